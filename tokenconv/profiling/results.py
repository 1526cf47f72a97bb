"""What a comparison found: plain values, in memory and as ``compare.json``."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tokenconv.costs import SiteCost
from tokenconv.errors import MeasurementError, UnknownNameError
from tokenconv.profiling.measurement import MIB, Mode, Phase, Ratio, Spread
from tokenconv.reports.table import aligned

SCHEMA_VERSION = 4


@dataclass(frozen=True)
class Operator:
    """What one operator did in a step."""

    calls: float
    """How often it ran."""
    self_ms: float
    """Its own time, without that of the operators it called."""


@dataclass(frozen=True)
class TimeSpent:
    """Time of one profiled step that has category, phase and site in common."""

    category: str
    """A ``Category``."""
    phase: Phase
    site: str
    """Name of the inserted module it was spent in, or for; empty if in none."""
    ms: float


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a step needs.

    The peaks are what is allocated on top of what is held between steps, each the most at one
    moment of that phase. A phase that the mode does not have needs 0.
    """

    parameters: int
    buffers: int
    images: int
    gradients: int
    """Not held between steps: part of the peaks of backward and optimizer."""
    optimizer_state: int
    forward_peak: int
    backward_peak: int
    optimizer_peak: int
    reserved: int | None
    """Most that the CUDA allocator had taken from the device during the step, with what the other
    arms hold; None on a CPU."""
    saved: dict[str, int]
    """What autograd keeps of the forward pass for the backward pass, by the module that it keeps it
    for; each storage once, without parameters, buffers and images. Empty for inference. Of eager
    execution, also where the arm is compiled."""

    @property
    def held(self) -> int:
        """Between steps: parameters, buffers, images and optimizer state."""
        return self.parameters + self.buffers + self.images + self.optimizer_state

    @property
    def peak(self) -> int:
        """What is held and the most of what a step takes."""
        return self.held + max(self.forward_peak, self.backward_peak, self.optimizer_peak)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One arm in one mode."""

    latency_ms: Spread
    """Of one batch."""
    samples_ms: tuple[float, ...]
    """Every round; the same index is the same round in all arms."""
    ratio: Ratio | None
    """To the baseline, from the ratios round by round; None if the baseline failed."""
    images_per_s: float
    memory: Memory
    memory_ratio: float | None
    """Peak over that of the baseline; None if the baseline failed."""
    time: tuple[TimeSpent, ...]
    """Adds up to the time of a step under the profiler, which is not that of one without; on a GPU
    to that of its kernels."""
    operators: dict[str, Operator]
    """Calls and own time of the operators of one step, by name."""
    depthwise_ms: dict[str, float]
    """Time of the forward pass of every depthwise convolution, by module."""

    @property
    def time_share(self) -> dict[str, float]:
        """Share of the time by category; adds up to 1."""
        total = sum(spent.ms for spent in self.time)
        shares = dict.fromkeys((spent.category for spent in self.time), 0.0)
        for spent in self.time:
            shares[spent.category] += spent.ms / total if total else 0.0
        return shares


@dataclass(frozen=True)
class Site:
    """What one module inside an arm costs for one image; of a ``SiteCost``, what is kept."""

    params: int
    macs: int
    bytes: int
    calls: int
    input_shape: tuple[int, ...]

    @classmethod
    def of(cls, found: SiteCost) -> "Site":
        """What is kept of what ``cost`` found."""
        return cls(found.params, found.macs, found.bytes, found.calls, found.input_shape)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the compared modules."""

    name: str
    description: str
    """What it is, for readers who know the name only; may be empty."""
    compiled: bool
    """Whether it ran through ``torch.compile``."""
    params: int
    macs: int
    """Multiply-accumulates for one image, by closed formulas."""
    macs_by_flop_counter: int
    """The same by PyTorch's ``FlopCounterMode``, as a cross-check."""
    bytes: int
    """Eager traffic for one image."""
    sites: dict[str, Site]
    """What was inserted, by name of the module, for one image."""
    depthwise: dict[str, Site]
    """Every depthwise convolution, by name of the module, for one image."""
    convolutions: dict[str, int]
    """How many convolutions there are, by name with ``*`` for numbers."""
    max_abs_diff_at_insertion: float | None
    """Largest difference of the output from that of the reference arm; None if one of the two has
    no output to compare."""
    modes: dict[Mode, Measured]
    """Without those that failed."""
    failures: dict[Mode, str]
    """Why a mode could not be measured."""


