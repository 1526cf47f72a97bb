"""Closed formulas: what kinds of convolution cost, before anything is built.

Letters: C ``dim``, O ``out_dim``, K ``kernel_size``, S positions that come out. Maps are
zero-padded by half the reach of the kernel, and a tap on the padding counts like any other, so

    standard   K*K*C*O * S    grouped      K*K*C*O/groups * S
    depthwise  K*K*C * S      separable    (K*K*C + C*O) * S

and dilation changes nothing. Every part reads its maps and parameters once and writes its result
once, 4 bytes a number, as ``tokenconv.cost`` counts; half of that in 16 bits. The backward pass is
that of a layer inside a network, gradients of input and weights: twice the forward pass, depthwise
or not. (``FlopCounterMode`` multiplies that of a depthwise convolution by ``(1 + C) / 2``.)
"""

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import reduce
from operator import add as plus

from tokenconv.costs.prices import Price

Size = tuple[int, int]
"""Rows and columns of a map."""
_BYTES = 4


def total(prices: Iterable[Price]) -> Price:
    """The sum of prices."""
    return reduce(plus, prices, Price(params=0, macs=0, backward_macs=0, bytes=0))


def out_size(size: Size, stride: int) -> Size:
    """Rows and columns that an odd kernel makes of ``size``, zero-padded by half its reach."""
    return -(-size[0] // stride), -(-size[1] // stride)


# --- one convolution ---


def grouped(
    dim: int,
    out_dim: int,
    kernel_size: int,
    size: Size,
    *,
    groups: int,
    stride: int = 1,
    bias: bool = False,
) -> Price:
    """A convolution whose groups of channels do not see each other.

    Parameters ``K*K*C*O/groups``, plus O with bias.

    Args:
        dim: Channels C.
        out_dim: Channels O that come out.
        kernel_size: Odd kernel side K.
        size: Rows and columns that go in.
        groups: Number of groups.
        stride: Step over rows and columns.
        bias: Learn one offset per channel that comes out.

    Raises:
        ValueError: If a number is not positive, the kernel is even, or ``groups`` does not divide
            both widths.
    """
    if min(dim, out_dim, groups, stride, *size) < 1 or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(
            f"expected positive numbers and an odd kernel_size, got {dim=}, {out_dim=}, "
            f"{kernel_size=}, {size=}, {groups=}, {stride=}"
        )
    if dim % groups or out_dim % groups:
        raise ValueError(f"expected groups to divide {dim=} and {out_dim=}, got {groups=}")
    taps = kernel_size**2 * dim // groups
    made = out_dim * math.prod(out_size(size, stride))
    params = out_dim * (taps + bias)
    return Price(
        params=params,
        macs=taps * made,
        backward_macs=2 * taps * made,
        bytes=_BYTES * (dim * math.prod(size) + params + made),
    )


def standard(
    dim: int, out_dim: int, kernel_size: int, size: Size, *, stride: int = 1, bias: bool = False
) -> Price:
    """A convolution in which every channel sees every other; see ``grouped``."""
    return grouped(dim, out_dim, kernel_size, size, groups=1, stride=stride, bias=bias)


def depthwise(
    dim: int, kernel_size: int, size: Size, *, stride: int = 1, bias: bool = False
) -> Price:
    """A convolution in which channels do not see each other; see ``grouped``."""
    return grouped(dim, dim, kernel_size, size, groups=dim, stride=stride, bias=bias)


# --- several ---


def separable(
    dim: int, out_dim: int, kernel_size: int, size: Size, *, stride: int = 1, bias: bool = False
) -> Price:
    """Depthwise, with the stride, then 1x1; nothing between, as in Xception.

    Parameters ``K*K*C + C*O``, plus ``C + O`` with bias.

    References:
        https://arxiv.org/abs/1704.04861, https://arxiv.org/abs/1610.02357
    """
    inner = depthwise(dim, kernel_size, size, stride=stride, bias=bias)
    return inner + standard(dim, out_dim, 1, out_size(size, stride), bias=bias)


def blueprint_u(
    dim: int, out_dim: int, kernel_size: int, size: Size, *, stride: int = 1, bias: bool = False
) -> Price:
    """BSConv-U: 1x1, then depthwise, with the stride and the bias.

    Parameters ``C*O + K*K*O``, plus O with bias. The 1x1 part works on all positions, also where
    there is a stride.

    References:
        https://arxiv.org/abs/2003.13549
    """
    inner = standard(dim, out_dim, 1, size)
    return inner + depthwise(out_dim, kernel_size, size, stride=stride, bias=bias)


def blueprint_s(
    dim: int,
    out_dim: int,
    kernel_size: int,
    size: Size,
    *,
    p: float = 0.25,
    min_mid_channels: int = 4,
    stride: int = 1,
    bias: bool = False,
) -> Price:
    """BSConv-S: 1x1 to M channels, 1x1, then depthwise, with the stride and the bias.

    ``M = min(C, max(min_mid_channels, ceil(p*C)))``. Parameters ``C*M + M*O + K*K*O``, plus O with
    bias.

    References:
        https://arxiv.org/abs/2003.13549
    """
    mid = min(dim, max(min_mid_channels, math.ceil(p * dim)))
    inner = standard(dim, mid, 1, size)
    return inner + blueprint_u(mid, out_dim, kernel_size, size, stride=stride, bias=bias)


def pyramid(
    dim: int,
    out_dim: int,
    size: Size,
    *,
    kernel_sizes: Sequence[int] = (3, 5, 7),
    width_ratio: float = 0.5,
    add: bool = False,
    stride: int = 1,
) -> Price:
    """PydMobileNet's block: several depthwise convolutions side by side, between two 1x1.

    As ``tokenconv.blocks.pyramid.PydMobileNet`` in evaluation mode, norms, activations and the
    shortcut included: with ``m = int(O * width_ratio)`` and ``e``, which is m if the maps are
    added, and m for each kernel if not, parameters
    ``2*C + C*m + 2*m + sum(K*K)*m + 2*e + e*O + 2*O``, and ``C*O + 2*O`` where width or size
    change.

    Args:
        dim: Channels C.
        out_dim: Channels O that come out.
        size: Rows and columns that go in.
        kernel_sizes: Odd kernel sides.
        width_ratio: Width m over O.
        add: Add the maps; else concatenate them.
        stride: Step of the depthwise convolutions.

    References:
        https://arxiv.org/abs/1811.07083
    """
    mid, made, count = int(out_dim * width_ratio), out_size(size, stride), len(kernel_sizes)
    wide = mid if add else mid * count
    collected = _moved(3 * (count - 1) * mid if add else 2 * count * mid, made)
    parts = [
        _norm_act(dim, size),
        standard(dim, mid, 1, size),
        _norm_act(mid, size),
        *(depthwise(mid, side, size, stride=stride) for side in kernel_sizes),
        collected,
        _norm_act(wide, made),
        standard(wide, out_dim, 1, made),
        _norm(out_dim, made),
        _moved(3 * out_dim, made),  # the shortcut
    ]
    if stride > 1 or dim != out_dim:
        parts += [standard(dim, out_dim, 1, size, stride=stride), _norm(out_dim, made)]
    return total(parts)


def esp(
    dim: int, out_dim: int, size: Size, *, branches: int = 5, kernel_size: int = 3, stride: int = 1
) -> Price:
    """ESPNet's efficient spatial pyramid: standard convolutions of several dilations side by side.

    As ``tokenconv.blocks.pyramid.ESP`` in evaluation mode, with hierarchical feature fusion, norm,
    activation and shortcut: with ``n = O // branches``, parameters ``C*n + K*K*n*O + 3*O``, and
    ``9*C*n`` in place of ``C*n`` with a stride.

    Args:
        dim: Channels C.
        out_dim: Channels O that come out.
        size: Rows and columns that go in.
        branches: Number of dilations.
        kernel_size: Odd kernel side K of all of them.
        stride: Step of the first convolution, which is 3x3 then.

    References:
        https://arxiv.org/abs/1803.06815
    """
    width, made = out_dim // branches, out_size(size, stride)
    widths = [out_dim - (branches - 1) * width, *[width] * (branches - 1)]
    fused = max(branches - 2, 0)  # neither the first map nor the second is added to anything
    is_added = stride == 1 and dim == out_dim
    return total(
        [
            standard(dim, width, 1 if stride == 1 else 3, size, stride=stride),
            *(standard(width, own, kernel_size, made) for own in widths),
            _moved(3 * fused * width + 2 * out_dim, made),  # and concatenated
            _moved(3 * out_dim * is_added, made),
            _norm(out_dim, made),
            _moved(2 * out_dim, made, params=out_dim),  # PReLU
        ]
    )


def _moved(dim: int, size: Size, *, params: int = 0) -> Price:
    """What no multiply-accumulate is counted for: ``dim`` channels, read or written."""
    moved = _BYTES * (dim * math.prod(size) + params)
    return Price(params=params, macs=0, backward_macs=0, bytes=moved)


def _norm(dim: int, size: Size) -> Price:
    """A ``BatchNorm``, which reads two statistics besides its parameters."""
    statistics = _moved(2 * dim, (1, 1))
    return statistics + _moved(2 * dim, size, params=2 * dim)


def _norm_act(dim: int, size: Size) -> Price:
    act = _moved(2 * dim, size)
    return _norm(dim, size) + act


# --- what it saves ---


def separable_ratio(kernel_size: int, out_dim: int) -> float:
    """Multiply-accumulates of a separable convolution over those of a standard one.

    ``1/O + 1/K**2``, without biases; the same for parameters.

    References:
        MobileNets, section 3.1, https://arxiv.org/abs/1704.04861
    """
    return 1 / out_dim + 1 / kernel_size**2


def smallest_out_dim(saving: float, kernel_size: int) -> int:
    """The fewest channels that must come out for a separable convolution to save more than this.

    Args:
        saving: How many times as many multiply-accumulates the standard convolution has; more than
            this is wanted.
        kernel_size: Kernel side K.

    Raises:
        ValueError: If no width saves so much: all save less than ``K**2``.
    """
    most = kernel_size**2
    if not 0 < saving < most:
        raise ValueError(
            f"expected a saving between 0 and {most}, which a {kernel_size}x{kernel_size} kernel "
            f"stays below at any width, got {saving}"
        )
    wanted = Fraction(saving)  # exact, since the next width may not save more
    return math.floor(wanted * most / (most - wanted)) + 1
