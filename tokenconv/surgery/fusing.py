"""What of a model's depthwise convolutions over tokens can be computed as one operator.

It is seen, not told: a weightless copy runs, to predict and to train, while every use of what a
convolution returns is written down. An activation that is its only use becomes part of it. So
models of timm and transformers, hybrids of this library and models of one's own need no list.
"""

import copy
from collections.abc import Sequence
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
from tokenconv.layers import DWConv, unlike_dwconv
from tokenconv.ops.depthwise_conv import ACTIVATE, Activation
from tokenconv.surgery.fragments import MergedConv
from tokenconv.surgery.places import BATCH, has_values
from tokenconv.surgery.sites import image_size


@dataclass(frozen=True)
class FusedChain:
    """A convolution and what is computed with it, by name."""

    conv: str
    act: str = ""
    activation: Activation | None = None
    gate: str = ""

    @property
    def text(self) -> str:
        """What it does, for the report."""
        parts = [str(self.activation)] * bool(self.act) + ["gate"] * bool(self.gate)
        return " and ".join(["on tokens", *parts])


@dataclass
class _Call:
    """One call of a module that is watched."""

    given: Tensor
    gave: Tensor
    uses: list[str] = field(default_factory=list)
    """Of what it returned, but for views: the activation that each ran in, or nothing."""


def fused_chains(
    model: nn.Module, input_size: Sequence[int] | None
) -> tuple[list[FusedChain], dict[str, str]]:
    """What can be accelerated, and why other depthwise convolutions cannot."""
    try:
        meta = meta_copy(model)
        watch = _Watch(meta)
        size = input_size or image_size(meta)
        with watch:
            run_meta(meta, BATCH, size)
            with suppress(Exception):  # not every model trains on images alone
                run_meta(meta, BATCH, size, training=True)
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
        chains.append(FusedChain(name, act, activation, gate))
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
    return unlike_dwconv(conv) if isinstance(conv, nn.Conv2d) else ""


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
