"""Results that nobody measured, with figures that are easy to check."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from tokenconv.profiling.measurement import MIB, Mode, Ratio, Spread
from tokenconv.profiling.report import write_report
from tokenconv.profiling.results import (
    Arm,
    Comparison,
    Measured,
    Memory,
    Operator,
    Phase,
    Point,
    Roof,
    Site,
    TimeSpent,
)

MODES: tuple[Mode, ...] = ("infer", "train")
SHARES = {
    "attention": 0.4, "MLP matmul": 0.1, "depthwise convolution": 0.1, "normalisation": 0.1,
    "activation": 0.1, "layout copies": 0.1, "other convolution": 0.02, "inserted matmul": 0.02,
    "optimizer": 0.02, "other": 0.04,
}  # fmt: skip
PHASES: dict[Mode, dict[Phase, float]] = {
    "infer": {"forward": 1.0},
    "train": {"forward": 0.3, "backward": 0.6, "optimizer": 0.05, "between": 0.05},
}


def make_arm(
    name: str, *, factor: float, difference: float, modes: tuple[Mode, ...], sites: tuple[str, ...]
) -> Arm:
    """An arm that takes ``factor`` times as long as the baseline, and more memory by its root."""
    costs = {site: Site(5000, 2_000_000, 8 * MIB, 1, (1, 384, 1024)) for site in sites}
    return Arm(
        name=name,
        description=f"what {name} is",
        compiled=False,
        params=int(3_600_000 * factor),
        macs=44_000_000,
        macs_by_flop_counter=44_000_000,
        bytes=10**7,
        sites=costs,
        depthwise={f"{site}.conv": cost for site, cost in costs.items()},
        convolutions={"patch_embed.proj": 1} | ({"blocks.*.mlp.act.conv": 12} if sites else {}),
        max_abs_diff_at_insertion=difference,
        modes={mode: make_measured(mode, factor, sites) for mode in modes},
        failures={},
    )


def make_measured(mode: Mode, factor: float, sites: tuple[str, ...]) -> Measured:
    ms = {"infer": 20, "train": 80}[mode] * factor
    within = sites or ("",)
    return Measured(
        latency_ms=Spread(ms, 0.2 * ms, 0.9 * ms, 1.1 * ms),
        samples_ms=(0.9 * ms, ms, 1.1 * ms),
        ratio=Ratio(
            median=factor,
            iqr=0.2 * factor,
            q25=0.9 * factor,
            q75=1.1 * factor,
            low=0.95 * factor,
            high=1.05 * factor,
            verdict="no difference shown" if factor == 1 else "slower",
        ),
        images_per_s=4000 / ms,
        memory=make_memory(mode, factor**0.5, sites),
        memory_ratio=factor**0.5,
        time=(
            *(
                TimeSpent(category, phase, "", ms * share * part)
                for category, share in SHARES.items()
                if category != "depthwise convolution"
                for phase, part in PHASES[mode].items()
            ),
            *(
                TimeSpent("depthwise convolution", phase, site, 0.1 * ms * part / len(within))
                for site in within
                for phase, part in PHASES[mode].items()
            ),
        ),
        operators={"aten::addmm": Operator(24, 3.0)}
        | ({"aten::_conv_depthwise2d": Operator(12, 4.5 * factor)} if sites else {}),
        depthwise_ms={f"{site}.conv": 1.0 + 0.1 * i for i, site in enumerate(sites)},
    )


def make_memory(mode: Mode, factor: float, sites: tuple[str, ...]) -> Memory:
    """A peak of 50 MiB, or of 200 MiB in training, times a factor."""
    scale = int(factor * MIB)
    is_training = mode == "train"
    saved = {f"blocks.{i}.attn": 6 * MIB for i in range(12)} | {
        f"{site}.conv": 3 * MIB for site in sites
    }
    return Memory(
        parameters=15 * scale,
        buffers=scale,
        images=4 * scale,
        gradients=15 * scale if is_training else 0,
        optimizer_state=30 * scale if is_training else 0,
        forward_peak=(140 if is_training else 30) * scale,
        backward_peak=150 * scale if is_training else 0,
        optimizer_peak=20 * scale if is_training else 0,
        reserved=None,
        saved=saved if is_training else {},
    )


def make_comparison(modes: tuple[Mode, ...] = MODES) -> Comparison:
    """Three arms; ``mix_ffn`` has twelve inserted modules."""
    sites = tuple(f"blocks.{i}.mlp.act" for i in range(12))
    return Comparison(
        baseline="attention_only",
        reference="original",
        batch_size=4,
        input_size=(3, 64, 96),
        memory_format="channels_last",
        rounds=dict.fromkeys(modes, 20),
        overhead=dict.fromkeys(modes, 0.015),
        load=(0.25, 2.0),
        governor="performance",
        device="cpu (made up)",
        dtype="float32",
        threads=2,
        versions={"python": "3.11.7", "torch": "2.15.0"},
        memory_source="memory events of the profiler",
        date="2026-01-02T03:04:05+00:00",
        roof=Roof(flops_per_s=180e9, bytes_per_s=21e9),
        arms=(
            make_arm("attention_only", factor=1, difference=0.17, modes=modes, sites=()),
            make_arm("original", factor=1.44, difference=0, modes=modes, sites=()),
            make_arm("mix_ffn", factor=2.25, difference=0, modes=modes, sites=sites),
        ),
        warnings=("the machine was busy before: 3.0 processes on 2 cores",),
        about={
            "model": "pvt_v2_b0",
            "weights": "random",
            "command": "tokenconv compare pvt_v2_b0 --block mix_ffn",
            "allocator": "glibc, keeps freed memory",
        },
    )


def without(comparison: Comparison, name: str, mode: Mode) -> Comparison:
    """The same, where an arm failed in a mode."""

    def failed(arm: Arm) -> Arm:
        modes = {key: measured for key, measured in arm.modes.items() if key != mode}
        return dataclasses.replace(arm, modes=modes, failures={mode: "no memory left"})

    def alone(arm: Arm) -> Arm:
        """Without a baseline in that mode."""
        modes = dict(arm.modes)
        if mode in modes:
            modes[mode] = dataclasses.replace(modes[mode], ratio=None, memory_ratio=None)
        return dataclasses.replace(arm, modes=modes)

    arms = [failed(arm) if arm.name == name else arm for arm in comparison.arms]
    if name == comparison.baseline:
        arms = [alone(arm) for arm in arms]
    return dataclasses.replace(comparison, arms=tuple(arms))


def make_sweep() -> list[Point]:
    """Nine points, the last of which failed; the arms come closer as images grow."""
    points = []
    for i, size in enumerate(("160", "224", "384")):
        for j, batch in enumerate(("1", "4", "8")):
            settings = {"img-size": size, "batch-size": batch}
            if (i, j) == (2, 2):
                points.append(Point(settings, None, "no memory left"))
                continue
            factor = 1.5 - 0.15 * i - 0.05 * j
            made = make_comparison()
            slower = make_arm(
                "mix_ffn", factor=factor, difference=0, modes=MODES, sites=tuple(made.arms[2].sites)
            )
            original = make_arm(
                "original", factor=1 + (factor - 1) / 3, difference=0, modes=MODES, sites=()
            )
            arms = (made.arms[0], original, slower)
            points.append(Point(settings, dataclasses.replace(made, arms=arms), None))
    return points


@pytest.fixture(scope="session")
def made_up() -> Callable[..., Comparison]:
    """Makes a comparison."""
    return make_comparison


@pytest.fixture(scope="session")
def failed() -> Callable[[Comparison, str, Mode], Comparison]:
    """Makes an arm fail in a mode."""
    return without


@pytest.fixture(scope="session")
def sweep() -> list[Point]:
    """A sweep of nine points."""
    return make_sweep()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, made_up: Callable[..., Comparison]) -> Path:
    """The files of a report."""
    folder = tmp_path_factory.mktemp("report")
    write_report(made_up(), folder)
    return folder
