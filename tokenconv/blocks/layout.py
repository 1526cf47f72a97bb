"""Between tokens and the maps that blocks compute on.

Called as ``layout.to_map(...)``: each function is one node of ``torch.fx``, which cannot trace
sizes and checks, and fx replaces functions in the module that they are looked up in. ``grid`` is
what ``forward`` was given behind ``x``.

Shape letters: B batch, N tokens = P prefix + grid, C channels, H rows, W columns.
"""

from dataclasses import replace

import torch
from torch import Tensor

from tokenconv.errors import GridError
from tokenconv.grid import (
    AnyGrid,
    Grid,
    PrefixTokens,
    TokenGrid,
    frames_to_tokens,
    grid_of,
    tokens_to_frames,
)
from tokenconv.grid import behind_prefix as put_behind

torch.fx.wrap("grid_of")


@torch.fx.wrap
def checked_map(fmap: Tensor, dim: int) -> Tensor:
    """A map, if it is one of this width.

    Raises:
        GridError: If it is not.
    """
    if fmap.ndim != 4 or fmap.shape[1] != dim:
        raise GridError(
            f"expected a map (B, {dim}, H, W), or tokens and their grid, block(x, H, W); got a "
            f"tensor of shape {tuple(fmap.shape)}"
        )
    return fmap


@torch.fx.wrap
def checked(x: Tensor, grid: tuple[Grid, ...], dim: int) -> Tensor:
    """Tokens that fill their one grid, at the width of the block.

    Raises:
        GridError: If they do not.
    """
    TokenGrid.of(*grid).check(x)
    if x.shape[2] != dim:
        raise GridError(f"expected tokens (B, N, {dim}), got a tensor of shape {tuple(x.shape)}")
    return x


@torch.fx.wrap
def to_map(x: Tensor, grid: tuple[Grid, ...]) -> Tensor:
    """The tokens on the grid as maps ``(B, C, H, W)``; the frames of a video one after another.

    Raises:
        GridError: If they do not fill it.
    """
    known = TokenGrid.of(*grid)
    known.check(x)
    return tokens_to_frames(x, known)


@torch.fx.wrap
def to_tokens(fmap: Tensor, grid: tuple[Grid, ...]) -> Tensor:
    """Maps of any size as tokens, all frames of a video in one sequence; no prefix tokens."""
    return frames_to_tokens(fmap, TokenGrid.of(*grid))


@torch.fx.wrap
def grid_behind(fmap: Tensor, grid: tuple[Grid, ...]) -> TokenGrid:
    """The grid of tokens that a map was made of."""
    known = TokenGrid.of(*grid)
    return TokenGrid((*known.size[:-2], *fmap.shape[-2:]), known.num_prefix_tokens)


@torch.fx.wrap
def without_prefix(x: Tensor, grid: AnyGrid) -> tuple[Tensor, AnyGrid]:
    """The tokens behind the prefix, and the grid of these."""
    count = grid.num_prefix_tokens
    if not count:
        return x, grid
    grid.check(x)
    return x[:, count:], replace(grid, num_prefix_tokens=0)


@torch.fx.wrap
def behind_prefix(
    tokens: Tensor,
    x: Tensor,
    grid: tuple[Grid, ...],
    policy: PrefixTokens = PrefixTokens.PASS,
) -> Tensor:
    """Tokens behind the prefix tokens of ``x``, or behind zeros in their place.

    Raises:
        GridError: If there are some, of another width.
    """
    count = grid_of(*grid).num_prefix_tokens
    if count and x.shape[2] != tokens.shape[2]:
        raise GridError(
            f"prefix tokens pass a block unchanged, which needs out_dim == dim, got "
            f"{tokens.shape[2]} and {x.shape[2]}: take them away first, or keep the width"
        )
    return put_behind(tokens, x, count, policy)
