"""Attention without a softmax over pairs: keys and values are summed up before queries come.

Shape letters: B batch, N tokens, C channels, n heads, d channels of a head, K kernel side,
S scales.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenconv.blocks.attention.base import Attention, LocalBranch, merge_heads, split_heads
from tokenconv.blocks.starts import init_torch_
from tokenconv.grid import Grid
from tokenconv.layers import BatchNorm, DWConv, GridModule


class FactorisedAttention(Attention):
    """Attention of CoaT: factorised, with convolutional relative positions (CRPE).

    ``q, k, v = qkv(x)``; ``d**-0.5 * q @ (softmax(k).T @ v) + q * DWConv(v)`` in every head, the
    softmax over tokens; ``proj``. Heads have kernels of several sides. Prefix tokens take part in
    the softmax and get nothing from the convolution. CoaT shares the convolutions in a stage:
    assign ``crpe`` to the blocks. ``attn_drop`` does nothing, as in the paper's code. Parameters:
    ``4*C*C + C``, ``3*C`` with ``qkv_bias``, and ``K*K + 1`` per channel.

    Args besides those of ``Attention``:
        windows: Heads by kernel side; None shares them out as CoaT: of 8, two have side 3, three
            5 and three 7.

    References:
        https://arxiv.org/abs/2104.06399
    """

    def build(self, bias: bool, windows: Mapping[int, int] | None = None) -> None:
        """See the class."""
        heads = self.num_heads
        if windows is None:
            ends = [0, heads * 2 // 8, heads * 5 // 8, heads]
            windows = {side: ends[i + 1] - ends[i] for i, side in enumerate((3, 5, 7))}
        if sum(windows.values()) != heads or min(windows.values()) < 0:
            raise ValueError(f"expected windows for {heads} heads in all, got {dict(windows)}")
        self.windows = {side: count for side, count in windows.items() if count}
        self.qkv = nn.Linear(self.dim, 3 * self.dim, bias=bias)
        width = self.dim // heads
        self.crpe = nn.ModuleList(LocalBranch(n * width, k) for k, n in self.windows.items())

    def mix(self, x: Tensor, *grid: Grid) -> Tensor:
        """See the class."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        width = self.dim // self.num_heads
        parts = v.split([count * width for count in self.windows.values()], dim=-1)
        local = torch.cat([conv(parts[i], *grid) for i, conv in enumerate(self.crpe)], dim=-1)
        heads, keys, values = (split_heads(part, self.num_heads) for part in (q, k, v))
        factor = heads @ (keys.softmax(dim=2).transpose(2, 3) @ values)
        return width**-0.5 * merge_heads(factor) + q * local


class LiteMultiScaleAttention(Attention):
    """Attention of EfficientViT (MIT): linear, by ReLU, of tokens and of sums around them.

    ``y = qkv(x)`` and, for every scale, ``conv1x1(DWConv(y))`` in groups of one head's q, k or v.
    For all heads of all scales ``q @ (k.T @ v) / (q @ k.T.sum(tokens) + eps)`` with ReLU of q and
    k, in 32 bits at least; then ``proj`` of all, and BN. The residual is the model's. The paper has
    no prefix tokens: here they skip the depthwise convolutions and take part in the rest.
    Parameters: ``3*C*C``, ``3*C*K*K + 3*C*d`` for every scale, and ``(1 + S)*C*C + 2*C``.

    Args besides those of ``Attention``:
        scales: Odd kernel sides K, one for every scale.
        eps: Added to the sum that is divided by.

    References:
        https://arxiv.org/abs/2205.14756
    """

    last = ("proj.1",)
    init = staticmethod(init_torch_)

    def build(self, bias: bool, scales: Sequence[int] = (5,), eps: float = 1e-5) -> None:
        """See the class."""
        self.scales, self.eps = tuple(scales), eps
        dim, heads = self.dim, self.num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.aggreg = nn.ModuleList(_Aggregate(3 * dim, k, 3 * heads, bias) for k in self.scales)
        width = dim * (1 + len(self.scales))
        self.proj = nn.Sequential(nn.Linear(width, dim, bias=False), BatchNorm(dim))

    def mix(self, x: Tensor, *grid: Grid) -> Tensor:
        """See the class."""
        y = self.qkv(x)
        scales = [y, *(aggregate(y, *grid) for aggregate in self.aggreg)]
        heads = split_heads(torch.cat(scales, dim=-1), len(scales) * self.num_heads)
        q, k, v = heads.chunk(3, dim=-1)
        return merge_heads(_divided(q.relu(), k.relu(), v, self.eps))


