"""Activations that torch does not have."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 * x)``, CLIP's activation."""

    def forward(self, x: Tensor) -> Tensor:
        """Activate."""
        return x * torch.sigmoid(1.702 * x)


class StarReLU(nn.Module):
    """``scale * relu(x)**2 + bias``, with one learnt number each; MetaFormer's activation.

    They start from one and zero, as in the official code; the paper derives 0.8944 and -0.4472.

    References:
        https://arxiv.org/abs/2210.13452
    """

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(1))
        self.bias = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as the official code does."""
        nn.init.ones_(self.scale)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Activate."""
        return self.scale * F.relu(x) ** 2 + self.bias
