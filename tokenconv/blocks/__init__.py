"""What stands in a Transformer, and ``BLOCKS``, the one list of it."""

from tokenconv.blocks.blueprint import bsconv_reg_loss, orthonormal_loss
from tokenconv.blocks.catalogue import BLOCKS, block_info, create_block, list_blocks
from tokenconv.blocks.ffn import MixFFN
from tokenconv.blocks.official import load_official
from tokenconv.blocks.registry import BlockInfo, Paper

__all__ = [
    "BLOCKS",
    "BlockInfo",
    "MixFFN",
    "Paper",
    "block_info",
    "bsconv_reg_loss",
    "create_block",
    "list_blocks",
    "load_official",
    "orthonormal_loss",
]
