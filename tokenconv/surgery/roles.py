"""What part of a model a module is: its classifier, a norm layer, a depthwise convolution."""

from typing import Any

from torch import nn


def heads(model: nn.Module) -> list[nn.Module]:
    """The classifier, as timm's ``get_classifier()`` gives it: one layer, two, or none."""
    for module in model.modules():
        if callable(getattr(module, "get_classifier", None)):
            found: Any = module.get_classifier()  # pyright: ignore[reportCallIssue]
            return list(found) if isinstance(found, (tuple, list, nn.ModuleList)) else [found]
    return []


def is_norm(module: nn.Module) -> bool:
    """Whether a class or an ancestor is called a norm, and has no parameters but vectors."""
    named = any("norm" in cls.__name__.lower() for cls in type(module).__mro__)
    return named and all(p.ndim <= 1 for p in module.parameters(recurse=False))


def is_depthwise(module: nn.Module) -> bool:
    """Whether every kernel of a convolution sees one channel out of many."""
    weight = module._parameters.get("weight")
    grey = getattr(module, "groups", None) == 1  # an embedding of images with one channel
    return weight is not None and weight.ndim > 2 and weight.shape[1] == 1 and not grey
