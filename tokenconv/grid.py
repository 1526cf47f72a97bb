"""The only place that knows token order: prefix tokens first, then the grid in row-major order.

Shape letters: B batch, N tokens = P prefix + grid, C channels, T frames, H rows, W columns.

``(B, N, C)`` contiguous *is* channels-last memory, so folding tokens into a map and unfolding a
map into tokens are views. All views here keep the true batch stride:
``x.transpose(1, 2).view(B, C, H, W)`` gives a batch of one a stride that PyTorch does not
recognise as channels-last, and the convolution behind it then copies.
"""

import math
import operator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tokenconv.choice import Choice
from tokenconv.errors import GridError

_AXES = {2: ("h", "w"), 3: ("t", "h", "w")}
_COUNTS = (int, torch.SymInt)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_FOLD = {2: "b (h w) c -> b c h w", 3: "b (t h w) c -> b c t h w"}
_UNFOLD = {4: "b c h w -> b (h w) c", 5: "b c t h w -> b (t h w) c"}


class PrefixTokens(Choice):
    """What happens to the tokens in front of the grid, which no convolution sees."""

    ACT = "act"
    """They skip the convolution and its bias, and take all else, such as activation and gate."""
    PASS = "pass"
    """They stay as they are."""
    ZERO = "zero"
    """They become zero."""


@dataclass(frozen=True)
class TokenGrid:
    """Size and prefix count of a token sequence.

    Args:
        size: ``(H, W)``, or ``(T, H, W)`` for video tokens.
        num_prefix_tokens: Tokens in front of the grid (class, distillation, registers).

    Raises:
        GridError: If a size is not a positive integer or the prefix count is negative.
    """

    size: tuple[int, ...]
    num_prefix_tokens: int = 0

    def __post_init__(self) -> None:
        size = self.size
        if not isinstance(size, (tuple, list)) or len(size) not in _AXES:
            raise GridError(f"expected a grid size (H, W) or (T, H, W), got {size!r}")
        for length in size:
            if not _is_count(length) or length < 1:
                raise GridError(f"expected positive integers as grid size, got {tuple(size)!r}")
        _check_prefix(self.num_prefix_tokens)
        if type(size) is not tuple:
            object.__setattr__(self, "size", tuple(size))

    @classmethod
    def of(cls, *grid: "Grid") -> "TokenGrid":
        """The full grid that a ``forward(x, *grid)`` was given.

        Args:
            *grid: ``H, W`` (or ``T, H, W``) as integers, one tuple of them, or a ``TokenGrid``.

        Raises:
            GridError: If it is none of these.
        """
        if len(grid) == 1:
            (only,) = grid
            if isinstance(only, TokenGrid):
                return only
            if isinstance(only, (SparseGrid, MultiGrid)):
                raise GridError(
                    f"expected tokens that fill one grid, got a {type(only).__name__}, on which "
                    f"only depthwise convolutions run, and blocks made of them, such as mix_ffn: "
                    f"take one of these, or keep all tokens"
                )
            if isinstance(only, (tuple, list)):
                return cls(tuple(only))
        return cls(grid)  # pyright: ignore[reportArgumentType]  # checked by __post_init__

    @property
    def num_positions(self) -> int:
        """Tokens on the grid, ``H*W`` or ``T*H*W``."""
        return reduce(operator.mul, self.size)

    @property
    def num_tokens(self) -> int:
        """All tokens, ``num_prefix_tokens`` plus the grid."""
        return self.num_prefix_tokens + self.num_positions

    def check(self, x: Tensor) -> None:
        """Refuse tokens that do not fill this grid.

        Args:
            x: Tokens ``(B, N, C)``.

        Raises:
            GridError: If ``x`` is not three-dimensional or ``N`` is not ``num_tokens``.
        """
        if x.ndim != 3:
            raise GridError(f"expected tokens (B, N, C), got a tensor of shape {tuple(x.shape)}")
        if x.shape[1] != self.num_tokens:
            raise GridError(self._mismatch(x))

    def _mismatch(self, x: Tensor) -> str:
        """What was expected, what came and what to do."""
        num_tokens, prefix = x.shape[1], self.num_prefix_tokens
        size = "*".join(str(s) for s in self.size)
        surplus = num_tokens - self.num_positions
        fits = surplus >= 0
        return (
            f"expected {self.num_tokens} tokens ({prefix} prefix + {size} grid), "
            f"got {num_tokens} (shape {tuple(x.shape)}). "
            + (
                f"If the first {surplus} are class or register tokens, pass "
                f"TokenGrid({self.size}, num_prefix_tokens={surplus})."
                if fits and surplus
                else f"If there is no prefix token, pass TokenGrid({self.size})."
                if fits
                else "Pass the grid that these tokens were cut from."
            )
        )


