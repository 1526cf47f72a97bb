"""Position encodings by convolution over the token grid.

Shape letters: B batch, N tokens = P prefix + grid, C channels, K kernel side.
"""

import math

from torch import Tensor, nn

from tokenconv.grid import Grid
from tokenconv.layers import DWConv, GridModule
from tokenconv.ops.depthwise_conv import Impl


class PEG(GridModule):
    """Position encoding generator: ``x + DWConv(x)``; prefix tokens pass unchanged.

    Zero padding tells the tokens where the border is. CPVT and Twins put it behind the first block
    of the network or of a stage. Parameters: ``dim * (K*K + 1)``. The kernel starts from a normal
    of std ``sqrt(2) / K``, the bias from zero. Keys: ``proj``; those of the official module
    (``proj.0.weight``) load as well.

    Args:
        dim: Channels C.
        kernel_size: Odd kernel side K.
        impl: Implementation of the convolution, see ``Impl``; None chooses.

    Raises:
        ValueError: If the kernel is even or ``dim`` is not positive.

    References:
        CPVT, https://arxiv.org/abs/2102.10882; Twins, https://arxiv.org/abs/2104.13840
    """

    def __init__(self, dim: int, *, kernel_size: int = 3, impl: Impl | str | None = None):
        super().__init__()
        self.proj = DWConv(dim, kernel_size, residual=True, impl=impl)
        self._register_load_state_dict_pre_hook(_accept_official_keys)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the Twins repository does."""
        nn.init.normal_(self.proj.weight, std=math.sqrt(2) / self.proj.kernel_size)
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def init_neutral_(self) -> None:
        """Make the output equal to the input."""
        self.proj.init_neutral_()

    def no_weight_decay(self) -> set[str]:
        """Parameters that Twins keeps out of weight decay: the kernel (biases always are)."""
        return {"proj.weight"}

    def forward(self, x: Tensor, *grid: Grid) -> Tensor:
        """Add the position encoding.

        Args:
            x: Tokens ``(B, N, C)``.
            *grid: ``H, W`` as integers, one tuple, a ``TokenGrid`` or a ``SparseGrid``.

        Returns:
            Tokens ``(B, N, C)``.

        Raises:
            GridError: If ``x`` does not fill the grid.
        """
        return self.proj(x, *grid)


def _accept_official_keys(state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
    for name in ("weight", "bias"):
        if (official := f"{prefix}proj.0.{name}") in state_dict:
            state_dict[f"{prefix}proj.{name}"] = state_dict.pop(official)
