"""Hybrid blocks for token sequences: convolution inside Vision Transformers.

Needs torch and einops; timm is imported when surgery is used, matplotlib when a report is drawn.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tokenconv.blocks import (
    BLOCKS,
    BlockInfo,
    MixFFN,
    create_block,
    list_blocks,
    load_official,
)
from tokenconv.costs import Cost, cost
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

__version__ = "0.1.0"

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
    "decompose_": "tokenconv.analysis",
    "export": "tokenconv.deploy",
    "quantize_": "tokenconv.deploy",
    "Comparison": "tokenconv.profiling",
    "compare": "tokenconv.profiling",
    "Plan": "tokenconv.surgery",
    "accelerate_": "tokenconv.surgery",
    "decelerate_": "tokenconv.surgery",
    "fold_": "tokenconv.surgery",
    "freeze_grid_": "tokenconv.surgery",
    "insert_": "tokenconv.surgery",
    "keep_tokens": "tokenconv.surgery",
    "load_": "tokenconv.surgery",
    "param_groups": "tokenconv.surgery",
    "plan": "tokenconv.surgery",
    "remove_": "tokenconv.surgery",
    "save": "tokenconv.surgery",
    "trainable_": "tokenconv.surgery",
}


def __getattr__(name: str) -> Any:
    if name == "analysis":
        return import_module("tokenconv.analysis")
    if name not in _LATER:
        raise AttributeError(f"module 'tokenconv' has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
