"""How far one model looks, as a report shows it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokenconv.analysis.receptive_field import radius


@dataclass(frozen=True)
class Fields:
    """What was seen of one model."""

    name: str
    field: Tensor
    """``(H, W)``, from ``effective_receptive_field``."""
    attention: Sequence[Tensor] = ()
    """``(heads,)`` of every layer, from ``attention_distance``."""

    def to_dict(self) -> dict[str, Any]:
        """Numbers alone, ready for JSON."""
        return {
            "name": self.name,
            "radius_pixels": {str(share): radius(self.field, share) for share in (0.5, 0.9)},
            "attention_distance_tokens": [heads.tolist() for heads in self.attention],
        }
