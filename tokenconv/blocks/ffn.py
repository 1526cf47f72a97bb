"""Feed-forward blocks with a convolution over the token grid.

Shape letters: B batch, N tokens = P prefix + grid, C channels.
"""

import math
from collections.abc import Callable

from torch import Tensor, nn

from tokenconv.grid import Grid
from tokenconv.layers import DWConv, SeparableConv
from tokenconv.ops.depthwise_conv import Impl


class MixFFN(nn.Module):
    """Feed-forward with a depthwise convolution between the projection and the activation.

    Order of operations: ``fc1 -> [ReLU, if linear] -> DWConv -> activation -> dropout -> fc2 ->
    dropout``; no norm, no residual. The papers have no prefix tokens; here they skip the
    convolution and take the rest.

    Parameters, with ``h = int(dim * mlp_ratio)``: ``2*dim*h + h + dim + (K*K + 1)*h``. Linear
    weights start from a truncated normal of std 0.02, the depthwise kernel from a normal of std
    ``sqrt(2) / K``, biases from zero. Keys: ``fc1``, ``dwconv``, ``fc2``, as in
    ``timm.models.pvt_v2.MlpWithDepthwiseConv``; the official ``dwconv.dwconv`` loads as well.

    Args:
        dim: Channels C, in and out.
        mlp_ratio: Hidden width over ``dim``; PVTv2 takes 8 in early and 4 in late stages,
            SegFormer 4.
        kernel_size: Odd kernel side K.
        dilation: Distance between kernel taps, in tokens.
        act_layer: Makes the activation.
        drop: Dropout probability after the activation and after ``fc2``.
        linear: Put a ReLU in front of the convolution, as PVTv2-Linear does.
        impl: Implementation of the convolution, see ``Impl``; None chooses.

    Raises:
        ValueError: If the kernel is even, or ``dim`` or the hidden width is not positive.

    References:
        PVT v2, https://arxiv.org/abs/2106.13797; SegFormer, https://arxiv.org/abs/2105.15203
    """

    def __init__(
        self,
        dim: int,
        *,
        mlp_ratio: float = 4.0,
        kernel_size: int = 3,
        dilation: int = 1,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        linear: bool = False,
        impl: Impl | str | None = None,
    ):
        super().__init__()
        hidden_dim = _hidden_dim(dim, mlp_ratio)
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.relu = nn.ReLU() if linear else nn.Identity()
        self.dwconv = DWConv(hidden_dim, kernel_size, dilation=dilation, impl=impl)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the PVTv2 and SegFormer repositories do."""
        _init_linears_(self.fc1, self.fc2)
        nn.init.normal_(self.dwconv.weight, std=math.sqrt(2) / self.dwconv.kernel_size)
        if self.dwconv.bias is not None:
            nn.init.zeros_(self.dwconv.bias)

    def forward(self, x: Tensor, *grid: Grid) -> Tensor:
        """Run the feed-forward.

        Args:
            x: Tokens ``(B, N, C)``.
            *grid: ``H, W`` as integers, one tuple, a ``TokenGrid`` or a ``SparseGrid``.

        Returns:
            Tokens ``(B, N, C)``.

        Raises:
            GridError: If ``x`` does not fill the grid.
        """
        x = self.relu(self.fc1(x))
        x = self.drop(self.act(self.dwconv(x, *grid)))
        return self.drop(self.fc2(x))


class SeparableFFN(nn.Module):
    """Feed-forward with a depthwise separable convolution beside it.

    Formula: ``fc2(act(fc1(x))) + SeparableConv(x)``, dropout after the activation and at the end;
    no norm, no residual. Prefix tokens skip the depthwise part of the convolution and take the
    rest. Parameters, with ``h = int(dim * mlp_ratio)``:
    ``2*dim*h + h + dim + dim*(K*K + 1) + dim*dim + dim``. Linear weights start from a truncated
    normal of std 0.02, biases from zero, the depthwise kernel as ``nn.Conv2d``. Keys: ``fc1``,
    ``fc2`` as in ``timm.layers.Mlp``, ``conv.depthwise``, ``conv.pointwise``.

    Args:
        dim: Channels C, in and out.
        mlp_ratio: Hidden width over ``dim``.
        kernel_size: Odd kernel side K.
        dilation: Distance between kernel taps, in tokens.
        act_layer: Makes the activation.
        drop: Dropout probability after the activation and at the end.
        impl: Implementation of the depthwise op, see ``Impl``; None chooses.

    Raises:
        ValueError: If the kernel is even, or ``dim`` or the hidden width is not positive.

    References:
        The convolution: MobileNets, https://arxiv.org/abs/1704.04861; a branch of that kind beside
        the MLP of a ViT: Convpass, https://arxiv.org/abs/2207.07039
    """

    def __init__(
        self,
        dim: int,
        *,
        mlp_ratio: float = 4.0,
        kernel_size: int = 3,
        dilation: int = 1,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        impl: Impl | str | None = None,
    ):
        super().__init__()
        hidden_dim = _hidden_dim(dim, mlp_ratio)
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.conv = SeparableConv(dim, kernel_size, dilation=dilation, impl=impl)
        self.drop = nn.Dropout(drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linear weights from a truncated normal, the depthwise kernel as ``nn.Conv2d``."""
        self.conv.reset_parameters()
        _init_linears_(self.fc1, self.fc2, self.conv.pointwise)

    def forward(self, x: Tensor, *grid: Grid) -> Tensor:
        """Run the feed-forward.

        Args:
            x: Tokens ``(B, N, C)``.
            *grid: ``H, W`` as integers, one tuple, a ``TokenGrid`` or a ``SparseGrid``.

        Returns:
            Tokens ``(B, N, C)``.

        Raises:
            GridError: If ``x`` does not fill the grid.
        """
        out = self.fc2(self.drop(self.act(self.fc1(x))))
        return self.drop(out + self.conv(x, *grid))


def _hidden_dim(dim: int, mlp_ratio: float) -> int:
    hidden_dim = int(dim * mlp_ratio)
    if dim < 1 or hidden_dim < 1:
        raise ValueError(f"expected dim and int(dim * mlp_ratio) >= 1, got {dim=}, {mlp_ratio=}")
    return hidden_dim


def _init_linears_(*linears: nn.Linear) -> None:
    for linear in linears:
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)


# --- what surgery puts into a model that has an MLP ---


def conv_around_activation(
    dim: int,
    *,
    kernel_size: int = 3,
    dilation: int = 1,
    bias: bool = True,
    impl: Impl | str | None = None,
) -> DWConv:
    """What ``mix_ffn`` adds before or after the activation of an MLP: ``x + conv(x)``."""
    return DWConv(dim, kernel_size, dilation=dilation, bias=bias, residual=True, impl=impl)


def second_kernel(
    dim: int, *, kernel_size: int = 3, dilation: int = 1, bias: bool = True
) -> DWConv:
    """What ``mix_ffn`` adds to an MLP with a convolution: a kernel beside the one it has."""
    return DWConv(dim, kernel_size, dilation=dilation, bias=bias)


def separable_branch(
    dim: int,
    *,
    kernel_size: int = 3,
    dilation: int = 1,
    bias: bool = True,
    impl: Impl | str | None = None,
) -> SeparableConv:
    """What ``separable_ffn`` puts beside an MLP or attention, or in place of attention."""
    return SeparableConv(dim, kernel_size, dilation=dilation, bias=bias, impl=impl)
