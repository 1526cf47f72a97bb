"""Blocks on maps: steps in a row, which take tokens as well.

Shape letters: B batch, C channels, N tokens = P prefix + grid, K kernel side.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from tokenconv.blocks import layout
from tokenconv.blocks.chain import Steps
from tokenconv.blocks.folding import fold_convs_
from tokenconv.blocks.map_layers import conv, in_a_row
from tokenconv.blocks.starts import init_torch_, silence_
from tokenconv.grid import Grid, PrefixTokens
from tokenconv.layers import GridModule


class MapBlock(GridModule):
    """Steps on maps, one after another; common to the classic depthwise separable blocks.

    ``block(fmap)`` takes ``(B, C, H, W)`` and gives a map. ``block(x, *grid)`` lays tokens out as
    one, runs on it, and gives tokens; with a stride it gives ``(tokens, TokenGrid)``. Frames of a
    ``(T, H, W)`` grid are images by themselves. Prefix tokens pass unchanged, so the width must
    stay where there are some. Convolutions are zero-padded by half their reach.

    Args:
        dim: Channels C.
        out_dim: Channels that come out; None takes ``dim``.
        kernel_size: Odd kernel side K, several where the block has several; None takes the paper's.
        stride: Step of the convolution over the grid: ``ceil(H / stride)`` rows come out.
        residual: Add the input where width and size stay; None does as the paper.
        **own: Arguments that only one block has.

    Raises:
        ValueError: If a width or the stride is not positive, the kernel is even, or a width does
            not fit the block.
        GridError: If tokens do not fill the grid, or prefix tokens would change their width.
        TypeError: If the block has no such argument.
    """

    kernel_size: int | tuple[int, ...] = 3
    """Of the class: the paper's."""
    adds_input: ClassVar[bool] = False
    """Whether the paper adds the input."""
    projects_input: ClassVar[bool] = False
    """Whether it adds a 1x1 convolution of the input and a norm where width or size change."""
    init: ClassVar[Callable[[nn.Module], None]] = staticmethod(init_torch_)
    """How the paper's code starts the weights."""
    prefix_tokens: PrefixTokens = PrefixTokens.PASS
    """What they do: stay as they are, or become zero."""

    def __init__(
        self,
        dim: int,
        *,
        out_dim: int | None = None,
        kernel_size: int | Sequence[int] | None = None,
        stride: int = 1,
        residual: bool | None = None,
        **own: Any,
    ):
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        if min(dim, out_dim, stride) < 1:
            raise ValueError(
                f"expected positive dim, out_dim and stride, got {dim=}, {out_dim=}, {stride=}"
            )
        self.dim, self.out_dim, self.stride = dim, out_dim, stride
        self.kernel_size = self._sides(kernel_size)
        steps = self.steps(dim, out_dim, self.kernel_size, stride, **own)
        self.body = in_a_row(steps)
        adds_input = self.adds_input if residual is None else residual
        self.skip = self.shortcut(dim, out_dim, stride) if adds_input else None
        self.after = self.behind(out_dim)
        self.reset_parameters()

    def _sides(self, kernel_size: int | Sequence[int] | None) -> Any:
        """One kernel side, or several where the paper's block has several."""
        sides = self.kernel_size if kernel_size is None else kernel_size
        many = isinstance(self.kernel_size, tuple)
        row = tuple(sides) if isinstance(sides, Sequence) else (sides,)
        if not row or any(side < 1 or side % 2 == 0 for side in row) or not (many or len(row) == 1):
            wanted = "odd kernel_size, one or several" if many else "odd kernel_size"
            raise ValueError(f"expected an {wanted}, got {kernel_size}")
        return row if many else row[0]

    def steps(self, dim: int, out_dim: int, side: Any, stride: int) -> Steps:
        """The paper's steps, in their order."""
        raise NotImplementedError

    def shortcut(self, dim: int, out_dim: int, stride: int) -> nn.Module | None:
        """What the input goes through before it is added; None adds nothing."""
        if stride == 1 and out_dim == dim:
            return nn.Identity()
        if not self.projects_input:
            return None
        return nn.Sequential(conv(dim, out_dim, stride=stride), nn.BatchNorm2d(out_dim))

    def behind(self, out_dim: int) -> nn.Module | None:
        """What follows the addition."""
        return None

    def reset_parameters(self) -> None:
        """Initialise as the paper's code does."""
        type(self).init(self)

    def init_neutral_(self) -> None:
        """Make what the steps give zero, by the last of them; the others start anew."""
        type(self).reset_parameters(self)
        silence_(self.body)

    def run(self, fmap: Tensor) -> Tensor:
        """Run on a map."""
        out = self.body(fmap)
        if self.skip is not None:
            out = out + self.skip(fmap)
        return out if self.after is None else self.after(out)

    def forward(self, x: Tensor, *grid: Grid) -> Any:
        """Run on a map, or on tokens and their grid; see the class."""
        if not grid:
            return self.run(layout.checked_map(x, self.dim))
        fmap = self.run(layout.to_map(layout.checked(x, grid, self.dim), grid))
        tokens = layout.behind_prefix(layout.to_tokens(fmap, grid), x, grid, self.prefix_tokens)
        return tokens if self.stride == 1 else (tokens, layout.grid_behind(fmap, grid))

    fold_ = fold_convs_

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.dim}, {self.out_dim}, stride={self.stride}"


class Mixer(MapBlock):
    """A block on maps that keeps width and size, as what stands in place of attention does.

    Args besides those of ``MapBlock``, without ``out_dim`` and ``stride``:
        **own: Arguments that only one block has.

    Raises:
        ValueError: As ``MapBlock``, and if ``out_dim`` is not ``dim`` or the stride is not one.
    """

    def steps(self, dim: int, out_dim: int, side: Any, stride: int, **own: Any) -> Steps:
        """See ``mix``."""
        if out_dim != dim or stride != 1:
            raise ValueError(
                f"expected out_dim == dim and stride 1, since {type(self).__name__} keeps width "
                f"and size, got {dim=}, {out_dim=}, {stride=}"
            )
        return self.mix(dim, side, **own)

    def mix(self, dim: int, side: Any) -> Steps:
        """The paper's steps, in their order."""
        raise NotImplementedError
