"""One profiled run of a step: where the time goes, the peak of memory, and the trace file."""

import gzip
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import (
    ProfilerActivity,
    profile,
    record_function,
    schedule,
    tensorboard_trace_handler,
)

from tokenconv.profiling.measurement import Step, synchronize

_PREFIX = "tokenconv: "
_WARMUP_STEPS, _PROFILED_STEPS = 3, 2
_OPERATORS = ("aten::", "tokenconv::", "Optimizer.step", "Torch-Compiled Region")


class Category(StrEnum):
    """What the time of a step is spent on."""

    ATTENTION = "attention"
    MLP_MATMUL = "MLP matmul"
    DEPTHWISE = "depthwise convolution"
    NORM = "normalisation"
    ACTIVATION = "activation"
    LAYOUT = "layout copies"
    OTHER = "other"


@dataclass(frozen=True)
class Operator:
    """What one operator did in a step."""

    calls: float
    """How often it ran."""
    self_ms: float
    """Its own time, without that of the operators it called."""


@dataclass(frozen=True)
class Profiled:
    """What one profiled run told."""

    time_share: dict[str, float]
    """Share of the time per ``Category``; adds up to 1."""
    transient_bytes: int
    """Most bytes that were allocated at one moment, on top of what was held before."""
    operators: dict[str, Operator]
    """Operators by name, in one step."""


def profile_step(step: Step, device: torch.device, trace_dir: Path | None = None) -> Profiled:
    """Run a step a few times under the PyTorch profiler.

    Args:
        step: Has run before, so that nothing is set up for the first time.
        device: Where it runs.
        trace_dir: Keep the trace here, gzipped, as TensorBoard's PyTorch plugin and Perfetto read
            it; None keeps none.
    """
    activities = [ProfilerActivity.CPU]
    on_cuda = device.type == "cuda"
    if on_cuda:
        activities.append(ProfilerActivity.CUDA)
    step.release_gradients()
    synchronize(device)
    before = torch.cuda.memory_allocated(device) if on_cuda else 0
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory() as scratch:
        folder = trace_dir or Path(scratch)
        handler = tensorboard_trace_handler(str(folder), worker_name=step.mode, use_gzip=True)
        with (
            _annotated(step.model),
            profile(
                activities=activities,
                record_shapes=True,
                profile_memory=True,
                schedule=schedule(wait=0, warmup=_WARMUP_STEPS, active=_PROFILED_STEPS, repeat=1),
                on_trace_ready=handler,
            ) as run,
        ):
            for _ in range(_WARMUP_STEPS + _PROFILED_STEPS):
                step()
                step.release_gradients()
                synchronize(device)
                run.step()
        trace = max(folder.glob(f"{step.mode}.*.pt.trace.json.gz"))  # named by time
        if on_cuda:
            transient = torch.cuda.max_memory_allocated(device) - before
        else:
            transient = _peak_of_memory_events(trace)
    return Profiled(_time_share(run, on_cuda=on_cuda), transient, _operators(run, on_cuda=on_cuda))


def _peak_of_memory_events(trace: Path) -> int:
    """Highest running sum of the profiler's allocations and frees on the CPU."""
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    memory = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    level = peak = 0
    for event in sorted(memory, key=lambda e: e["ts"]):
        level += event["args"]["Bytes"]
        peak = max(peak, level)
    return peak


# --- where the time goes ---

_NAMES = {
    Category.ATTENTION: ("attn", "attention", "self_attn"),
    Category.MLP_MATMUL: ("mlp", "ffn"),
}


