"""Attention to keys and values from a smaller grid.

Shape letters: B batch, N tokens, M keys, C channels, n heads, s side of the squares that become
one key each.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenconv.blocks import layout
from tokenconv.blocks.attention.base import Attention, attend
from tokenconv.blocks.starts import init_kaiming_convs_, init_pvt_
from tokenconv.errors import GridError
from tokenconv.grid import Grid, TokenGrid
from tokenconv.layers import DWConv


class SpatialReductionAttention(Attention):
    """Attention of PVTv2 and SegFormer: keys and values from ``s x s`` squares of tokens.

    ``q = Linear(x)``; ``k, v = Linear(LN(conv(x)))`` of a full convolution with side and stride s;
    attention; ``proj``. With ``linear`` there are 7 x 7 keys on any grid instead, and everywhere:
    ``k, v = Linear(GELU(LN(conv1x1(pool(x)))))``. Rows and columns that fill no square are not
    seen as keys, as in the paper's code. The papers have no prefix tokens: here they are queries,
    and keys that are neither convolved nor normed. Parameters: ``4*C*C + 4*C``, and
    ``s*s*C*C + 3*C`` where something is reduced (s is 1 if ``linear``).

    Args besides those of ``Attention``:
        sr_ratio: Side s of the squares; with 1 nothing is reduced.
        linear: Average to 7 x 7 keys, whatever ``sr_ratio`` is.

    References:
        PVT v2, https://arxiv.org/abs/2106.13797; SegFormer, https://arxiv.org/abs/2105.15203
    """

    qkv_bias = True
    init = staticmethod(init_pvt_)

    def build(self, bias: bool, sr_ratio: int = 2, linear: bool = False) -> None:
        """See the class."""
        self.sr_ratio = 1 if linear else checked_ratio(sr_ratio)
        self.q = nn.Linear(self.dim, self.dim, bias=bias)
        self.kv = nn.Linear(self.dim, 2 * self.dim, bias=bias)
        self.reduces = linear or sr_ratio > 1
        if self.reduces:
            self.pool = nn.AdaptiveAvgPool2d(7) if linear else nn.Identity()
            self.sr = nn.Conv2d(self.dim, self.dim, self.sr_ratio, stride=self.sr_ratio)
            self.norm = nn.LayerNorm(self.dim)
            self.act = nn.GELU() if linear else nn.Identity()

    def mix(self, x: Tensor, *grid: Grid) -> Tensor:
        """See the class."""
        q = self.q(x)
        if self.reduces:
            fmap = self.sr(self.pool(layout.to_map(at_least(x, grid, self.sr_ratio), grid)))
            x = layout.behind_prefix(self.act(self.norm(layout.to_tokens(fmap, grid))), x, grid)
        k, v = self.kv(x).chunk(2, dim=-1)
        return attend(q, k, v, self.num_heads, drop=self.drop)


class LightweightAttention(Attention):
    """Attention of CMT (LMHSA): keys and values by a strided depthwise convolution, and positions.

    ``q = Linear(x)``; ``k = Linear(y)``, ``v = Linear(y)`` of ``y = BN(DWConv(x))`` with side and
    stride s; ``softmax(q @ k.T * (C/n)**-0.5 + relative_pos) @ v``; ``proj``. Rows and columns that
    fill no square are not seen as keys, as in the paper's code. The paper has no prefix tokens:
    here they are queries and unconvolved keys, without a position. The positions start from a
    standard normal; on another grid they are resized, bicubically over queries and keys, and they
    are the same between any two frames. CMT shares one table in a stage: assign it to the blocks.
    Parameters: ``4*C*C + C``, ``3*C`` with ``qkv_bias``, ``s*s*C + 3*C`` if s > 1, and ``n*N*M``
    of the grid ``size``.

    Args besides those of ``Attention``:
        sr_ratio: Side s of the squares; with 1 nothing is reduced.
        size: Rows and columns of the grid for which positions are learned; None learns none.

    References:
        https://arxiv.org/abs/2107.06263
    """

    init = staticmethod(init_kaiming_convs_)

    def build(self, bias: bool, sr_ratio: int = 2, size: tuple[int, int] | None = (14, 14)) -> None:
        """See the class."""
        self.sr_ratio, dim = checked_ratio(sr_ratio), self.dim
        self.q = nn.Linear(dim, dim, bias=bias)
        self.k = nn.Linear(dim, dim, bias=bias)
        self.v = nn.Linear(dim, dim, bias=bias)
        if sr_ratio > 1:
            kernel = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio, groups=dim)
            self.sr = nn.Sequential(kernel, nn.BatchNorm2d(dim))
        if size is None:
            self.relative_pos = None
            return
        keys = math.prod(side // sr_ratio for side in size)
        if keys < 1:
            raise ValueError(f"expected a size of {sr_ratio=} at least, got {size=}")
        self.relative_pos = nn.Parameter(torch.empty(self.num_heads, math.prod(size), keys))

    def reset_parameters(self) -> None:
        """Initialise as the paper's code does."""
        super().reset_parameters()
        if self.relative_pos is not None:
            nn.init.normal_(self.relative_pos)

    def mix(self, x: Tensor, *grid: Grid) -> Tensor:
        """See the class."""
        q = self.q(x)
        if self.sr_ratio > 1:
            fmap = self.sr(layout.to_map(at_least(x, grid, self.sr_ratio), grid))
            x = layout.behind_prefix(layout.to_tokens(fmap, grid), x, grid)
        bias = None
        if self.relative_pos is not None:
            bias = _resized(self.relative_pos, self.sr_ratio, grid).to(q.dtype)
        k, v = self.k(x), self.v(x)
        return attend(q, k, v, self.num_heads, bias=bias, drop=self.drop)


