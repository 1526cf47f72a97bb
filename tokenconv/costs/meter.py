"""Prices every operator call of a forward pass by its closed formula, from the shapes it is given.

Nothing is computed: the pass runs on the meta device. What a tensor comes from (the image, a
parameter, something that wants a gradient) is known by its storage, which views share.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenconv.costs.prices import Category

_aten = torch.ops.aten


class _Product(NamedTuple):
    """A convolution or a matrix product."""

    macs: int
    factors: tuple[Tensor, Tensor]


def _matmul(args: Sequence[Any], out: Tensor) -> _Product:
    return _Product(out.numel() * args[-1].shape[-2], (args[-2], args[-1]))


def _convolution(args: Sequence[Any], out: Tensor) -> _Product:
    x, weight, transposed = args[0], args[1], args[6]
    positions = x.numel() if transposed else out.numel()
    return _Product(positions * math.prod(weight.shape[1:]), (x, weight))


_PRODUCTS: dict[Any, Callable[[Sequence[Any], Tensor], _Product]] = {
    **dict.fromkeys((_aten.mm, _aten.bmm, _aten.addmm, _aten.baddbmm), _matmul),
    _aten.convolution: _convolution,
}
_FREE = {_aten._unsafe_view, _aten.detach, _aten.empty, _aten.empty_like, _aten.new_empty}
_CATEGORIES = {
    name: category
    for category, names in {
        Category.ATTENTION: ("_softmax", "_safe_softmax"),
        Category.NORM: (
            "native_layer_norm", "native_group_norm", "native_batch_norm", "cudnn_batch_norm",
            "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "_fused_rms_norm",
        ),
        Category.ACTIVATION: (
            "relu", "relu6", "gelu", "silu", "mish", "elu", "tanh", "sigmoid", "hardtanh",
            "hardswish", "hardsigmoid", "leaky_relu", "_prelu_kernel", "softplus", "threshold",
        ),
    }.items()
    for name in names
}  # fmt: skip


def _kind_of_convolution(weight: Tensor, groups: int) -> Category:
    if weight.shape[1] == 1 < groups:
        return Category.DEPTHWISE
    is_pointwise = groups == 1 and math.prod(weight.shape[2:]) == 1
    return Category.POINTWISE if is_pointwise else Category.CONVOLUTION


def _as_on_devices(packet: Any, args: Sequence[Any], out: Any) -> Any:
    """What an operator returns where something is computed, if the meta device has it otherwise."""
    if packet is _aten.convolution:  # keeps the layout there, so that what follows need not copy
        layouts = {suggest_memory_format(t) for t in args[:2]} - {torch.contiguous_format}
        return out.contiguous(memory_format=layouts.pop()) if layouts else out
    if packet is _aten.native_batch_norm and not args[5]:  # has no statistics of its own then
        return out[0], out[1].new_empty(0), out[2].new_empty(0)
    return out


@dataclass
class _Tally:
    macs: int = 0
    backward_macs: int = 0
    bytes: int = 0


@dataclass
class _Visit:
    calls: int = 0
    input_shape: tuple[int, ...] = ()


class _Origin(NamedTuple):
    """What the values in a storage come from."""

    storage: Any
    """Held, so that no other takes its place."""
    is_image: bool
    """Whether they depend on the image."""
    wants_grad: bool
    """Whether they depend on something that wants a gradient."""
    params: frozenset[int]
    """The parameters they come from, if they do not depend on the image."""


_NOTHING = _Origin(None, False, False, frozenset())


class Meter(TorchDispatchMode):
    """Prices what runs while it is entered, in total, by category, and for the sites it runs in.

    Args:
        params: Of the model, each once.
    """

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.total = _Tally()
        self.categories = {category: _Tally() for category in Category}
        self.sites: dict[str, tuple[_Tally, _Visit]] = {}
        self._open: list[_Tally] = []
        self._params = {id(param): param for param in params}
        self._owners: dict[int, Category] = {}
        self._origins: dict[int, _Origin] = {}
        for name, param in self._params.items():
            storage, known = param.untyped_storage(), self._origin(param)
            self._origins[storage._cdata] = _Origin(
                storage, False, known.wants_grad or param.requires_grad, known.params | {name}
            )

    def enter(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """A forward pre-hook that opens a site."""
        tally, visit = self.sites[name] = _Tally(), _Visit()

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            visit.calls += 1
            visit.input_shape = tuple(args[0].shape)
            self._open.append(tally)

        return hook

    def leave(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        """A forward hook that closes the site that was opened last."""
        self._open.pop()

    def is_image(self, x: Tensor, *, wants_grad: bool = False) -> None:
        """Say what the model is given, and whether a gradient of it is wanted."""
        storage = x.untyped_storage()
        self._origins[storage._cdata] = _Origin(storage, True, wants_grad, frozenset())

    def params(self) -> Counter[Category]:
        """Number of parameters by the category of the first operator they meet the image in."""
        found: Counter[Category] = Counter()
        for name, param in self._params.items():
            found[self._owners.get(name, Category.OTHER)] += param.numel()
        return found

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, out: Tensor
    ) -> None:
        """Price attention as one operator: two products of the same rows and columns."""
        scores = math.prod(out.shape[:-1]) * key.shape[-2]
        of_scores = self._wants_grad(query), self._wants_grad(key)
        of_result = any(of_scores), self._wants_grad(value)
        macs = scores * query.shape[-1], scores * value.shape[-1]
        backward = macs[0] * sum(of_scores) + macs[1] * sum(of_result)
        given = [t for t in (query, key, value, mask) if isinstance(t, Tensor)]
        self._count(Category.ATTENTION, sum(macs), backward, given, [out])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = _as_on_devices(func.overloadpacket, args, func(*args, **(kwargs or {})))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        packet = func.overloadpacket
        if func.is_view or packet in _FREE:
            self._follow(given, made)
        elif (formula := _PRODUCTS.get(packet)) is not None:
            product = formula(args, out)
            backward = product.macs * sum(map(self._wants_grad, product.factors))
            category = self._kind_of_product(packet, product, args)
            self._count(category, product.macs, backward, given, made)
        else:
            name = packet.__name__.removesuffix("_")
            self._count(_CATEGORIES.get(name, Category.OTHER), 0, 0, given, made)
        return out

    def _kind_of_product(self, packet: Any, product: _Product, args: Sequence[Any]) -> Category:
        if packet is _aten.convolution:
            return _kind_of_convolution(product.factors[1], args[8])
        both = all(self._origin(factor).is_image for factor in product.factors)
        return Category.ATTENTION if both else Category.LINEAR

    def _count(
        self,
        category: Category,
        macs: int,
        backward_macs: int,
        given: Sequence[Tensor],
        made: Sequence[Tensor],
    ) -> None:
        moved = sum(t.numel() * t.element_size() for t in (*given, *made))
        for tally in (self.total, self.categories[category], *self._open):
            tally.macs += macs
            tally.backward_macs += backward_macs
            tally.bytes += moved
        for name in self._follow(given, made):
            self._owners.setdefault(name, category)

    # --- where values come from ---

    def _follow(self, given: Sequence[Tensor], made: Sequence[Tensor]) -> frozenset[int]:
        """Note what results come from; the parameters that meet the image here."""
        origins = [self._origin(t) for t in given]
        is_image = any(origin.is_image for origin in origins)
        params = frozenset[int]().union(*(origin.params for origin in origins))
        wants_grad = any(origin.wants_grad for origin in origins)
        for t in made:
            storage = t.untyped_storage()
            own = frozenset[int]() if is_image else params
            self._origins[storage._cdata] = _Origin(storage, is_image, wants_grad, own)
        return params if is_image else frozenset()

    def _origin(self, x: Tensor) -> _Origin:
        return self._origins.get(x.untyped_storage()._cdata, _NOTHING)

    def _wants_grad(self, x: Tensor) -> bool:
        return self._origin(x).wants_grad


class AttentionAsOne(TorchFunctionMode):
    """Takes scaled dot-product attention as the one kernel it is; meta would decompose it.

    Args:
        meter: What prices it, if anything does.
    """

    def __init__(self, meter: Meter | None):
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
            self.meter.attention(query, key, value, mask, out)
        return out
