"""Attention on some channels and convolution on the others, or on all of them before.

Shape letters: B batch, C channels, n heads, K kernel side, S scales.
"""

import math

import torch
from torch import Tensor, nn

from tokenconv.blocks.attention.base import attend, heads_of
from tokenconv.blocks.attention.channels import CrossCovarianceAttention
from tokenconv.blocks.chain import Steps
from tokenconv.blocks.map_layers import LayerNorm2d, LayerScale2d, Residual, Split, conv, depthwise
from tokenconv.blocks.maps import MapBlock, Mixer
from tokenconv.blocks.starts import init_linears_, init_truncated_


class InceptionMixer(MapBlock):
    """Mixer of iFormer: channels that are convolved, that are pooled, and that attend.

    The last ``attention_heads`` of n heads are low frequencies, the first half of the other
    channels is convolved and the rest pooled: ``GELU(DWConv(conv1x1(a)))`` and
    ``GELU(conv1x1(maxpool(b)))``, both twice as wide as what they are given, and attention to and
    of the averages of ``s x s`` tokens, each of which stands for all of its square again. Then
    ``conv1x1(y + DWConv(y))`` of all. A grid that squares do not divide has smaller ones at its
    end; the paper's code takes none. The paper has no prefix tokens; they pass. The residual is the
    model's. With l low channels and c = C - l: ``c*c/2 + K*K*c + c*c/2 + c + 3*l*l
    + K*K*(2*c + l) + (2*c + l)*C + C`` parameters.

    Args besides those of ``MapBlock``:
        num_heads: Heads n; None takes one per 64 channels, two at least.
        attention_heads: How many of them attend.
        pool_size: Side s of the squares; the paper has 2 in its first stages and then 1.
        qkv_bias: Learn offsets of queries, keys and values.

    References:
        https://arxiv.org/abs/2205.12956
    """

    init = staticmethod(init_linears_)

    def steps(
        self,
        dim: int,
        out_dim: int,
        side: int,
        stride: int,
        num_heads: int | None = None,
        attention_heads: int = 1,
        pool_size: int = 2,
        qkv_bias: bool = False,
    ) -> Steps:
        """See the class."""
        heads = heads_of(dim, num_heads, 1 if num_heads else 2)
        low = attention_heads * (dim // heads)
        half = (dim - low) // 2
        if stride != 1 or not 0 < attention_heads < heads or 2 * half + low != dim:
            raise ValueError(
                f"expected stride 1, and heads that attend and an even number of channels that do "
                f"not, got {stride=}, {attention_heads=} of {heads}, {dim - low} channels"
            )
        convolved = nn.Sequential(conv(half, 2 * half), depthwise(2 * half, side), nn.GELU())
        pool = nn.MaxPool2d(side, stride=1, padding=side // 2)
        pooled = nn.Sequential(pool, conv(half, 2 * half, bias=True), nn.GELU())
        attended = _PooledAttention(low, attention_heads, pool_size, qkv_bias)
        width = 4 * half + low
        return {
            "mix": Split([half, half, low], convolved, pooled, attended),
            "fuse": Residual(depthwise(width)),
            "proj": conv(width, out_dim, bias=True),
        }


class _PooledAttention(nn.Module):
    """Attention of averages of squares, on a map; no projection."""

    def __init__(self, dim: int, num_heads: int, pool_size: int, bias: bool):
        super().__init__()
        self.num_heads, self.pool_size = num_heads, pool_size
        self.pool = nn.AvgPool2d(pool_size, ceil_mode=True)
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)

    def forward(self, fmap: Tensor) -> Tensor:
        """Attend."""
        small = self.pool(fmap)
        q, k, v = self.qkv(small.flatten(2).transpose(1, 2)).chunk(3, dim=-1)
        out = attend(q, k, v, self.num_heads)
        return _spread(out, small, fmap, self.pool_size)


@torch.fx.wrap
def _spread(x: Tensor, small: Tensor, fmap: Tensor, side: int) -> Tensor:
    """Tokens as squares of a map."""
    out = x.transpose(1, 2).unflatten(2, small.shape[2:])
    out = out.repeat_interleave(side, 2).repeat_interleave(side, 3)
    return out[:, :, : fmap.shape[2], : fmap.shape[3]]


class SplitTransposeAttention(Mixer):
    """Encoder of EdgeNeXt (SDTA): a pyramid of depthwise convolutions, then XCA, then an MLP.

    The channels are cut into S parts: ``y1 = DWConv(x1)``, ``yi = DWConv(yi-1 + xi)``, and the last
    stays. To all of them a Fourier encoding of the position is added, ``conv1x1`` of 64 sines and
    cosines; ``y + gamma1 * XCA(LN(y))``; ``x + gamma2 * Linear(GELU(Linear(LN(y))))`` with the
    input x. Prefix tokens pass: the sum of parts has no meaning for them. Parameters:
    ``12*C*C + 15*C + n + (S - 1)*10*ceil(C/S)``, and ``65*C`` for the position.

    Args besides those of ``Mixer``:
        num_scales: Parts S.
        num_heads: Heads n of XCA; None takes one per 64 channels.
        use_pos_emb: Add the position, as in the second of EdgeNeXt's stages only.
        expand_ratio: Hidden width of the MLP over ``dim``.
        qkv_bias: Learn offsets of queries, keys and values.
        ls_init_value: What gamma1 and gamma2 start from.

    References:
        https://arxiv.org/abs/2206.10589
    """

    adds_input = True
    init = staticmethod(init_truncated_)

    def mix(
        self,
        dim: int,
        side: int,
        num_scales: int = 2,
        num_heads: int | None = None,
        use_pos_emb: bool = True,
        expand_ratio: float = 4.0,
        qkv_bias: bool = True,
        ls_init_value: float = 1e-6,
    ) -> Steps:
        """See the class."""
        hidden = int(expand_ratio * dim)
        return {
            "scales": _Scales(dim, num_scales, side),
            "position": _FourierPosition(dim) if use_pos_emb else None,
            "xca": _Transposed(dim, heads_of(dim, num_heads), qkv_bias, ls_init_value),
            "norm": LayerNorm2d(dim, eps=1e-6),
            "fc1": conv(dim, hidden, bias=True),
            "act": nn.GELU(),
            "fc2": conv(hidden, dim, bias=True),
            "gamma": LayerScale2d(dim, ls_init_value),
        }


class _Scales(nn.Module):
    """A depthwise convolution of every part of the channels but the last, and of those before."""

    def __init__(self, dim: int, num_scales: int, kernel_size: int):
        super().__init__()
        width = math.ceil(dim / max(num_scales, 1))
        if num_scales < 2 or math.ceil(dim / width) != num_scales:
            raise ValueError(f"expected num_scales >= 2 that cut {dim=}, got {num_scales}")
        self.num_scales = num_scales
        self.convs = nn.ModuleList(
            depthwise(width, kernel_size, bias=True) for _ in range(num_scales - 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        parts = x.chunk(self.num_scales, dim=1)
        outs = []
        for i, convolve in enumerate(self.convs):
            outs.append(convolve(parts[i] + outs[-1] if outs else parts[i]))
        return torch.cat([*outs, parts[self.num_scales - 1]], dim=1)


class _FourierPosition(nn.Module):
    """Adds a 1x1 convolution of sines and cosines of the row and the column."""

    def __init__(self, dim: int, num_waves: int = 32):
        super().__init__()
        self.num_waves = num_waves
        self.proj = conv(2 * num_waves, dim, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Add."""
        return x + self.proj(_waves(x, self.num_waves))


@torch.fx.wrap
def _waves(like: Tensor, count: int) -> Tensor:
    """``(1, 2*count, H, W)``: of the row, then of the column, all of which are one turn."""
    turns = 10000.0 ** (torch.arange(0, count, 2, device=like.device) / count)
    sides = []
    for length in like.shape[2:]:
        places = torch.arange(1, length + 1, device=like.device)
        angles = places / (length + 1e-6) * 2 * math.pi / turns[:, None]
        # (count/2, length) -> (count, length), sine and cosine in turn
        sides.append(torch.stack([angles.sin(), angles.cos()], dim=1).flatten(0, 1))
    rows, cols = sides
    height, width = like.shape[2:]
    both = [rows[:, :, None].expand(-1, -1, width), cols[:, None].expand(-1, height, -1)]
    return torch.cat(both)[None].to(like.dtype)


class _Transposed(nn.Module):
    """``x + gamma * XCA(LN(x))`` on a map."""

    def __init__(self, dim: int, num_heads: int, bias: bool, init_value: float):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.xca = CrossCovarianceAttention(dim, num_heads=num_heads, qkv_bias=bias)
        self.gamma = LayerScale2d(dim, init_value)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        out = self.xca.proj(self.xca.mix(tokens))
        return x + self.gamma(_as(out, x))


@torch.fx.wrap
def _as(tokens: Tensor, fmap: Tensor) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, fmap.shape[2:])
