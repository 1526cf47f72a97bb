"""Norms, scales and products on maps ``(B, C, H, W)``."""

import torch
from torch import Tensor, nn

from tokenconv.layers import GlobalResponseNorm


class LayerNorm2d(nn.LayerNorm):
    """``nn.LayerNorm`` over the channels of every pixel."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResponseNorm2d(GlobalResponseNorm):
    """``GlobalResponseNorm`` on a map."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Let the channels compete."""
        rows, cols = x.shape[2], x.shape[3]
        tokens = super().forward(x.flatten(2).transpose(1, 2), rows, cols)
        return tokens.transpose(1, 2).unflatten(2, (rows, cols))


class LayerScale2d(nn.Module):
    """``gamma * x``, a number per channel.

    Args:
        dim: Channels C.
        value: What the numbers start from.
    """

    def __init__(self, dim: int, value: float):
        super().__init__()
        self.value = value
        self.gamma = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from the one value."""
        nn.init.constant_(self.gamma, self.value)

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels."""
        return x * self.gamma[:, None, None]


class Modulated(nn.Module):
    """``context(x) * value(x)``, common to all convolutional modulation.

    Args:
        context: What gives the weights; its convolutions see the neighbours.
        value: What is weighed; None takes ``x``.
    """

    def __init__(self, context: nn.Module, value: nn.Module | None = None):
        super().__init__()
        self.context = context
        self.value = nn.Identity() if value is None else value

    def forward(self, x: Tensor) -> Tensor:
        """Modulate."""
        return self.context(x) * self.value(x)