@contextmanager
def _annotated(model: nn.Module) -> Iterator[None]:
    """Mark attention, MLPs and our layers with a ``record_function`` range while this lasts."""
    handles = []
    for name, module in model.named_modules():
        if (category := _category_of_module(name, module)) is None:
            continue
        # One label, one range and both hooks per module; a module calls itself never.
        label, open_ranges = f"{_PREFIX}{category}: {name}", []

        def enter(module: nn.Module, args: Any, label: str = label, ranges: list = open_ranges):
            ranges.append(record_function(label))
            ranges[-1].__enter__()

        def leave(module: nn.Module, args: Any, out: Any, ranges: list = open_ranges):
            ranges.pop().__exit__(None, None, None)

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _category_of_module(name: str, module: nn.Module) -> Category | None:
    if type(module).__module__.startswith("tokenconv.layers"):
        return Category.DEPTHWISE
    last = name.rpartition(".")[2]
    return next((category for category, names in _NAMES.items() if last in names), None)


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


class _Classifier:
    """Finds the category of every profiled operator, forward and backward.

    An operator belongs to what its name says; else to what called it. Backward operators are
    called by the autograd engine: they belong to the forward operator of the same sequence number.
    """

    def __init__(self, events: list[Any]):
        self.seen: dict[int, Category] = {}
        self.forward: dict[int, Any] = {}
        for event in sorted(events, key=lambda e: e.time_range.start):
            if event.sequence_nr >= 0 and not _is_in_backward(event):
                self.forward[event.sequence_nr] = event  # the last to carry it made the node

    def category(self, event: Any) -> Category:
        if id(event) not in self.seen:
            self.seen[id(event)] = self._classify(event)
        return self.seen[id(event)]

    def _caller(self, event: Any) -> Any | None:
        if _is_backward(event):
            return self.forward.get(event.sequence_nr)
        return event.cpu_parent

    def _classify(self, event: Any) -> Category:
        if event.name.startswith(_PREFIX):
            marked = Category(event.name.removeprefix(_PREFIX).split(":")[0])
            return Category.OTHER if marked is Category.MLP_MATMUL else marked
        operator = event.name.removeprefix("aten::")
        caller = self._caller(event)
        if operator in _BY_OPERATOR:
            return _BY_OPERATOR[operator]
        if operator.startswith(("scaled_dot_product", "_scaled_dot_product")):
            return Category.ATTENTION
        if operator in _CONVOLUTIONS and _is_depthwise(event):
            return Category.DEPTHWISE
        if operator in _MATMULS:
            return self._matmul(event)
        inherited = self.category(caller) if caller is not None else Category.OTHER
        if operator in _COPIES and not self._inside_kernel(caller):
            return Category.LAYOUT
        return inherited

    def _inside_kernel(self, caller: Any | None) -> bool:
        """Whether a copy is a detail of a matmul or an attention kernel, not of the layout."""
        name = caller.name.removeprefix("aten::") if caller is not None else ""
        return name in _MATMULS or name.startswith(("scaled_dot", "_scaled_dot"))

    def _matmul(self, event: Any) -> Category:
        """A matmul belongs to the innermost attention or MLP it runs in."""
        while (event := self._caller(event)) is not None:
            if event.name.startswith(_PREFIX):
                return Category(event.name.removeprefix(_PREFIX).split(":")[0])
        return Category.OTHER


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


def _operators(run: profile, *, on_cuda: bool) -> dict[str, Operator]:
    """Calls and own time per operator, of one of the steps that were profiled."""
    calls: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    for event in run.events() or ():
        if event.device_type == DeviceType.CPU and event.name.startswith(_OPERATORS):
            own = event.self_device_time_total if on_cuda else event.self_cpu_time_total
            calls[event.name] += 1
            spent[event.name] += own
    return {
        name: Operator(calls[name] / _PROFILED_STEPS, spent[name] / 1e3 / _PROFILED_STEPS)
        for name in sorted(calls)
    }


def _time_share(run: profile, *, on_cuda: bool) -> dict[str, float]:
    events = [e for e in run.events() or () if e.device_type == DeviceType.CPU]
    classifier = _Classifier(events)
    spent = dict.fromkeys(Category, 0.0)
    for event in events:
        own = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        spent[classifier.category(event)] += own
    total = sum(spent.values())
    return {category.value: time / total if total else 0.0 for category, time in spent.items()}
