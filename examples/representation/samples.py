r"""A rule that is separable is learned from fewer samples by a layer that is.

The teacher is a random separable kernel `W[o,i,q] = p[o,i] * d[i,q]`, its answers on white patches
carry noise of half their standard deviation. Students are fitted to n samples by least squares; on
white patches `||W' - W||^2 / ||W||^2` is the share of variance they miss, so no test set is needed.

A linear student with D degrees of freedom that can express the teacher misses `s^2 * D / (n * O)`
once n is large, `s^2 = 1/4` the noise's variance: D is `C*K*K*O` for the dense layer and `C*K*K +
C*O - C` for the separable one (a factor can move between `p` and `d`, channel by channel). Near `n
= C*K*K = 144` the dense student fits the noise exactly, and is at its worst. The second panel has a
dense teacher, for what the constraint costs where it is wrong: however many samples there are, the
separable student misses what lies outside the best separable kernel, the teacher's discarded
singular values, channel by channel.
"""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import tokenconv as tc
from representation.experiment import Claim, Table, column, draw_curve, mean
from representation.layers import fitted, noisy_samples, relative_error
from tokenconv.layers import GridConv

TITLE = "A separable rule needs fewer samples"
DIM, NOISE = 16, 0.5
FREEDOM = {"dense": 9 * DIM * DIM, "separable": 9 * DIM + DIM * DIM - DIM}
COUNTS = (64, 128, 256, 512, 1024, 2048, 4096)


def dense() -> nn.Module:
    """Starts from zero: with few samples it ends at the least kernel that fits them."""
    layer = GridConv(DIM, DIM, bias=False)
    nn.init.zeros_(layer.weight)
    return layer


STUDENTS = {"dense": dense, "separable": lambda: tc.SeparableConv(DIM, bias=False)}


def teacher(kind: str, generator: torch.Generator) -> Tensor:
    """A random kernel ``(C, K*K, O)``; each output has variance 1 on white patches."""
    wanted = torch.randn(DIM, 9, DIM, generator=generator, dtype=torch.double)
    if kind == "separable":
        depthwise = torch.randn(DIM, 9, 1, generator=generator, dtype=torch.double)
        wanted = wanted[:, :1] * depthwise
    return wanted / wanted.square().sum((0, 1)).sqrt()


def best_separable(wanted: Tensor) -> float:
    """Share that the nearest separable kernel misses: all singular values but the first ones."""
    values = torch.linalg.svdvals(wanted)
    return float(values[:, 1:].square().sum() / values.square().sum())


def run(seed: int, quick: bool) -> Table:
    """Share of variance missed, by teacher and student, and the floor of the separable one."""
    table: Table = {}
    counts = COUNTS[::3] if quick else COUNTS
    for kind in STUDENTS:
        generator = torch.Generator().manual_seed(seed)
        wanted = teacher(kind, generator)
        torch.manual_seed(seed)
        for name, make in STUDENTS.items():
            row = table[f"{kind} teacher, {name} student"] = {}
            for count in counts:
                samples = noisy_samples(wanted, count, NOISE, generator)
                kernel = fitted(make, DIM, *samples, steps=15 if quick else 150)
                row[str(count)] = relative_error(kernel, wanted)
        if kind == "dense":
            floor = dict.fromkeys(map(str, counts), best_separable(wanted))
            table["dense teacher, best separable kernel"] = floor
    return table


def draw(figure: Figure, runs: Sequence[Table]) -> None:
    """Share missed over the number of samples, a panel for each teacher."""
    axes = figure.subplots(1, 2, sharey=True)
    for axis, kind in zip(axes, ("separable", "dense"), strict=True):
        for number, name in enumerate(STUDENTS):
            draw_curve(axis, runs, f"{kind} teacher, {name} student", f"{name} student", number)
            if kind == "separable" or name == "dense":
                counts = [count for count in COUNTS if count >= 512]
                missed = [NOISE**2 * FREEDOM[name] / (count * DIM) for count in counts]
                axis.plot(counts, missed, "k:", linewidth=1)
        axis.set(title=f"{kind} teacher", xlabel="samples n", xscale="log", yscale="log")
    floor = mean(runs, "dense teacher, best separable kernel", str(COUNTS[0]))
    axes[1].axhline(floor, color="C1", linestyle="--", linewidth=1)
    axes[1].text(COUNTS[-1], floor / 1.2, "best separable kernel", color="C1", va="top", ha="right")
    axes[0].plot([], [], "k:", linewidth=1, label="$s^2 D / (n O)$")
    axes[0].set_ylabel("share of variance missed")
    axes[0].legend()


def claim(runs: Sequence[Table]) -> Claim:
    """See ``representation.experiment.Claim``."""
    last = [*runs[0]["dense teacher, dense student"]][-1]
    own, other = (
        {name: mean(runs, f"{kind} teacher, {name} student", last) for name in STUDENTS}
        for kind in ("separable", "dense")
    )
    floor = mean(runs, "dense teacher, best separable kernel", last)
    return Claim(
        f"At {last} samples of a separable rule the dense student misses "
        f"{own['dense'] / own['separable']:.1f} times the variance that the separable one does, "
        f"which has {FREEDOM['dense'] / FREEDOM['separable']:.1f} times fewer degrees of freedom; "
        f"of a dense rule the separable student misses {other['separable']:.0%} however many "
        f"there are (the best separable kernel {floor:.0%}), the dense one {other['dense']:.1%}.",
        own["dense"] > 4 * own["separable"]
        and min(column(runs, "dense teacher, separable student", last)) > 0.9 * floor > 0.5,
    )
