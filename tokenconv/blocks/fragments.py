"""What surgery puts into a model that has an MLP: only the part of a block that is new there."""

from collections.abc import Callable
from typing import Any

from tokenconv.blocks.chain import Chain
from tokenconv.blocks.maps import MapBlock
from tokenconv.grid import PrefixTokens
from tokenconv.layers import DWConv, SeparableConv
from tokenconv.ops.depthwise_conv import Impl


def conv_around_activation(
    dim: int,
    *,
    kernel_size: int = 3,
    dilation: int = 1,
    bias: bool = True,
    impl: Impl | str | None = None,
) -> DWConv:
    """What ``mix_ffn`` adds before or after the activation of an MLP: ``x + conv(x)``."""
    return DWConv(dim, kernel_size, dilation=dilation, bias=bias, residual=True, impl=impl)


def second_kernel(
    dim: int, *, kernel_size: int = 3, dilation: int = 1, bias: bool = True
) -> DWConv:
    """What ``mix_ffn`` adds to an MLP with a convolution: a kernel beside the one it has."""
    return DWConv(dim, kernel_size, dilation=dilation, bias=bias)


def separable_branch(
    dim: int,
    *,
    kernel_size: int = 3,
    dilation: int = 1,
    bias: bool = True,
    impl: Impl | str | None = None,
) -> SeparableConv:
    """What ``separable_ffn`` puts beside an MLP or attention, or in place of attention."""
    return SeparableConv(dim, kernel_size, dilation=dilation, bias=bias, impl=impl)


def branch_of(
    block: Callable[..., Chain | MapBlock], **fixed: Any
) -> Callable[..., Chain | MapBlock]:
    """What a block adds beside an MLP: itself, without its residual.

    Prefix tokens that it passes get nothing from it. Building it with an argument that is fixed
    here is a ``ValueError``.
    """

    def build(dim: int, **kwargs: Any) -> Chain | MapBlock:
        if refused := fixed.keys() & kwargs.keys():
            raise ValueError(
                f"{', '.join(sorted(refused))} cannot be chosen where a block is inserted: it "
                f"keeps width and size, and the model adds the residual"
            )
        branch = block(dim, **{**fixed, **kwargs})
        if branch.prefix_tokens == PrefixTokens.PASS:
            branch.prefix_tokens = PrefixTokens.ZERO
        return branch

    return build
