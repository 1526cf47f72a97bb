"""Queries, keys and values that convolutions make.

Shape letters: B batch, N tokens, M keys, C channels, n heads, K kernel side.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenconv.blocks import layout
from tokenconv.blocks.attention.base import Attention, attend, split_heads
from tokenconv.blocks.map_layers import depthwise
from tokenconv.grid import Grid, TokenGrid


class ConvProjectionAttention(Attention):
    """Attention of CvT: a convolution in front of the linear layers of q, k and v, no activation.

    ``q, k, v = Linear(BN(DWConv(x)))``, each with its own, and with stride 2 for k and v: the grid
    of keys has ``ceil(H/2)`` rows. Then attention with the scale ``C**-0.5``, of the whole width
    and not of a head, and ``proj``. Prefix tokens go around convolution and norm. Parameters:
    ``4*C*C + 4*C + 3*(K*K*C + 2*C)``.

    Args besides those of ``Attention``:
        kernel_size: Odd kernel side K.
        stride_kv: Step of the convolutions of keys and values.

    References:
        https://arxiv.org/abs/2103.15808
    """

    qkv_bias = True

    def build(self, bias: bool, kernel_size: int = 3, stride_kv: int = 2) -> None:
        """See the class."""
        self.kernel_size, self.stride_kv = checked_side(kernel_size), checked_stride(stride_kv)
        dim = self.dim
        self.conv_proj_q, self.conv_proj_k, self.conv_proj_v = (
            nn.Sequential(depthwise(dim, kernel_size, stride=stride), nn.BatchNorm2d(dim))
            for stride in (1, stride_kv, stride_kv)
        )
        self.proj_q, self.proj_k, self.proj_v = (nn.Linear(dim, dim, bias=bias) for _ in range(3))

    def mix(self, x: Tensor, *grid: Grid) -> Tensor:
        """See the class."""
        fmap = layout.to_map(x, grid)
        q, k, v = (
            linear(layout.behind_prefix(layout.to_tokens(convolve(fmap), grid), x, grid))
            for convolve, linear in (
                (self.conv_proj_q, self.proj_q),
                (self.conv_proj_k, self.proj_k),
                (self.conv_proj_v, self.proj_v),
            )
        )
        return attend(q, k, v, self.num_heads, scale=self.dim**-0.5, drop=self.drop)


class PoolingAttention(Attention):
    """Attention of MViTv2: pooled q, k and v of every head, and decomposed relative positions.

    ``q, k, v = LN(DWConv(qkv(x)))`` of one kernel per channel of a head, the same for all heads,
    with stride s for k and v; ``softmax(q @ k.T * (C/n)**-0.5 + q @ rows + q @ columns) @ v + q``
    (positions see the unscaled q); ``proj``. Prefix tokens go around the convolutions, are normed,
    and have no position. The positions start from a truncated normal of std 0.02; for another
    number of distances they are resized, linearly as in the paper's code. They are the same
    between any two frames. Parameters: ``4*C*C + 4*C + 3*(K*K + 2)*C/n`` and
    ``2*(2*max(size) - 1)*C/n``.

    Args besides those of ``Attention``:
        kernel_size: Odd kernel side K.
        stride_kv: Step s of the convolutions of keys and values.
        size: Rows and columns of the grid for which positions are learned; None learns none.

    References:
        https://arxiv.org/abs/2112.01526
    """

    qkv_bias = True

    def build(
        self,
        bias: bool,
        kernel_size: int = 3,
        stride_kv: int = 2,
        size: tuple[int, int] | None = (14, 14),
    ) -> None:
        """See the class."""
        self.kernel_size, self.stride_kv = checked_side(kernel_size), checked_stride(stride_kv)
        width = self.dim // self.num_heads
        self.qkv = nn.Linear(self.dim, 3 * self.dim, bias=bias)
        self.pool_q, self.pool_k, self.pool_v = (
            depthwise(width, kernel_size, stride=stride) for stride in (1, stride_kv, stride_kv)
        )
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.rel_pos_h, self.rel_pos_w = (
            None if size is None else nn.Parameter(torch.empty(2 * side - 1, width))
            for side in size or (0, 0)
        )

    def reset_parameters(self) -> None:
        """Initialise as the paper's code does."""
        super().reset_parameters()
        for table in (self.rel_pos_h, self.rel_pos_w):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)

    def mix(self, x: Tensor, *grid: Grid) -> Tensor:
        """See the class."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, _ = self._pooled(q, self.pool_q, self.norm_q, grid)
        k, small = self._pooled(k, self.pool_k, self.norm_k, grid)
        v, _ = self._pooled(v, self.pool_v, self.norm_v, grid)
        bias = None
        if self.rel_pos_h is not None and self.rel_pos_w is not None:
            heads = split_heads(q, self.num_heads)
            bias = _relative(heads, self.rel_pos_h, self.rel_pos_w, grid, small)
        return attend(q, k, v, self.num_heads, bias=bias, drop=self.drop) + q

    def _pooled(
        self, x: Tensor, pool: nn.Module, norm: nn.Module, grid: tuple[Grid, ...]
    ) -> tuple[Tensor, TokenGrid]:
        """Convolve every head by itself, as an image of its own."""
        # (B, N, C) -> (B*n, N, C/n)
        heads = split_heads(x, self.num_heads).flatten(0, 1)
        fmap = pool(layout.to_map(heads, grid))
        out = norm(layout.behind_prefix(layout.to_tokens(fmap, grid), heads, grid))
        return _merged(out, self.num_heads), layout.grid_behind(fmap, grid)


def _merged(x: Tensor, num_heads: int) -> Tensor:
    """``(B*n, N, C/n) -> (B, N, C)``."""
    return x.unflatten(0, (-1, num_heads)).transpose(1, 2).flatten(2)


@torch.fx.wrap
def _relative(
    q: Tensor, rows: Tensor, cols: Tensor, grid: tuple[Grid, ...], small: TokenGrid
) -> Tensor:
    """What positions add to the products, ``(B, n, N, M)``; zero for prefix tokens."""
    known = TokenGrid.of(*grid)
    prefix = known.num_prefix_tokens
    *frames, height, width = known.size
    # (B, n, N, C/n) -> (B, n, T, H, W, C/n)
    q = q[:, :, prefix:].unflatten(2, (math.prod(frames), height, width))
    by_row = torch.einsum("bnthwc,hkc->bnthwk", q, _distances(rows, height, small.size[-2]))
    by_col = torch.einsum("bnthwc,wkc->bnthwk", q, _distances(cols, width, small.size[-1]))
    bias = (by_row[..., :, None] + by_col[..., None, :]).flatten(-2).flatten(2, 4)
    bias = bias.repeat(1, 1, 1, math.prod(frames))
    return F.pad(bias, (prefix, 0, prefix, 0))


def _distances(table: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """The entry ``(H, H', C/n)`` of a table for every query and key along a side."""
    most = 2 * max(num_queries, num_keys) - 1
    if torch.compiler.is_compiling() or len(table) != most:  # one graph for all sizes
        table = F.interpolate(table.T[None], most, mode="linear")[0].T
    stretch_q = max(num_keys / num_queries, 1.0)
    stretch_k = max(num_queries / num_keys, 1.0)
    places_q = torch.arange(num_queries, device=table.device)[:, None] * stretch_q
    places_k = torch.arange(num_keys, device=table.device)[None] * stretch_k
    return table[(places_q - places_k + (num_keys - 1) * stretch_k).long()]


def checked_side(kernel_size: int) -> int:
    """A kernel side.

    Raises:
        ValueError: If it is not odd.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"expected an odd kernel_size, got {kernel_size}")
    return kernel_size


def checked_stride(stride_kv: int) -> int:
    """A step of convolutions.

    Raises:
        ValueError: If it is not positive.
    """
    if stride_kv < 1:
        raise ValueError(f"expected stride_kv >= 1, got {stride_kv}")
    return stride_kv
