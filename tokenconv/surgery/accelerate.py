"""Run a model's own depthwise convolutions over tokens, and the activations behind them, fused."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenconv.blocks.gated import Gate
from tokenconv.errors import SurgeryError
from tokenconv.layers import DWConv
from tokenconv.ops.depthwise_conv import Activation, Impl, depthwise_conv
from tokenconv.surgery.fragments import MergedConv
from tokenconv.surgery.fusing import FusedChain, fused_chains


@dataclass(frozen=True)
class Acceleration:
    """What ``accelerate_`` did; print it to read it."""

    changed: dict[str, str]
    """Convolutions that run on tokens now, by name, and what they do besides."""
    kept: dict[str, str]
    """Why other depthwise convolutions run as before, by name."""

    def __str__(self) -> str:
        found = {**self.changed, **{name: f"kept: {why}" for name, why in self.kept.items()}}
        width = max(map(len, found))
        head = f"{len(self.changed)} of {len(found)} depthwise convolutions accelerated"
        return "\n".join([head, *(f"  {name:<{width}}  {what}" for name, what in found.items())])


def accelerate_(
    model: nn.Module,
    input_size: Sequence[int] | None = None,
    *,
    impl: Impl | str | None = None,
) -> Acceleration:
    """Let a model's depthwise convolutions over tokens run as ``depthwise_conv``, in place.

    An activation behind a convolution that nothing else uses is computed together with it, and the
    gate of ``conv_glu`` as well. Works on any model that takes images: timm's (PVTv2, Twins, XCiT,
    CoaT, ...), transformers' (SegFormer, PVTv2, ...), and hybrids made by ``insert_``. Parameters,
    their keys and the model's code stay as they are; outputs are equal within the rounding of the
    dtype. ``decelerate_`` takes it back.

    Hooks on a fused activation do not run meanwhile; a convolution with forward hooks, which may
    look at what it returns, keeps its activation. ``insert_``, ``remove_`` and ``freeze_grid_``
    are refused until then, so accelerate last.

    Args:
        model: Any model that takes a batch of images.
        input_size: ``(C, H, W)`` of an image; None takes the one the model was built for.
        impl: How the convolutions shall run, see ``Impl``; None chooses in every call.

    Returns:
        What was changed, and what was not, with the reason.

    Raises:
        SurgeryError: If there is nothing to accelerate, the model refuses an image of that size, or
            it is accelerated already.
        UnknownNameError: If there is no such ``impl``.
    """
    impl = None if impl is None else Impl.of(impl)
    if any(_accelerated(model)):
        raise SurgeryError("this model is accelerated already; call decelerate_ first")
    chains, kept = fused_chains(model, input_size)
    if not chains:
        reasons = "; ".join(
            f"{name}{f' and {count - 1} more' if count > 1 else ''}: {why}"
            for why, count in Counter(kept.values()).items()
            for name in [next(name for name, reason in kept.items() if reason == why)]
        )
        raise SurgeryError(
            f"{type(model).__name__} has no depthwise convolution over tokens to accelerate"
            + (f" ({reasons})" if reasons else "")
        )
    modules = dict(model.named_modules())
    fused = {modules[chain.act] for chain in chains if chain.act}
    for name, act in list(model.named_modules(remove_duplicate=False)):
        if act in fused:
            model.set_submodule(name, FusedActivation(act).train(act.training))
    for chain in chains:
        _speed_up(modules[chain.conv], chain, impl)
        if chain.gate:
            modules[chain.gate].is_fused = True  # pyright: ignore[reportArgumentType]
    return Acceleration({chain.conv: chain.text for chain in chains}, kept)


def decelerate_(model: nn.Module) -> nn.Module:
    """Take back what ``accelerate_`` did, in place; the model computes what it did before.

    Args:
        model: A model that ``accelerate_`` has changed, or a copy of one.

    Returns:
        The same model.

    Raises:
        SurgeryError: If it is not accelerated.
    """
    if not any(_accelerated(model)):
        raise SurgeryError(f"this {type(model).__name__} is not accelerated")
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, FusedActivation):
            model.set_submodule(name, module.original)
        elif isinstance(module, Gate):
            module.is_fused = False
        elif isinstance(module, _OnTokens):
            module.__class__ = module._plain  # pyright: ignore[reportAttributeAccessIssue]
            del module.tokenconv
        elif isinstance(module, DWConv) and "tokenconv" in vars(module):
            module.activation, module.impl = vars(module).pop("tokenconv")
    return model


def check_not_accelerated(model: nn.Module) -> None:
    """Refuse a model whose convolutions are accelerated."""
    if any(_accelerated(model)):
        raise SurgeryError(
            "this model is accelerated; call decelerate_ first, and accelerate_ last"
        )


def _accelerated(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if "tokenconv" in vars(module))


# --- what stands in the model afterwards ---


@dataclass(frozen=True)
class _Way:
    """How an accelerated convolution runs."""

    activation: Activation | None
    impl: Impl | None


class _OnTokens(nn.Module):
    """A convolution over maps that are tokens in memory, by a class derived from its own."""

    _plain: type[nn.Module]
    tokenconv: _Way

    def weights(self) -> tuple[Tensor, Tensor | None, int]:
        """Weight, bias and dilation."""
        raise NotImplementedError  # both subclasses have their own

    def forward(self, input: Tensor) -> Tensor:
        """Convolve a map ``(B, C, H, W)``."""
        return _convolve_map(input, *self.weights(), self.tokenconv)


class TokenConv2d(_OnTokens, nn.Conv2d):
    """A model's own ``nn.Conv2d``."""

    _plain = nn.Conv2d

    def weights(self) -> tuple[Tensor, Tensor | None, int]:
        """Weight, bias and dilation."""
        return self.weight, self.bias, self.dilation[0]


class TokenMergedConv(_OnTokens, MergedConv):
    """A model's own convolution with a kernel that was inserted."""

    _plain = MergedConv

    def weights(self) -> tuple[Tensor, Tensor | None, int]:
        """Weight, bias and dilation."""
        return *self.merged(), self.added.dilation


class FusedActivation(nn.Module):
    """Where an activation stood that a convolution computes."""

    def __init__(self, original: nn.Module):
        super().__init__()
        self.original = original

    def forward(self, x: Tensor) -> Tensor:
        """Pass on what is activated already."""
        return x


@torch.fx.wrap
def _convolve_map(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, way: _Way
) -> Tensor:
    """One fx node: the checks behind it cannot be traced symbolically."""
    size = x.shape[2:]
    tokens = x.permute(0, 2, 3, 1).flatten(1, 2)  # a view, with a true batch stride
    out = depthwise_conv(
        tokens, weight, bias, tuple(size), dilation=dilation, activation=way.activation,
        impl=way.impl,
    )  # fmt: skip
    return out.unflatten(1, size).permute(0, 3, 1, 2)


def _speed_up(conv: nn.Module, chain: FusedChain, impl: Impl | None) -> None:
    if isinstance(conv, DWConv):
        vars(conv)["tokenconv"] = conv.activation, conv.impl
        conv.activation, conv.impl = chain.activation, impl or conv.impl
        return
    ours: type[nn.Module] = TokenMergedConv if isinstance(conv, MergedConv) else TokenConv2d
    conv.__class__ = ours  # pyright: ignore[reportAttributeAccessIssue]
    vars(conv)["tokenconv"] = _Way(chain.activation, impl)
