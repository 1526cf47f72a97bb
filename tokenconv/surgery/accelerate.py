"""Run a model's own depthwise convolutions over tokens, and the activations behind them, fused.

What can be fused is seen, not told: a weightless copy runs, to predict and to train, while every
use of what a convolution returns is written down. An activation that is its only use becomes part
of it. So models of timm and transformers, hybrids of this library and models of one's own need no
list.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenconv.blocks.chain import Chain
from tokenconv.blocks.gated import Gate
from tokenconv.costs import meta_copy, run_meta
from tokenconv.errors import MeasurementError, SurgeryError
from tokenconv.layers import DWConv
from tokenconv.ops.depthwise_conv import ACTIVATE, Activation, Impl, depthwise_conv
from tokenconv.surgery.fragments import MergedConv
from tokenconv.surgery.sites import has_values, image_size

_BATCH = 2  # with one image, maps of any memory layout look alike


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
    chains, kept = _chains(model, input_size)
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


torch.fx.wrap("_convolve_map")


def _speed_up(conv: nn.Module, chain: "_Chain", impl: Impl | None) -> None:
    if isinstance(conv, DWConv):
        vars(conv)["tokenconv"] = conv.activation, conv.impl
        conv.activation, conv.impl = chain.activation, impl or conv.impl
        return
    ours: type[nn.Module] = TokenMergedConv if isinstance(conv, MergedConv) else TokenConv2d
    conv.__class__ = ours  # pyright: ignore[reportAttributeAccessIssue]
    vars(conv)["tokenconv"] = _Way(chain.activation, impl)


# --- what there is to be fused ---


@dataclass(frozen=True)
class _Chain:
    """A convolution and what is computed with it, by name."""

    conv: str
    act: str = ""
    activation: Activation | None = None
    gate: str = ""

    @property
    def text(self) -> str:
        parts = [str(self.activation)] * bool(self.act) + ["gate"] * bool(self.gate)
        return " and ".join(["on tokens", *parts])


@dataclass
class _Call:
    """One call of a module that is watched."""

    given: Tensor
    gave: Tensor
    uses: list[str] = field(default_factory=list)
    """Of what it returned, but for views: the activation that each ran in, or nothing."""


def _chains(
    model: nn.Module, input_size: Sequence[int] | None
) -> tuple[list[_Chain], dict[str, str]]:
    """What can be accelerated, and why other depthwise convolutions cannot."""
    try:
        meta = meta_copy(model)
        watch = _Watch(meta)
        size = input_size or image_size(meta)
        with watch:
            run_meta(meta, _BATCH, size)
            with suppress(Exception):  # not every model trains on images alone
                run_meta(meta, _BATCH, size, training=True)
    except MeasurementError as error:
        raise SurgeryError(f"{error}. Pass the right input_size=(C, H, W)") from error
    chains, kept = [], {}
    for name, conv in watch.convs.items():
        calls = watch.calls.get(name, [])
        if why := _unfit(conv, calls):
            kept[name] = why
            continue
        act = "" if model.get_submodule(name)._forward_hooks else _only_use(watch, calls)
        activation = watch.acts[act] if act else None
        if isinstance(conv, DWConv) and conv.activation:
            act, activation = "", conv.activation
        gate = _gate_around(meta, act)
        chains.append(_Chain(name, act, activation, gate))
    return chains, kept


def _unfit(conv: nn.Module, calls: Sequence[_Call]) -> str:
    """Why a depthwise convolution cannot run as ours; empty if it can."""
    if not calls:
        return "it does not run"
    known = next(kind for kind in (DWConv, MergedConv, nn.Conv2d) if isinstance(conv, kind))
    if "forward" in vars(conv) or type(conv).forward is not known.forward:
        return "it has a forward of its own"
    if isinstance(conv, DWConv):
        return ""
    given = calls[0].given
    if given.ndim != 4 or given.stride(1) != 1:
        return "its input is a map in NCHW memory, and no view of tokens"
    if isinstance(conv, MergedConv):
        return ""
    assert isinstance(conv, nn.Conv2d)
    side, dilation = conv.kernel_size[0], conv.dilation[0]
    if conv.stride != (1, 1):
        return f"it has a stride of {conv.stride}"
    if conv.dilation != (dilation, dilation):
        return f"it has a dilation of {conv.dilation}"
    if conv.kernel_size != (side, side) or side % 2 == 0:
        return f"its kernel of {conv.kernel_size} is not odd and square"
    same = ("same", (dilation * (side // 2),) * 2)
    if conv.padding not in same or conv.padding_mode != "zeros":
        return "its padding does not keep the size with zeros"
    return ""


def _only_use(watch: "_Watch", calls: Sequence[_Call]) -> str:
    """The activation that is the only use of what a convolution returns, in every call."""
    used = {use for call in calls for use in call.uses}
    if len(used) != 1:
        return ""
    (act,) = used
    if act not in watch.acts:
        return ""
    given = [_storage(call.given) for call in watch.calls[act]]
    return act if given == [_storage(call.gave) for call in calls] else ""


def _gate_around(model: nn.Module, act: str) -> str:
    """The gate of ours whose first half is just a convolution and this activation."""
    name = act.rpartition(".")[0].rpartition(".")[0]
    gate = model.get_submodule(name) if name else None
    return name if isinstance(gate, Gate) and gate.can_fuse() else ""


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class _Watch(TorchDispatchMode):
    """Writes down every use of what depthwise convolutions return, while a model runs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.convs: dict[str, nn.Module] = {}
        self.acts: dict[str, Activation] = {}
        self.calls: dict[str, list[_Call]] = {}
        self.open: list[str] = []
        """Activations and convolutions that are running."""
        self.made: dict[int, _Call] = {}
        """By storage: the call that returned it, which keeps it, so that none is used again."""
        for name, module in model.named_modules():
            if type(module) is nn.Conv2d:
                module.register_forward_hook(_keep_layout)
            if any(name.startswith(f"{conv}.") for conv in self.convs):
                continue
            if _is_depthwise(module):
                self.convs[name] = module
            elif activation := activation_of(module):
                self.acts[name] = activation
            else:
                continue
            module.register_forward_pre_hook(self._enter(name), with_kwargs=True)
            module.register_forward_hook(self._leave, with_kwargs=True)
        model.register_forward_hook(self._return)

    def _enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.open.append(name)
            if kwargs or len(args) != 1:  # what stands there afterwards takes one tensor
                self.acts.pop(name, None)

        return hook

    def _leave(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        name = self.open.pop()
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if given and isinstance(out, Tensor):
            call = _Call(given[0], out)
            if len(given) > 1:  # a gate, which is multiplied before anything else sees the result
                call.uses.append("")
            self.calls.setdefault(name, []).append(call)
            if name in self.convs:
                self.made[_storage(out)] = call

    def _return(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        """To be returned is a use as well, which no operator shows."""
        self._use(out)

    def _use(self, *values: Any) -> None:
        inside = next((name for name in self.open if name in self.acts), "")
        for one in tree_leaves(values):
            if isinstance(one, Tensor) and (call := self.made.get(_storage(one))):
                call.uses.append(inside)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self._use(args, kwargs)
        return out


def _keep_layout(conv: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    """A convolution of tokens returns tokens, as it does on devices; the meta device has NCHW."""
    is_tokens = bool(args) and args[0].ndim == 4 and args[0].stride(1) == 1
    return out.contiguous(memory_format=torch.channels_last) if is_tokens else out


def _is_depthwise(module: nn.Module) -> bool:
    if isinstance(module, (DWConv, MergedConv)):
        return True
    return type(module) is nn.Conv2d and (
        module.groups == module.in_channels == module.out_channels > 1
    )


def activation_of(module: nn.Module) -> Activation | None:
    """The activation that a module computes, by what it makes of numbers, not by its class."""
    if isinstance(module, (Chain, nn.Identity)) or has_values(module) or list(module.children()):
        return None
    far = 10.0 ** torch.arange(-30, 31, dtype=torch.float64)  # some activations clip there
    numbers = torch.cat([torch.linspace(-8, 8, 257, dtype=torch.float64), far, -far])
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            outs = [copy.deepcopy(module).train(mode)(numbers.clone()) for mode in (True, False)]
    except Exception:  # whatever a module of somebody's raises on what it was not made for
        return None
    for activation in Activation:
        wanted = ACTIVATE[activation](numbers)
        if all(
            isinstance(out, Tensor)
            and out.shape == numbers.shape
            and torch.allclose(out, wanted, rtol=1e-10, atol=1e-12)
            for out in outs
        ):
            return activation
    return None
