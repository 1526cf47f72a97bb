"""Depthwise separable convolution as a module.

Shape letters: B batch, N tokens = P prefix + grid, C channels, K kernel side.
"""

from collections.abc import Callable

from torch import Tensor, nn

from tokenconv.grid import Grid
from tokenconv.layers.base import GridModule
from tokenconv.layers.depthwise import DWConv
from tokenconv.ops.depthwise_conv import Impl


class SeparableConv(GridModule):
    """Depthwise, then pointwise convolution on tokens; as in Xception nothing between them.

    Formula: ``y[p, o] = b[o] + sum_c P[o, c] * (sum_q D[c, q] * x[p + q, c])`` on the grid, with
    ``norm_layer`` and ``act_layer`` applied to the inner sum. Prefix tokens skip the depthwise part
    and take the others; the pointwise one is a linear layer. Parameters without a norm:
    ``C*K*K + C*out_dim``, plus ``C + out_dim`` with bias; initialised as ``nn.Conv2d`` and
    ``nn.Linear``. Keys: ``depthwise``, ``norm``, ``act``, ``pointwise``.

    Args:
        dim: Channels C.
        kernel_size: Odd kernel side K.
        out_dim: Channels that come out; None takes ``dim``.
        dilation: Distance between kernel taps, in tokens.
        bias: Learn offsets, in both parts.
        norm_layer: Makes a norm of ``dim`` channels between the parts, for tokens ``(B, N, C)``:
            ``nn.LayerNorm``, or ``tokenconv.layers.BatchNorm``, not torch's.
        act_layer: Makes an activation between the parts, behind the norm.
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
        norm_layer: Callable[[int], nn.Module] | None = None,
        act_layer: Callable[[], nn.Module] | None = None,
        impl: Impl | str | None = None,
    ):
        super().__init__()
        if out_dim is not None and out_dim < 1:
            raise ValueError(f"expected out_dim >= 1, got {out_dim}")
        self.depthwise = DWConv(dim, kernel_size, dilation=dilation, bias=bias, impl=impl)
        self.norm = norm_layer(dim) if norm_layer else nn.Identity()
        self.act = act_layer() if act_layer else nn.Identity()
        self.pointwise = nn.Linear(dim, out_dim or dim, bias=bias)

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Conv2d`` and ``nn.Linear`` do, a norm as it does itself."""
        for part in self.modules():
            if part is not self and hasattr(part, "reset_parameters"):
                part.reset_parameters()  # pyright: ignore[reportCallIssue]

    def init_neutral_(self) -> None:
        """Make the output zero; gradients reach the pointwise part first."""
        type(self).reset_parameters(self)  # surgery hides it
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
        return self.pointwise(self.act(self.norm(self.depthwise(x, *grid))))
