"""The classic depthwise separable blocks, on maps and on tokens.

Shape letters: B batch, C channels, O channels that come out, h hidden width, K kernel side.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenconv.blocks.chain import Steps
from tokenconv.blocks.map_layers import (
    ChannelShuffle,
    Parallel,
    Split,
    conv,
    depthwise,
    squeeze_excite,
)
from tokenconv.blocks.maps import MapBlock
from tokenconv.blocks.starts import init_by_group_, init_kaiming_


class MobileNetV1(MapBlock):
    """MobileNetV1's depthwise separable convolution, a norm and an activation behind each part.

    ``DWConv (stride) -> BN -> activation -> 1x1 -> BN -> activation``, no biases, no residual.
    Parameters: ``K*K*C + 2*C + C*O + 2*O``.

    Args besides those of ``MapBlock``:
        act_layer: Makes the activations; timm takes ``nn.ReLU6``.

    References:
        https://arxiv.org/abs/1704.04861
    """

    init = staticmethod(init_by_group_)

    def steps(
        self,
        dim: int,
        out_dim: int,
        side: int,
        stride: int,
        act_layer: Callable[[], nn.Module] = nn.ReLU,
    ) -> Steps:
        """See the class."""
        return {
            "depthwise": depthwise(dim, side, stride=stride),
            "norm1": nn.BatchNorm2d(dim),
            "act1": act_layer(),
            "pointwise": conv(dim, out_dim),
            "norm2": nn.BatchNorm2d(out_dim),
            "act2": act_layer(),
        }


class Xception(MapBlock):
    """Xception's block: separable convolutions with nothing between their two parts.

    ``[ReLU] -> DWConv -> 1x1 -> BN``, ``repeats`` times, with a ReLU in front of each but the
    first, which ``start_with_act`` gives one; a 3x3 max pooling where there is a stride. The
    input is added, through a 1x1 convolution and BN where width or size change. No biases.
    Parameters where nothing changes: ``repeats * (K*K*C + C*C + 2*C)``.

    Args besides those of ``MapBlock``:
        repeats: Number of separable convolutions.
        start_with_act: Begin with a ReLU.
        grow_first: Change the width in the first of them, not in the last.

    References:
        https://arxiv.org/abs/1610.02357
    """

    adds_input = True
    projects_input = True
    init = staticmethod(init_kaiming_)

    def steps(
        self,
        dim: int,
        out_dim: int,
        side: int,
        stride: int,
        repeats: int = 3,
        start_with_act: bool = True,
        grow_first: bool = True,
    ) -> Steps:
        """See the class."""
        if repeats < 1:
            raise ValueError(f"expected repeats >= 1, got {repeats}")
        middle = out_dim if grow_first else dim
        widths = [dim, *[middle] * (repeats - 1), out_dim]
        steps: dict[str, nn.Module | None] = {}
        for i, (before, behind) in enumerate(pairwise(widths), 1):
            steps[f"act{i}"] = nn.ReLU() if i > 1 or start_with_act else None
            steps[f"depthwise{i}"] = depthwise(before, side)
            steps[f"pointwise{i}"] = conv(before, behind)
            steps[f"norm{i}"] = nn.BatchNorm2d(behind)
        steps["pool"] = nn.MaxPool2d(3, stride, 1) if stride > 1 else None
        return steps


class InvertedResidual(MapBlock):
    """MobileNetV2's inverted residual: wide inside, narrow and linear outside.

    ``[1x1 -> BN -> activation] -> DWConv (stride) -> BN -> activation -> [SE] -> 1x1 -> BN``, plus
    the input where width and size stay; the first part only if ``expand_ratio`` is not 1. No biases
    but those of SE, whose width is a share of C, not of h. Parameters, ``h = C * expand_ratio``:
    ``C*h + 2*h + K*K*h + 2*h + h*O + 2*O``, with SE ``2*h*r + r + h``, ``r = int(C * se_ratio)``.

    Args besides those of ``MapBlock``:
        expand_ratio: Hidden width h over C.
        act_layer: Makes the activations.
        se_ratio: Width between the layers of squeeze-and-excitation over C; 0 leaves it out.

    References:
        https://arxiv.org/abs/1801.04381
    """

    adds_input = True
    init = staticmethod(init_kaiming_)
    act_layer: ClassVar[type[nn.Module]] = nn.ReLU6
    se_ratio: ClassVar[float] = 0.0

    def steps(
        self,
        dim: int,
        out_dim: int,
        side: int,
        stride: int,
        expand_ratio: float = 6.0,
        act_layer: Callable[[], nn.Module] | None = None,
        se_ratio: float | None = None,
    ) -> Steps:
        """See the class."""
        act = act_layer or type(self).act_layer
        hidden = round(dim * expand_ratio)
        if hidden < 1:
            raise ValueError(f"expected a positive hidden width, got {dim=}, {expand_ratio=}")
        expand: Steps = {
            "expand": conv(dim, hidden),
            "norm1": nn.BatchNorm2d(hidden),
            "act1": act(),
        }
        return {
            **({} if expand_ratio == 1 else expand),
            "depthwise": depthwise(hidden, side, stride=stride),
            "norm2": nn.BatchNorm2d(hidden),
            "act2": act(),
            "se": _squeeze_excite(
                hidden, dim, self.se_ratio if se_ratio is None else se_ratio, act
            ),
            "project": conv(hidden, out_dim),
            "norm3": nn.BatchNorm2d(out_dim),
        }


class MBConv(InvertedResidual):
    """EfficientNet's block: an inverted residual with SiLU and squeeze-and-excitation.

    Its weights start from a normal of std ``sqrt(2 / fan_out)``; parameters as there.

    References:
        https://arxiv.org/abs/1905.11946
    """

    init = staticmethod(init_by_group_)
    act_layer = nn.SiLU
    se_ratio = 0.25


def _squeeze_excite(
    hidden: int, dim: int, ratio: float, act: Callable[[], nn.Module]
) -> nn.Module | None:
    if ratio < 0:
        raise ValueError(f"expected se_ratio >= 0, got {ratio}")
    return squeeze_excite(hidden, max(1, int(dim * ratio)), act()) if ratio else None


class ShuffleNetV1(MapBlock):
    """ShuffleNet's unit: a bottleneck of grouped 1x1 convolutions, with a shuffle between them.

    ``grouped 1x1 -> BN -> ReLU -> DWConv (stride) -> BN -> shuffle -> grouped 1x1 -> BN``, width
    ``w = O // 4`` in between; plus the input, then ReLU. With a stride the 3x3 average of the input
    comes first in the channels, and the steps, behind a ReLU, give the ``O - C`` others. The order
    is that of the official code; the paper shuffles in front of the depthwise convolution, which is
    the same with its channels in another order. No biases. Parameters at
    stride 1: ``2*C*w/groups + K*K*w + 4*w + 2*C``.

    Args besides those of ``MapBlock``:
        groups: Groups of the 1x1 convolutions.
        first_groups: Groups of the first one; None takes ``groups``. The paper takes 1 in the
            first unit of the network.

    Raises:
        ValueError: If the groups do not divide the widths, or ``out_dim`` is not above ``dim``
            with a stride, or not ``dim`` without.

    References:
        https://arxiv.org/abs/1707.01083
    """

    adds_input = True

    def steps(
        self,
        dim: int,
        out_dim: int,
        side: int,
        stride: int,
        groups: int = 1,
        first_groups: int | None = None,
    ) -> Steps:
        """See the class."""
        if (out_dim != dim) if stride == 1 else (out_dim <= dim):
            raise ValueError(
                f"expected out_dim == dim at stride 1 and above it with a stride, got {dim=}, "
                f"{out_dim=}, {stride=}"
            )
        if groups < 1:
            raise ValueError(f"expected groups >= 1, got {groups}")
        mid, made = out_dim // 4, out_dim if stride == 1 else out_dim - dim
        return {
            "reduce": conv(dim, mid, groups=groups if first_groups is None else first_groups),
            "norm1": nn.BatchNorm2d(mid),
            "act": nn.ReLU(),
            "depthwise": depthwise(mid, side, stride=stride),
            "norm2": nn.BatchNorm2d(mid),
            "shuffle": ChannelShuffle(mid // groups),
            "expand": conv(mid, made, groups=groups),
            "norm3": nn.BatchNorm2d(made),
        }

    def behind(self, out_dim: int) -> nn.Module:
        """An activation."""
        return nn.ReLU()

    def reset_parameters(self) -> None:
        """Initialise as the official code does: by the inputs, and norms a little above zero."""
        super().reset_parameters()
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.normal_(part.weight, std=1 / part.weight.shape[1])
            elif isinstance(part, nn.BatchNorm2d):
                nn.init.constant_(part.bias, 1e-4)

    def run(self, fmap: Tensor) -> Tensor:
        """Add the input, or put its average in front."""
        out = super().run(fmap)
        if self.stride == 1:
            return out
        return torch.cat([F.avg_pool2d(fmap, 3, self.stride, 1), out], dim=1)


class ShuffleNetV2(MapBlock):
    """ShuffleNet V2's unit: half the channels pass, and all are shuffled.

    At stride 1 the channels are cut in two; the second half goes through ``1x1 -> BN -> ReLU ->
    DWConv -> BN -> 1x1 -> BN -> ReLU``. With a stride both halves of the output are made of the
    whole input: one as said, one by ``DWConv -> BN -> 1x1 -> BN -> ReLU``. Then the channels of the
    two alternate. No biases. Parameters at stride 1, ``c = C / 2``: ``2*c*c + K*K*c + 6*c``.

    Raises:
        ValueError: If ``out_dim`` is odd, or is not ``dim`` at stride 1.

    References:
        https://arxiv.org/abs/1807.11164
    """

    def steps(self, dim: int, out_dim: int, side: int, stride: int) -> Steps:
        """See the class."""
        if out_dim % 2 or (stride == 1 and out_dim != dim):
            raise ValueError(
                f"expected an even out_dim, and out_dim == dim at stride 1, got {dim=}, {out_dim=}"
            )
        half = out_dim // 2
        entering = half if stride == 1 else dim
        right = nn.Sequential(
            *_conv_norm(entering, half),
            nn.ReLU(),
            *_depthwise_norm(half, side, stride),
            *_conv_norm(half, half),
            nn.ReLU(),
        )
        if stride == 1:
            return {
                "halves": Split([half, half], nn.Identity(), right),
                "shuffle": ChannelShuffle(2),
            }
        left = nn.Sequential(*_depthwise_norm(dim, side, stride), *_conv_norm(dim, half), nn.ReLU())
        return {"halves": Parallel(left, right), "shuffle": ChannelShuffle(2)}


def _conv_norm(dim: int, out_dim: int) -> tuple[nn.Module, nn.Module]:
    return conv(dim, out_dim), nn.BatchNorm2d(out_dim)


def _depthwise_norm(dim: int, side: int, stride: int) -> tuple[nn.Module, nn.Module]:
    return depthwise(dim, side, stride=stride), nn.BatchNorm2d(dim)
