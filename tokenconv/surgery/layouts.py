"""How tokens lie where a block of ours is called, so that it can be told their grid.

Shape letters: B batch, N tokens = P prefix + grid, C channels, H rows, W columns.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from timm.models.hiera import Unroll
from torch import Tensor, nn

from tokenconv.errors import GridError
from tokenconv.grid import SparseGrid, TokenGrid
from tokenconv.surgery.binding import GridBinding


class Layout(Protocol):
    """Calls a block of ours on what a site is given."""

    def call(self, block: nn.Module, x: Tensor) -> Tensor:
        """``block`` on ``x``, in the layout of ``x``."""
        ...


@dataclass(frozen=True)
class CarriedGrid:
    """Tokens ``(B, N, C)`` whose grid comes from a source, halved some times."""

    binding: GridBinding
    source: str
    halvings: int
    rounds_up: bool
    num_prefix_tokens: int

    def call(self, block: nn.Module, x: Tensor) -> Tensor:
        """See ``Layout``."""
        carrier = self.binding.carrier(self.source)
        grid = _grid(carrier, x, self.halvings, self.rounds_up, self.num_prefix_tokens)
        return block(x, grid)


@dataclass(frozen=True)
class ChannelsLastMap:
    """A map ``(B, H, W, C)``, which shows its grid."""

    def call(self, block: nn.Module, x: Tensor) -> Tensor:
        """See ``Layout``."""
        rows, cols = x.shape[1], x.shape[2]
        return block(x.flatten(1, 2), rows, cols).unflatten(1, (rows, cols))


class MaskUnits:
    """Tokens ``(B, N, C)`` in the order of a Hiera block, for images of one size."""

    def __init__(self, reroll: Any, index: int):
        self.reroll = reroll
        self.index = index
        schedule, self.size = reroll.schedule[index]
        self.unroll = Unroll(self.size, (1, 1), schedule)

    def call(self, block: nn.Module, x: Tensor) -> Tensor:
        """See ``Layout``."""
        rows, cols = self.size
        if x.shape[1] != rows * cols:
            raise GridError(
                f"expected {rows}*{cols} tokens, got {x.shape[1]}: images of another size, or "
                f"masked, where a convolution cannot run in Hiera"
            )
        x = self.reroll(x, self.index).flatten(1, 2)
        return self.unroll(block(x, rows, cols))


RETURNS: Mapping[str, Callable[[Tensor], Any]] = {
    "tokens": lambda fmap: fmap.flatten(2).transpose(1, 2),
    "tokens and size": lambda fmap: (fmap.flatten(2).transpose(1, 2), tuple(fmap.shape[2:])),
    "map": lambda fmap: fmap,
    "map, channels last": lambda fmap: fmap.permute(0, 2, 3, 1),
}
"""What a patch embedding returns of the map ``(B, C, H, W)`` of its tokens."""


def halved(side: int, times: int, rounds_up: bool) -> int:
    """A side of a grid after some halvings; a symbol stays a symbol."""
    for _ in range(times):
        side = (side + 1) // 2 if rounds_up else side // 2
    return side


@torch.fx.wrap
def _grid(
    carrier: Tensor, x: Tensor, halvings: int, rounds_up: bool, num_prefix_tokens: int
) -> TokenGrid | SparseGrid:
    """One fx node: the check in it cannot be traced symbolically."""
    if not carrier.is_floating_point():
        return SparseGrid(carrier, num_prefix_tokens)
    num_tokens, rows, cols = x.shape[1], carrier.shape[1], carrier.shape[2]
    if torch.jit.is_tracing():  # sizes are tensors then
        num_tokens, rows, cols = int(num_tokens), int(rows), int(cols)
    rows, cols = halved(rows, halvings, rounds_up), halved(cols, halvings, rounds_up)
    if num_tokens != num_prefix_tokens + rows * cols:
        raise GridError(
            f"expected {num_prefix_tokens} prefix tokens and {rows}*{cols} on the grid, got "
            f"{num_tokens} (shape {tuple(x.shape)}). Where tokens are dropped or masked by code of "
            f"your own, call tokenconv.keep_tokens there"
        )
    return TokenGrid((rows, cols), num_prefix_tokens)
