"""What all stems have in common.

Shape letters: B batch, I channels that come in, H rows, W columns, N tokens that come out, C
channels, K kernel side, w width inside.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenconv.blocks import layout
from tokenconv.blocks.chain import Steps
from tokenconv.blocks.folding import fold_convs_
from tokenconv.blocks.map_layers import conv, in_a_row
from tokenconv.blocks.starts import init_torch_
from tokenconv.grid import Grid, TokenGrid, map_to_tokens
from tokenconv.layers import GridModule


class Stem(GridModule):
    """Steps that make a smaller map of an image or a map; common to the stems.

    ``stem(images)`` takes ``(B, I, H, W)`` and gives ``(tokens, TokenGrid)``, the tokens ``(B, N,
    C)``; ``stem.run(images)`` gives them as a map ``(B, C, rows, columns)``. Between the stages of
    a pyramid, ``stem(x, *grid)`` takes tokens of I channels, without prefix tokens unless C is I.

    Args:
        dim: Channels C that come out.
        in_chans: Channels I that come in.
        **own: Arguments that only one stem has.

    Raises:
        ValueError: If a width is not positive, or an argument does not fit the stem.
        GridError: If what comes has another width, or does not fill its grid.
        TypeError: If the stem has no such argument.
    """

    init: ClassVar[Callable[[nn.Module], None]] = staticmethod(init_torch_)
    """How the paper's code starts the weights."""

    def __init__(self, dim: int, *, in_chans: int = 3, **own: Any):
        super().__init__()
        if min(dim, in_chans) < 1:
            raise ValueError(f"expected positive dim and in_chans, got {dim=}, {in_chans=}")
        self.dim, self.in_chans = dim, in_chans
        steps = self.steps(dim, in_chans, **own)
        self.body = in_a_row(steps)
        self.reset_parameters()

    def steps(self, dim: int, in_chans: int) -> Steps:
        """The paper's steps on maps, in their order."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Initialise as the paper's code does."""
        type(self).init(self)

    def run(self, images: Tensor) -> Tensor:
        """The tokens of images, as a map."""
        return self.body(layout.checked_map(images, self.in_chans))

    def forward(self, x: Tensor, *grid: Grid) -> Any:
        """Tokens and their grid; see the class."""
        if not grid:
            return tokens_and_grid(self.run(x))
        fmap = self.run(layout.to_map(layout.checked(x, grid, self.in_chans), grid))
        tokens = layout.behind_prefix(layout.to_tokens(fmap, grid), x, grid)
        return tokens, layout.grid_behind(fmap, grid)

    fold_ = fold_convs_

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.dim}, in_chans={self.in_chans}"


@torch.fx.wrap
def tokens_and_grid(fmap: Tensor) -> tuple[Tensor, TokenGrid]:
    """A map as tokens."""
    return map_to_tokens(fmap), TokenGrid(fmap.shape[2:])


# --- parts ---


def patches(dim: int, out_dim: int, side: int, *, bias: bool = True) -> nn.Conv2d:
    """A convolution whose windows touch, and do not overlap."""
    return nn.Conv2d(dim, out_dim, side, side, bias=bias)


def conv_row(
    widths: Sequence[int],
    side: int,
    strides: Sequence[int],
    act: Callable[[], nn.Module],
    *,
    bias: bool = False,
    act_first: bool = False,
) -> dict[str, nn.Module]:
    """Convolutions from width to width, each with a BatchNorm and an activation behind it."""
    if min(widths, default=0) < 1:
        raise ValueError(f"expected positive widths, got {tuple(widths[1:])}")
    if side < 1:
        raise ValueError(f"expected a kernel side of 1 or more, got {side}")
    steps: dict[str, nn.Module] = {}
    for i, ((dim, out_dim), stride) in enumerate(zip(pairwise(widths), strides, strict=True), 1):
        steps[f"conv{i}"] = conv(dim, out_dim, side, stride=stride, bias=bias)
        behind = {f"norm{i}": nn.BatchNorm2d(out_dim), f"act{i}": act()}
        steps |= dict(reversed(behind.items())) if act_first else behind
    return steps
