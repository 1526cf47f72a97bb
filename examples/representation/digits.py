"""Handwritten digits of 8x8 pixels, and small classifiers on their tokens, one a pixel."""

from collections.abc import Callable, Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from tokenconv.layers import BatchNorm, GridConv

SIDE, COUNT = 8, 500


class Unit(nn.Module):
    """``ReLU -> layer -> BatchNorm`` on tokens, added to its input or not."""

    def __init__(self, layer: nn.Module, width: int, *, residual: bool):
        super().__init__()
        self.layer = layer
        self.norm = BatchNorm(width)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(B, N, C)``."""
        out = self.norm(self.layer(functional.relu(x), SIDE, SIDE))
        return x + out if self.residual else out


class Classifier(nn.Module):
    """A dense convolution, units around the layers, and a linear head on the mean over tokens."""

    def __init__(self, layers: Sequence[nn.Module], width: int, *, residual: bool = True):
        super().__init__()
        self.stem = GridConv(1, width)
        self.units = nn.Sequential(*(Unit(layer, width, residual=residual) for layer in layers))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of tokens ``(B, N, 1)``."""
        return self.head(functional.relu(self.units(self.stem(x, SIDE, SIDE))).mean(1))


def split(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits and their classes, those to train on and the others, shuffled by seed."""
    pixels, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    tokens = torch.from_numpy(pixels).float()[order, :, None] / 8 - 1
    labels = torch.from_numpy(classes)[order]
    return tokens[:COUNT], labels[:COUNT], tokens[COUNT:], labels[COUNT:]


def train(
    model: nn.Module,
    seed: int,
    steps: int,
    penalty: Callable[[nn.Module], Tensor] | None = None,
) -> tuple[float, float]:
    """Train on some digits; loss there at the end, and accuracy on the others.

    Args:
        model: Gives logits.
        seed: Says which digits, and in which order.
        steps: Of 32 digits each.
        penalty: Of the model, added to the loss it is trained with.
    """
    tokens, labels, others, their_labels = split(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(COUNT, (32,), generator=generator)
        loss = functional.cross_entropy(model(tokens[chosen]), labels[chosen])
        if penalty:
            loss = loss + penalty(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.inference_mode():
        loss = functional.cross_entropy(model(tokens), labels)
        accuracy = (model(others).argmax(1) == their_labels).float().mean()
    return float(loss), float(accuracy)
