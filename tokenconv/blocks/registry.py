"""``BLOCKS``: one row per block, from its name to what builds it and where it fits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Literal

from torch import nn

from tokenconv.blocks.ffn import (
    MixFFN,
    SeparableFFN,
    conv_around_activation,
    second_kernel,
    separable_branch,
)
from tokenconv.blocks.position import PEG
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
    """Where surgery can put it, the usual place first: from a site to ``fragment(dim, **kwargs)``,
    which builds only what is new; ``dim`` is the width of the tokens at the site. A fragment maps
    tokens to tokens like a block. Its ``init_neutral_()``, which also resets it there, makes it
    return its input where it stands ``before_`` or ``after_`` something, and zero ``beside_``
    something. For ``merge_conv`` it is a ``DWConv`` whose kernel is added to that of the MLP's own
    convolution."""


BLOCKS: Mapping[str, BlockInfo] = MappingProxyType(
    {
        "mix_ffn": BlockInfo(
            factory=MixFFN,
            group="ffn",
            paper="https://arxiv.org/abs/2106.13797",
            prefix_policy="skip the convolution",
            kind="tokens",
            parity_test="tests/blocks/test_ffn.py::test_mix_ffn_matches_timm",
            sites={
                "before_act": conv_around_activation,
                "after_act": conv_around_activation,
                "merge_conv": second_kernel,
            },
        ),
        "peg": BlockInfo(
            factory=PEG,
            group="position",
            paper="https://arxiv.org/abs/2102.10882",
            prefix_policy="pass unchanged",
            kind="tokens",
            parity_test="tests/blocks/test_position.py::test_peg_matches_timm",
            sites={"after_block": PEG, "before_block": PEG, "before_attn": PEG},
        ),
        "separable_ffn": BlockInfo(
            factory=SeparableFFN,
            group="ffn",
            paper="https://arxiv.org/abs/1704.04861",
            prefix_policy="skip the depthwise part",
            kind="tokens",
            parity_test="tests/blocks/test_ffn.py::test_separable_ffn_is_its_formula",
            sites={
                "beside_mlp": separable_branch,
                "beside_attn": separable_branch,
                "replace_attn": separable_branch,
            },
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