@torch.fx.wrap
def _resized(table: Tensor, sr_ratio: int, grid: tuple[Grid, ...]) -> Tensor:
    """``(n, N, M)`` for the tokens of a grid, zero for prefix tokens."""
    known = TokenGrid.of(*grid)
    *frames, rows, cols = known.size
    wanted = (rows * cols, (rows // sr_ratio) * (cols // sr_ratio))
    if torch.compiler.is_compiling() or table.shape[1:] != wanted:  # one graph for all sizes
        table = F.interpolate(table[None], wanted, mode="bicubic")[0]
    count, prefix = math.prod(frames), known.num_prefix_tokens
    return F.pad(table.repeat(1, count, count), (prefix, 0, prefix, 0))


class ShuntedAttention(Attention):
    """Attention of Shunted Transformer: half the heads see keys from larger squares than the rest.

    ``q = Linear(x)``. For the first half of the heads and side s, for the second and side s/2:
    ``k, v = Linear(GELU(LN(conv(x))))`` of a full convolution with that side as stride, then
    ``v + DWConv(v)`` on the smaller grid. ``proj`` of all heads. With ``sr_ratio=1`` no key is
    reduced and ``DWConv(v)`` is added to what attention gives, before ``proj``; that is
    ``lepe_attn``. Rows and columns that fill no square are not seen as keys. The paper has no
    prefix tokens: here they are queries, and keys that are neither convolved nor normed.
    Parameters: ``4*C*C + 4*C + s*s*C*C + s*s/4*C*C + 16*C``.

    Args besides those of ``Attention``:
        sr_ratio: Side s of the larger squares, even.

    References:
        https://arxiv.org/abs/2111.15193
    """

    qkv_bias = True
    heads_by = 2
    init = staticmethod(init_pvt_)

    def build(self, bias: bool, sr_ratio: int = 2) -> None:
        """See the class."""
        if sr_ratio < 2 or sr_ratio % 2:
            raise ValueError(f"expected an even sr_ratio, got {sr_ratio}; for 1 take lepe_attn")
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(self.dim, self.dim, bias=bias)
        self.large = _Squares(self.dim, sr_ratio, bias)
        self.small = _Squares(self.dim, sr_ratio // 2, bias)

    def mix(self, x: Tensor, *grid: Grid) -> Tensor:
        """See the class."""
        x = at_least(x, grid, self.sr_ratio)
        q1, q2 = self.q(x).chunk(2, dim=-1)
        (k1, v1), (k2, v2) = self.large(x, *grid), self.small(x, *grid)
        heads, drop = self.num_heads // 2, self.drop
        return torch.cat(
            [attend(q1, k1, v1, heads, drop=drop), attend(q2, k2, v2, heads, drop=drop)], dim=-1
        )


class _Squares(nn.Module):
    """Keys and values of half the heads, from squares of one size."""

    def __init__(self, dim: int, side: int, bias: bool):
        super().__init__()
        self.sr = nn.Conv2d(dim, dim, side, stride=side)
        self.norm = nn.LayerNorm(dim)
        self.act = nn.GELU()
        self.kv = nn.Linear(dim, dim, bias=bias)
        self.local_conv = DWConv(dim // 2, residual=True)

    def forward(self, x: Tensor, *grid: Grid) -> tuple[Tensor, Tensor]:
        """Reduce, and let the values see their neighbours."""
        fmap = self.sr(layout.to_map(x, grid))
        y = self.act(self.norm(layout.to_tokens(fmap, grid)))
        k, v = self.kv(layout.behind_prefix(y, x, grid)).chunk(2, dim=-1)
        return k, self.local_conv(v, layout.grid_behind(fmap, grid))


@torch.fx.wrap
def at_least(x: Tensor, grid: tuple[Grid, ...], side: int) -> Tensor:
    """Tokens of a grid that holds a square of this side.

    Raises:
        GridError: If it does not.
    """
    size = TokenGrid.of(*grid).size
    if min(size[-2:]) < side:
        raise GridError(
            f"expected a grid of at least {side}*{side}, which become one key, got {size}: take a "
            f"smaller sr_ratio"
        )
    return x


def checked_ratio(sr_ratio: int) -> int:
    """A side of squares.

    Raises:
        ValueError: If it is not positive.
    """
    if sr_ratio < 1:
        raise ValueError(f"expected sr_ratio >= 1, got {sr_ratio}")
    return sr_ratio