@dataclass(frozen=True, eq=False)
class SparseGrid:
    """Tokens at some positions of a grid, other ones for every image.

    For patch dropout, masked tokens and images of several sizes packed into one batch. A position
    without a token counts as zero, like the padding of a convolution.

    Args:
        coords: Row and column of every token behind the prefix, in any order: integers
            ``(B, L, 2)``, or ``(B, L, 3)`` with the frame first; not above ``2**19``, and no
            position twice in an image, which is not checked. Negative where a slot holds no
            token: such a slot is passed over, and passes unchanged.
        num_prefix_tokens: Tokens in front of the others (class, distillation, registers).

    Raises:
        GridError: If ``coords`` has another shape or no integers, or the prefix count is negative.
    """

    coords: Tensor
    num_prefix_tokens: int = 0

    def __post_init__(self) -> None:
        coords = self.coords
        if not isinstance(coords, Tensor) or coords.dtype not in _INTEGERS or coords.ndim != 3:
            raise GridError(f"expected integer coords (B, L, 2) or (B, L, 3), got {_about(coords)}")
        if int(coords.shape[2]) not in _AXES:  # a tensor under torch.jit.trace
            raise GridError(f"expected coords (B, L, 2) or (B, L, 3), got {_about(coords)}")
        _check_prefix(self.num_prefix_tokens)

    @property
    def num_tokens(self) -> int:
        """All tokens of an image, ``num_prefix_tokens`` plus L."""
        return self.num_prefix_tokens + self.coords.shape[1]

    def check(self, x: Tensor) -> None:
        """Refuse tokens that are not those of this grid.

        Args:
            x: Tokens ``(B, N, C)``.

        Raises:
            GridError: If ``x`` has other dimensions, images or tokens than ``coords``.
        """
        images, slots, _ = self.coords.shape
        if x.ndim != 3 or x.shape[0] != images or x.shape[1] != self.num_tokens:
            raise GridError(
                f"expected {images} images of {self.num_tokens} tokens "
                f"({self.num_prefix_tokens} prefix + {slots}), got a tensor of shape "
                f"{tuple(x.shape)}"
            )


@dataclass(frozen=True)
class MultiGrid:
    """Several maps in one token sequence, one behind the other; no convolution crosses maps.

    Args:
        sizes: ``(H, W)`` of every map.
        num_prefix_tokens: Tokens in front of the first map.

    Raises:
        GridError: If there is no map, or a size or the prefix count is none.
    """

    sizes: tuple[tuple[int, ...], ...]
    num_prefix_tokens: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.sizes, (tuple, list)) or not self.sizes:
            raise GridError(f"expected the sizes (H, W) of several maps, got {self.sizes!r}")
        for size in self.sizes:
            TokenGrid(size)
        _check_prefix(self.num_prefix_tokens)

    @property
    def maps(self) -> list[TokenGrid]:
        """The maps, as grids without prefix tokens."""
        return [TokenGrid(size) for size in self.sizes]

    @property
    def num_tokens(self) -> int:
        """All tokens, ``num_prefix_tokens`` plus the maps."""
        return self.num_prefix_tokens + sum(one.num_positions for one in self.maps)

    def check(self, x: Tensor) -> None:
        """Refuse tokens that do not fill these maps.

        Args:
            x: Tokens ``(B, N, C)``.

        Raises:
            GridError: If ``x`` is not three-dimensional or ``N`` is not ``num_tokens``.
        """
        if x.ndim != 3 or x.shape[1] != self.num_tokens:
            sizes = " + ".join("*".join(str(side) for side in size) for size in self.sizes)
            raise GridError(
                f"expected (B, {self.num_tokens}, C), {self.num_prefix_tokens} prefix tokens and "
                f"{sizes}, got a tensor of shape {tuple(x.shape)}"
            )


AnyGrid = TokenGrid | SparseGrid | MultiGrid
Grid = int | tuple[int, ...] | AnyGrid
"""What ``forward(x, *grid)`` takes: ``H, W`` as integers, one tuple, or a grid."""


def grid_of(*grid: Grid) -> AnyGrid:
    """The grid that a ``forward(x, *grid)`` was given.

    Raises:
        GridError: If it is none.
    """
    if len(grid) == 1 and isinstance(grid[0], (SparseGrid, MultiGrid)):
        return grid[0]
    return TokenGrid.of(*grid)


