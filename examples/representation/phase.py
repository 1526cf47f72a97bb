r"""One kernel for a channel gives it one shift; a relative phase needs two.

Two channels hold vertical gratings of one frequency, `a = cos(w*t + u)` and `b = cos(w*t + u + v)`,
in white noise, at a random place `u`. The class is the quadrant of the relative phase `v`, which is
uniform over the circle. A linear layer is followed by what any network would do at a position, an
MLP, and by the mean over positions.

A separable layer `W[o,i,q] = p[o,i] * d[i,q]` filters each channel once, for all outputs. On a
grating a filter is a gain and a shift, so the readout sees `cos(z)` and `cos(z + v + g)` with one
`g` for the whole layer, `z` uniform. Going through the positions the other way round, `z -> -z`,
shows the same pairs for `-v - 2*g` as for `v`: the two cannot be told from each other, whatever the
readout and however many outputs. A reflection of the circle maps two quadrants to themselves at
best, and swaps the others, so at most `1/2 + 1/2 * 1/2 = 75 %` can be right. With a second kernel
for one channel the readout has the cosine and the sine of `v`, and nothing is lost: a dense layer,
a sum of T = 2 separable ones, or a second separable layer.
"""

import math
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

import tokenconv as tc
from representation.experiment import Claim, Table, column, draw_rows, mean
from representation.layers import Stack, kernel_of, num_params, ranks, sum_of_separable
from tokenconv.layers import GridConv

TITLE = "One kernel for a channel is one shift"
CEILING = 0.75
SIDE, BORDER, WIDTH, CLASSES = 9, 2, 16, 4
ARMS = {
    "dense": lambda: GridConv(2, WIDTH),
    "separable": lambda: tc.SeparableConv(2, out_dim=WIDTH),
    "separable, 4x outputs": lambda: tc.SeparableConv(2, out_dim=4 * WIDTH),
    "sum of T=2": lambda: sum_of_separable(2, WIDTH, 2, bias=True),
    "two separable, in a row": lambda: Stack(
        tc.SeparableConv(2, out_dim=4), tc.SeparableConv(4, out_dim=WIDTH)
    ),
}


class Reader(nn.Module):
    """A linear layer, an MLP at every position that no padding reaches, and the mean over them."""

    def __init__(self, layer: nn.Module, width: int):
        super().__init__()
        self.layer = layer
        self.mlp = nn.Sequential(
            nn.ReLU(), nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()
        )
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of tokens ``(B, N, 2)``."""
        inner = slice(BORDER, SIDE - BORDER)
        filtered = self.layer(x, SIDE, SIDE).unflatten(1, (SIDE, SIDE))[:, inner, inner]
        return self.head(self.mlp(filtered).mean((1, 2)))


def gratings(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens ``(B, N, 2)`` of both gratings, period 5, and the quadrant of their phase."""
    place, phase = 2 * math.pi * torch.rand(2, count, 1, generator=generator)
    angles = 2 * math.pi / 5 * torch.arange(SIDE) + place
    lines = torch.stack([angles.cos(), (angles + phase).cos()], dim=-1)
    pictures = lines[:, None].expand(-1, SIDE, -1, -1).flatten(1, 2)
    noise = 0.1 * torch.randn(pictures.shape, generator=generator)
    return pictures + noise, (phase[:, 0] * CLASSES / (2 * math.pi)).long().clamp(max=CLASSES - 1)


def train(name: str, seed: int, steps: int) -> tuple[nn.Module, float]:
    """A layer, trained with its reader on new pictures in every step, and accuracy on 4096."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    layer = ARMS[name]()
    model = Reader(layer, 4 * WIDTH if "4x" in name else WIDTH)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        pictures, labels = gratings(128, generator)
        loss = functional.cross_entropy(model(pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.inference_mode():
        pictures, labels = gratings(4096, generator)
        return layer, float((model(pictures).argmax(1) == labels).float().mean())


def run(seed: int, quick: bool) -> Table:
    """Accuracy, parameters of the layer, and the highest rank of an input channel."""
    table: Table = {}
    for name in ARMS:
        layer, accuracy = train(name, seed, steps=10 if quick else 300)
        rank = int(ranks(kernel_of(layer, 2, side=7)).max())
        table[name] = {"accuracy": accuracy, "parameters": num_params(layer), "rank": rank}
    return table


def draw(figure: Figure, runs: Sequence[Table]) -> None:
    """Accuracy of every layer, below or above the ceiling."""
    axis = figure.subplots()
    draw_rows(axis, runs, [*ARMS], "accuracy")
    axis.axhline(CEILING, color="black", linestyle="--", linewidth=1)
    axis.text(-0.55, CEILING + 0.01, "bound for one kernel a channel")
    axis.axhline(1 / CLASSES, color="gray", linestyle=":", linewidth=1)
    axis.text(-0.55, 1 / CLASSES + 0.01, "chance", color="gray")
    axis.set(ylabel="accuracy on new pictures", ylim=(0.2, 1.02))


def claim(runs: Sequence[Table]) -> Claim:
    """See ``representation.experiment.Claim``."""
    found = {name: mean(runs, name, "accuracy") for name in ARMS}
    above = ("dense", "sum of T=2", "two separable, in a row")
    below = ("separable", "separable, 4x outputs")
    sampling = 0.02  # three standard errors of 4096 pictures
    return Claim(
        f"A separable layer reads a relative phase in {found['separable']:.1%} of the pictures, "
        f"with four times the outputs in {found['separable, 4x outputs']:.1%}, and 75 % is its "
        f"bound; a dense layer reads {found['dense']:.1%}, a sum of two separable ones "
        f"{found['sum of T=2']:.1%}, and two in a row {found['two separable, in a row']:.1%}.",
        all(min(column(runs, name, "accuracy")) > CEILING + 0.1 for name in above)
        and all(max(column(runs, name, "accuracy")) < CEILING + sampling for name in below),
    )
