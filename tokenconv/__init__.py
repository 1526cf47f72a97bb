"""Hybrid blocks for token sequences: convolution inside Vision Transformers.

Needs torch and einops; timm is imported when surgery is used, matplotlib when a report is drawn.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tokenconv.blocks import BLOCKS, BlockInfo, MixFFN, create_block, list_blocks
from tokenconv.costs import Cost, cost
from tokenconv.errors import (
    GridError,
    MeasurementError,
    SurgeryError,
    TokenConvError,
    UnknownNameError,
)
from tokenconv.grid import TokenGrid, map_to_tokens, tokens_to_map
from tokenconv.layers import DWConv
from tokenconv.ops.depthwise_conv import Impl, depthwise_conv

if TYPE_CHECKING:
    from tokenconv.profiling import Comparison, compare
    from tokenconv.surgery import Plan, insert_, plan, remove_

__version__ = "0.1.0"

__all__ = [
    "BLOCKS",
    "BlockInfo",
    "Comparison",
    "Cost",
    "DWConv",
    "GridError",
    "Impl",
    "MeasurementError",
    "MixFFN",
    "Plan",
    "SurgeryError",
    "TokenConvError",
    "TokenGrid",
    "UnknownNameError",
    "compare",
    "cost",
    "create_block",
    "depthwise_conv",
    "insert_",
    "list_blocks",
    "map_to_tokens",
    "plan",
    "remove_",
    "tokens_to_map",
]

_LATER = {
    "Comparison": "tokenconv.profiling",
    "compare": "tokenconv.profiling",
    "Plan": "tokenconv.surgery",
    "insert_": "tokenconv.surgery",
    "plan": "tokenconv.surgery",
    "remove_": "tokenconv.surgery",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'tokenconv' has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
