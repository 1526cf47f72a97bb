"""Validate the call, then choose an implementation.

Shape letters: B batch, N tokens = P prefix + grid, C channels, K kernel side.
"""

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from tokenconv.choice import Choice
from tokenconv.grid import AnyGrid, MultiGrid, PrefixTokens, SparseGrid, TokenGrid, grid_of
from tokenconv.ops.depthwise_conv import onednn, triton
from tokenconv.ops.depthwise_conv.conv2d import depthwise_conv_conv2d
from tokenconv.ops.depthwise_conv.epilogue import Activation, finish
from tokenconv.ops.depthwise_conv.gather import depthwise_conv_gather
from tokenconv.ops.depthwise_conv.naive import depthwise_conv_naive
from tokenconv.ops.depthwise_conv.reference import depthwise_conv_reference


class Impl(Choice):
    """How to compute a depthwise convolution; a request is honoured or refused, never swapped."""

    REFERENCE = "reference"
    """Shifted multiply-adds, one per kernel tap: slow and obvious."""
    CONV2D = "conv2d"
    """``torch.nn.functional.conv2d`` on a view of the tokens."""
    NAIVE = "naive"
    """The same on a copy in NCHW memory, and a copy back: what most code does, as a control."""
    GATHER = "gather"
    """One gather per kernel tap, for tokens that do not fill their grid."""
    ONEDNN = "onednn"
    """oneDNN's convolution with the activation in it, on packed kernels: inference on CPUs."""
    TRITON = "triton"
    """A kernel of ours for GPUs: convolution, activation, gate and prefix tokens in one pass."""


_FULL = {
    Impl.CONV2D: depthwise_conv_conv2d,
    Impl.NAIVE: depthwise_conv_naive,
    Impl.REFERENCE: depthwise_conv_reference,
}
_SPARSE = {Impl.GATHER: depthwise_conv_gather}
_FUSED = (Impl.ONEDNN, Impl.TRITON)
"""The first two, by kind of grid, leave activation and gate to ``finish``; the last have them."""


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: AnyGrid | tuple[int, ...],
    *,
    dilation: int = 1,
    residual: bool = False,
    activation: Activation | str | None = None,
    gate: Tensor | None = None,
    prefix_tokens: PrefixTokens | str = PrefixTokens.ACT,
    impl: Impl | str | None = None,
) -> Tensor:
    """Convolve every channel over the token grid with its own kernel, and activate.

    ``y = activation(conv(x) + bias [+ x]) * gate`` on the grid. Prefix tokens (class, registers)
    skip the convolution and its bias, so without an activation and a gate they stay as they are.
    The grid is zero-padded and keeps its size. On a ``(T, H, W)`` grid each frame is convolved by
    itself. The convolution equals
    ``F.conv2d(map, weight, bias, padding=dilation * (K // 2), dilation=dilation, groups=C)`` on
    the folded grid; for a ``SparseGrid``, on a map that is zero where no token is; for a
    ``MultiGrid``, on every map by itself.

    Without ``impl``, float32 on CPUs takes ``onednn`` where no gradient, compiler or autocast asks
    for another way; everything else takes ``conv2d``, and a ``SparseGrid`` takes ``gather``.
    ``benchmarks/kernels.py`` measures them.

    Args:
        x: Tokens ``(B, N, C)``, prefix tokens first, then the grid in row-major order, or those
            of a ``SparseGrid`` in its order.
        weight: One odd-sided kernel per channel, ``(C, 1, K, K)``.
        bias: ``(C,)`` or None.
        grid: Size and prefix count of ``x``; a plain size means no prefix tokens.
        dilation: Distance between kernel taps, in tokens.
        residual: Add ``x`` to the convolution, in front of the activation.
        activation: One of ``Activation``; None for none.
        gate: ``(B, N, C)``, multiplied with what was activated, or None.
        prefix_tokens: ``act``: prefix tokens take activation and gate; ``pass``: they stay as they
            are; ``zero``: they become zero.
        impl: How to compute it; None chooses.

    Returns:
        Tokens ``(B, N, C)`` in the order of ``x``.

    Raises:
        GridError: If ``x`` does not hold ``grid.num_tokens`` tokens.
        ValueError: If weight, bias, gate or dilation do not fit, a name is unknown, or ``impl``
            cannot take this call.

    References:
        MobileNets, section 3.1, https://arxiv.org/abs/1704.04861
    """
    grid = grid_of(grid)
    grid.check(x)
    _check_kernel(x, weight, bias, dilation)
    if gate is not None:
        _check_gate(x, gate)
    if activation is not None:
        activation = Activation.of(activation)
    prefix_tokens = PrefixTokens.of(prefix_tokens)
    if isinstance(grid, MultiGrid):
        out = _on_every_map(x, weight, bias, grid, dilation, residual, impl)
        return finish(out, x, grid.num_prefix_tokens, activation, gate, prefix_tokens)
    call = x, weight, bias, gate, grid, dilation
    if impl is not None and (refusal := _refusal(Impl.of(impl), *call)):
        raise ValueError(f"impl={str(impl)!r} is refused: {refusal}; or leave impl out")
    chosen = _choose(*call) if impl is None else Impl.of(impl)
    if x.is_meta and chosen in _FUSED:  # nothing is computed there
        chosen = Impl.CONV2D
    if isinstance(grid, SparseGrid):
        out = _SPARSE[chosen](x, weight, bias, grid, dilation, residual)
    elif chosen == Impl.TRITON:
        return triton.depthwise_conv_triton(
            x, weight, bias, grid, residual, activation, gate, prefix_tokens
        )
    elif chosen == Impl.ONEDNN:
        return onednn.depthwise_conv_onednn(
            x, weight, bias, grid, dilation, residual, activation, gate, prefix_tokens
        )
    else:
        out = _FULL[chosen](x, weight, bias, grid, dilation, residual)
    return finish(out, x, grid.num_prefix_tokens, activation, gate, prefix_tokens)