@dataclass(frozen=True)
class Roof:
    """What the device can do, measured in the same run."""

    flops_per_s: float
    """Of a large matrix product in the dtype of the images."""
    bytes_per_s: float
    """Of a copy that is larger than the caches, reads and writes together."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of ``compare``."""

    baseline: str
    reference: str
    batch_size: int
    input_size: tuple[int, ...]
    """``(C, H, W)`` of one image."""
    memory_format: str
    """``contiguous`` or ``channels_last``."""
    rounds: dict[Mode, int]
    """Rounds that counted."""
    overhead: dict[Mode, float]
    """Time of the rounds that went into measuring, as a share of what was measured."""
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
    roof: Roof
    arms: tuple[Arm, ...]
    warnings: tuple[str, ...]
    """Why figures may be worth less than they look."""
    about: dict[str, str]
    """What the comparison does not know itself, such as ``model`` and ``command``."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values, ready for JSON."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    @property
    def modes(self) -> list[Mode]:
        """What was measured, in this order."""
        return list(self.rounds)

    def arm(self, name: str) -> Arm:
        """The arm of this name.

        Raises:
            UnknownNameError: If there is none.
        """
        arms = {one.name: one for one in self.arms}
        if name not in arms:
            raise UnknownNameError("arm", name, arms)
        return arms[name]

    def __str__(self) -> str:
        shown = aligned(table(self), keys=2)
        return "\n".join([shown, *(f"warning: {line}" for line in self.warnings)])


@dataclass(frozen=True)
class Point:
    """One point of a sweep."""

    settings: dict[str, str]
    """What was set, such as ``{"img-size": "224", "batch-size": "8"}``."""
    comparison: Comparison | None
    failure: str | None
    """Why there is no comparison."""

    @property
    def name(self) -> str:
        """Such as ``img-size=224,batch-size=8``; names its folder."""
        return ",".join(f"{key}={value}" for key, value in self.settings.items())


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
        UnknownNameError: If there is no such arm, or it or the baseline has no figures of the mode.
    """
    old, new = (_figures(comparison, name, mode).operators for name in (comparison.baseline, arm))
    nothing = Operator(0, 0)
    found = []
    for name in {**old, **new}:
        before, after = old.get(name, nothing), new.get(name, nothing)
        if before.calls == after.calls:
            continue
        kind = "appears" if name not in old else "vanishes" if name not in new else "changes"
        found.append(OperatorChange(name, kind, before, after))
    return sorted(found, key=lambda change: -abs(change.after.self_ms - change.before.self_ms))


def _figures(comparison: Comparison, arm: str, mode: Mode) -> Measured:
    modes = comparison.arm(arm).modes
    if mode not in modes:
        raise UnknownNameError("mode", mode, modes)
    return modes[mode]


# --- as text ---

_HEADER = (
    "mode", "arm", "params", "MACs", "latency ms (IQR)", "vs baseline (99% interval)", "verdict",
    "images/s", "peak MiB", "diff at insertion",
)  # fmt: skip


def table(comparison: Comparison) -> list[tuple[str, ...]]:
    """Header and rows of the result, as text; an arm that failed has a row that says so."""
    return [
        _HEADER,
        *(_row(arm, mode, comparison) for mode in comparison.modes for arm in comparison.arms),
    ]


def _row(arm: Arm, mode: Mode, comparison: Comparison) -> tuple[str, ...]:
    difference = arm.max_abs_diff_at_insertion
    costs = (f"{arm.params / 1e6:.3f} M", f"{arm.macs / 1e9:.3f} G")
    shown = "-" if difference is None else f"{difference:.1e}" if difference else "0"
    if mode not in arm.modes:
        return (mode, arm.name, *costs, "-", "-", "failed", "-", "-", shown)
    measured = arm.modes[mode]
    is_baseline = arm.name == comparison.baseline
    return (
        mode,
        arm.name,
        *costs,
        f"{short(measured.latency_ms.median)} ({short(measured.latency_ms.iqr)})",
        "baseline" if is_baseline else _interval(measured.ratio),
        "" if is_baseline or measured.ratio is None else measured.ratio.verdict,
        short(measured.images_per_s),
        short(measured.memory.peak / MIB),
        shown,
    )


def short(value: float) -> str:
    """A number with the digits that matter: a decimal, or three digits that count."""
    return f"{value:,.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def _interval(ratio: Ratio | None) -> str:
    return "-" if ratio is None else f"{ratio.median:.3f}x ({ratio.low:.3f}-{ratio.high:.3f})"


# --- as a file ---


def schema() -> dict[str, Any]:
    """The JSON schema of ``compare.json``."""
    from pydantic import TypeAdapter  # only who reads files needs it

    found = TypeAdapter(Comparison).json_schema()
    found["properties"]["schema_version"] = {"const": SCHEMA_VERSION, "type": "integer"}
    found["required"] = ["schema_version", *found["required"]]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write a ``compare.json``."""
    path.write_text(json.dumps(comparison.to_dict(), indent=1, allow_nan=False) + "\n")


def read_comparison(path: Path) -> Comparison:
    """Read a ``compare.json``, every value of it checked.

    Raises:
        MeasurementError: If it is none, of another version, or not whole.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise MeasurementError(f"cannot read a comparison from {path}: {error}") from error
    version = content.pop("schema_version", None) if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise MeasurementError(
            f"{path} has schema_version {version}, expected {SCHEMA_VERSION}: measure it again"
        )
    try:
        return TypeAdapter(Comparison).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(str(part) for part in wrong["loc"])
        raise MeasurementError(
            f"{path} is no whole comparison: {where}: {wrong['msg']}: measure it again"
        ) from error
