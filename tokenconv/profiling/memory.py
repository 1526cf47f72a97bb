"""What a step needs of memory: what is held, the peaks of its phases, what autograd keeps."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import profile

from tokenconv.profiling.measurement import Phase, Step, phase_of_range
from tokenconv.profiling.results import Memory


@dataclass(frozen=True)
class Peaks:
    """Most bytes at one moment of each phase, on top of what is held between steps."""

    forward: int
    backward: int
    optimizer: int
    reserved: int | None
    """Most that the CUDA allocator had taken, for all arms together; None on a CPU."""


def measure_memory(step: Step, peaks: Peaks) -> Memory:
    """What a step needs, the peaks of which are known already."""
    trained = [p for p in step.model.parameters() if p.requires_grad]
    is_training = step.optimizer is not None
    return Memory(
        parameters=_bytes(step.model.parameters()),
        buffers=_bytes(step.model.buffers()),
        images=_bytes([step.images]),
        gradients=_bytes(trained) if is_training else 0,
        optimizer_state=_bytes(step.optimizer_state()),
        forward_peak=peaks.forward,
        backward_peak=peaks.backward,
        optimizer_peak=peaks.optimizer,
        reserved=peaks.reserved,
        saved=saved_activations(step.model, step.images) if is_training else {},
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def saved_activations(model: nn.Module, images: Tensor) -> dict[str, int]:
    """Bytes that autograd keeps of a forward pass until the backward pass, by module.

    Every storage counts once, for the innermost module that it was first kept for; parameters,
    buffers and the images, which are there anyway, do not count. The forward pass is an eager one.

    Args:
        model: In the mode in which it shall run.
        images: ``(B, C, H, W)``.

    Returns:
        Modules that something is kept for, in the order of the forward pass; the name of what
        happens in no submodule is empty.
    """
    there = [*model.parameters(), *model.buffers(), images]
    seen = {tensor.untyped_storage().data_ptr() for tensor in there}
    running = [""]
    kept: Counter[str] = Counter()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:  # alive, hence unique, as long as the graph is
            seen.add(storage.data_ptr())
            kept[running[-1]] += storage.nbytes()
        return tensor

    handles = []
    for name, module in model.named_modules():
        enter = module.register_forward_pre_hook(
            lambda module, args, name=name: running.append(name), prepend=True
        )
        leave = module.register_forward_hook(lambda module, args, out: _leave(running))
        handles += [enter, leave]
    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(images)
        del out
    finally:
        for handle in handles:
            handle.remove()
    return dict(kept)


def _leave(running: list[str]) -> None:
    """Forward hooks must return nothing, or they replace the output."""
    running.pop()


def peaks_of(run: profile, reserved: int | None) -> Peaks:
    """Highest running sums of what was allocated and freed while a profiler ran.

    Args:
        run: Knows memory, and the ranges of the phases.
        reserved: What the CUDA allocator says; None on a CPU.
    """
    device_type = DeviceType.CPU if reserved is None else DeviceType.CUDA
    profiler: Any = run.profiler
    moments: list[tuple[int, int]] = []
    ranges: list[tuple[Phase, int, int]] = []
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]":
            if event.device_type() == device_type:
                moments.append((event.start_ns(), event.nbytes()))
        elif event.device_type() != DeviceType.CPU:
            continue  # the profiler repeats ranges on a GPU's clock; memory is taken on the CPU's
        elif (phase := phase_of_range(event.name())) is not None:
            ranges.append((phase, event.start_ns(), event.start_ns() + event.duration_ns()))
    moments.sort()
    peaks: dict[Phase, int] = {"forward": 0, "backward": 0, "optimizer": 0}
    for phase, start, end in ranges:
        peaks[phase] = max(peaks[phase], _peak_within(moments, start, end))
    return Peaks(peaks["forward"], peaks["backward"], peaks["optimizer"], reserved)


def _peak_within(moments: Sequence[tuple[int, int]], start: int, end: int) -> int:
    level = peak = 0
    for when, change in moments:
        if when > end:
            break
        level += change
        peak = max(peak, level) if when >= start else max(level, 0)
    return peak