def _about(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _check_prefix(num_prefix_tokens: int) -> None:
    if not _is_count(num_prefix_tokens) or num_prefix_tokens < 0:
        raise GridError(f"expected num_prefix_tokens >= 0, got {num_prefix_tokens!r}")


def _is_count(value: object) -> bool:
    return isinstance(value, _COUNTS) and not isinstance(value, bool)


def tokens_to_map(x: Tensor, *grid: Grid) -> Tensor:
    """Fold tokens into a map, as a view; prefix tokens are left out.

    Args:
        x: Tokens ``(B, N, C)``.
        *grid: ``H, W`` as integers, one tuple, or a ``TokenGrid``.

    Returns:
        ``(B, C, H, W)``, or ``(B, C, T, H, W)``; channels-last memory when ``x`` is contiguous
        and has no prefix tokens, or one image.

    Raises:
        GridError: If ``x`` does not fill the grid.
    """
    g = TokenGrid.of(*grid)
    g.check(x)
    if g.num_prefix_tokens:
        x = x[:, g.num_prefix_tokens :]
    rank = len(g.size)
    return rearrange(x, _FOLD[rank], **dict(zip(_AXES[rank], g.size, strict=True)))


def map_to_tokens(fmap: Tensor, prefix: Tensor | None = None) -> Tensor:
    """Unfold a map into tokens, as a view; inverse of ``tokens_to_map``.

    Args:
        fmap: ``(B, C, H, W)`` or ``(B, C, T, H, W)``.
        prefix: Prefix tokens ``(B, P, C)`` to put in front, which takes a copy.

    Returns:
        Tokens ``(B, N, C)``.

    Raises:
        GridError: If ``fmap`` has another number of dimensions.
    """
    if fmap.ndim not in _UNFOLD:
        raise GridError(f"expected a map (B, C, H, W) or (B, C, T, H, W), got {tuple(fmap.shape)}")
    tokens = rearrange(fmap, _UNFOLD[fmap.ndim])
    return tokens if prefix is None else torch.cat([prefix, tokens], dim=1)


# --- for the code that convolves: the grid is checked already, and einops' Python is spared ---


def tokens_to_frames(x: Tensor, grid: TokenGrid) -> Tensor:
    """Fold tokens into maps, as a view, the frames of a video as images by themselves.

    Args:
        x: Tokens ``(B, N, C)`` that fill the grid.
        grid: Their grid.

    Returns:
        ``(B, C, H, W)``, or ``(B*T, C, H, W)``; prefix tokens are left out.
    """
    *frames, rows, cols = grid.size
    spatial = x[:, grid.num_prefix_tokens :] if grid.num_prefix_tokens else x
    # (B, T*H*W, C) -> (B*T, H, W, C) -> (B*T, C, H, W); a plain grid is one frame
    maps = spatial.reshape(x.shape[0] * math.prod(frames), rows, cols, x.shape[-1])
    return maps.permute(0, 3, 1, 2)


def frames_to_tokens(maps: Tensor, grid: TokenGrid) -> Tensor:
    """Unfold maps into tokens; the inverse of ``tokens_to_frames``, for maps of any size.

    Args:
        maps: ``(B, C, h, w)``, or ``(B*T, C, h, w)``.
        grid: The grid that the maps were made of, which says how many frames an image has.

    Returns:
        Tokens ``(B, h*w, C)``, or ``(B, T*h*w, C)``, without prefix tokens.
    """
    frames = math.prod(grid.size[:-2])
    count, dim, rows, cols = maps.shape
    return maps.permute(0, 2, 3, 1).reshape(count // frames, frames * rows * cols, dim)


def behind_prefix(
    tokens: Tensor,
    x: Tensor,
    num_prefix_tokens: int,
    policy: PrefixTokens = PrefixTokens.PASS,
) -> Tensor:
    """Tokens behind the prefix tokens of others, which takes a copy where there are some.

    Args:
        tokens: ``(B, N, C)``.
        x: Its first tokens are the prefix; they take the dtype of ``tokens``.
        num_prefix_tokens: How many.
        policy: ``ZERO`` makes zeros of them, any other leaves them as they are.
    """
    if not num_prefix_tokens:
        return tokens
    prefix = x[:, :num_prefix_tokens].to(tokens.dtype)
    if policy == PrefixTokens.ZERO:
        prefix = torch.zeros_like(prefix)
    return torch.cat([prefix, tokens], dim=1)
