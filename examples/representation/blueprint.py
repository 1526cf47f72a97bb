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
from torch import nn

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


def explained(when: str, layers: Sequence[nn.Module]) -> Table:
    """Share of all squares of their kernels that is left with rank one a channel, in or out."""
    kernels = [kernel_of(layer, DIM).detach().double() for layer in layers]
    total = sum(float(kernel.square().sum()) for kernel in kernels)
    table: Table = {}
    for way, axis in (("input", 0), ("output", 2)):
        firsts = [torch.linalg.svdvals(kernel.movedim(axis, 0))[:, 0] for kernel in kernels]
        share = sum(float(first.square().sum()) for first in firsts) / total
        table[f"{when}, by {way}"] = {"rank one explains": share}
    return table


def run(seed: int, quick: bool) -> Table:
    """Accuracy, training loss and parameters; what rank one explains before training and behind."""
    table: Table = {}
    ranks: Table = {}
    for name, (width, make) in ARMS.items():
        torch.manual_seed(seed)
        layers = [make() for _ in range(UNITS)]
        model = Classifier(layers, width)
        if name == "dense":
            ranks |= explained("untrained", layers)
        penalty = bsconv_reg_loss if name == "BSConv-S" else None
        loss, accuracy = train(model, seed, steps=20 if quick else 300, penalty=penalty)
        if name == "dense":
            ranks |= explained("trained", layers)
        table[name] = {
            "accuracy": accuracy, "training loss": loss, "parameters": num_params(model),
        }  # fmt: skip
    return table | ranks


def draw(figure: Figure, runs: Sequence[Table]) -> None:
    """Accuracy of every layer, and what both kinds of rank one explain."""
    left, right = figure.subplots(1, 2)
    draw_rows(left, runs, [*ARMS], "accuracy")
    labels = [f"{name}\n{runs[0][name]['parameters'] / 1e3:.1f} k" for name in ARMS]
    left.set_xticks(range(len(ARMS)), labels)
    left.set_ylabel("accuracy")
    draw_rows(right, runs, [row for row in runs[0] if row not in ARMS], "rank one explains")
    right.set(title="kernels of the dense classifier", ylim=(0, 1))
    right.set_ylabel("share that rank one a channel explains")


def claim(runs: Sequence[Table]) -> Claim:
    """See ``representation.experiment.Claim``."""
    u, s = (gain(runs, name, "DSC", "accuracy") for name in ("BSConv-U", "BSConv-S"))
    shares = [mean(runs, f"trained, by {way}", "rank one explains") for way in ("input", "output")]
    return Claim(
        f"At matched parameters BSConv-U differs from DSC by {points(u)} points of accuracy and "
        f"BSConv-S by {points(s)}; of the trained dense kernels rank one for each input channel "
        f"explains {shares[0]:.1%}, for each output channel {shares[1]:.1%}: no advantage of "
        "BSConv shows here.",
        not u.is_positive and not s.is_positive and abs(shares[0] - shares[1]) < 0.02,
    )
