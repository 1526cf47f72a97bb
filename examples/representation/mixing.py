r"""Depthwise layers never mix channels, however many there are; a pointwise layer does at once.

Output channel c of a depthwise layer is made of input channel c alone, and so it is of any stack of
them, of activations, residuals and of BatchNorm in inference. The Jacobian of the whole says so:
its blocks between different channels are zero, exactly. LayerNorm, the norm of Transformers, takes
its mean and variance over channels, and mixes them.

Six channels on 5x5 tokens in float64: the largest derivative of any token in an output channel by
any token in an input channel.
"""

from collections.abc import Callable, Sequence

import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor, nn

import tokenconv as tc
from representation.experiment import Claim, Table, column
from representation.layers import Stack
from tokenconv.layers import BatchNorm

TITLE = "Depthwise layers never mix channels"
DIM, SIDE = 6, 5
NEVER = ("1 depthwise", "8 depthwise", "8, BatchNorm")


def deep(
    depth: int, norm: Callable[[int], nn.Module] = lambda dim: nn.Identity()
) -> list[nn.Module]:
    """Depthwise layers with residual, each behind a norm and in front of an activation."""
    return [
        part for _ in range(depth) for part in (norm(DIM), tc.DWConv(DIM, residual=True), nn.GELU())
    ]


STACKS = {
    "1 depthwise": lambda: Stack(*deep(1)),
    "8 depthwise": lambda: Stack(*deep(8)),
    "8, BatchNorm": lambda: Stack(*deep(8, BatchNorm)),
    "8, LayerNorm": lambda: Stack(*deep(8, nn.LayerNorm)),
    "8, then pointwise": lambda: Stack(*deep(8), nn.Linear(DIM, DIM)),
}


def jacobian(name: str, seed: int) -> Tensor:
    """Largest derivative ``(C, C)`` of an output channel by an input channel."""
    torch.manual_seed(seed)
    stack = STACKS[name]().double().eval()
    x = torch.randn(1, SIDE * SIDE, DIM, dtype=torch.double)
    whole = torch.autograd.functional.jacobian(lambda x: stack(x, SIDE, SIDE), x)
    assert isinstance(whole, Tensor)
    return whole[0, :, :, 0].abs().amax((0, 2))


def run(seed: int, quick: bool) -> Table:
    """The largest derivative between different channels, the smallest, and that within one."""
    table: Table = {}
    between = ~torch.eye(DIM, dtype=torch.bool)
    for name in STACKS:
        found = jacobian(name, seed)
        table[name] = {
            "within a channel": float(found.diagonal().min()),
            "between, largest": float(found[between].max()),
            "between, smallest": float(found[between].min()),
        }
    return table


def draw(figure: Figure, runs: Sequence[Table]) -> None:
    """The matrices of seed 0; zeros are white."""
    axes = figure.subplots(1, len(STACKS))
    colors = ScalarMappable(LogNorm(1e-2, 10), "viridis_r")
    for axis, name in zip(axes, STACKS, strict=True):
        axis.imshow(jacobian(name, 0).numpy(), cmap=colors.cmap, norm=colors.norm)
        axis.set_title(name, fontsize=10)
        axis.set(xticks=range(DIM), yticks=range(DIM), xlabel="input channel")
    axes[0].set_ylabel("output channel")
    figure.colorbar(
        colors, ax=axes, label="largest derivative; white: 0", shrink=0.8, extend="both"
    )


def claim(runs: Sequence[Table]) -> Claim:
    """See ``representation.experiment.Claim``."""
    zero = [value for name in NEVER for value in column(runs, name, "between, largest")]
    mixed = [
        value
        for name in STACKS
        if name not in NEVER
        for value in column(runs, name, "between, smallest")
    ]
    return Claim(
        "The Jacobian of one and of eight depthwise layers, with activations, residuals and "
        f"BatchNorm, is {max(zero):.0f} between all channels, bit for bit; one pointwise layer "
        f"behind them, or LayerNorm between them, makes it {min(mixed):.2g} or more between any "
        "two.",
        max(zero) == 0 < min(mixed),
    )
