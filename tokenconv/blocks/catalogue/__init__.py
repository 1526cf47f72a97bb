"""``BLOCKS``: one row per block, from its name to what builds it and where it fits."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from torch import nn

from tokenconv.blocks.catalogue.adapters import ADAPTERS
from tokenconv.blocks.catalogue.attention import ATTENTION
from tokenconv.blocks.catalogue.feed_forwards import FEED_FORWARDS
from tokenconv.blocks.catalogue.mixers import MIXERS
from tokenconv.blocks.catalogue.positions import POSITIONS
from tokenconv.blocks.catalogue.separable import SEPARABLE
from tokenconv.blocks.catalogue.stems import STEMS
from tokenconv.blocks.registry import BlockInfo
from tokenconv.errors import UnknownNameError

BLOCKS: Mapping[str, BlockInfo] = MappingProxyType(
    {
        **FEED_FORWARDS,
        **MIXERS,
        **ATTENTION,
        **POSITIONS,
        **STEMS,
        **ADAPTERS,
        **SEPARABLE,
    }
)
"""Every block by its name; ``create_block`` builds one, ``list_blocks`` finds names."""


def create_block(name: str, dim: int, **kwargs: Any) -> nn.Module:
    """Build a block by name.

    Args:
        name: A key of ``BLOCKS``.
        dim: Channels C.
        **kwargs: Keyword arguments of the block.

    Returns:
        The block; it is called ``block(x, H, W)``, those of kind ``maps`` also ``block(fmap)``,
        and stems ``block(images)``.

    Raises:
        UnknownNameError: If there is no such block; the nearest names are listed.
        ValueError: If an argument does not fit the block.
    """
    return block_info(name).factory(dim, **kwargs)


def block_info(name: str) -> BlockInfo:
    """The row of ``BLOCKS`` with this name, or an error that lists the nearest ones."""
    if name not in BLOCKS:
        raise UnknownNameError("block", name, BLOCKS)
    return BLOCKS[name]


def list_blocks(pattern: str = "*") -> list[str]:
    """Names of the blocks that match a shell-style pattern, sorted."""
    return sorted(name for name in BLOCKS if fnmatchcase(name, pattern))
