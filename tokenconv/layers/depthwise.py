"""Depthwise convolution as a module.

Shape letters: B batch, N tokens = P prefix + grid, C channels, K kernel side.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from tokenconv.grid import Grid, grid_of
from tokenconv.layers.base import GridModule
from tokenconv.ops.depthwise_conv import Activation, Impl, depthwise_conv

_FOLDED = 2
"""Version, in the metadata of a state dict, of a kernel that the residual was added to."""


class DWConv(GridModule):
    """Depthwise convolution on tokens, called as in the papers' code: ``DWConv(dim)(x, H, W)``.

    Formula: ``y[p] = bias + sum_q weight[q] * x[p + q]`` on the grid, ``y = x`` on prefix tokens;
    with ``residual`` the convolution is added to ``x``, and prefix tokens still pass unchanged. An
    ``activation`` follows, for all tokens, in the same pass over memory where ``impl`` can do that.
    Parameters: ``dim * K * K``, plus ``dim`` with bias; initialised as ``nn.Conv2d``.

    ``load_state_dict`` takes the keys ``weight`` and ``bias``, and those of the classic module
    (``dwconv.weight``, ``dwconv.bias``) as well.

    Args:
        dim: Channels C.
        kernel_size: Odd kernel side K.
        dilation: Distance between kernel taps, in tokens.
        bias: Learn one offset per channel.
        residual: Return ``x + conv(x)`` instead of ``conv(x)``.
        activation: What follows, one of ``gelu``, ``gelu_tanh``, ``silu``, ``relu``; None for none.
        impl: Implementation of the op, see ``Impl``; None chooses.
        device: As in ``nn.Conv2d``.
        dtype: As in ``nn.Conv2d``.

    Raises:
        ValueError: If ``dim`` or ``dilation`` is not positive, the kernel is even, or
            ``activation`` or ``impl`` is unknown.

    References:
        PVT v2, https://arxiv.org/abs/2106.13797; MobileNets, https://arxiv.org/abs/1704.04861
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        *,
        dilation: int = 1,
        bias: bool = True,
        residual: bool = False,
        activation: Activation | str | None = None,
        impl: Impl | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim < 1 or dilation < 1:
            raise ValueError(f"expected dim >= 1 and dilation >= 1, got {dim=}, {dilation=}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"expected an odd kernel_size, got {kernel_size}")
        self.dim = dim
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.residual = residual
        self.activation = None if activation is None else Activation.of(activation)
        self.impl = None if impl is None else Impl.of(impl)
        placement: Any = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(dim, 1, kernel_size, kernel_size, **placement))
        self.bias = nn.Parameter(torch.empty(dim, **placement)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Conv2d`` does: uniform within ``1 / K``."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / self.kernel_size, 1 / self.kernel_size)

    def init_neutral_(self) -> None:
        """Make the convolution zero, so that with ``residual`` the output equals the input."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        if self._version == _FOLDED:  # the residual is in the kernel
            nn.init.dirac_(self.weight, groups=self.dim)

    def fold_(self) -> bool:
        """Add the residual to the kernel, in place, for inference: its centre grows by 1.

        Equal in real arithmetic. Float16 and bfloat16 are refused, since ``1 + w`` loses most of a
        small ``w`` there; for the same reason do not convert to them, or use autocast or TF32,
        afterwards. The state dict then holds the folded kernel, and its metadata say so: loading
        it where the residual is still added, or the reverse, is an error.

        Returns:
            Whether anything changed.

        Raises:
            ValueError: If the kernel is stored in fewer than 32 bits.
        """
        if not self.residual:
            return False
        if self.weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"its kernel is {str(self.weight.dtype).removeprefix('torch.')}, in which 1 + w "
                f"loses most of a small w; expected float32 or float64"
            )
        centre, needs_grad = self.kernel_size // 2, self.weight.requires_grad
        with torch.inference_mode(False), torch.no_grad():
            weight = self.weight.clone()
            weight[:, :, centre, centre] += 1
            self.weight = nn.Parameter(weight, requires_grad=needs_grad)
        self.residual, self._version = False, _FOLDED
        return True

    def forward(self, x: Tensor, *grid: Grid, gate: Tensor | None = None) -> Tensor:
        """Convolve the tokens.

        Args:
            x: Tokens ``(B, N, C)``.
            *grid: ``H, W`` as integers, one tuple, a ``TokenGrid`` or a ``SparseGrid``.
            gate: ``(B, N, C)``, multiplied with the result, in the same pass where possible.

        Returns:
            Tokens ``(B, N, C)``.

        Raises:
            GridError: If ``x`` does not fill the grid.
            ValueError: If ``gate`` has another shape, or the implementation asked for cannot take
                the tokens.
        """
        return _convolve(
            x, self.weight, self.bias, grid, self.dilation, self.residual, self.activation, gate,
            self.impl,
        )  # fmt: skip

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in ("weight", "bias"):
            classic = f"{prefix}dwconv.{name}"
            if classic in state_dict and f"{prefix}{name}" not in state_dict:
                state_dict[f"{prefix}{name}"] = state_dict.pop(classic)
        stored = local_metadata.get("version", self._version)
        if stored != self._version and (self.residual or self._version == _FOLDED):
            error_msgs.append(
                f"{prefix}weight is {'' if stored == _FOLDED else 'not '}folded, and this model is "
                f"{'not ' if stored == _FOLDED else ''}: load before fold_, or fold both"
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return (
            f"{self.dim}, kernel_size={self.kernel_size}, dilation={self.dilation}, "
            f"bias={self.bias is not None}, residual={self.residual}"
            + (f", activation={self.activation}" if self.activation else "")
        )


def unlike_dwconv(conv: nn.Conv2d) -> str:
    """Why an ``nn.Conv2d`` computes something else on maps than a ``DWConv``; empty if the same."""
    side, dilation = conv.kernel_size[0], conv.dilation[0]
    if not conv.groups == conv.in_channels == conv.out_channels:
        return f"it has {conv.groups} groups for {conv.in_channels} -> {conv.out_channels} channels"
    if conv.stride != (1, 1):
        return f"it has a stride of {conv.stride}"
    if conv.dilation != (dilation, dilation):
        return f"it has a dilation of {conv.dilation}"
    if conv.kernel_size != (side, side) or side % 2 == 0:
        return f"its kernel of {conv.kernel_size} is not odd and square"
    if conv.padding not in ("same", (dilation * (side // 2),) * 2) or conv.padding_mode != "zeros":
        return "its padding does not keep the size with zeros"
    return ""


@torch.fx.wrap
def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[Grid, ...],
    dilation: int,
    residual: bool,
    activation: Activation | None,
    gate: Tensor | None,
    impl: Impl | str | None,
) -> Tensor:
    """One fx node: the checks behind it cannot be traced symbolically."""
    return depthwise_conv(
        x, weight, bias, grid_of(*grid), dilation=dilation, residual=residual,
        activation=activation, gate=gate, impl=impl,
    )  # fmt: skip
