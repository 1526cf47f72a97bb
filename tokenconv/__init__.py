"""Hybrid blocks for token sequences: convolution inside Vision Transformers.

Importing it takes torch and einops. What else a name needs is imported when the name is first used:
timm by surgery, matplotlib by ``compare``.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from tokenconv.errors import (
    AnalysisError,
    CheckpointError,
    ExportError,
    GridError,
    MeasurementError,
    SurgeryError,
    TokenConvError,
    UnknownNameError,
)
from tokenconv.grid import MultiGrid, SparseGrid, TokenGrid, map_to_tokens, tokens_to_map
from tokenconv.layers import DWConv, SeparableConv
from tokenconv.ops.depthwise_conv import Impl, depthwise_conv

if TYPE_CHECKING:
    from tokenconv import analysis
    from tokenconv.analysis import decompose_
    from tokenconv.blocks import (
        BLOCKS,
        BlockInfo,
        MixFFN,
        create_block,
        list_blocks,
        load_official,
    )
    from tokenconv.costs import Cost, cost
    from tokenconv.deploy import export, quantize_
    from tokenconv.profiling import Comparison, compare
    from tokenconv.surgery import (
        Plan,
        accelerate_,
        decelerate_,
        fold_,
        freeze_grid_,
        insert_,
        keep_tokens,
        load_,
        param_groups,
        plan,
        remove_,
        save,
        trainable_,
    )

    __version__: str

__all__ = [
    "BLOCKS",
    "AnalysisError",
    "BlockInfo",
    "CheckpointError",
    "Comparison",
    "Cost",
    "DWConv",
    "ExportError",
    "GridError",
    "Impl",
    "MeasurementError",
    "MixFFN",
    "MultiGrid",
    "Plan",
    "SeparableConv",
    "SparseGrid",
    "SurgeryError",
    "TokenConvError",
    "TokenGrid",
    "UnknownNameError",
    "accelerate_",
    "analysis",
    "compare",
    "cost",
    "create_block",
    "decelerate_",
    "decompose_",
    "depthwise_conv",
    "export",
    "fold_",
    "freeze_grid_",
    "insert_",
    "keep_tokens",
    "list_blocks",
    "load_",
    "load_official",
    "map_to_tokens",
    "param_groups",
    "plan",
    "quantize_",
    "remove_",
    "save",
    "tokens_to_map",
    "trainable_",
]

_LATER = {
    "analysis": ("decompose_",),
    "blocks": ("BLOCKS", "BlockInfo", "MixFFN", "create_block", "list_blocks", "load_official"),
    "costs": ("Cost", "cost"),
    "deploy": ("export", "quantize_"),
    "profiling": ("Comparison", "compare"),
    "surgery": (
        "Plan", "accelerate_", "decelerate_", "fold_", "freeze_grid_", "insert_", "keep_tokens",
        "load_", "param_groups", "plan", "remove_", "save", "trainable_",
    ),
}  # fmt: skip
"""Rooms that are imported when they, or the names of them that are here, are first asked for."""


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return import_module(f"tokenconv.{name}")
    for room, names in _LATER.items():
        if name in names:
            return getattr(import_module(f"tokenconv.{room}"), name)
    if name == "__version__":
        return version("tokenconv")  # that of pyproject.toml
    raise AttributeError(f"module 'tokenconv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
