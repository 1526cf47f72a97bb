"""How far one model looks, as a report shows it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenconv.analysis.modes import evaluating
from tokenconv.analysis.receptive_field import (
    attention_distance,
    effective_receptive_field,
    radius,
)
from tokenconv.errors import AnalysisError
from tokenconv.grid import TokenGrid


@dataclass(frozen=True)
class Fields:
    """What was seen of one model."""

    name: str
    field: Tensor
    """``(H, W)``, from ``effective_receptive_field``."""
    attention: Sequence[Tensor] = ()
    """``(heads,)`` of every layer, from ``attention_distance``."""

    @classmethod
    def of(cls, name: str, model: nn.Module, images: Tensor) -> "Fields":
        """Look at the features that a timm model ends with, and at attention among them.

        Args:
            name: What to call it.
            model: One with ``forward_intermediates``; layers that attend among other tokens than
                those of its last map are passed over.
            images: ``(B, C, H, W)``.

        Raises:
            AnalysisError: If it has no ``forward_intermediates``.
        """
        last = _LastMap(model)
        field = effective_receptive_field(last, images)
        with evaluating(model), torch.no_grad():
            rows, columns = last(images[:1]).shape[2:]
        grid = TokenGrid((rows, columns), num_prefix_tokens=getattr(model, "num_prefix_tokens", 0))
        try:
            attention = attention_distance(model, images, grid)
        except AnalysisError:  # none among them
            attention = []
        return cls(name, field, attention)

    def to_dict(self) -> dict[str, Any]:
        """Numbers alone, ready for JSON."""
        return {
            "name": self.name,
            "radius_pixels": {str(share): radius(self.field, share) for share in (0.5, 0.9)},
            "attention_distance_tokens": [heads.tolist() for heads in self.attention],
        }


class _LastMap(nn.Module):
    """The features that a timm model ends with, as maps."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, c, h, w)``."""
        forward = getattr(self.model, "forward_intermediates", None)
        if forward is None:
            kind = type(self.model).__name__
            raise AnalysisError(f"expected a model with forward_intermediates, got {kind}")
        return forward(images, indices=1, output_fmt="NCHW", intermediates_only=True)[-1]
