"""Token mixers that modulate: what convolutions see weighs the values.

Shape letters: C channels, K kernel side.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from tokenconv.blocks.chain import Steps
from tokenconv.blocks.map_layers import (
    ChannelShuffle,
    LayerNorm2d,
    Modulated,
    Split,
    conv,
    depthwise,
)
from tokenconv.blocks.maps import Mixer
from tokenconv.blocks.starts import init_by_group_, init_truncated_


class LKA(Mixer):
    """VAN's large kernel attention, with the input that is added within it.

    ``x + proj_2(y * conv1(DWConv dilated(DWConv(y))))``, ``y = GELU(proj_1(x))``, all with biases:
    the first convolution is 5x5, the second 7x7 with dilation 3, ``conv1`` is 1x1. In VAN ``x``
    comes from a norm, and the block adds what it was before that, too. Starts from a normal of std
    ``sqrt(2 / fan_out)``. Parameters: ``3*(C*C + C) + 26*C + 50*C``.

    Args besides those of ``Mixer``, of which ``kernel_size`` has both sides:
        dilation: Distance between taps of the second kernel.

    References:
        https://arxiv.org/abs/2202.09741
    """

    kernel_size = (5, 7)
    adds_input = True
    init = staticmethod(init_by_group_)

    def mix(self, dim: int, side: Sequence[int], dilation: int = 3) -> Steps:
        """See the class."""
        if len(side) != 2:
            raise ValueError(f"expected two kernel sides, got {side}")
        context = nn.Sequential(
            depthwise(dim, side[0], bias=True),
            depthwise(dim, side[1], dilation=dilation, bias=True),
            conv(dim, dim, bias=True),
        )
        return {
            "proj_1": conv(dim, dim, bias=True),
            "act": nn.GELU(),
            "lka": Modulated(context),
            "proj_2": conv(dim, dim, bias=True),
        }


class ConvModulation(Mixer):
    """Conv2Former's convolutional modulation, with its norm: a large kernel weighs the values.

    ``proj(DWConv(GELU(1x1(y))) * v(y))``, ``y = LayerNorm(x)``, eps 1e-6, all with biases, no
    residual. Starts from a truncated normal of std 0.02. Parameters:
    ``3*(C*C + C) + (K*K + 1)*C + 2*C``.

    References:
        https://arxiv.org/abs/2211.11943
    """

    kernel_size = 11
    init = staticmethod(init_truncated_)

    def mix(self, dim: int, side: int) -> Steps:
        """See the class."""
        att = nn.Sequential(conv(dim, dim, bias=True), nn.GELU(), depthwise(dim, side, bias=True))
        return {
            "norm": LayerNorm2d(dim, eps=1e-6),
            "modulate": Modulated(att, conv(dim, dim, bias=True)),
            "proj": conv(dim, dim, bias=True),
        }


class _Focal(nn.Module):
    """``q * h(sum of gates times contexts)``, of q, the first context and the gates in a row."""

    def __init__(self, dim: int, sides: Sequence[int], bias: bool, normalize: bool):
        super().__init__()
        self.widths = [dim, dim, len(sides) + 1]
        self.layers = nn.ModuleList(
            nn.Sequential(depthwise(dim, side), nn.GELU()) for side in sides
        )
        self.act = nn.GELU()
        self.h = conv(dim, dim, bias=bias)
        self.share = 1 / (len(sides) + 1) if normalize else 1.0

    def forward(self, x: Tensor) -> Tensor:
        q, context, gates = x.split(self.widths, dim=1)
        contexts = []
        for layer in self.layers:
            context = layer(context)
            contexts.append(context)
        contexts.append(self.act(context.mean((2, 3), keepdim=True)))
        weighed = [each * gates[:, i : i + 1] for i, each in enumerate(contexts)]
        return q * self.h(self.share * reduce(torch.add, weighed))


class FocalModulation(Mixer):
    """FocalNet's focal modulation: contexts of growing reach, each with a gate per pixel.

    ``f`` gives a query q, a context and ``L + 1`` gates. Each of L levels is ``GELU(DWConv)`` of
    the one before, and the last is the GELU of their mean over the map. ``proj(q * h(sum of gate
    times level))``; ``f``, ``h`` and ``proj`` are 1x1 with biases, no residual. Linear layers of
    the paper start from a truncated normal of std 0.02, the others as ``nn.Conv2d``. Parameters:
    ``C*(2*C + L + 1) + 2*C + L + 1``, ``C*K*K`` of each level, ``2*(C*C + C)``.

    Args besides those of ``Mixer``, of which ``kernel_size`` is the first level's:
        focal_level: Number of levels L; 3 in the models of large reach.
        focal_factor: What each kernel is larger than the one before.
        bias: Learn offsets in ``f`` and ``h``.
        use_postln: Have a LayerNorm, eps 1e-5, in front of ``proj``.
        normalize_modulator: Divide the sum by ``L + 1``.
        proj_drop: Dropout probability behind ``proj``.

    Raises:
        ValueError: If there is no level, or a kernel is even.

    References:
        https://arxiv.org/abs/2203.11926
    """

    def mix(
        self,
        dim: int,
        side: int,
        focal_level: int = 2,
        focal_factor: int = 2,
        bias: bool = True,
        use_postln: bool = False,
        normalize_modulator: bool = False,
        proj_drop: float = 0.0,
    ) -> Steps:
        """See the class."""
        sides = [side + i * focal_factor for i in range(focal_level)]
        if not sides or any(k < 1 or k % 2 == 0 for k in sides):
            raise ValueError(
                f"expected focal_level >= 1 and an even focal_factor, got {focal_level=}, "
                f"{focal_factor=}"
            )
        return {
            "f": conv(dim, 2 * dim + focal_level + 1, bias=bias),
            "focal": _Focal(dim, sides, bias, normalize_modulator),
            "norm": LayerNorm2d(dim) if use_postln else None,
            "proj": conv(dim, dim, bias=True),
            "proj_drop": nn.Dropout(proj_drop),
        }

    def reset_parameters(self) -> None:
        """Initialise as the paper's code does."""
        super().reset_parameters()
        _as_linear_(self, "body.f", "body.proj")


