"""What a module is that needs to know where its tokens lie."""

from torch import Tensor, nn

from tokenconv.grid import Grid


class GridModule(nn.Module):
    """A module that is called with tokens and their grid: ``module(x, *grid)``."""

    def forward(self, x: Tensor, *grid: Grid) -> Tensor:
        """Run the module.

        Args:
            x: Tokens ``(B, N, C)``.
            *grid: ``H, W`` as integers, one tuple, or a grid of ``tokenconv.grid``.

        Returns:
            Tokens ``(B, N, C)``, in the order of ``x``.

        Raises:
            GridError: If ``x`` does not hold the tokens of the grid.
        """
        raise NotImplementedError
