"""What a model costs: parameters, multiply-accumulates and bytes, from shapes alone.

A forward pass on the meta device gives the shape of every operator call; each call is then priced
by its closed formula. Nothing is allocated and nothing is computed.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from tokenconv.errors import MeasurementError, UnknownNameError


@dataclass(frozen=True)
class SiteCost:
    """What one module inside a model costs."""

    params: int
    """Parameters it owns."""
    macs: int
    """Multiply-accumulates for one image."""
    bytes: int
    """Bytes its operators read and write for one image."""
    calls: int
    """How often it runs in one forward pass."""
    input_shape: tuple[int, ...]
    """Shape of what it is given, for one image; empty if it never runs."""


@dataclass(frozen=True)
class Cost:
    """What a model costs for one image.

    A multiply-accumulate counts once; convolutions, linears, ``Q K^T`` and ``A V`` are counted
    and nothing else, as in the papers. ``bytes`` is the traffic of eager execution: every operator
    reads its tensors once and writes its results once, views are free.
    """

    params: int
    macs: int
    bytes: int
    sites: Mapping[str, SiteCost]
    """The modules that were asked for, by name."""


def cost(
    model: nn.Module, input_size: Sequence[int], *, sites: Iterable[str] | None = None
) -> Cost:
    """Price one forward pass of a model, without memory and without running it.

    Args:
        model: Any module that takes a batch of images.
        input_size: ``(C, H, W)`` of one image.
        sites: Names of modules to price by themselves; None takes the outermost tokenconv modules.

    Returns:
        Parameters, MACs and bytes, in total and per site.

    Raises:
        MeasurementError: If the model refuses an image of this size, or cannot be copied.
        UnknownNameError: If there is no module of a name in ``sites``.
    """
    return price(meta_copy(model), input_size, sites=sites)


def price(
    meta: nn.Module, input_size: Sequence[int], *, sites: Iterable[str] | None = None
) -> Cost:
    """What ``cost`` does, for a model that is on the meta device already; see there."""
    modules = dict(meta.named_modules())
    meter = _Meter()
    hooks: list[RemovableHandle] = []
    for name in own_modules(meta) if sites is None else sites:
        if (module := modules.get(name)) is None:
            raise UnknownNameError("module", name, modules)
        hooks.append(module.register_forward_pre_hook(meter.enter(name)))
        hooks.append(module.register_forward_hook(meter.leave))
    with meter:
        run_meta(meta, 1, input_size, meter)
    for hook in hooks:
        hook.remove()
    return Cost(
        params=_num_params(meta),
        macs=meter.total.macs,
        bytes=meter.total.bytes,
        sites={
            name: SiteCost(params=_num_params(modules[name]), **vars(tally))
            for name, tally in meter.sites.items()
        },
    )


def run_meta(
    meta: nn.Module,
    batch: int,
    input_size: Sequence[int],
    meter: "_Meter | None" = None,
    *,
    training: bool = False,
) -> None:
    """Run a model on the meta device on a batch of images.

    Args:
        meta: What ``meta_copy`` gave.
        batch: Number of images.
        input_size: ``(C, H, W)`` of one image.
        meter: Where to price attention, which no dispatch mode sees here.
        training: In training mode; else in evaluation mode.

    Raises:
        MeasurementError: If it refuses them.
    """
    floating = next((p.dtype for p in meta.parameters() if p.is_floating_point()), torch.float32)
    images = torch.empty(batch, *input_size, device="meta", dtype=floating)
    try:
        with torch.inference_mode(False), torch.no_grad(), _AttentionAsOne(meter):
            meta.train(training)(images)
    except (RuntimeError, AssertionError, ValueError) as error:
        size = "x".join(str(s) for s in input_size)
        raise MeasurementError(f"the model refuses an image of {size}: {error}") from error


_HOOKS = ("tokenconv.", "transformers.")
"""Whose hooks are part of a model; transformers collects hidden states by them."""


def meta_copy(model: nn.Module) -> nn.Module:
    """A deep copy of a model whose parameters and buffers take no memory.

    Hooks of users stay behind: they may read values, which a meta tensor does not have.

    Raises:
        MeasurementError: If the model cannot be copied.
    """
    weightless: dict[int, Any] = {}
    try:
        with torch.inference_mode(False):
            for parameter in model.parameters():
                weightless[id(parameter)] = nn.Parameter(
                    torch.empty_like(parameter, device="meta"), parameter.requires_grad
                )
            for buffer in model.buffers():
                weightless[id(buffer)] = torch.empty_like(buffer, device="meta")
            meta = copy.deepcopy(model, weightless)
    except RuntimeError as error:
        raise MeasurementError(f"the model cannot be copied: {error}") from error
    for module in meta.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if not getattr(hook, "__module__", "").startswith(_HOOKS):
                    del hooks[key]
    return meta


def _num_params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def own_modules(model: nn.Module, prefix: str = "") -> list[str]:
    """Names of the outermost tokenconv modules, looking through what only holds them."""
    names: list[str] = []
    for name, child in model._modules.items():
        if child is None:
            continue
        if _does_the_work(child):
            names.append(prefix + name)
        else:
            names.extend(own_modules(child, f"{prefix}{name}."))
    return names


def _does_the_work(module: nn.Module) -> bool:
    """Whether it is ours, and no mere place in a model where ours stand."""
    room = type(module).__module__
    if not room.startswith("tokenconv.surgery."):
        return room.startswith("tokenconv.")
    holds_ours = any(type(m).__module__.startswith("tokenconv.layers.") for m in module.children())
    return holds_ours and bool(module._parameters)


def depthwise_modules(model: nn.Module) -> list[str]:
    """Names of the outermost modules that convolve every channel by itself."""
    names: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in names)
        if not inside and _is_depthwise(module):
            names.append(name)
    return names


def _is_depthwise(module: nn.Module) -> bool:
    """One kernel per channel: a weight (C, 1, K, K)."""
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim < 4 or not weight.shape[1] == 1 < weight.shape[0]:
        return False
    groups = getattr(module, "groups", weight.shape[0])  # ours need not say
    return groups == weight.shape[0]


# --- closed formulas: (argument shapes as called, result) -> multiply-accumulates ---


def _matmul_macs(args: Sequence[Any], out: Tensor) -> int:
    return out.numel() * args[-1].shape[-2]


def _convolution_macs(args: Sequence[Any], out: Tensor) -> int:
    weight, transposed = args[1], args[6]
    if transposed:
        return args[0].numel() * math.prod(weight.shape[1:])
    return out.numel() * math.prod(weight.shape[1:])


def _attention_macs(query: Tensor, key: Tensor, value: Tensor) -> int:
    return math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


_aten = torch.ops.aten
_MACS: dict[Any, Callable[[Sequence[Any], Tensor], int]] = {
    _aten.mm: _matmul_macs,
    _aten.bmm: _matmul_macs,
    _aten.addmm: _matmul_macs,
    _aten.baddbmm: _matmul_macs,
    _aten.convolution: _convolution_macs,
}
_FREE = {_aten._unsafe_view, _aten.detach, _aten.empty, _aten.empty_like, _aten.new_empty}


@dataclass
class _Tally:
    macs: int = 0
    bytes: int = 0
    calls: int = 0
    input_shape: tuple[int, ...] = ()


class _Meter(TorchDispatchMode):
    """Prices every operator call of a forward pass, in total and for the sites it runs in."""

    def __init__(self) -> None:
        super().__init__()
        self.total = _Tally()
        self.sites: dict[str, _Tally] = {}
        self.open: list[_Tally] = []

    def enter(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        tally = self.sites[name] = _Tally()

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            tally.calls += 1
            tally.input_shape = tuple(args[0].shape)
            self.open.append(tally)

        return hook

    def leave(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        self.open.pop()

    def price(self, macs: int, tensors: Sequence[Any]) -> None:
        moved = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
        for tally in (self.total, *self.open):
            tally.macs += macs
            tally.bytes += moved

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if not (func.is_view or packet in _FREE):
            formula = _MACS.get(packet)
            self.price(formula(args, out) if formula else 0, tree_leaves((args, kwargs, out)))
        return out


class _AttentionAsOne(TorchFunctionMode):
    """Takes scaled dot-product attention as the one kernel it is; meta would decompose it."""

    def __init__(self, meter: _Meter | None):
        super().__init__()
        self.meter = meter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask")
        query, key, value, mask = (
            args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)
        )
        batch = torch.broadcast_shapes(query.shape[:-2], value.shape[:-2])
        out = query.new_empty((*batch, query.shape[-2], value.shape[-1]))
        if self.meter:
            self.meter.price(_attention_macs(query, key, value), (query, key, value, mask, out))
        return out