def _on_every_map(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: MultiGrid,
    dilation: int,
    residual: bool,
    impl: Impl | str | None,
) -> Tensor:
    prefix, *maps = x.split([grid.num_prefix_tokens, *(m.num_positions for m in grid.maps)], 1)
    outs = [
        depthwise_conv(tokens, weight, bias, one, dilation=dilation, residual=residual, impl=impl)
        for tokens, one in zip(maps, grid.maps, strict=True)
    ]
    return torch.cat([prefix.to(outs[0].dtype), *outs], dim=1)


def _choose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    grid: TokenGrid | SparseGrid,
    dilation: int,
) -> Impl:
    """The fastest that can take the call, as far as it was measured."""
    if isinstance(grid, SparseGrid):
        return Impl.GATHER
    if x.device.type == "cpu":
        refused = _refusal(Impl.ONEDNN, x, weight, bias, gate, grid, dilation)
        return Impl.CONV2D if refused else Impl.ONEDNN
    return Impl.CONV2D


def _refusal(
    impl: Impl,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    grid: TokenGrid | SparseGrid,
    dilation: int,
) -> str | None:
    """Why an implementation cannot take a call; None if it can."""
    takes = (*_SPARSE,) if isinstance(grid, SparseGrid) else (*_FULL, *_FUSED)
    if impl not in takes:
        names = " or ".join(repr(str(one)) for one in takes)
        return f"it takes no {type(grid).__name__}; take {names}"
    if impl not in _FUSED or x.is_meta:
        return None
    if refusal := (
        onednn.refusal(x, weight, bias)
        if impl == Impl.ONEDNN
        else triton.refusal(x, weight, dilation)
    ):
        return refusal
    if not torch.compiler.is_compiling() and any(
        t is not None and unpack_dual(t).tangent is not None for t in (x, weight, bias, gate)
    ):
        return "it has no derivative in forward mode"
    return None


def _check_gate(x: Tensor, gate: Tensor) -> None:
    if gate.shape != x.shape:
        raise ValueError(
            f"expected a gate of the shape of the tokens, {tuple(x.shape)}, got {tuple(gate.shape)}"
        )
    _check_alike(x, gate, "gate")


def _check_alike(x: Tensor, other: Tensor, name: str) -> None:
    if other.device != x.device:
        raise ValueError(
            f"expected {name} on the device of the tokens, {x.device}, got {other.device}"
        )
    if other.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"expected {name} in the dtype of the tokens, {x.dtype}, got {other.dtype}"
        )


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
    _check_alike(x, weight, "weight")
    if bias is not None:
        _check_alike(x, bias, "bias")
    if dilation < 1:
        raise ValueError(f"expected dilation >= 1, got {dilation}")
