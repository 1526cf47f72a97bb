"""The second part of a pair fitted to images, in closed form.

Shape letters as in ``factors``; F features of one group, L positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenconv.analysis.modes import evaluating
from tokenconv.errors import AnalysisError

_RIDGE = 1e-6
"""Of the mean feature's energy: where images say nothing, the weight stays as it was."""


@dataclass(frozen=True)
class Fit:
    """``||y - y'|| / ||y||`` of a layer's outputs on the calibration images."""

    before: float
    after: float

    def __str__(self) -> str:
        return f"{self.before:.3f} -> {self.after:.3f}"


def refine_(
    model: nn.Module, pairs: Mapping[nn.Module, nn.Conv2d], images: Tensor
) -> dict[nn.Module, Fit]:
    """Fit pairs in a model to the dense convolutions whose places they took.

    One forward pass: each pair is fitted when it is reached, to what the dense convolution gives
    for the same input, so it makes up for some of what was lost in front of it.

    Args:
        model: Runs in evaluation mode; its modes are as before afterwards.
        pairs: Two convolutions each, the first without a bias, and the dense one.
        images: ``(B, C, H, W)``.

    Returns:
        How near each is, by pair; none for those where the images give fewer positions than there
        are unknowns, which stay as they were.

    Raises:
        AnalysisError: If the model refuses the images, or they lead to values that are not finite.
    """
    fits: dict[nn.Module, Fit] = {}

    def fit(pair: nn.Module, args: tuple[Any, ...]) -> None:
        if pair not in fits and (found := _fit(pair, pairs[pair], args[0])):
            fits[pair] = found

    hooks = [pair.register_forward_pre_hook(fit) for pair in pairs]
    try:
        with evaluating(model), torch.no_grad():
            model(images)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise AnalysisError(f"the model refuses images {tuple(images.shape)}: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return fits


def _fit(pair: Any, dense: nn.Conv2d, x: Tensor) -> Fit | None:
    """Solve the normal equations of the second part's weight and bias, summed over images."""
    conv: nn.Conv2d = pair[1]
    groups, rows = conv.groups, conv.out_channels // conv.groups
    inner = conv.weight[0].numel() + (conv.bias is not None)
    if len(x) * _apply(dense, x[:1])[0, 0].numel() < inner:
        return None
    gram = torch.zeros(groups, inner, inner, dtype=torch.float64, device=x.device)
    right = torch.zeros(groups, inner, rows, dtype=torch.float64, device=x.device)
    for image in x.split(1):
        features = _features(conv, pair[0](image)).double()
        wanted = _apply(dense, image).double().reshape(groups, rows, -1)
        gram += features @ features.mT
        right += features @ wanted.mT
    if not gram.isfinite().all() or not right.isfinite().all():
        raise AnalysisError("they lead to values that are not finite")
    weight = conv.weight.double().reshape(groups, rows, -1)
    if conv.bias is not None:
        weight = torch.cat([weight, conv.bias.double().reshape(groups, rows, 1)], dim=2)
    before = _error(pair, dense, x)
    missing = right - gram @ weight.mT
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += _RIDGE * diagonal.mean(1, keepdim=True).clamp(min=1e-30)
    change = torch.linalg.solve(gram, missing).mT
    weight = (weight + change).to(conv.weight.dtype)
    kept = [p.detach().clone() for p in conv.parameters()]
    conv.weight.copy_(weight[..., : conv.weight[0].numel()].reshape_as(conv.weight))
    if conv.bias is not None:
        conv.bias.copy_(weight[..., -1].reshape_as(conv.bias))
    after = _error(pair, dense, x)
    if not after <= before:  # rounding, where there is nothing to gain
        for parameter, old in zip(conv.parameters(), kept, strict=True):
            parameter.copy_(old)
        after = before
    return Fit(before, after)


def _apply(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """What a convolution gives; its hooks, which are those of its place, do not run."""
    return conv._conv_forward(x, conv.weight, conv.bias)


def _features(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """What every output of a convolution is a linear function of, ``(G, F, L)`` for one image."""
    padding = conv._reversed_padding_repeated_twice
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    kernel: Any = conv.kernel_size
    x = F.pad(x, padding, mode=mode)
    patches = F.unfold(x, kernel, dilation=conv.dilation, stride=conv.stride)  # pyright: ignore[reportArgumentType]
    patches = patches.reshape(conv.groups, -1, patches.shape[-1])
    if conv.bias is None:
        return patches
    return torch.cat([patches, torch.ones_like(patches[:, :1])], dim=1)


def _error(pair: nn.Module, dense: nn.Conv2d, x: Tensor) -> float:
    lost = total = 0.0
    for image in x.split(1):
        wanted = _apply(dense, image).double()  # squares leave the range of float16
        lost += (pair.forward(image).double() - wanted).square().sum().item()
        total += wanted.square().sum().item()
    return (lost / total) ** 0.5 if total else 0.0
