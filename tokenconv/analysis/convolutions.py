"""Which convolutions of a model can be taken apart, and why others cannot."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tokenconv.errors import AnalysisError, UnknownNameError
from tokenconv.patterns import compiled


@dataclass(frozen=True)
class Found:
    """The convolutions of a model."""

    dense: Mapping[str, nn.Conv2d]
    """Those that mix channels and look at more than one position, by name."""
    passed_over: Mapping[str, str]
    """Why others are none of these, by name."""


def find_dense(model: nn.Module, layers: str | Sequence[str] | None = None) -> Found:
    """Dense convolutions of a model, grouped ones among them, in the order of its modules.

    Args:
        model: Any module; a convolution that is used under two names is found once.
        layers: Only these, by a regular expression searched in their names, or by a list of names.

    Raises:
        AnalysisError: If a convolution is quantised or has a weight that is not finite, ``layers``
            is no regular expression, or no convolution is left.
        UnknownNameError: If there is no convolution of a name in ``layers``.
    """
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        reason = _why_not(name, module)
        if reason == "" and owners[id(module.weight)] > 1:
            reason = "shares its weight with another module"
        if reason is not None:
            reasons[name] = reason
    dense: dict[str, nn.Conv2d] = {}
    for name in _chosen(layers, [name for name, reason in reasons.items() if not reason]):
        dense[name] = model.get_submodule(name)  # pyright: ignore[reportArgumentType]
        check_finite(name, dense[name].weight)
    return Found(dense, {name: reason for name, reason in reasons.items() if reason})


def _chosen(layers: str | Sequence[str] | None, names: list[str]) -> list[str]:
    if layers is None:
        return names
    if not isinstance(layers, str):
        for name in layers:
            if name not in names:
                raise UnknownNameError("dense convolution", name, names)
        return [name for name in names if name in layers]
    try:
        pattern = compiled(layers)
    except ValueError as error:
        raise AnalysisError(str(error)) from error
    chosen = [name for name in names if pattern.search(name)]
    if not chosen:
        raise UnknownNameError("dense convolution", layers, names)
    return chosen


def _why_not(name: str, module: nn.Module) -> str | None:
    """Empty for a dense convolution, a reason for another one, None for what is none."""
    kind = type(module).__name__
    if type(module).__module__.startswith(("torch.ao.nn.", "torch.nn.quantized")) and hasattr(
        module, "kernel_size"
    ):
        raise AnalysisError(f"{name} is a quantised {kind}; analyse the model before quantisation")
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return "transposed"
    if isinstance(module, nn.Conv1d | nn.Conv3d):
        return f"{kind}: only two dimensions are taken apart"
    if not isinstance(module, nn.Conv2d):
        return None
    if "weight" not in module._parameters:  # reading it may even change it (spectral_norm)
        return "its weight is computed (parametrisation, weight_norm, pruning); make it permanent"
    check_values(name, module.weight)
    if module.kernel_size == (1, 1):
        return "1x1: it looks at one position"
    if is_depthwise(module):
        return "depthwise already"
    if not is_plain(module):
        return f"{kind} computes its convolution in a way of its own"
    return ""


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Whether no two filters read the same channel, or no two channels meet: half of a pair."""
    return conv.kernel_size != (1, 1) and 1 < conv.groups in (conv.in_channels, conv.out_channels)


def is_plain(module: nn.Module) -> bool:
    """Whether it is an ``nn.Conv2d`` that computes what one computes."""
    return (
        isinstance(module, nn.Conv2d)
        and getattr(module.forward, "__func__", None) is nn.Conv2d.forward
        and type(module)._conv_forward is nn.Conv2d._conv_forward
    )


def check_values(name: str, weight: Tensor) -> None:
    """Refuse a weight that is not made of real numbers.

    Raises:
        AnalysisError: If it has none, or keeps them in a form of its own, as quantised ones do.
    """
    if is_lazy(weight) or weight.is_meta:
        why = "it was never run" if is_lazy(weight) else "it is on the meta device"
        raise AnalysisError(f"{name} has no values: {why}; load weights first")
    if is_traceable_wrapper_subclass(weight):
        raise AnalysisError(
            f"the weight of {name} is a {type(weight).__name__}; expected a plain tensor: analyse "
            f"the model before quantisation or sharding"
        )
    if not weight.is_floating_point():
        raise AnalysisError(f"{name} has a weight of {weight.dtype}; expected floating point")


def check_finite(name: str, weight: Tensor) -> None:
    """Refuse a weight that no decomposition exists for.

    Raises:
        AnalysisError: If it holds NaN or infinity, or see ``check_values``.
    """
    check_values(name, weight)
    if not torch.isfinite(weight).all():
        bad = (~torch.isfinite(weight)).sum().item()
        raise AnalysisError(f"the weight of {name} holds {bad} values that are not finite")
