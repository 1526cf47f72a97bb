"""What blocks are composed of: steps on tokens in a row, a shortcut around some, a gate.

Shape letters: B batch, N tokens = P prefix + grid, C channels, K kernel side.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from tokenconv.blocks import layout
from tokenconv.blocks.folding import check_foldable, fold_norms_
from tokenconv.grid import AnyGrid, Grid, PrefixTokens
from tokenconv.layers import DWConv, GridModule

Steps = Mapping[str, nn.Module | None]
"""Modules by name, in their order; None is left out."""


class Chain(GridModule):
    """Steps on tokens, one after another; those that need the grid are given it.

    Args:
        **steps: Modules by name, in their order; None is left out.
    """

    prefix_tokens: PrefixTokens = PrefixTokens.ACT
    """What they do: take all steps but convolutions, stay as they are, or become zero."""

    def __init__(self, **steps: nn.Module | None):
        super().__init__()
        for name, step in steps.items():
            if step is not None:
                self.add_module(name, step)

    def forward(self, x: Tensor, *grid: Grid) -> Tensor:
        """See ``GridModule``."""
        known = layout.grid_of(*grid)
        if self.prefix_tokens == PrefixTokens.ACT:
            return self.run(x, known)
        rest = layout.without_prefix(x, known)
        out = self.run(rest[0], rest[1])  # by index, as fx wants it
        return layout.behind_prefix(out, x, (known,), self.prefix_tokens)

    def run(self, x: Tensor, grid: AnyGrid) -> Tensor:
        """Run the steps."""
        for step in self._modules.values():  # children() would skip a module that is there twice
            x = step(x, grid) if isinstance(step, GridModule) else step(x)  # pyright: ignore
        return x

    def init_neutral_(self) -> None:
        """Make the output zero, by the last step that has parameters; the others start anew."""
        type(self).reset_parameters(self)  # pyright: ignore  # every block has it; surgery hides it
        last = [step for step in self.children() if next(step.parameters(), None) is not None][-1]
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def fold_(self) -> bool:
        """Fold norms into the layers beside them, in place, for inference.

        A ``BatchNorm`` goes into the linear layer in front of it or behind it, or into the
        convolution in front of it, if prefix tokens, which skip that, do not meet the norm; its
        keys go with it. What is inside the steps is folded as well. Equal in real arithmetic.

        Returns:
            Whether anything changed.

        Raises:
            ValueError: In training mode, or if values are stored in fewer than 32 bits.
        """
        check_foldable(self)
        inside = [step.fold_() for step in self.children() if hasattr(step, "fold_")]  # pyright: ignore
        prefix_skips = self.prefix_tokens == PrefixTokens.ACT
        return any([*inside, fold_norms_(self, but=DWConv if prefix_skips else ())])


class Shortcut(Chain):
    """``x`` plus what the steps make of it."""

    def run(self, x: Tensor, grid: AnyGrid) -> Tensor:
        """Run the steps, and add."""
        return x + super().run(x, grid)


class Local(Shortcut):
    """A shortcut around steps that prefix tokens do not take."""

    prefix_tokens = PrefixTokens.PASS