class _Aggregate(GridModule):
    """A depthwise convolution, and a linear layer in groups."""

    def __init__(self, dim: int, kernel_size: int, groups: int, bias: bool):
        super().__init__()
        self.conv = DWConv(dim, kernel_size, bias=bias)
        self.linear = nn.Conv1d(dim, dim, 1, groups=groups, bias=bias)

    def forward(self, x: Tensor, *grid: Grid) -> Tensor:
        """Sum up around every token."""
        return self.linear(self.conv(x, *grid).transpose(1, 2)).transpose(1, 2)


@torch.fx.wrap
def _divided(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """``q @ (k.T @ v)`` over ``q @ k.T.sum(tokens) + eps``, in 32 bits at least."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    meta = v.device.type == "meta"  # which autocast does not know
    with nullcontext() if meta else torch.autocast(v.device.type, enabled=False):
        q, k, ones = q.to(dtype), k.to(dtype), F.pad(v.to(dtype), (0, 1), value=1.0)
        out = q @ (k.transpose(-1, -2) @ ones)
        return (out[..., :-1] / (out[..., -1:] + eps)).to(v.dtype)


class AdditiveAttention(Attention):
    """Attention of SwiftFormer: all tokens are summed to one query, which scales the keys.

    ``q = Linear(x)``, ``k = Linear(x)``, both of length 1; ``a = q @ w_g * C**-0.5``, of length 1
    over tokens; ``proj(Linear(sum(a * q) * k) + q)``. No convolution: SwiftFormer's stands in
    front. More heads make q, k and what is between wider, ``n*C``. The paper has no prefix tokens:
    here they take part. ``attn_drop`` does nothing. Parameters: ``3*n*C*C + n*n*C*C + 4*n*C + C``.

    Args besides those of ``Attention``:
        num_heads: Widths C of q and k; None takes 1.

    References:
        https://arxiv.org/abs/2303.15446
    """

    qkv_bias = True

    def heads(self, dim: int, num_heads: int | None) -> int:
        """One, if nothing else was asked for."""
        if min(dim, num_heads or 1) < 1:
            raise ValueError(f"expected positive dim and num_heads, got {dim=}, {num_heads=}")
        return num_heads or 1

    def build(self, bias: bool) -> None:
        """See the class."""
        width = self.num_heads * self.dim
        self.to_query = nn.Linear(self.dim, width, bias=bias)
        self.to_key = nn.Linear(self.dim, width, bias=bias)
        self.w_g = nn.Parameter(torch.empty(width, 1))
        self.linear = nn.Linear(width, width)
        self.proj = nn.Linear(width, self.dim)

    def reset_parameters(self) -> None:
        """Initialise as the paper's code does."""
        super().reset_parameters()
        nn.init.normal_(self.w_g)

    def mix(self, x: Tensor, *grid: Grid) -> Tensor:
        """See the class."""
        query = F.normalize(self.to_query(x), dim=-1)
        key = F.normalize(self.to_key(x), dim=-1)
        weights = F.normalize(query @ self.w_g * self.dim**-0.5, dim=1)
        return self.linear((weights * query).sum(dim=1, keepdim=True) * key) + query
