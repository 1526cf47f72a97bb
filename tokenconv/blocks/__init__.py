"""What stands in a Transformer, and ``BLOCKS``, the one list of it."""

from tokenconv.blocks.ffn import MixFFN
from tokenconv.blocks.registry import BLOCKS, BlockInfo, create_block, list_blocks

__all__ = ["BLOCKS", "BlockInfo", "MixFFN", "create_block", "list_blocks"]
