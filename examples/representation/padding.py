r"""Zeros around a map tell where its border is; each layer carries that one token further in.

On a constant picture a convolution sees the same at every position, unless the padding differs from
the picture. With zeros, L layers of 3x3 give each row within L of the border features of its own,
and all between are alike: on S rows the best decoder of position explains `1 - m * (m^2 - 1) / (S *
(S^2 - 1))` of its variance, `m = S - 2*L`. With circular or reflected padding features are the same
everywhere.

Random separable layers with ReLU, three channels in and 32 behind, 16x16 positions, nothing
trained. On a constant picture the best decoder is the mean over positions with equal features. On
pictures of white noise a linear probe of position is fitted on 48 pictures and judged on 48 others.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from representation.experiment import Claim, Table, column, draw_curve, mean

Mode = Literal["zeros", "reflect", "circular"]
TITLE = "Padding as a position signal"
SIDE, DIM, PICTURES = 16, 32, 48
MODES: tuple[Mode, ...] = ("zeros", "reflect", "circular")
DEPTHS = (1, 2, 3, 4, 6, 8)


def network(depth: int, mode: Mode, seed: int) -> nn.Sequential:
    """Depthwise, pointwise and ReLU, so many times, with random weights."""
    torch.manual_seed(seed)
    parts = []
    for dim in (3, *[DIM] * (depth - 1)):
        depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, padding_mode=mode)
        parts += [depthwise, nn.Conv2d(dim, DIM, 1), nn.ReLU()]
    for part in parts:
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
    return nn.Sequential(*parts).double()


def places(count: int) -> Tensor:
    """Row and column of every position of some pictures, ``(B*N, 2)``, from -1 to 1."""
    line = torch.linspace(-1, 1, SIDE, dtype=torch.double)
    return torch.cartesian_prod(line, line).repeat(count, 1)


def features(net: nn.Module, pictures: Tensor) -> Tensor:
    """Of every position, ``(B*N, C)``."""
    with torch.no_grad():
        return net(pictures).permute(0, 2, 3, 1).flatten(0, 2)


def explained(decoded: Tensor) -> float:
    """Share of the variance of position; below 0 if its mean would be nearer."""
    wanted = places(len(decoded) // SIDE**2)
    return float(1 - (decoded - wanted).square().sum() / wanted.square().sum())


def best_decoder(found: Tensor) -> Tensor:
    """For each position the mean over all that have the same features, up to rounding."""
    scale = found.abs().max().clamp(min=1e-300)
    _, kinds = torch.unique((found / scale).round(decimals=9), dim=0, return_inverse=True)
    alike = (kinds[:, None] == kinds).double()
    return alike @ places(1) / alike.sum(1, keepdim=True)


def probe(fitted_on: Tensor, judged_on: Tensor) -> Tensor:
    """What a linear probe says of positions it was not fitted on."""
    known, others = (
        torch.cat([one, torch.ones_like(one[:, :1])], dim=1) for one in (fitted_on, judged_on)
    )
    answers = places(len(known) // SIDE**2)
    return others @ torch.linalg.lstsq(known, answers, rcond=1e-9, driver="gelsd").solution


def run(seed: int, quick: bool) -> Table:
    """Share of position explained, by picture, padding and depth; what features differ by.

    The latter as a share of the largest.
    """
    generator = torch.Generator().manual_seed(seed)
    constant = torch.ones(1, 3, SIDE, SIDE, dtype=torch.double)
    noise = torch.randn(2 * PICTURES, 3, SIDE, SIDE, generator=generator, dtype=torch.double)
    table: Table = {f"constant, {mode}": {} for mode in MODES}
    table |= {f"noise, {mode}": {} for mode in MODES}
    table |= {f"features differ, {mode}": {} for mode in MODES}
    for mode in MODES:
        for depth in DEPTHS[::3] if quick else DEPTHS:
            net = network(depth, mode, seed)
            found = features(net, constant)
            table[f"constant, {mode}"][str(depth)] = explained(best_decoder(found))
            parts = [features(net, part) for part in noise.split(PICTURES)]
            table[f"noise, {mode}"][str(depth)] = explained(probe(*parts))
            differ = (found - found[:1]).abs().max() / found.abs().max()
            table[f"features differ, {mode}"][str(depth)] = float(differ)
    return table


def bound(depth: int) -> float:
    """What the best decoder explains behind so many layers."""
    alike = max(SIDE - 2 * depth, 0)
    return 1 - alike * (alike**2 - 1) / (SIDE * (SIDE**2 - 1))


def draw(figure: Figure, runs: Sequence[Table]) -> None:
    """Share explained over depth, a panel for each kind of picture."""
    axes = figure.subplots(1, 2, sharey=True)
    for axis, kind in zip(axes, ("constant", "noise"), strict=True):
        for number, mode in enumerate(MODES):
            draw_curve(axis, runs, f"{kind}, {mode}", mode, number)
        axis.set_xlabel("layers")
    depths = range(1, max(DEPTHS) + 1)
    axes[0].plot(depths, [bound(depth) for depth in depths], "k:", label="bound for zeros")
    axes[0].set(title="a constant picture, best decoder", ylabel="variance of position explained")
    axes[1].set_title("white noise, linear probe")
    axes[0].legend()


def claim(runs: Sequence[Table]) -> Claim:
    """See ``representation.experiment.Claim``."""
    first, *_, last = runs[0]["constant, zeros"]
    differ = [
        value
        for mode in MODES[1:]
        for run in runs
        for value in run[f"features differ, {mode}"].values()
    ]
    zeros, reflect, circular = (mean(runs, f"noise, {mode}", last) for mode in MODES)
    return Claim(
        f"On a constant picture zero padding lets {mean(runs, 'constant, zeros', first):.0%} of "
        f"position be decoded behind {first} layer and {mean(runs, 'constant, zeros', last):.0%} "
        f"behind {last}; with reflected and circular padding features are the same everywhere, to "
        f"rounding ({max(differ):.0e}). On noise a linear probe behind {last} layers explains "
        f"{zeros:.0%} with zeros, {reflect:.1%} with reflected and {circular:.1%} with circular "
        "padding.",
        max(differ) < 1e-12
        and all(
            abs(run["constant, zeros"][depth] - bound(int(depth))) < 1e-9
            for run in runs
            for depth in run["constant, zeros"]
        )
        and min(column(runs, "noise, zeros", last))
        > 0.1
        > max(column(runs, "noise, circular", last)),
    )
