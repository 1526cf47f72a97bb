"""Convolutions of several reaches side by side, and groups of channels from one to all.

Shape letters: C channels, O channels that come out, m width of the bottleneck, K kernel side.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from tokenconv.blocks.chain import Steps
from tokenconv.blocks.map_layers import Parallel, Split, conv, depthwise
from tokenconv.blocks.maps import MapBlock


class PydMobileNet(MapBlock):
    """PydMobileNet's block: depthwise convolutions of several sides, side by side.

    ``BN -> ReLU -> 1x1 (to m) -> BN -> ReLU -> DWConv 3, 5, 7 (stride) -> BN -> ReLU -> 1x1 ->
    BN``, plus the input, through a 1x1 convolution and BN where width or size change. The three are
    added, or stand one behind the other in the channels; ``m = int(O * width_ratio)``. No biases.
    Parameters, ``e = m`` or ``3*m``: ``2*C + C*m + 2*m + 83*m + 2*e + e*O + 2*O``.

    Args besides those of ``MapBlock``:
        width_ratio: Width m of the bottleneck over ``out_dim``.
        add: Add the maps of the convolutions; else concatenate them.

    References:
        https://arxiv.org/abs/1811.07083
    """

    kernel_size = (3, 5, 7)
    adds_input = True
    projects_input = True

    def steps(
        self,
        dim: int,
        out_dim: int,
        side: Sequence[int],
        stride: int,
        width_ratio: float = 0.5,
        add: bool = False,
    ) -> Steps:
        """See the class."""
        mid = int(out_dim * width_ratio)
        if mid < 1:
            raise ValueError(f"expected a positive bottleneck, got {out_dim=}, {width_ratio=}")
        wide = mid if add else mid * len(side)
        convs = [depthwise(mid, k, stride=stride) for k in side]
        return {
            "norm1": nn.BatchNorm2d(dim),
            "act1": nn.ReLU(),
            "reduce": conv(dim, mid),
            "norm2": nn.BatchNorm2d(mid),
            "act2": nn.ReLU(),
            "pyramid": Parallel(*convs, add=add),
            "norm3": nn.BatchNorm2d(wide),
            "act3": nn.ReLU(),
            "project": conv(wide, out_dim),
            "norm4": nn.BatchNorm2d(out_dim),
        }


class ESP(MapBlock):
    """ESPNet's efficient spatial pyramid: full convolutions of several dilations, side by side.

    ``1x1 (to n) -> 3x3, one per dilation -> hierarchical feature fusion``, plus the input where
    width and size stay, ``-> BN (eps 1e-3) -> PReLU``. ``n = O // 5``, the first of the five takes
    what is left, ``O - 4*n``. Fusion adds each map to the sum of those before it, but the first
    stays out, and takes the pattern of holes away. With a stride the first convolution is 3x3 and
    takes it. No biases. Parameters at stride 1: ``C*n + 9*n*O + 3*O``.

    Args besides those of ``MapBlock``:
        dilations: One per branch.
        fuse: Do the hierarchical feature fusion.

    Raises:
        ValueError: If ``out_dim`` has no channel for each branch.

    References:
        https://arxiv.org/abs/1803.06815
    """

    adds_input = True

    def steps(
        self,
        dim: int,
        out_dim: int,
        side: int,
        stride: int,
        dilations: Sequence[int] = (1, 2, 4, 8, 16),
        fuse: bool = True,
    ) -> Steps:
        """See the class."""
        count = len(dilations)
        if not count or out_dim < count or min(dilations) < 1:
            raise ValueError(
                f"expected out_dim >= {count} for as many positive dilations, got {out_dim}, "
                f"{dilations}"
            )
        width = out_dim // count
        widths = [out_dim - (count - 1) * width, *[width] * (count - 1)]
        branches = [conv(width, widths[i], side, dilation=d) for i, d in enumerate(dilations)]
        return {
            "reduce": conv(dim, width, 1 if stride == 1 else 3, stride=stride),
            "pyramid": _Fused(*branches) if fuse else Parallel(*branches),
        }

    def behind(self, out_dim: int) -> nn.Module:
        """A norm and an activation with a slope per channel."""
        return nn.Sequential(nn.BatchNorm2d(out_dim, eps=1e-3), nn.PReLU(out_dim))


class _Fused(Parallel):
    """Maps of parallel branches, each added to those in front of it, but for the first."""

    def forward(self, x: Tensor) -> Tensor:
        first, *others = [branch(x) for branch in self.branches]
        return torch.cat([first, *accumulate(others)], dim=1)


class MixConv(MapBlock):
    """MixConv: depthwise convolutions of several sides, each on channels of its own.

    The channels are cut in equal parts, the first takes the remainder. No biases. Parameters:
    the sum of ``K*K`` times the channels of a part.

    Raises:
        ValueError: If ``out_dim`` is not ``dim``, or there are fewer channels than kernels.

    References:
        https://arxiv.org/abs/1907.09595
    """

    kernel_size = (3, 5, 7)

    def steps(self, dim: int, out_dim: int, side: Sequence[int], stride: int) -> Steps:
        """See the class."""
        part = dim // len(side)
        if dim != out_dim or part < 1:
            raise ValueError(
                f"expected out_dim == dim and a channel for each of {len(side)} kernels, got "
                f"{dim=}, {out_dim=}"
            )
        widths = [dim - part * (len(side) - 1), *[part] * (len(side) - 1)]
        convs = [depthwise(width, k, stride=stride) for width, k in zip(widths, side, strict=True)]
        return {"mixed": Split(widths, *convs)}


class GroupedConv(MapBlock):
    """One convolution in groups of channels: standard with one group, depthwise with C.

    What lies between is Inception-like: every group of channels has its own convolution, and sees
    no other. Parameters: ``K*K*C*O/groups``, and O with bias.

    Args besides those of ``MapBlock``:
        groups: Number of groups.
        dilation: Distance between kernel taps.
        bias: Learn an offset per channel.

    Raises:
        ValueError: If ``groups`` does not divide both widths.

    References:
        Xception, section 1.2, https://arxiv.org/abs/1610.02357
    """

    def steps(
        self,
        dim: int,
        out_dim: int,
        side: int,
        stride: int,
        groups: int = 1,
        dilation: int = 1,
        bias: bool = True,
    ) -> Steps:
        """See the class."""
        setting = {"stride": stride, "dilation": dilation, "groups": groups, "bias": bias}
        return {"conv": conv(dim, out_dim, side, **setting)}
