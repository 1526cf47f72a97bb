"""timm's feature extractors around a hybrid, where they take its stages out of their container.

The container had bound the stages to their grid; here the extractor does it.
"""

from collections.abc import Mapping
from typing import Any

from timm.models import FeatureDictNet, FeatureHookNet, FeatureListNet
from torch import nn

from tokenconv.surgery.binding import BoundBlock, Carriers, GridBinding


class _BindsStages(nn.ModuleDict):
    """Binds the grids to stages that were taken out of the container which had bound them."""

    _binding: GridBinding

    def items(self) -> Any:
        """What a feature extractor iterates over, running each stage before it takes the next."""
        carriers: Carriers = {}
        for name, stage in self._modules.items():
            assert stage is not None
            (bound,) = self._binding.bind([stage])
            carriers = {**carriers, **vars(bound).get("_carriers", {})}
            yield name, BoundBlock(self._binding, stage, carriers) if carriers else stage


class BindingFeatureDictNet(_BindsStages, FeatureDictNet):
    """A ``FeatureDictNet`` of a hybrid."""


class BindingFeatureListNet(_BindsStages, FeatureListNet):
    """A ``FeatureListNet`` of a hybrid."""


class BindingFeatureHookNet(_BindsStages, FeatureHookNet):
    """A ``FeatureHookNet`` of a hybrid."""


_BINDING: Mapping[type[nn.Module], type[nn.Module]] = {
    FeatureDictNet: BindingFeatureDictNet,
    FeatureListNet: BindingFeatureListNet,
    FeatureHookNet: BindingFeatureHookNet,
}


def bind_stages(extractor: nn.Module, binding: GridBinding) -> None:
    """Let an extractor of one of timm's classes that run stages by themselves bind their grids."""
    if type(extractor) in _BINDING:
        extractor.__class__ = _BINDING[type(extractor)]  # pyright: ignore
        vars(extractor)["_binding"] = binding
