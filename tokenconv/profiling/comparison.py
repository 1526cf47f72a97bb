"""Compare modules: latency, memory, parameters, MACs and where the time goes, in one paired run."""

import copy
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from tokenconv.costs import cost, meta_copy
from tokenconv.errors import MeasurementError, UnknownNameError
from tokenconv.profiling.measurement import (
    MIB,
    Mode,
    Rounds,
    Spread,
    Step,
    paired,
    time_interleaved,
)
from tokenconv.profiling.traces import Operator, profile_step

SCHEMA_VERSION = 2
_MODES: dict[str, list[Mode]] = {
    "infer": ["infer"],
    "train": ["train"],
    "both": ["infer", "train"],
}
_MOST_COMPILED = 8
_PACKAGES = ("tokenconv", "torch", "timm", "einops")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One arm in one mode."""

    latency_ms: Spread
    """Of one batch."""
    images_per_s: float
    peak_memory_mib: float
    """What is held between steps plus the peak of what a step allocates."""
    time_share: dict[str, float]
    """Share of the time by category; adds up to 1."""
    operators: dict[str, Operator]
    """Calls and own time of the operators of one step, by name."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the compared modules."""

    name: str
    params: int
    macs: int
    """Multiply-accumulates for one image, by closed formulas."""
    macs_by_flop_counter: int
    """The same by PyTorch's ``FlopCounterMode``, as a cross-check."""
    bytes: int
    """Eager traffic for one image."""
    max_abs_diff_at_insertion: float
    """Largest difference of the output from that of the reference arm."""
    modes: dict[Mode, Measured]
    ratios: dict[str, Any]
    """This arm over the baseline: ``params``, ``macs``, and per mode ``latency`` (a ``Ratio``, from
    the ratios round by round) and ``peak_memory``."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of ``compare``."""

    baseline: str
    reference: str
    batch_size: int
    input_size: tuple[int, ...]
    """``(C, H, W)`` of one image."""
    rounds: dict[Mode, int]
    """Rounds that counted."""
    compiled: bool
    device: str
    dtype: str
    threads: int
    load: tuple[float, float]
    """Processes that wanted to run, on the average of a minute, before and after."""
    governor: str
    """Of the CPU's frequency."""
    versions: dict[str, str]
    memory_source: str
    """Who counted the memory."""
    date: str
    arms: tuple[Arm, ...]
    warnings: tuple[str, ...]
    """Why figures may be worth less than they look."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values, ready for JSON."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    def __str__(self) -> str:
        rows = table(self)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, *(f"warning: {line}" for line in self.warnings)])


@dataclass(frozen=True)
class OperatorChange:
    """An operator that an arm runs otherwise than the baseline."""

    name: str
    kind: Literal["appears", "vanishes", "changes"]
    before: Operator
    """In a step of the baseline."""
    after: Operator
    """In a step of the arm."""


def operator_changes(comparison: Comparison, arm: str, mode: Mode) -> list[OperatorChange]:
    """Operators that appear, vanish or run more or less often, those that cost most first.

    Args:
        comparison: What was measured.
        arm: Name of an arm.
        mode: ``infer`` or ``train``.

    Raises:
        UnknownNameError: If there is no such arm or mode.
    """
    arms = {one.name: one for one in comparison.arms}
    if arm not in arms:
        raise UnknownNameError("arm", arm, arms)
    if mode not in arms[arm].modes:
        raise UnknownNameError("mode", mode, arms[arm].modes)
    nothing = Operator(0, 0)
    old, new = (arms[name].modes[mode].operators for name in (comparison.baseline, arm))
    found = []
    for name in {**old, **new}:
        before, after = old.get(name, nothing), new.get(name, nothing)
        if before.calls == after.calls:
            continue
        kind = "appears" if name not in old else "vanishes" if name not in new else "changes"
        found.append(OperatorChange(name, kind, before, after))
    return sorted(found, key=lambda change: -abs(change.after.self_ms - change.before.self_ms))


_HEADER = (
    "mode", "arm", "params", "MACs", "latency ms (IQR)", "vs baseline (99% interval)", "verdict",
    "images/s", "peak MiB", "diff at insertion",
)  # fmt: skip


def table(comparison: Comparison) -> list[tuple[str, ...]]:
    """Header and rows of the result, as text."""
    modes = list(comparison.arms[0].modes)
    rows = [_row(arm, mode, comparison) for mode in modes for arm in comparison.arms]
    return [_HEADER, *rows]


def _row(arm: Arm, mode: Mode, comparison: Comparison) -> tuple[str, ...]:
    measured, ratio = arm.modes[mode], arm.ratios[mode]["latency"]
    is_baseline = arm.name == comparison.baseline
    interval = f"{ratio['median']:.3f}x ({ratio['low']:.3f}-{ratio['high']:.3f})"
    return (
        mode,
        arm.name,
        f"{arm.params / 1e6:.3f} M",
        f"{arm.macs / 1e9:.3f} G",
        f"{measured.latency_ms.median:.1f} ({measured.latency_ms.iqr:.1f})",
        "baseline" if is_baseline else interval,
        "" if is_baseline else ratio["verdict"],
        f"{measured.images_per_s:.1f}",
        f"{measured.peak_memory_mib:.1f}",
        f"{arm.max_abs_diff_at_insertion:.1e}" if arm.max_abs_diff_at_insertion else "0",
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
    compiled: bool = False,
    trace_dir: Path | str | None = None,
    progress: bool = False,
) -> Comparison:
    """Measure modules side by side: one run, same images, arms in turn and in random order.

    The models are copied, so that training steps leave yours alone.

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
        compiled: Run every arm through ``torch.compile``.
        trace_dir: Keep profiler traces here, in a folder per arm; None keeps none.
        progress: Show a progress bar on standard error.

    Returns:
        The comparison; print it for a table, or keep it with ``to_dict``. What is ``faster`` or
        ``slower`` is so at 99% confidence; ``no difference shown`` is no proof of equality.

    Raises:
        MeasurementError: If a model refuses the images or cannot be trained, or if outputs are no
            single tensor, not finite, or of different shapes.
        UnknownNameError: If ``mode`` is none, or ``baseline`` or ``reference`` no arm.
        ValueError: If there are no models or images, or a number or an arm's name makes no sense.
    """
    baseline = baseline or next(iter(models), "")
    reference = reference or baseline
    modes = _checked_modes(models, images, mode, (baseline, reference), repeats, warmup, compiled)
    rounds = (
        Rounds(baseline=baseline, precision=precision, budget_s=budget_s, warmup=warmup)
        if repeats is None
        else Rounds.exactly(repeats, baseline=baseline, warmup=warmup)
    )
    load = _load()
    with torch.inference_mode(False), torch.enable_grad():
        copies = {name: copy.deepcopy(model) for name, model in models.items()}
        differences = _differences(copies, images, reference)
        input_size = tuple(images.shape[1:])
        costs = {name: cost(model, input_size) for name, model in copies.items()}
        counted = {name: _macs_by_flop_counter(m, input_size) for name, m in copies.items()}
        samples: dict[Mode, dict[str, list[float]]] = {}
        measured: dict[str, dict[Mode, Measured]] = {name: {} for name in copies}
        known = len(modes) * len(copies) * (warmup + repeats + 1) if repeats else None
        with tqdm(total=known, desc="measuring", unit="step", disable=not progress) as bar:
            for current in modes:
                bar.set_postfix_str(current)
                steps = _steps(copies, images, current, compiled=compiled)
                samples[current] = time_interleaved(
                    steps, rounds=rounds, device=images.device, tick=bar.update
                )
                for name, step in steps.items():
                    folder = Path(trace_dir) / name if trace_dir else None
                    measured[name][current] = _measure(step, samples[current][name], folder)
                    bar.update()

    def ratios(name: str) -> dict[str, Any]:
        found: dict[str, Any] = {
            "params": _ratio(costs[name].params, costs[baseline].params),
            "macs": _ratio(costs[name].macs, costs[baseline].macs),
        }
        for current in modes:
            ratio = paired(samples[current][name], samples[current][baseline])
            memory = [measured[n][current].peak_memory_mib for n in (name, baseline)]
            found[current] = {
                "latency": asdict(ratio),
                "peak_memory": memory[0] / memory[1],
            }
        return found

    arms = tuple(
        Arm(
            name=name,
            params=costs[name].params,
            macs=costs[name].macs,
            macs_by_flop_counter=counted[name],
            bytes=costs[name].bytes,
            max_abs_diff_at_insertion=differences[name],
            modes=measured[name],
            ratios=ratios(name),
        )
        for name in copies
    )
    return Comparison(
        baseline=baseline,
        reference=reference,
        batch_size=len(images),
        input_size=input_size,
        rounds={current: len(samples[current][baseline]) for current in modes},
        compiled=compiled,
        device=_device_name(images.device),
        dtype=str(images.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        load=(load, _load()),
        governor=_governor(),
        versions={"python": platform.python_version(), **_versions()},
        memory_source=(
            "CUDA allocator" if images.device.type == "cuda" else "memory events of the profiler"
        ),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        arms=arms,
        warnings=tuple(_warnings(arms, baseline, rounds, load)),
    )


def _warnings(arms: Sequence[Arm], baseline: str, rounds: Rounds, load: float) -> Iterator[str]:
    """What a reader should know before believing the figures."""
    cores = os.cpu_count() or 1
    if load > 0.5 * cores:
        yield (
            f"the machine was busy before: {load:.1f} processes on {cores} cores; close what runs, "
            f"and measure again"
        )
    for arm in arms:
        for mode in arm.modes:
            latency = arm.ratios[mode]["latency"]
            half = (latency["high"] - latency["low"]) / 2 / latency["median"]
            if arm.name != baseline and half > rounds.precision:
                yield (
                    f"{mode} of {arm.name} is known to {half:.1%} only, not to "
                    f"{rounds.precision:.1%}: measure longer (budget, repeats), or on a machine "
                    f"with less noise"
                )


def _load() -> float:
    """Processes that want to run, on the average of the last minute; 0 where nobody counts."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _governor() -> str:
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return path.read_text().strip() if path.is_file() else "not told"


