"""``BLOCKS``: one row per block, from its name to what builds it and where it fits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Literal

from torch import nn

from tokenconv.blocks.ffn import MixFFN, conv_before_activation, second_kernel
from tokenconv.errors import UnknownNameError


@dataclass(frozen=True, kw_only=True)
class BlockInfo:
    """What there is to know about a block without building it."""

    factory: Callable[..., nn.Module]
    """``factory(dim, **kwargs)`` builds the whole block."""
    group: str
    """Where it stands in a Transformer: ``ffn``, ``position``, ``adapter``, ..."""
    paper: str
    """Address of the source paper."""
    prefix_policy: str
    """What happens to class and register tokens."""
    kind: Literal["tokens"]
    """``tokens`` blocks obey ``forward(x, *grid)``."""
    parity_test: str
    """The pytest node that proves the block equal to code we did not write."""
    sites: Mapping[str, Callable[..., nn.Module]] = field(default_factory=dict)
    """Where surgery can put it: from a mode to ``fragment(dim, **kwargs)``, which builds only what
    is new, ``dim`` being the hidden width of the model's own MLP. ``inside``: goes in front of the
    activation, maps tokens to tokens like a block, and is the identity when its parameters are
    zero. ``merge``: a ``DWConv`` whose kernel is added to that of the MLP's own convolution."""


BLOCKS: Mapping[str, BlockInfo] = MappingProxyType(
    {
        "mix_ffn": BlockInfo(
            factory=MixFFN,
            group="ffn",
            paper="https://arxiv.org/abs/2106.13797",
            prefix_policy="skip the convolution",
            kind="tokens",
            parity_test="tests/blocks/test_ffn.py::test_mix_ffn_matches_timm",
            sites={"inside": conv_before_activation, "merge": second_kernel},
        ),
    }
)


def create_block(name: str, dim: int, **kwargs: Any) -> nn.Module:
    """Build a block by name.

    Args:
        name: A key of ``BLOCKS``.
        dim: Channels C.
        **kwargs: Keyword arguments of the block.

    Returns:
        The block; ``kind="tokens"`` blocks are called ``block(x, H, W)``.

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
