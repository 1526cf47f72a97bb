r"""One kernel for an input channel, or one for an output channel: DSC against BSConv.

A depthwise separable layer, `W[o,i,q] = p[o,i] * d[i,q]`, shares a kernel among what an input
channel gives; BSConv-U, `W[o,i,q] = p[o,i] * d[o,q]`, among what an output channel takes, and
BSConv-S writes `p` as a product of two thin matrices. At equal width DSC and BSConv-U have equally
many parameters; BSConv-S is 20 wide instead of 16 to have as many, and is trained with its
regulariser.

The case for BSConv is that kernels of trained networks are alike within an output channel. So
beside the accuracy of classifiers of three units (handwritten digits of 8x8, 500 to train on, 1297
to be judged by) there is what the best rank one for each input channel, and for each output
channel, explains of the kernels of the dense classifier: the first singular values' share of all
squares.
"""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import tokenconv as tc
from representation.digits import Classifier, train
from representation.experiment import Claim, Table, draw_rows, gain, mean, points
from representation.layers import kernel_of, num_params
from tokenconv.blocks.blueprint import bsconv_reg_loss
from tokenconv.layers import GridConv

TITLE = "DSC against BSConv"
UNITS, DIM = 3, 16
ARMS = {
    "dense": (DIM, lambda: GridConv(DIM, DIM, bias=False)),
    "DSC": (DIM, lambda: tc.SeparableConv(DIM, bias=False)),
    "BSConv-U": (DIM, lambda: tc.create_block("bsconv_u", dim=DIM, bias=False)),
    "BSConv-S": (20, lambda: tc.create_block("bsconv_s", dim=20, bias=False)),
}


def explained(kernels: Sequence[Tensor]) -> dict[str, float]:
    """Share of all squares that is left with rank one for each input, or output channel."""
    total = sum(float(kernel.square().sum()) for kernel in kernels)
    shares = {}
    for name, channel in (("an input channel", 0), ("an output channel", 2)):
        values = [torch.linalg.svdvals(kernel.movedim(channel, 0))[:, 0] for kernel in kernels]
        shares[name] = sum(float(first.square().sum()) for first in values) / total
    return shares


def run(seed: int, quick: bool) -> Table:
    """Accuracy, training loss and parameters; what rank one explains before training and behind."""
    table, ranks = {}, {}
    for name, (width, make) in ARMS.items():
        torch.manual_seed(seed)
        layers = [make() for _ in range(UNITS)]
        model = Classifier(layers, width)

        def kernels(layers: Sequence[nn.Module] = layers) -> list[Tensor]:
            return [kernel_of(layer, DIM).detach().double() for layer in layers]

        if name == "dense":
            ranks["rank one explains, untrained"] = explained(kernels())
        loss, accuracy = train(
            model, seed, steps=20 if quick else 300,
            penalty=bsconv_reg_loss if name == "BSConv-S" else None,
        )  # fmt: skip
        table[name] = {
            "accuracy": accuracy, "training loss": loss, "parameters": num_params(model),
        }  # fmt: skip
        if name == "dense":
            ranks["rank one explains, trained"] = explained(kernels())
    return table | ranks


def draw(figure: Figure, runs: Sequence[Table]) -> None:
    """Accuracy of every layer, and what both kinds of rank one explain."""
    axes = figure.subplots(1, 2)
    draw_rows(axes[0], runs, [*ARMS], "accuracy")
    labels = [f"{run['parameters'] / 1e3:.1f} k" for run in (runs[0][name] for name in ARMS)]
    names = [f"{name}\n{label}" for name, label in zip(ARMS, labels, strict=True)]
    axes[0].set_xticks(range(len(ARMS)), names)
    axes[0].set_ylabel("accuracy")
    kinds = ("an input channel", "an output channel")
    parts = [
        {
            f"{when}, {kind.split()[1]}": run[f"rank one explains, {when}"] | {"share": share}
            for when in ("untrained", "trained")
            for kind, share in run[f"rank one explains, {when}"].items()
        }
        for run in runs
    ]
    draw_rows(axes[1], parts, [*parts[0]], "share")
    axes[1].set(ylabel=f"rank one for {kinds[0]} or {kinds[1]} explains", ylim=(0, 1))


def claim(runs: Sequence[Table]) -> Claim:
    """See ``representation.experiment.Claim``."""
    u, s = (gain(runs, name, "DSC", "accuracy") for name in ("BSConv-U", "BSConv-S"))
    shares = [
        mean(runs, "rank one explains, trained", f"an {way} channel") for way in ("input", "output")
    ]
    return Claim(
        f"At matched parameters BSConv-U differs from DSC by {points(u)} points of accuracy and "
        f"BSConv-S by {points(s)}; of the trained dense kernels rank one for each input channel "
        f"explains {shares[0]:.1%}, for each output channel {shares[1]:.1%}: no advantage of "
        "BSConv shows here.",
        not u.is_positive and not s.is_positive and abs(shares[0] - shares[1]) < 0.02,
    )
