"""Whose time it is: category, phase and site of every operator that the profiler saw."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

from torch import nn
from torch.autograd import DeviceType
from torch.profiler import record_function

from tokenconv.costs import depthwise_modules, own_modules
from tokenconv.profiling.measurement import RANGE, Phase, phase_of_range
from tokenconv.profiling.results import Operator, TimeSpent

_OPERATORS = ("aten::", "mkldnn::", "tokenconv::", "Optimizer.step", "Torch-Compiled Region")
_SITE, _BLOCK = "site", "block"


class Category(StrEnum):
    """What the time of a step is spent on."""

    ATTENTION = "attention"
    MLP_MATMUL = "MLP matmul"
    DEPTHWISE = "depthwise convolution"
    CONVOLUTION = "other convolution"
    INSERTED_MATMUL = "inserted matmul"
    NORM = "normalisation"
    ACTIVATION = "activation"
    LAYOUT = "layout copies"
    OPTIMIZER = "optimizer"
    OTHER = "other"


# --- ranges: what the profiler shall see besides operators ---


def _label(name: str) -> tuple[str, str]:
    """Kind and module that a range stands for; both empty if it is none of ours."""
    if not name.startswith(RANGE):
        return "", ""
    kind, _, module = name.removeprefix(RANGE).partition(": ")
    return kind, module


_NAMES = {
    Category.ATTENTION: ("attn", "attention", "self_attn"),
    Category.MLP_MATMUL: ("mlp", "ffn"),
}
_CLASSES = {Category.ATTENTION: re.compile(r"Attention|Attn")}
"""Where names tell nothing, as ``token_mixer`` in CAFormer."""


@contextmanager
def annotated(model: nn.Module) -> Iterator[None]:
    """Put a ``record_function`` range around each part that has a meaning while this lasts.

    Those are Transformer blocks, attention, MLPs, what was inserted, and depthwise convolutions.
    """
    handles = []
    modules = dict(model.named_modules())
    for name, labels in _labels(model).items():
        module = modules[name]
        for label in labels:
            # One range at a time: a module calls itself never.
            open_ranges: list[record_function] = []

            def enter(
                module: nn.Module, args: Any, label: str = label, ranges: list = open_ranges
            ) -> None:
                ranges.append(record_function(label))
                ranges[-1].__enter__()

            def leave(module: nn.Module, args: Any, out: Any, ranges: list = open_ranges) -> None:
                ranges.pop().__exit__(None, None, None)

            handles.append(module.register_forward_pre_hook(enter, prepend=True))
            handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _labels(model: nn.Module) -> dict[str, list[str]]:
    """What to write on the ranges of a module, from the innermost to the outermost."""
    marks: list[tuple[str, str]] = [(name, Category.DEPTHWISE) for name in depthwise_modules(model)]
    marks += [(name, _SITE) for name in own_modules(model)]
    for name, module in model.named_modules():
        block, _, last = name.rpartition(".")
        if (kind := _kind(last, type(module).__name__)) is not None:
            marks.append((name, kind))
            marks += [(block, _BLOCK)] * bool(block)
    labels: dict[str, list[str]] = {}
    for name, kind in dict.fromkeys(marks):
        labels.setdefault(name, []).append(f"{RANGE}{kind}: {name}")
    return labels


def _kind(name: str, cls: str) -> Category | None:
    """Whether a module is attention or an MLP, by its own name or that of its class."""
    named = (kind for kind, names in _NAMES.items() if name in names)
    classed = (kind for kind, pattern in _CLASSES.items() if pattern.search(cls))
    return next(named, None) or next(classed, None)


# --- events: what the profiler saw ---

_BY_OPERATOR = {
    **dict.fromkeys(
        ("layer_norm", "native_layer_norm", "native_layer_norm_backward", "rms_norm",
         "batch_norm", "native_batch_norm", "native_batch_norm_backward", "group_norm"),
        Category.NORM,
    ),
    **dict.fromkeys(
        ("gelu", "gelu_backward", "silu", "silu_backward", "relu", "threshold_backward",
         "hardswish", "hardswish_backward", "sigmoid", "sigmoid_backward"),
        Category.ACTIVATION,
    ),
    **dict.fromkeys(("softmax", "_softmax", "_softmax_backward_data"), Category.ATTENTION),
}  # fmt: skip
_COPIES = {"copy_", "clone", "contiguous", "cat", "_to_copy"}
_MATMULS = {"linear", "addmm", "mm", "bmm", "baddbmm", "matmul"}
_CONVOLUTIONS = {"conv2d", "convolution", "convolution_backward"}
_OF_RANGE = {_SITE: Category.INSERTED_MATMUL, **{category: category for category in Category}}
"""Whose matmuls are those in a range of a kind; a block says nothing of that."""


class Attribution:
    """What every profiled operator belongs to, forward and backward.

    An operator belongs to what its name says; else to what called it. Backward operators are
    called by the autograd engine: they belong to the forward operator of the same sequence number.
    All that the optimizer does is the optimizer's.

    Args:
        events: Of the profiler, on the CPU.
        on_cuda: Whether the time that counts is that of the GPU.
    """

    def __init__(self, events: list[Any], *, on_cuda: bool = False):
        self.events = [event for event in events if event.device_type == DeviceType.CPU]
        self.on_cuda = on_cuda
        self.categories: dict[int, Category] = {}
        self.sites: dict[int, str] = {}
        self.forward: dict[int, Any] = {}
        for event in sorted(self.events, key=lambda e: e.time_range.start):
            if event.sequence_nr >= 0 and not _is_in_backward(event):
                self.forward[event.sequence_nr] = event  # the last to carry it made the node

    def time(self, steps: int) -> tuple[TimeSpent, ...]:
        """Own time of all events, in one of so many steps."""
        spent: defaultdict[tuple[Category, Phase, str], float] = defaultdict(float)
        for category in Category:
            spent[category, "between", ""] = 0.0  # so that all are there, in this order
        for event in self.events:
            spent[self.category(event), _phase_of(event), self.site(event)] += self._own(event)
        return tuple(
            TimeSpent(category.value, when, site, microseconds / 1e3 / steps)
            for (category, when, site), microseconds in spent.items()
        )

    def operators(self, steps: int) -> dict[str, Operator]:
        """Calls and own time by name, in one of so many steps."""
        calls: Counter[str] = Counter()
        spent: defaultdict[str, float] = defaultdict(float)
        for event in self.events:
            if event.name.startswith(_OPERATORS):
                calls[event.name] += 1
                spent[event.name] += self._own(event)
        return {
            name: Operator(calls[name] / steps, spent[name] / 1e3 / steps) for name in sorted(calls)
        }

    def depthwise_ms(self, steps: int) -> dict[str, float]:
        """Time of the forward pass of every depthwise convolution, in one of so many steps."""
        spent: defaultdict[str, float] = defaultdict(float)
        for event in self.events:
            kind, name = _label(event.name)
            if kind == Category.DEPTHWISE:
                spent[name] += event.device_time_total if self.on_cuda else event.cpu_time_total
        return {name: microseconds / 1e3 / steps for name, microseconds in spent.items()}

    def category(self, event: Any) -> Category:
        """What the time is spent on."""
        if id(event) not in self.categories:
            self.categories[id(event)] = self._classify(event)
        return self.categories[id(event)]

    def site(self, event: Any) -> str:
        """The inserted module it belongs to; empty if to none."""
        if id(event) not in self.sites:
            kind, name = _label(event.name)
            caller = self._caller(event)
            self.sites[id(event)] = (
                name if kind == _SITE else "" if caller is None else self.site(caller)
            )
        return self.sites[id(event)]

    def _own(self, event: Any) -> float:
        return event.self_device_time_total if self.on_cuda else event.self_cpu_time_total

    def _caller(self, event: Any) -> Any | None:
        if _is_backward(event):
            return self.forward.get(event.sequence_nr)
        return event.cpu_parent

    def _classify(self, event: Any) -> Category:
        if _phase_of(event) == "optimizer":
            return Category.OPTIMIZER
        kind, _ = _label(event.name)
        if kind in (Category.ATTENTION, Category.DEPTHWISE):
            return Category(kind)
        if kind:
            return Category.OTHER
        operator = event.name.removeprefix("aten::")
        caller = self._caller(event)
        if operator in _BY_OPERATOR:
            return _BY_OPERATOR[operator]
        if operator.startswith(("scaled_dot_product", "_scaled_dot_product")):
            return Category.ATTENTION
        if operator in _CONVOLUTIONS:
            return Category.DEPTHWISE if _is_depthwise(event) else Category.CONVOLUTION
        if operator in _MATMULS:
            return self._matmul(event)
        inherited = self.category(caller) if caller is not None else Category.OTHER
        if operator in _COPIES and not _is_kernel(caller):
            return Category.LAYOUT
        return inherited

    def _matmul(self, event: Any) -> Category:
        """A matmul belongs to the innermost attention, MLP or inserted module it runs in."""
        while (event := self._caller(event)) is not None:
            if (kind := _label(event.name)[0]) in _OF_RANGE:
                return _OF_RANGE[kind]
        return Category.OTHER


def _is_kernel(caller: Any | None) -> bool:
    """Whether a copy in it is a detail of a matmul or an attention kernel, not of the layout."""
    name = caller.name.removeprefix("aten::") if caller is not None else ""
    return name in _MATMULS or name.startswith(("scaled_dot", "_scaled_dot"))


def _phase_of(event: Any | None) -> Phase:
    while event is not None:
        if _is_backward(event):
            return "backward"
        if (found := phase_of_range(event.name)) is not None:
            return found
        event = event.cpu_parent
    return "between"


def _is_backward(event: Any) -> bool:
    return event.name.startswith("autograd::engine::evaluate_function")


def _is_in_backward(event: Any | None) -> bool:
    while event is not None and not _is_backward(event):
        event = event.cpu_parent
    return event is not None


def _is_depthwise(event: Any) -> bool:
    """One input channel per group: a weight (C, 1, K, K) on a map of C channels."""
    shapes = event.input_shapes
    if event.name.endswith("_backward"):
        shapes = shapes[1:]  # behind the gradient of the output
    fmap, weight = shapes[:2]
    return len(weight) == 4 and weight[1] == 1 < weight[0] and fmap[1] == weight[0]