class _Decompose(nn.Module):
    """``x + scale * (x - mean of x over the map)``."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale[:, None, None] * (x - x.mean((2, 3), keepdim=True))


class MogaAggregation(Mixer):
    """MogaNet's multi-order gated aggregation, with the input that is added within it.

    ``x + proj_2(SiLU(gate(y)) * SiLU(value(y)))``, ``y = SiLU(z + scale * (z - mean of z))``,
    ``z = proj_1(x)``. ``value`` is a 5x5 depthwise convolution; then the channels are cut in
    ``C - int(3/8*C) - int(C/2)``, which pass, ``int(3/8*C)``, 5x5 with dilation 2, and
    ``int(C/2)``, 7x7 with dilation 3; then 1x1. All with biases. Starts from a normal of std
    ``sqrt(2 / fan_out)``. Parameters: ``4*(C*C + C) + 26*C + 26*int(3/8*C) + 50*int(C/2) + C``.

    Args besides those of ``Mixer``, of which ``kernel_size`` has all three sides:
        dilations: Distance between kernel taps, of all three.
        channel_split: Shares of the channels.

    Raises:
        ValueError: If there are not three of each, or a share has no channel.

    References:
        https://arxiv.org/abs/2211.03295
    """

    kernel_size = (5, 5, 7)
    adds_input = True
    init = staticmethod(init_by_group_)

    def mix(
        self,
        dim: int,
        side: Sequence[int],
        dilations: Sequence[int] = (1, 2, 3),
        channel_split: Sequence[int] = (1, 3, 4),
    ) -> Steps:
        """See the class."""
        if not len(side) == len(dilations) == len(channel_split) == 3:
            raise ValueError(
                f"expected three kernel sides, dilations and shares, got {side}, {dilations}, "
                f"{channel_split}"
            )
        large = [int(share * dim / sum(channel_split)) for share in channel_split[1:]]
        widths = [dim - sum(large), *large]
        if min(widths) < 1:
            raise ValueError(f"expected a channel for each of {channel_split}, got {dim=}")
        convs = [
            depthwise(width, k, dilation=d, bias=True)
            for width, k, d in zip([dim, *large], side, dilations, strict=True)
        ]
        value = nn.Sequential(
            convs[0], Split(widths, nn.Identity(), *convs[1:]), conv(dim, dim, bias=True), nn.SiLU()
        )
        return {
            "proj_1": conv(dim, dim, bias=True),
            "decompose": _Decompose(dim),
            "act": nn.SiLU(),
            "modulate": Modulated(value, nn.Sequential(conv(dim, dim, bias=True), nn.SiLU())),
            "proj_2": conv(dim, dim, bias=True),
        }


class SAM(Mixer):
    """SMT's scale-aware modulation: a kernel side per head, mixed across heads.

    ``proj(m * v(x))``: the channels of ``s(x)`` are cut in heads, the i-th goes through a depthwise
    convolution of side ``3 + 2*i``; the first channel of every head, then the second of every head,
    and so on; ``1x1 to e*C, in C/heads groups -> BN -> GELU -> 1x1`` gives m. All with biases; no
    residual. Linear layers of the paper start from a truncated normal of std 0.02, the others from
    a normal of std ``sqrt(2 / fan_out)``. Parameters of four heads, e = 2:
    ``3*(C*C + C) + 42*C + 14*C + 2*C*C + C``.

    Args besides those of ``Mixer``, of which ``kernel_size`` has one side per head:
        expand_ratio: Width e between the last two over C.
        qkv_bias: Learn offsets in ``v`` and ``s``.
        proj_drop: Dropout probability behind ``proj``.

    Raises:
        ValueError: If the heads do not divide the channels.

    References:
        https://arxiv.org/abs/2307.08579
    """

    kernel_size = (3, 5, 7, 9)
    init = staticmethod(init_by_group_)

    def mix(
        self,
        dim: int,
        side: Sequence[int],
        expand_ratio: int = 2,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
    ) -> Steps:
        """See the class."""
        heads = len(side)
        if dim % heads:
            raise ValueError(f"expected the {heads} heads of {side} to divide dim, got {dim=}")
        width, groups = expand_ratio * dim, dim // heads
        scales = Split([groups] * heads, *(depthwise(groups, k, bias=True) for k in side))
        context = nn.Sequential(
            conv(dim, dim, bias=qkv_bias),
            scales,
            ChannelShuffle(heads),
            conv(dim, width, groups=groups, bias=True),
            nn.BatchNorm2d(width),
            nn.GELU(),
            conv(width, dim, bias=True),
        )
        return {
            "modulate": Modulated(context, conv(dim, dim, bias=qkv_bias)),
            "proj": conv(dim, dim, bias=True),
            "proj_drop": nn.Dropout(proj_drop),
        }

    def reset_parameters(self) -> None:
        """Initialise as the paper's code does."""
        super().reset_parameters()
        grouped = self.get_submodule("body.modulate.context.3")
        assert isinstance(grouped, nn.Conv2d)
        std = (2 * grouped.groups / grouped.out_channels) ** 0.5
        nn.init.normal_(grouped.weight, std=std)
        _as_linear_(self, "body.modulate.context.0", "body.modulate.value", "body.proj")


def _as_linear_(block: nn.Module, *names: str) -> None:
    """Start 1x1 convolutions as the linear layers that they are in the paper's code."""
    for name in names:
        layer: Any = block.get_submodule(name)
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
