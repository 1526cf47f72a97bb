r"""The number of groups is a spectrum from the standard convolution to the depthwise one.

A convolution in g groups, then a pointwise layer over all channels: g = 1 is a standard
convolution, the numbers between are Inception's towers, g = C is depthwise separable. An input
channel reaches the `C / g` channels of its group, so its slice of the whole kernel has rank `min(C
/ g, K*K)` at most, and every kernel of g groups is one of `g / 2` groups, too: more groups express
less.

Teachers are such layers with random weights, for g = 1, 4 and 16 = C; students of all g have the
same width, and are fitted to few samples and to many, with noise of half the standard deviation.
"""

from collections.abc import Sequence
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from representation.experiment import Claim, Table, draw_curve, mean
from representation.layers import Stack, fitted, noisy_samples, num_params, relative_error
from tokenconv.layers import GridConv

TITLE = "Groups, from standard to depthwise"
DIM, NOISE = 16, 0.5
GROUPS = (1, 2, 4, 8, 16)
TEACHERS = (1, 4, 16)
FEW, MANY = 256, 4096


def grouped(groups: int) -> nn.Module:
    """A convolution in groups, then a pointwise one over all channels."""
    return Stack(GridConv(DIM, DIM, groups=groups, bias=False), nn.Linear(DIM, DIM, bias=False))


def teacher(groups: int, generator: torch.Generator) -> Tensor:
    """The kernel of such a layer with random weights; each output has variance 1."""
    size = DIM // groups
    weight = torch.randn(groups, size, 9, size, generator=generator, dtype=torch.double)
    pointwise = torch.randn(groups, size, DIM, generator=generator, dtype=torch.double)
    wanted = torch.einsum("gikj,gjo->giko", weight, pointwise).flatten(0, 1)
    return wanted / wanted.square().sum((0, 1)).sqrt()


def run(seed: int, quick: bool) -> Table:
    """Share of variance missed, by teacher, number of samples and groups of the student."""
    table: Table = {"parameters": {str(g): num_params(grouped(g)) for g in GROUPS}}
    for groups in TEACHERS:
        generator = torch.Generator().manual_seed(seed)
        wanted = teacher(groups, generator)
        torch.manual_seed(seed)
        for count in (FEW, MANY):
            samples = noisy_samples(wanted, count, NOISE, generator)
            row = table[f"teacher of {groups}, {count} samples"] = {}
            for own in GROUPS:
                kernel = fitted(partial(grouped, own), DIM, *samples, steps=10 if quick else 150)
                row[str(own)] = relative_error(kernel, wanted)
    return table


def draw(figure: Figure, runs: Sequence[Table]) -> None:
    """Share missed over the groups of the student, a panel for each teacher."""
    axes = figure.subplots(1, len(TEACHERS), sharey=True)
    for axis, groups in zip(axes, TEACHERS, strict=True):
        for number, count in enumerate((FEW, MANY)):
            row = f"teacher of {groups}, {count} samples"
            draw_curve(axis, runs, row, f"{count} samples", number)
        axis.axvline(groups, color="gray", linestyle=":", linewidth=1)
        axis.set(title=f"teacher of g = {groups}", xlabel="groups of the student")
        axis.set(xscale="log", yscale="log")
        axis.set_xticks(GROUPS, [str(g) for g in GROUPS])
        axis.minorticks_off()
    axes[0].set_ylabel("share of variance missed")
    axes[0].legend(loc="lower right")


def claim(runs: Sequence[Table]) -> Claim:
    """See ``representation.experiment.Claim``."""

    def best(row: str) -> int:
        return min(GROUPS, key=lambda own: mean(runs, row, str(own)))

    few, many = (
        [best(f"teacher of {g}, {count} samples") for g in TEACHERS] for count in (FEW, MANY)
    )
    worst = "teacher of 1, 4096 samples"
    return Claim(
        f"Of rules with 1, 4 and 16 groups, {MANY} samples are fitted best with {_listed(many)}, "
        f"and {FEW} with {_listed(few)}: with few samples more constraint than the rule has can "
        f"pay; with many, a depthwise separable layer still misses {mean(runs, worst, '16'):.0%} "
        f"of a standard convolution, which itself misses {mean(runs, worst, '1'):.1%}.",
        tuple(many) == TEACHERS and few[1:] == [4, 16],
    )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"
