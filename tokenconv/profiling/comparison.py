"""Compare modules: latency, memory, parameters, MACs and where the time goes, in one paired run."""

import copy
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from tokenconv.costs import cost, depthwise_modules, meta_copy
from tokenconv.errors import MeasurementError, UnknownNameError
from tokenconv.profiling import machine
from tokenconv.profiling.measurement import (
    ENOUGH_ROUNDS,
    Mode,
    Rounds,
    Spread,
    Step,
    Timing,
    is_out_of_memory,
    paired,
    reason,
    time_interleaved,
)
from tokenconv.profiling.memory import measure_memory
from tokenconv.profiling.results import Arm, Comparison, Measured, Memory, Site
from tokenconv.profiling.roof import measure_roof
from tokenconv.profiling.traces import Profiled, profile_step, record_trace

_MODES: dict[str, list[Mode]] = {
    "infer": ["infer"],
    "train": ["train"],
    "both": ["infer", "train"],
}
_MOST_COMPILED = 8
_NOT_FINITE = (
    "its weights are not finite after training steps; its gradients overflow in this dtype"
)


def compare(
    models: Mapping[str, nn.Module],
    images: Tensor,
    *,
    mode: Literal["infer", "train", "both"] = "both",
    baseline: str | None = None,
    reference: str | None = None,
    repeats: int | None = None,
    precision: float = 0.02,
    budget_s: float = 20.0,
    warmup: int = 3,
    compiled: bool | Collection[str] = False,
    trace_dir: Path | str | None = None,
    progress: bool = False,
    about: Mapping[str, str] | None = None,
    descriptions: Mapping[str, str] | None = None,
) -> Comparison:
    """Measure modules side by side: one run, same images, arms in turn and in random order.

    The models are copied, so that training steps leave yours alone. An arm that runs out of
    memory, whose output is not finite or has another shape than that of the reference, or that
    cannot be trained, says so in the result and does not lose the others.

    Args:
        models: What to compare, by name; all on the device and in the dtype of ``images``.
        images: ``(B, C, H, W)``.
        mode: ``infer``, ``train`` (forward, backward and AdamW), or ``both``.
        baseline: The arm that ratios refer to; None takes the first.
        reference: The arm that outputs are compared with; None takes the baseline.
        repeats: Rounds that count; None takes 20 and as many more as ``precision`` needs.
        precision: Half the 99% interval of every latency ratio, over the ratio, that is good
            enough.
        budget_s: Seconds per mode after which no further round begins, but for the first 20.
        warmup: Rounds before them that do not count; more where ``repeats`` is None and the
            latencies go on changing.
        compiled: Run every arm through ``torch.compile``, or those of these names.
        trace_dir: Keep profiler traces here, in a folder per arm; None keeps none. If it cannot be
            written, a warning says so.
        progress: Show a progress bar on standard error.
        about: What else a report shall say, such as ``model`` and ``command``.
        descriptions: What the arms are, by name, for readers of the report.

    Returns:
        The comparison; print it for a table, or keep it with ``to_dict``. What is ``faster`` or
        ``slower`` is so at 99% confidence; ``no difference shown`` is no proof of equality.

    Raises:
        MeasurementError: If a model refuses the images, an output is no single tensor, a model
            needs the values of the images to know what to do (so that it has no cost by formula),
            or no arm at all can be measured.
        UnknownNameError: If ``mode`` is none, or ``baseline``, ``reference`` or a name in
            ``compiled`` no arm.
        ValueError: If there are no models or images, or a number or an arm's name makes no sense.
    """
    baseline = baseline or next(iter(models), "")
    reference = reference or baseline
    compiled = (set(models) if compiled else set()) if isinstance(compiled, bool) else set(compiled)
    named = (baseline, reference, *sorted(compiled))
    rounds = (
        Rounds(baseline=baseline, precision=precision, budget_s=budget_s, warmup=warmup)
        if repeats is None
        else Rounds.exactly(repeats, baseline=baseline, warmup=warmup)
    )
    modes = _checked_modes(models, images, mode, named, rounds, len(compiled))
    load = machine.load()
    warnings: list[str] = []
    with torch.inference_mode(False), torch.enable_grad():
        copies = {name: copy.deepcopy(model) for name, model in models.items()}
        if compiled:
            torch.compiler.reset()
        differences, broken = _differences(copies, images, reference, compiled)
        arms = [
            _arm(
                name,
                model,
                images,
                description=(descriptions or {}).get(name, ""),
                compiled=name in compiled,
                difference=differences.get(name),
            )
            for name, model in copies.items()
        ]
        roof = measure_roof(images.device, images.dtype)
        found: dict[Mode, _InMode] = {}
        known = len(modes) * len(copies) * (warmup + repeats + 1) if repeats else None
        with tqdm(total=known, desc="measuring", unit="step", disable=not progress) as bar:
            for current in modes:
                bar.set_postfix_str(current)
                if compiled and current != "infer":  # which has been compiled to compare outputs
                    torch.compiler.reset()
                steps, failed = _steps(copies, images, current, compiled, broken)
                timing = time_interleaved(
                    steps, rounds=rounds, device=images.device, tick=bar.update
                )
                found[current] = _measure(steps, timing, baseline, failed, bar.update)
                if trace_dir is not None:
                    warnings += _record(found[current].steps, images.device, Path(trace_dir))
    arms = tuple(_with_figures(arm, found) for arm in arms)
    if not any(arm.modes for arm in arms):
        name, failed = next((arm.name, arm.failures) for arm in arms)
        raise MeasurementError(f"no arm can be measured; {name}: {next(iter(failed.values()))}")
    warnings += _doubts(arms, baseline, rounds, load)
    return Comparison(
        baseline=baseline,
        reference=reference,
        batch_size=len(images),
        input_size=tuple(images.shape[1:]),
        memory_format=_memory_format(images),
        rounds={current: one.rounds for current, one in found.items()},
        overhead={current: one.overhead for current, one in found.items()},
        device=machine.device_name(images.device),
        dtype=str(images.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        load=(load, machine.load()),
        governor=machine.governor(),
        versions=machine.versions(),
        memory_source="memory events of the profiler",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        roof=roof,
        arms=arms,
        warnings=tuple(warnings),
        about=dict(about or {}),
    )


def _checked_modes(
    models: Mapping[str, nn.Module],
    images: Tensor,
    mode: str,
    named: Sequence[str],
    rounds: Rounds,
    num_compiled: int,
) -> list[Mode]:
    """The modes to measure, once everything else that was asked for makes sense."""
    if not models:
        raise ValueError("expected models to compare, got none")
    if rounds.least < 1 or rounds.warmup < 0 or not rounds.precision > 0 or rounds.budget_s < 0:
        raise ValueError(
            f"expected repeats >= 1, warmup >= 0, precision > 0 and budget_s >= 0, got "
            f"{rounds.least}, {rounds.warmup}, {rounds.precision} and {rounds.budget_s}"
        )
    if mode not in _MODES:
        raise UnknownNameError("mode", mode, _MODES)
    for name in named:
        if name not in models:
            raise UnknownNameError("arm", name, models)
    for name in models:
        if name in ("", "..") or Path(name).name != name:
            raise ValueError(f"expected arm names that can name a folder, got {name!r}")
    if images.ndim != 4 or not len(images):
        raise ValueError(f"expected images (B, C, H, W), got {tuple(images.shape)}")
    if num_compiled > _MOST_COMPILED:
        raise ValueError(
            f"torch.compile keeps {_MOST_COMPILED} versions of one forward and runs the rest "
            f"uncompiled, got {num_compiled} models to compile"
        )
    return _MODES[mode]


# --- before anything is timed ---


def _differences(
    models: Mapping[str, nn.Module], images: Tensor, reference: str, compiled: Collection[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Largest absolute difference of each output from the reference's, and what is wrong with some.

    Compiled arms are run compiled. A reference that is wrong is nothing to be compared with.
    """
    outputs: dict[str, Tensor] = {}
    broken: dict[str, str] = {}
    for name in sorted(models, key=lambda name: name != reference):
        model = models[name].eval()
        try:
            with torch.inference_mode():
                output = (torch.compile(model) if name in compiled else model)(images)
        except Exception as error:
            if name in compiled or is_out_of_memory(error):
                broken[name] = reason(error)
                continue
            shape = "x".join(str(s) for s in images.shape)
            raise MeasurementError(f"{name} refuses images of {shape}: {error}") from error
        if not isinstance(output, Tensor):
            raise MeasurementError(
                f"expected one tensor as output, {name} gives a {type(output).__name__}"
            )
        if not bool(output.isfinite().all()):
            broken[name] = "its output is not finite; its figures would mean nothing"
        elif reference in outputs and output.shape != outputs[reference].shape:
            broken[name] = (
                f"its output has the shape {tuple(output.shape)}, that of {reference} "
                f"{tuple(outputs[reference].shape)}"
            )
        else:
            outputs[name] = output
    if reference not in outputs:
        return {}, broken
    return {
        name: float((output - outputs[reference]).abs().max()) for name, output in outputs.items()
    }, broken


def _arm(
    name: str,
    model: nn.Module,
    images: Tensor,
    *,
    description: str,
    compiled: bool,
    difference: float | None,
) -> Arm:
    """What is known of an arm before anything is run."""
    input_size = tuple(images.shape[1:])
    try:
        inserted = cost(model, input_size)
        depthwise = cost(model, input_size, sites=depthwise_modules(model))
    except MeasurementError as error:
        raise MeasurementError(
            f"the cost of {name} cannot be told without running it (does what it does depend on "
            f"values?): {error}"
        ) from error
    return Arm(
        name=name,
        description=description,
        compiled=compiled,
        params=inserted.params,
        macs=inserted.macs,
        macs_by_flop_counter=_macs_by_flop_counter(model, input_size),
        bytes=inserted.bytes,
        sites={site: Site.of(found) for site, found in inserted.sites.items()},
        depthwise={site: Site.of(found) for site, found in depthwise.sites.items()},
        convolutions=_convolutions(model),
        max_abs_diff_at_insertion=difference,
        modes={},
        failures={},
    )


def _convolutions(model: nn.Module) -> dict[str, int]:
    """How many convolutions there are, by name with ``*`` for numbers."""
    names = [
        name
        for name, module in model.named_modules()
        if (weight := module._parameters.get("weight")) is not None and weight.ndim >= 4
    ]
    inside = tuple(f"{name}." for name in names)
    outermost = [name for name in names if not name.startswith(inside)]
    return dict(Counter(re.sub(r"\b\d+\b", "*", name) for name in outermost))


def _macs_by_flop_counter(model: nn.Module, input_size: tuple[int, ...]) -> int:
    """PyTorch's own count on the forward pass, half its FLOPs."""
    meta = meta_copy(model).eval().requires_grad_(False)
    floating = (p.dtype for p in meta.parameters() if p.is_floating_point())
    dtype = next(floating, torch.float32)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        meta(torch.empty(1, *input_size, device="meta", dtype=dtype))
    return counter.get_total_flops() // 2


def _steps(
    models: Mapping[str, nn.Module],
    images: Tensor,
    mode: Mode,
    compiled: Collection[str],
    broken: Mapping[str, str],
) -> tuple[dict[str, Step], dict[str, str]]:
    """The work of every arm, done once to see that it can be done; and why some cannot."""
    steps: dict[str, Step] = {}
    failures = dict(broken)
    for name, model in models.items():
        if name in broken:
            continue
        try:
            step = Step(model, images, mode, compiled=name in compiled)
            step()
        except Exception as error:  # whatever a model raises is its own matter
            failures[name] = reason(error)
        else:
            steps[name] = step
    return steps, failures


# --- once the steps are timed ---


@dataclass(frozen=True)
class _InMode:
    """What was found in one mode."""

    rounds: int
    overhead: float
    steps: dict[str, Step]
    """Of the arms that did not fail."""
    measured: dict[str, Measured]
    failures: dict[str, str]


def _measure(
    steps: Mapping[str, Step],
    timing: Timing,
    baseline: str,
    failures: Mapping[str, str],
    tick: Callable[[], object],
) -> _InMode:
    """Profile every step that was timed, and put its figures together."""
    failures = {**failures, **timing.failures}
    profiled: dict[str, tuple[Profiled, Memory]] = {}
    for name in timing.samples_ms:
        step = steps[name]
        try:
            run = profile_step(step, step.images.device)
            profiled[name] = run, measure_memory(step, run.peaks)
        except Exception as error:
            failures[name] = reason(error)
        if step.has_ruined_weights():
            failures[name] = _NOT_FINITE
            profiled.pop(name, None)
        tick()
    has_baseline = baseline in profiled
    base_samples = timing.samples_ms[baseline] if has_baseline else None
    base_memory = profiled[baseline][1].peak if has_baseline else None
    measured = {}
    for name, (run, memory) in profiled.items():
        samples = timing.samples_ms[name]
        latency = Spread.of(samples)
        measured[name] = Measured(
            latency_ms=latency,
            samples_ms=tuple(samples),
            ratio=paired(samples, base_samples) if base_samples else None,
            images_per_s=1e3 * len(steps[name].images) / latency.median,
            memory=memory,
            memory_ratio=memory.peak / base_memory if base_memory else None,
            time=run.time,
            operators=run.operators,
            depthwise_ms=run.depthwise_ms,
        )
    return _InMode(
        rounds=len(next(iter(timing.samples_ms.values()), [])),
        overhead=timing.overhead,
        steps={name: steps[name] for name in measured},
        measured=measured,
        failures=failures,
    )


def _with_figures(arm: Arm, found: Mapping[Mode, _InMode]) -> Arm:
    name = arm.name
    return replace(
        arm,
        modes={mode: one.measured[name] for mode, one in found.items() if name in one.measured},
        failures={mode: one.failures[name] for mode, one in found.items() if name in one.failures},
    )


def _record(steps: Mapping[str, Step], device: torch.device, folder: Path) -> Iterator[str]:
    """Keep a trace of every step; warnings of what could not be kept."""
    for name, step in steps.items():
        try:
            record_trace(step, device, folder / name)
        except Exception as error:
            for part in (folder / name).glob(f"{step.mode}.*"):
                part.unlink()
            yield f"no trace of {step.mode} of {name} in {folder}: {reason(error)}"


def _memory_format(images: Tensor) -> str:
    is_last = images.is_contiguous(memory_format=torch.channels_last)
    return "channels_last" if is_last and not images.is_contiguous() else "contiguous"


# --- how sure it is ---


def _doubts(arms: Sequence[Arm], baseline: str, rounds: Rounds, load: float) -> Iterator[str]:
    """What a reader should know before believing the figures."""
    cores = os.cpu_count() or 1
    if load > 0.5 * cores:
        yield (
            f"the machine was busy before: {load:.1f} processes on {cores} cores; close what runs, "
            f"and measure again"
        )
    unsure: dict[Mode, dict[str, float]] = {}
    few = False
    for arm in arms:
        for mode, measured in arm.modes.items():
            few |= len(measured.samples_ms) < ENOUGH_ROUNDS
            ratio = measured.ratio
            if arm.name != baseline and ratio and ratio.half_width > rounds.precision:
                unsure.setdefault(mode, {})[arm.name] = ratio.half_width
    if few:
        yield (
            f"with fewer than {ENOUGH_ROUNDS} rounds no verdict is given, and intervals promise "
            f"more than they know"
        )
    for mode, widths in unsure.items():
        worst = max(widths, key=lambda name: widths[name])
        known = f"{worst} to {widths[worst]:.1%}"
        if len(widths) > 1:
            known = f"{len(widths)} arms, at worst {known}"
        yield (
            f"ratios of {mode} are known less well than to {rounds.precision:.1%} ({known}): "
            f"measure longer (budget, repeats), or on a machine with less noise"
        )
