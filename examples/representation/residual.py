r"""Adding the input: more that a layer can express, and more that a deep stack can learn.

Around a depthwise layer alone a residual expresses nothing new: it is one more tap, and `fold_`
adds it to the kernel. Around a separable pair it does: `p[o,i] * d[i,q] + (o == i and q == 0)` has
rank 2 for each input channel, not 1.

Classifiers of handwritten digits (8x8, 500 to train on, 1297 to be judged by) of 2 to 16 units
`ReLU -> depthwise -> pointwise -> BatchNorm`, with the input added or not; nothing else differs,
and neither do the parameters.
"""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure

import tokenconv as tc
from representation.digits import Classifier, train
from representation.experiment import Claim, Table, draw_curve, gain, points
from representation.layers import kernel_of, ranks

TITLE = "Residual on or off"
WIDTH = 16
DEPTHS = (2, 4, 8, 16)


def run(seed: int, quick: bool) -> Table:
    """Accuracy by depth, training loss by depth, and the rank of an input channel."""
    accuracies, losses = {True: {}, False: {}}, {True: {}, False: {}}
    for depth in DEPTHS[::2] if quick else DEPTHS:
        for residual in (True, False):
            torch.manual_seed(seed)
            layers = [tc.SeparableConv(WIDTH) for _ in range(depth)]
            model = Classifier(layers, WIDTH, residual=residual)
            loss, accuracy = train(model, seed, steps=10 if quick else 200)
            accuracies[residual][str(depth)], losses[residual][str(depth)] = accuracy, loss
    torch.manual_seed(seed)
    kernel = kernel_of(tc.SeparableConv(WIDTH), WIDTH)
    alone = torch.zeros_like(kernel)
    alone[range(WIDTH), 4, range(WIDTH)] = 1
    return {
        "accuracy, residual": accuracies[True],
        "accuracy, none": accuracies[False],
        "training loss, residual": losses[True],
        "training loss, none": losses[False],
        "rank of a channel": {
            "residual": float(ranks(kernel + alone).max()), "none": float(ranks(kernel).max()),
        },
    }  # fmt: skip


def draw(figure: Figure, runs: Sequence[Table]) -> None:
    """Accuracy and loss over depth."""
    for axis, name in zip(figure.subplots(1, 2), ("accuracy", "training loss"), strict=True):
        for number, kind in enumerate(("residual", "none")):
            draw_curve(axis, runs, f"{name}, {kind}", kind, number)
        axis.set(xlabel="units", ylabel=name, xscale="log")
        axis.set_xticks(DEPTHS, [str(depth) for depth in DEPTHS])
        axis.minorticks_off()
        axis.legend()


def claim(runs: Sequence[Table]) -> Claim:
    """See ``representation.experiment.Claim``."""
    first, *_, last = runs[0]["accuracy, none"]
    shallow, deep = (
        gain(runs, "accuracy, residual", "accuracy, none", depth) for depth in (first, last)
    )
    rank = [run["rank of a channel"] for run in runs]
    return Claim(
        f"With {last} units the residual brings {points(deep)} points of accuracy, with {first} "
        f"{points(shallow)}; a channel's slice has rank 2 with it and 1 without.",
        deep.is_positive
        and not shallow.is_positive
        and all(one == {"residual": 2, "none": 1} for one in rank),
    )