def _checked_modes(
    models: Mapping[str, nn.Module],
    images: Tensor,
    mode: str,
    named: tuple[str, str],
    repeats: int | None,
    warmup: int,
    compiled: bool,
) -> list[Mode]:
    """The modes to measure, once everything else that was asked for makes sense."""
    if not models or (repeats is not None and repeats < 1) or warmup < 0:
        raise ValueError(f"expected models and repeats >= 1, got {list(models)}, {repeats=}")
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
    if compiled and len(models) > _MOST_COMPILED:
        raise ValueError(
            f"torch.compile keeps {_MOST_COMPILED} versions of one forward and runs the rest "
            f"uncompiled, got {len(models)} models to compare"
        )
    return _MODES[mode]


def _steps(
    models: Mapping[str, nn.Module], images: Tensor, mode: Mode, *, compiled: bool
) -> dict[str, Step]:
    """The work of every arm, done once to see that it can be done."""
    if compiled:
        torch.compiler.reset()
    steps = {}
    for name, model in models.items():
        try:
            steps[name] = Step(model, images, mode, compiled=compiled)
            steps[name]()
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise MeasurementError(f"{name} cannot be measured in mode {mode}: {error}") from error
    return steps


def _measure(step: Step, samples_ms: list[float], trace_dir: Path | None) -> Measured:
    """Summarise the timing of a step, and profile it."""
    profiled = profile_step(step, step.images.device, trace_dir)
    latency = Spread.of(samples_ms)
    return Measured(
        latency_ms=latency,
        images_per_s=1e3 * len(step.images) / latency.median,
        peak_memory_mib=(step.resident_bytes() + profiled.transient_bytes) / MIB,
        time_share=profiled.time_share,
        operators=profiled.operators,
    )


