"""Runs of a step under the PyTorch profiler: one to take figures from, one to look at."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

from tokenconv.profiling.attribution import Attribution, annotated
from tokenconv.profiling.measurement import Step, keeps_freed_memory, synchronize
from tokenconv.profiling.memory import Peaks, peaks_of, saved_activations
from tokenconv.profiling.results import Operator, TimeSpent

_WARMUP_STEPS, _PROFILED_STEPS = 3, 2
_MOST_TOUCHED = 2**30


@dataclass(frozen=True)
class Profiled:
    """What a profiled run told of one step."""

    time: tuple[TimeSpent, ...]
    operators: dict[str, Operator]
    depthwise_ms: dict[str, float]
    peaks: Peaks


def profile_step(step: Step, device: torch.device) -> Profiled:
    """Run a step a few times under the profiler, for figures.

    Args:
        step: Has run before, so that nothing is set up for the first time.
        device: Where it runs.
    """
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.empty_cache()  # or what earlier arms had taken counts as taken by this one
        torch.cuda.reset_peak_memory_stats(device)
    run = _run(step, device)
    attribution = Attribution(list(run.events() or ()), on_cuda=on_cuda)
    return Profiled(
        time=attribution.time(_PROFILED_STEPS),
        operators=attribution.operators(_PROFILED_STEPS),
        depthwise_ms=attribution.depthwise_ms(_PROFILED_STEPS),
        peaks=peaks_of(run, torch.cuda.max_memory_reserved(device) if on_cuda else None),
    )


def _touch_pages(step: Step) -> None:
    """Let the process hold as much free memory as the profiled steps may break up.

    The profiler's own small objects lie between what a step gives back, so that the next step takes
    fresh pages from the system, and the operators that touch them first look slow: a training step
    took twice as long under the profiler.
    """
    trained = sum(p.nbytes for p in step.model.parameters() if p.requires_grad)
    kept = sum(saved_activations(step.model, step.images).values()) if step.optimizer else 0
    wanted = (_WARMUP_STEPS + _PROFILED_STEPS) * (kept + trained + step.images.nbytes)
    torch.empty(min(wanted, _MOST_TOUCHED), dtype=torch.uint8).fill_(1)


def record_trace(step: Step, device: torch.device, folder: Path) -> None:
    """Run a step a few times under the profiler, for people to look at.

    Leaves a gzipped trace, with the stacks that TensorBoard's Module view needs, as its PyTorch
    plugin and Perfetto read it; on a GPU also a snapshot of the memory, for
    https://docs.pytorch.org/memory_viz.

    Args:
        step: Has run before.
        device: Where it runs.
        folder: Made if missing.

    Raises:
        OSError: If it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.memory._record_memory_history(device=device)
    try:
        _run(step, device, folder)
        if on_cuda:
            torch.cuda.memory._dump_snapshot(str(folder / f"{step.mode}.memory.pickle"))
    finally:
        if on_cuda:
            torch.cuda.memory._record_memory_history(enabled=None)


def _run(step: Step, device: torch.device, folder: Path | None = None) -> profile:
    """Profile a step, and leave a trace in a folder if there is one."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it chatters on stderr the first time
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    elif keeps_freed_memory():
        _touch_pages(step)
    synchronize(device)
    with (
        annotated(step.model),
        profile(
            activities=activities,
            record_shapes=True,
            profile_memory=True,
            with_stack=folder is not None,
            acc_events=True,  # of the one cycle there is; older versions of torch warn without
            schedule=schedule(wait=0, warmup=_WARMUP_STEPS, active=_PROFILED_STEPS, repeat=1),
            on_trace_ready=(
                tensorboard_trace_handler(str(folder), step.mode, use_gzip=True) if folder else None
            ),
        ) as run,
    ):
        for _ in range(_WARMUP_STEPS + _PROFILED_STEPS):
            step()
            synchronize(device)
            run.step()
    return run
