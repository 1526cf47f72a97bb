"""What the depthwise kernels of a model became: how far from the identity they have moved.

Shape letters: C channels, K*K kernel.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenconv.analysis.convolutions import check_finite
from tokenconv.costs import depthwise_modules


@dataclass(frozen=True)
class DepthwiseKernels:
    """The kernels of one depthwise convolution."""

    name: str
    kernels: Tensor
    """``(C, K, K)`` as they act, with the residual in the centre where there is one."""
    has_residual: bool

    @property
    def distance(self) -> Tensor:
        """``||kernel - identity||`` of each channel, ``(C,)``; 0 at insertion by ``insert_``."""
        return (self.kernels - self._identity).flatten(1).norm(dim=1)

    @property
    def off_centre(self) -> Tensor:
        """Share of each kernel's energy that comes from neighbours, ``(C,)``; 0 for no energy."""
        energy = self.kernels.square().flatten(1).sum(1)
        rows, columns = (side // 2 for side in self.kernels.shape[1:])
        centre = self.kernels[:, rows, columns].square()
        return torch.where(energy > 0, 1 - centre / energy.clamp(min=1e-300), 0.0)

    @property
    def _identity(self) -> Tensor:
        identity = torch.zeros_like(self.kernels[:1])
        rows, columns = (side // 2 for side in self.kernels.shape[1:])
        identity[:, rows, columns] = 1
        return identity

    def to_dict(self) -> dict[str, Any]:
        """Without the kernels, ready for JSON."""
        return {
            "name": self.name,
            "shape": list(self.kernels.shape),
            "has_residual": self.has_residual,
            "distance_from_identity": _quartiles(self.distance),
            "off_centre": _quartiles(self.off_centre),
        }


def depthwise_kernels(model: nn.Module) -> list[DepthwiseKernels]:
    """The two-dimensional kernels of all depthwise convolutions of a model, on maps and on tokens.

    Raises:
        AnalysisError: If a weight is not finite.
    """
    found = []
    for name in depthwise_modules(model):
        module: Any = model.get_submodule(name)
        weight = module.weight.detach()
        if weight.ndim != 4:
            continue
        check_finite(name, weight)
        has_residual = bool(getattr(module, "residual", False))
        kernels = DepthwiseKernels(name, weight.double().squeeze(1), has_residual)
        if has_residual:
            kernels = DepthwiseKernels(name, kernels.kernels + kernels._identity, True)
        found.append(kernels)
    return found


def moved(before: nn.Module, after: nn.Module) -> Mapping[str, Tensor]:
    """How far every depthwise kernel moved between two states of a model.

    Returns:
        ``||after - before||`` of each channel, ``(C,)``, by name of the convolution.
    """
    earlier = {each.name: each.kernels for each in depthwise_kernels(before)}
    return {
        each.name: (each.kernels - earlier[each.name]).flatten(1).norm(dim=1)
        for each in depthwise_kernels(after)
        if each.name in earlier
    }


def _quartiles(values: Tensor) -> list[float]:
    return values.quantile(values.new_tensor([0.25, 0.5, 0.75])).tolist()
