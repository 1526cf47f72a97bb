r"""An activation between depthwise and pointwise takes what a single kernel cannot spare.

Xception has none there and learns faster than with ReLU or ELU; its author supposes that what helps
in deep intermediate spaces loses information in a space one channel deep. For a Gaussian response
`z` of a single kernel the loss is known: no linear layer behind a ReLU gets more of `z` than
`corr(z, relu(z))^2 = (1/4) / (1/2 - 1/(2*pi)) = 73 %` of its variance; with a second kernel of the
opposite sign `z = relu(z) - relu(-z)` is there again. So the supposition says: harm with T = 1
kernel a channel, none with several.

Classifiers of handwritten digits (8x8, 500 to train on, 1297 to be judged by) of three units `ReLU
-> depthwise -> activation or none -> pointwise -> BatchNorm`, added to their input.
"""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import nn

from representation.digits import Classifier, train
from representation.experiment import Claim, Table, draw_rows, gain, points
from representation.layers import num_params, sum_of_separable

TITLE = "An activation between depthwise and pointwise"
WIDTH, UNITS = 16, 3
BETWEEN = {"none": nn.Identity, "ReLU": nn.ReLU, "ELU": nn.ELU}
TERMS = (1, 4)


def run(seed: int, quick: bool) -> Table:
    """Accuracy on digits not trained on, loss on the others, and parameters."""
    table: Table = {}
    for terms in TERMS:
        for name, act in BETWEEN.items():
            torch.manual_seed(seed)
            layers = [sum_of_separable(WIDTH, WIDTH, terms, act(), bias=True) for _ in range(UNITS)]
            model = Classifier(layers, WIDTH)
            loss, accuracy = train(model, seed, steps=20 if quick else 300)
            table[f"{name}, T={terms}"] = {
                "accuracy": accuracy, "training loss": loss, "parameters": num_params(model),
            }  # fmt: skip
    return table


def draw(figure: Figure, runs: Sequence[Table]) -> None:
    """Accuracy and loss with each of them."""
    rows = [*runs[0]]
    for axis, name in zip(figure.subplots(1, 2), ("accuracy", "training loss"), strict=True):
        draw_rows(axis, runs, rows, name)
        axis.set_ylabel(name)


def claim(runs: Sequence[Table]) -> Claim:
    """See ``representation.experiment.Claim``."""
    relu, elu, many = (
        gain(runs, f"{name}, T={terms}", f"none, T={terms}", "accuracy")
        for name, terms in (("ReLU", 1), ("ELU", 1), ("ReLU", 4))
    )
    return Claim(
        f"Against none, a ReLU in between changes accuracy by {points(relu)} points with one "
        f"kernel a channel and by {points(many)} with four; an ELU, which can be inverted, by "
        f"{points(elu)} with one: as a loss of information would.",
        -relu.mean > relu.half and many.is_positive and abs(elu.mean) < elu.half,
    )
