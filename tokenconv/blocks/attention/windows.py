"""Attention inside windows, and values that see their neighbours by a depthwise convolution (LePE).

Shape letters: B batch, N tokens, M tokens of a window, C channels, n heads, s side.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenconv.blocks import layout
from tokenconv.blocks.attention.base import Attention, LocalBranch, attend
from tokenconv.blocks.map_layers import depthwise
from tokenconv.grid import Grid, TokenGrid

Window = tuple[int | None, int | None]
"""Rows and columns of a window; None takes all of the grid."""


class LePEAttention(Attention):
    """Attention with a depthwise convolution of the values beside it (LePE), as in SMT.

    ``q, k, v = Linear(x)``; ``softmax(q @ k.T * (C/n)**-0.5) @ v + DWConv(v)``; ``proj``.
    BiFormer convolves the input x instead of v, and RMT has the same branch with K = 5 beside its
    retention, which is not built here. The papers have no prefix tokens: here they attend, and get
    nothing from the convolution. Parameters: ``4*C*C + C + (K*K + 1)*C``, and ``3*C`` with
    ``qkv_bias``.

    Args besides those of ``Attention``:
        kernel_size: Odd kernel side K.
        of_input: Convolve x instead of v.

    References:
        SMT, https://arxiv.org/abs/2307.08579; CSWin, https://arxiv.org/abs/2107.00652; RMT,
        https://arxiv.org/abs/2309.11523; BiFormer, https://arxiv.org/abs/2303.08810
    """

    def build(self, bias: bool, kernel_size: int = 3, of_input: bool = False) -> None:
        """See the class."""
        self.kernel_size, self.of_input = kernel_size, of_input
        self.q = nn.Linear(self.dim, self.dim, bias=bias)
        self.kv = nn.Linear(self.dim, 2 * self.dim, bias=bias)
        self.lepe = LocalBranch(self.dim, kernel_size)

    def mix(self, x: Tensor, *grid: Grid) -> Tensor:
        """See the class."""
        k, v = self.kv(x).chunk(2, dim=-1)
        local = self.lepe(x if self.of_input else v, *grid)
        return attend(self.q(x), k, v, self.num_heads, drop=self.drop) + local


class CrossShapedAttention(Attention):
    """Attention of CSWin: half the heads in vertical stripes, half in horizontal ones, with LePE.

    ``q, k, v = qkv(x)``; in every stripe ``softmax(q @ k.T * (C/n)**-0.5) @ v + DWConv(v)``, the
    convolution zero-padded at the border of the stripe; both halves of the channels one behind the
    other; ``proj``. The first half has stripes of H x s tokens, the second of s x W. The paper's
    grids divide into stripes; others are filled up, and what was added is zero for the convolution
    and not seen by attention. The paper has no prefix tokens: here they are keys in every stripe,
    see all tokens, and get nothing from the convolution. Parameters: ``4*C*C + C + (K*K + 1)*C``,
    and ``3*C`` with ``qkv_bias``.

    Args besides those of ``Attention``:
        split_size: Width s of a stripe.
        last_stage: One window as large as the grid for all heads, as in the last stage.

    References:
        https://arxiv.org/abs/2107.00652
    """

    heads_by = 2

    def build(self, bias: bool, split_size: int = 7, last_stage: bool = False) -> None:
        """See the class."""
        if split_size < 1:
            raise ValueError(f"expected split_size >= 1, got {split_size}")
        self.split_size, self.last_stage = split_size, last_stage
        self.qkv = nn.Linear(self.dim, 3 * self.dim, bias=bias)
        halves = 1 if last_stage else 2
        self.lepe = nn.ModuleList(depthwise(self.dim // halves, bias=True) for _ in range(halves))

    def mix(self, x: Tensor, *grid: Grid) -> Tensor:
        """See the class."""
        halves = len(self.lepe)
        heads, s = self.num_heads // halves, self.split_size
        windows: list[Window] = [(None, None)] if self.last_stage else [(None, s), (s, None)]
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        parts = [part.chunk(halves, dim=-1) for part in (q, k, v)]
        outs = []
        for i, conv in enumerate(self.lepe):
            q, k, v = (part[i] for part in parts)
            out = attend_in_windows(q, k, v, grid, windows[i], heads, self.drop)
            local = from_windows(conv(to_windows(v, grid, windows[i])), grid, windows[i])
            outs.append(out + behind_zeros(local, grid))
        return torch.cat(outs, dim=-1)


class HiLoAttention(Attention):
    """Attention of LITv2: some heads inside windows (Hi-Fi), the others to averages (Lo-Fi).

    Hi-Fi: ``q, k, v = Linear(x)``, attention in windows of ``s x s`` tokens, ``Linear``. Lo-Fi: ``q
    = Linear(x)``, ``k, v = Linear(mean of s x s tokens)``, attention, ``Linear``. What comes out is
    Hi-Fi's channels and then Lo-Fi's; no projection of both. The paper's grids divide into windows;
    on others Hi-Fi does not see what fills the last ones up, and Lo-Fi averages what is there. The
    paper has no prefix tokens: here they are keys in every window and beside the averages, and see
    all tokens. With ``window_size=1`` all heads are Lo-Fi: plain attention. Parameters, with h
    channels in Hi-Fi and w in Lo-Fi: ``3*C*h + h*h + h + C*w + 2*C*w + w*w + w``, and ``3*C`` with
    ``qkv_bias``.

    Args besides those of ``Attention``:
        window_size: Side s.
        alpha: Share of the heads that are Lo-Fi.

    References:
        https://arxiv.org/abs/2205.13213
    """

    heads_by = 2

    def build(self, bias: bool, window_size: int = 2, alpha: float = 0.5) -> None:
        """See the class."""
        if window_size < 1 or not 0 <= alpha <= 1:
            raise ValueError(
                f"expected window_size >= 1 and 0 <= alpha <= 1, got {window_size=}, {alpha=}"
            )
        self.window_size = window_size
        self.low_heads = self.num_heads if window_size == 1 else int(self.num_heads * alpha)
        self.high_heads = self.num_heads - self.low_heads
        head_dim, dim = self.dim // self.num_heads, self.dim
        low, high = self.low_heads * head_dim, self.high_heads * head_dim
        self.proj = nn.Identity()
        self.last = ()
        if high:
            self.h_qkv = nn.Linear(dim, 3 * high, bias=bias)
            self.h_proj = nn.Linear(high, high)
            self.last += ("h_proj",)
        if low:
            self.l_q = nn.Linear(dim, low, bias=bias)
            self.l_kv = nn.Linear(dim, 2 * low, bias=bias)
            self.pool = nn.AvgPool2d(window_size, ceil_mode=True)
            self.l_proj = nn.Linear(low, low)
            self.last += ("l_proj",)

    def mix(self, x: Tensor, *grid: Grid) -> Tensor:
        """See the class."""
        outs = []
        if self.high_heads:
            q, k, v = self.h_qkv(x).chunk(3, dim=-1)
            window = (self.window_size, self.window_size)
            out = attend_in_windows(q, k, v, grid, window, self.high_heads, self.drop)
            outs.append(self.h_proj(out))
        if self.low_heads:
            y = x
            if self.window_size > 1:
                means = layout.to_tokens(self.pool(layout.to_map(x, grid)), grid)
                y = layout.behind_prefix(means, x, grid)
            k, v = self.l_kv(y).chunk(2, dim=-1)
            out = attend(self.l_q(x), k, v, self.low_heads, drop=self.drop)
            outs.append(self.l_proj(out))
        return torch.cat(outs, dim=-1)


@torch.fx.wrap
def attend_in_windows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[Grid, ...],
    window: Window,
    num_heads: int,
    drop: float = 0.0,
) -> Tensor:
    """Attention of the tokens of a window to each other and to the prefix tokens.

    Prefix tokens see all tokens. Windows that the grid does not fill are filled up with what is not
    seen; a compiled graph takes grids that do, or grids that do not. The frames of a video have
    windows of their own.
    """
    prefix = TokenGrid.of(*grid).num_prefix_tokens
    inside = [to_windows(part, grid, window) for part in (q, k, v)]
    num_windows = _count(grid, window)
    qs, ks, vs = (part.flatten(2).transpose(1, 2) for part in inside)
    if prefix:
        fronts = [part[:, :prefix].repeat_interleave(num_windows, 0) for part in (k, v)]
        ks, vs = torch.cat([fronts[0], ks], dim=1), torch.cat([fronts[1], vs], dim=1)
    seen = _seen(q, grid, window)
    out = attend(qs, ks, vs, num_heads, bias=seen, drop=drop)
    out = from_windows(out.transpose(1, 2).unflatten(2, inside[0].shape[2:]), grid, window)
    if not prefix:
        return out
    return torch.cat([attend(q[:, :prefix], k, v, num_heads, drop=drop), out], dim=1)


@torch.fx.wrap
def to_windows(x: Tensor, grid: tuple[Grid, ...], window: Window) -> Tensor:
    """The tokens on the grid as maps of one window each, zeros where the grid ends before."""
    rows, cols, down, right = _sides(grid, window)
    fmap = F.pad(layout.to_map(x, grid), (0, right, 0, down))
    return rearrange(fmap, "b c (i h) (j w) -> (b i j) c h w", h=rows, w=cols)


@torch.fx.wrap
def from_windows(fmap: Tensor, grid: tuple[Grid, ...], window: Window) -> Tensor:
    """The inverse of ``to_windows``: tokens, without prefix tokens."""
    rows, cols, down, right = _sides(grid, window)
    height, width = TokenGrid.of(*grid).size[-2:]
    i, j = (height + down) // rows, (width + right) // cols
    fmap = rearrange(fmap, "(b i j) c h w -> b c (i h) (j w)", i=i, j=j)
    return layout.to_tokens(fmap[:, :, :height, :width], grid)


@torch.fx.wrap
def behind_zeros(x: Tensor, grid: tuple[Grid, ...]) -> Tensor:
    """Tokens behind zeros for the prefix tokens."""
    return F.pad(x, (0, 0, TokenGrid.of(*grid).num_prefix_tokens, 0))


def _sides(grid: tuple[Grid, ...], window: Window) -> tuple[int, int, int, int]:
    """Rows and columns of a window, and how many the grid lacks."""
    height, width = TokenGrid.of(*grid).size[-2:]
    rows = height if window[0] is None else min(window[0], height)
    cols = width if window[1] is None else min(window[1], width)
    return rows, cols, -height % rows, -width % cols


def _count(grid: tuple[Grid, ...], window: Window) -> int:
    """Windows of an image, or of all frames of a video."""
    rows, cols, down, right = _sides(grid, window)
    *frames, height, width = TokenGrid.of(*grid).size
    return math.prod(frames) * ((height + down) // rows) * ((width + right) // cols)


def _seen(x: Tensor, grid: tuple[Grid, ...], window: Window) -> Tensor | None:
    """Which keys of every window are tokens, if not all are."""
    _, _, down, right = _sides(grid, window)
    if not (down or right):
        return None
    full = TokenGrid.of(*grid)
    ones = x.new_ones(x.shape[0], full.num_positions, 1)
    inside = to_windows(ones, (TokenGrid(full.size),), window).flatten(2) > 0
    return F.pad(inside, (full.num_prefix_tokens, 0), value=True)[:, None]
