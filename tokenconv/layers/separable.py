"""Depthwise separable convolution as a module.

Shape letters: B batch, N tokens = P prefix + grid, C channels, K kernel side.
"""

from torch import Tensor, nn

from tokenconv.grid import Grid
from tokenconv.layers.base import GridModule
from tokenconv.layers.depthwise import DWConv
from tokenconv.ops.depthwise_conv import Impl


class SeparableConv(GridModule):
    """Depthwise, then pointwise convolution on tokens, with nothing between them.

    Formula: ``y[p, o] = b[o] + sum_c P[o, c] * (sum_q D[c, q] * x[p + q, c])`` on the grid. Prefix
    tokens skip the depthwise part and take the pointwise one, which is a linear layer. Parameters:
    ``C*K*K + C*out_dim``, plus ``C + out_dim`` with bias; initialised as ``nn.Conv2d`` and
    ``nn.Linear``. Keys: ``depthwise`` and ``pointwise``.

    Args:
        dim: Channels C.
        kernel_size: Odd kernel side K.
        out_dim: Channels that come out; None takes ``dim``.
        dilation: Distance between kernel taps, in tokens.
        bias: Learn offsets, in both parts.
        impl: Implementation of the depthwise op, see ``Impl``; None chooses.

    Raises:
        ValueError: If a width or ``dilation`` is not positive, or the kernel is even.

    References:
        MobileNets, https://arxiv.org/abs/1704.04861; Xception, https://arxiv.org/abs/1610.02357
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        *,
        out_dim: int | None = None,
        dilation: int = 1,
        bias: bool = True,
        impl: Impl | str | None = None,
    ):
        super().__init__()
        if out_dim is not None and out_dim < 1:
            raise ValueError(f"expected out_dim >= 1, got {out_dim}")
        self.depthwise = DWConv(dim, kernel_size, dilation=dilation, bias=bias, impl=impl)
        self.pointwise = nn.Linear(dim, out_dim or dim, bias=bias)

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Conv2d`` and ``nn.Linear`` do."""
        self.depthwise.reset_parameters()
        self.pointwise.reset_parameters()

    def init_neutral_(self) -> None:
        """Make the output zero; gradients reach the pointwise part first."""
        self.depthwise.reset_parameters()
        for parameter in self.pointwise.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, *grid: Grid) -> Tensor:
        """Convolve the tokens.

        Args:
            x: Tokens ``(B, N, C)``.
            *grid: ``H, W`` as integers, one tuple, a ``TokenGrid`` or a ``SparseGrid``.

        Returns:
            Tokens ``(B, N, out_dim)``.

        Raises:
            GridError: If ``x`` does not fill the grid.
        """
        return self.pointwise(self.depthwise(x, *grid))
