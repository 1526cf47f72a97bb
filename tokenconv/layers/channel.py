"""Gates and norms over channels, from what a channel is on the whole grid.

Shape letters: B batch, N tokens = P prefix + grid, C channels.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tokenconv.grid import Grid, TokenGrid
from tokenconv.layers.base import GridModule


class BatchNorm(nn.BatchNorm1d):
    """``nn.BatchNorm2d`` for tokens ``(B, N, C)``: statistics over all images and tokens.

    Keys and statistics are those of ``nn.BatchNorm2d`` on the folded grid. Prefix tokens, where
    they are not kept away from it, count like others.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Nothing: it could not be traced symbolically."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise every channel."""
        return super().forward(input.flatten(0, 1)).view(input.shape)


class SqueezeExcite(GridModule):
    """``x * gate(expand(act(reduce(mean(x)))))``; the mean is over the grid, without the prefix.

    Args:
        dim: Channels C.
        reduced_dim: Width between the two linear layers.
        act_layer: Makes the activation between them.
        gate_layer: Makes the gate.

    References:
        https://arxiv.org/abs/1709.01507
    """

    def __init__(
        self,
        dim: int,
        reduced_dim: int,
        *,
        act_layer: Callable[[], nn.Module] = nn.ReLU,
        gate_layer: Callable[[], nn.Module] = nn.Sigmoid,
    ):
        super().__init__()
        self.reduce = nn.Linear(dim, reduced_dim)
        self.act = act_layer()
        self.expand = nn.Linear(reduced_dim, dim)
        self.gate = gate_layer()

    def forward(self, x: Tensor, *grid: Grid) -> Tensor:
        """Scale the channels."""
        mean = _on_grid(x, grid).mean(dim=1, keepdim=True)
        return x * self.gate(self.expand(self.act(self.reduce(mean))))


class EfficientChannelAttention(GridModule):
    """``x * gate(conv1d(mean(x)))``: a convolution along the channels.

    The mean is over the grid, without the prefix.

    Args:
        dim: Channels C.
        gate_layer: Makes the gate.
        kernel_size: Odd width of the convolution; None takes the paper's, t or t + 1 of
            ``t = int(abs((log2(C) + 1) / 2))``.

    References:
        https://arxiv.org/abs/1910.03151
    """

    def __init__(
        self,
        dim: int,
        *,
        gate_layer: Callable[[], nn.Module] = nn.Sigmoid,
        kernel_size: int | None = None,
    ):
        super().__init__()
        t = int(abs((math.log2(dim) + 1) / 2))
        width = kernel_size or (t if t % 2 else t + 1)
        self.conv = nn.Conv1d(1, 1, width, padding=width // 2, bias=False)
        self.gate = gate_layer()

    def forward(self, x: Tensor, *grid: Grid) -> Tensor:
        """Scale the channels."""
        mean = _on_grid(x, grid).mean(dim=1, keepdim=True)
        return x * self.gate(self.conv(mean))


class GlobalResponseNorm(GridModule):
    """``x + weight * x * norm + bias``, where ``norm`` is a channel's share of all channels' norms.

    The L2 norm of a channel over the grid, without the prefix, is divided by the mean of these
    norms over the channels plus 1e-6. Weight and bias start from zero.

    Args:
        dim: Channels C.

    References:
        ConvNeXt V2, https://arxiv.org/abs/2301.00808
    """

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def reset_parameters(self) -> None:
        """Start as the identity."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, *grid: Grid) -> Tensor:
        """Let the channels compete."""
        norm = _on_grid(x, grid).norm(dim=1, keepdim=True)
        share = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)
        return x + self.weight * (x * share) + self.bias


@torch.fx.wrap
def _on_grid(x: Tensor, grid: tuple[Grid, ...]) -> Tensor:
    """One fx node: its check cannot be traced symbolically."""
    known = TokenGrid.of(*grid)
    known.check(x)
    return x[:, known.num_prefix_tokens :]
