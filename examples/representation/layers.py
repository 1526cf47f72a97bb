"""Linear layers on tokens, the kernel that each amounts to, and how it is fitted.

Shape letters: C channels, O channels that come out, K kernel side, T terms of a sum.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tokenconv.grid import Grid
from tokenconv.layers import GridConv, GridModule


class Stack(GridModule):
    """Modules one after another; those that need the grid are given it."""

    def __init__(self, *parts: nn.Module):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor, *grid: Grid) -> Tensor:
        """Run them on tokens."""
        for part in self.parts:
            x = part(x, *grid) if isinstance(part, GridModule) else part(x)
        return x


def sum_of_separable(
    dim: int, out_dim: int, terms: int, *between: nn.Module, bias: bool = False
) -> Stack:
    """T depthwise separable convolutions, added: T kernels a channel, then a pointwise layer."""
    wide = dim * terms
    depthwise = GridConv(dim, wide, groups=dim, bias=bias)
    return Stack(depthwise, *between, nn.Linear(wide, out_dim, bias=bias))


def kernel_of(layer: nn.Module, dim: int, side: int = 3) -> Tensor:
    """The kernel ``(C, K*K, O)`` of a linear layer, from what it makes of impulses."""
    impulses = torch.zeros(dim, side * side, dim, dtype=next(layer.parameters()).dtype)
    impulses[range(dim), side * side // 2, range(dim)] = 1
    still = layer(torch.zeros_like(impulses[:1]), side, side)  # of its biases
    return (layer(impulses, side, side) - still).flip(1)


def ranks(kernel: Tensor) -> Tensor:
    """Rank of each input channel's slice ``(K*K, O)``; the separable ones have 1."""
    return torch.linalg.matrix_rank(kernel.detach().double(), rtol=1e-4)


def relative_error(kernel: Tensor, wanted: Tensor) -> float:
    """``||kernel - wanted||^2 / ||wanted||^2``: of white noise, the share of variance missed."""
    return float((kernel - wanted).square().sum() / wanted.square().sum())


def noisy_samples(
    wanted: Tensor, count: int, noise: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """White patches ``(n, C*K*K)`` and what a kernel gives on them ``(n, O)``, with noise."""
    patches = torch.randn(count, wanted[..., 0].numel(), generator=generator, dtype=torch.double)
    clean = patches @ wanted.flatten(0, 1)
    added = torch.randn(clean.shape, generator=generator, dtype=torch.double)
    return patches, clean + noise * added


def fitted(
    make: Callable[[], nn.Module], dim: int, patches: Tensor, answers: Tensor, steps: int
) -> Tensor:
    """The kernel with the least squared error, by L-BFGS; of two starts the one that fits better.

    Deterministic given torch's seed.
    """
    gram = patches.T @ patches / len(patches)
    cross = patches.T @ answers / len(patches)
    best, kernel = torch.inf, None
    for _ in range(2):
        layer = make().double()
        optimizer = torch.optim.LBFGS(
            layer.parameters(), max_iter=steps, history_size=20, tolerance_grad=1e-9,
            tolerance_change=1e-12, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure(layer: nn.Module = layer) -> Tensor:
            layer.zero_grad()
            flat = kernel_of(layer, dim).flatten(0, 1)
            loss = (flat * (gram @ flat - 2 * cross)).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        loss = float(closure().detach())
        if loss < best:
            best, kernel = loss, kernel_of(layer, dim).detach()
    assert kernel is not None
    return kernel


def num_params(module: nn.Module) -> int:
    """How many numbers it learns."""
    return sum(parameter.numel() for parameter in module.parameters())