def _differences(
    models: Mapping[str, nn.Module], images: Tensor, reference: str
) -> dict[str, float]:
    """Largest absolute difference of each model's output from the reference's."""
    outputs: dict[str, Tensor] = {}
    for name, model in models.items():
        try:
            with torch.inference_mode():
                outputs[name] = model.eval()(images)
        except (RuntimeError, AssertionError, ValueError) as error:
            shape = "x".join(str(s) for s in images.shape)
            raise MeasurementError(f"{name} refuses images of {shape}: {error}") from error
        if not isinstance(outputs[name], Tensor):
            raise MeasurementError(
                f"expected one tensor as output, {name} gives a {type(outputs[name]).__name__}"
            )
        if not bool(outputs[name].isfinite().all()):
            raise MeasurementError(f"the output of {name} is not finite; its figures mean nothing")
    expected = outputs[reference]
    for name, output in outputs.items():
        if output.shape != expected.shape:
            raise MeasurementError(
                f"outputs differ in shape: {reference} gives {tuple(expected.shape)}, "
                f"{name} {tuple(output.shape)}"
            )
    return {name: float((output - expected).abs().max()) for name, output in outputs.items()}


def _macs_by_flop_counter(model: nn.Module, input_size: tuple[int, ...]) -> int:
    """PyTorch's own count on the forward pass, half its FLOPs."""
    meta = meta_copy(model).eval().requires_grad_(False)
    floating = (p.dtype for p in meta.parameters() if p.is_floating_point())
    dtype = next(floating, torch.float32)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        meta(torch.empty(1, *input_size, device="meta", dtype=dtype))
    return counter.get_total_flops() // 2


def _ratio(own: int, base: int) -> float | None:
    """None where the baseline has nothing to divide by."""
    return own / base if base else None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
