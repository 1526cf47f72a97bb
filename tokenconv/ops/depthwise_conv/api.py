"""Validate the call, then choose an implementation.

Shape letters: B batch, N tokens = P prefix + grid, C channels, K kernel side.
"""

from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from tokenconv.errors import UnknownNameError
from tokenconv.grid import AnyGrid, MultiGrid, SparseGrid, grid_of
from tokenconv.ops.depthwise_conv.conv2d import depthwise_conv_conv2d
from tokenconv.ops.depthwise_conv.gather import depthwise_conv_gather
from tokenconv.ops.depthwise_conv.naive import depthwise_conv_naive
from tokenconv.ops.depthwise_conv.reference import depthwise_conv_reference


class Impl(StrEnum):
    """How to compute a depthwise convolution; a request is honoured or refused, never swapped."""

    REFERENCE = "reference"
    """Shifted multiply-adds, one per kernel tap: slow and obvious."""
    CONV2D = "conv2d"
    """``torch.nn.functional.conv2d`` on a view of the tokens."""
    NAIVE = "naive"
    """The same on a copy in NCHW memory, and a copy back: what most code does, as a control."""
    GATHER = "gather"
    """One gather per kernel tap, for tokens that do not fill their grid."""

    @classmethod
    def of(cls, name: "Impl | str") -> "Impl":
        """The implementation of this name, or an error that lists the nearest ones."""
        if name not in set(cls):
            raise UnknownNameError("impl", str(name), list(cls))
        return cls(name)


_FULL = {
    Impl.CONV2D: depthwise_conv_conv2d,
    Impl.NAIVE: depthwise_conv_naive,
    Impl.REFERENCE: depthwise_conv_reference,
}
_SPARSE = {Impl.GATHER: depthwise_conv_gather}
"""By kind of grid; the first is taken where none is asked for."""


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: AnyGrid | tuple[int, ...],
    *,
    dilation: int = 1,
    residual: bool = False,
    impl: Impl | str | None = None,
) -> Tensor:
    """Convolve every channel over the token grid with its own kernel.

    Prefix tokens (class, registers) pass through unchanged. The grid is zero-padded and keeps its
    size. On a ``(T, H, W)`` grid each frame is convolved by itself. Equals
    ``F.conv2d(map, weight, bias, padding=dilation * (K // 2), dilation=dilation, groups=C)`` on
    the folded grid; for a ``SparseGrid``, on a map that is zero where no token is; for a
    ``MultiGrid``, on every map by itself.

    Args:
        x: Tokens ``(B, N, C)``, prefix tokens first, then the grid in row-major order, or those
            of a ``SparseGrid`` in its order.
        weight: One odd-sided kernel per channel, ``(C, 1, K, K)``.
        bias: ``(C,)`` or None.
        grid: Size and prefix count of ``x``; a plain size means no prefix tokens.
        dilation: Distance between kernel taps, in tokens.
        residual: Add the convolution to ``x`` on the grid; prefix tokens still pass unchanged.
        impl: How to compute it; None chooses.

    Returns:
        Tokens ``(B, N, C)`` in the order of ``x``.

    Raises:
        GridError: If ``x`` does not hold ``grid.num_tokens`` tokens.
        ValueError: If weight, bias or dilation do not fit, or ``impl`` is unknown or made for the
            other kind of grid.

    References:
        MobileNets, section 3.1, https://arxiv.org/abs/1704.04861
    """
    grid = grid_of(grid)
    grid.check(x)
    _check_kernel(x, weight, bias, dilation)
    if isinstance(grid, MultiGrid):
        prefix, *maps = x.split([grid.num_prefix_tokens, *(m.num_positions for m in grid.maps)], 1)
        call: Any = {"dilation": dilation, "residual": residual, "impl": impl}
        outs = [
            depthwise_conv(tokens, weight, bias, one, **call)
            for tokens, one in zip(maps, grid.maps, strict=True)
        ]
        return torch.cat([prefix.to(outs[0].dtype), *outs], dim=1)
    implementations: Any = _SPARSE if isinstance(grid, SparseGrid) else _FULL
    chosen = next(iter(implementations)) if impl is None else Impl.of(impl)
    if chosen not in implementations:
        raise ValueError(
            f"impl={str(chosen)!r} takes no {type(grid).__name__}; take "
            f"{' or '.join(repr(str(name)) for name in implementations)}, or leave impl out"
        )
    return implementations[chosen](x, weight, bias, grid, dilation, residual)


def _check_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> None:
    dim, shape = x.shape[-1], weight.shape
    if len(shape) != 4 or shape[0] != dim or shape[1] != 1 or shape[2] != shape[3]:
        raise ValueError(
            f"expected a depthwise weight ({dim}, 1, K, K) for {dim} channels, got {tuple(shape)}"
        )
    if shape[3] % 2 == 0:
        raise ValueError(f"expected an odd kernel side, got {shape[3]}")
    if bias is not None and bias.shape != (dim,):
        raise ValueError(f"expected a bias ({dim},), got {tuple(bias.shape)}")
    if dilation < 1:
        raise ValueError(f"expected dilation >= 1, got {dilation}")
