"""The tables of a comparison."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import product

from tokenconv.profiling.measurement import MIB, Mode
from tokenconv.profiling.results import (
    Arm,
    Comparison,
    Measured,
    Phase,
    operator_changes,
    table,
)
from tokenconv.reports.table import NOTHING, Cell, Table, number, words

_FIGURES = (
    "A row per mode and arm. Latency is of one batch. Ratios are to the baseline: below 1 is "
    "faster, or less memory."
)
PHASES: tuple[Phase, ...] = ("forward", "backward", "optimizer", "between")


def figures(comparison: Comparison) -> Table:
    """The result as on the terminal, with the ratio of the memory and what is compiled, if any."""
    header, *lines = table(comparison)
    some_compiled = any(arm.compiled for arm in comparison.arms)
    rows = []
    for line, (mode, arm) in zip(lines, product(comparison.modes, comparison.arms), strict=True):
        measured = arm.modes.get(mode)
        values = (
            None, None, arm.params, arm.macs, *_sorted_by(measured),
            arm.max_abs_diff_at_insertion,
        )  # fmt: skip
        rows.append([
            *map(Cell, line, values),
            number(measured and measured.memory_ratio, ".3f", "x"),
            *(words("yes" if arm.compiled else "no") if some_compiled else ()),
        ])  # fmt: skip
    added = ("memory vs baseline", *(("compiled",) if some_compiled else ()))
    return Table(_FIGURES, (*header, *added), rows, keys=2)


def _sorted_by(measured: Measured | None) -> Iterable[float | None]:
    """Latency, ratio, verdict, images per second and peak memory."""
    if measured is None:
        return [None] * 5
    ratio = measured.ratio and measured.ratio.median
    peak = measured.memory.peak / MIB
    return measured.latency_ms.median, ratio, None, measured.images_per_s, peak


# --- memory and time ---


def memory(comparison: Comparison) -> Table:
    """What is held between steps, and what every phase takes on top of it."""
    rows = []
    reserves = any(one.memory.reserved is not None for _, _, one in measurements(comparison))
    for mode, arm, measured in measurements(comparison):
        own = measured.memory
        parts = (
            own.parameters, own.buffers, own.images, own.optimizer_state, own.held,
            own.forward_peak, own.backward_peak, own.optimizer_peak, own.gradients, own.peak,
        )  # fmt: skip
        rows.append([
            *words(mode, arm.name),
            *(number(part / MIB) for part in parts),
            *([number(own.reserved and own.reserved / MIB)] if reserves else []),
        ])  # fmt: skip
    header = (
        "mode", "arm", "parameters", "buffers", "images", "optimizer state", "held", "forward",
        "backward", "optimizer", "gradients", "peak", *(["reserved"] if reserves else []),
    )  # fmt: skip
    caption = (
        "Memory in MiB: what is held between steps, the most that each phase takes on top of it, "
        "and the peak, which is held and the largest phase. Gradients are part of the phases."
    )
    return Table(caption, header, rows, keys=2)


def time_shares(comparison: Comparison) -> Table:
    """Share of the time by category, a column per mode and arm."""
    shares = [one.time_share for _, _, one in measurements(comparison)]
    rows = [
        [Cell(category), *(number(share.get(category, 0.0), ".1%") for share in shares)]
        for category in categories(comparison)
    ]
    return Table("Share of the time", ["category", *_columns(comparison)], rows)


def categories(comparison: Comparison) -> list[str]:
    """What time was spent on, in the order of appearance."""
    spent = [spent for _, _, one in measurements(comparison) for spent in one.time]
    used = {one.category for one in spent if one.ms > 0}
    return [name for name in dict.fromkeys(one.category for one in spent) if name in used]


def phase_share(measured: Measured, phase: Phase) -> float:
    """Share of the time that a phase takes."""
    total = sum(spent.ms for spent in measured.time)
    return sum(spent.ms for spent in measured.time if spent.phase == phase) / (total or 1)


def _columns(comparison: Comparison) -> list[str]:
    return [f"{mode}: {arm.name}" for mode, arm, _ in measurements(comparison)]


def measurements(comparison: Comparison) -> Iterator[tuple[Mode, Arm, Measured]]:
    """Everything that did not fail."""
    for mode, arm in product(comparison.modes, comparison.arms):
        if mode in arm.modes:
            yield mode, arm, arm.modes[mode]


# --- what was inserted ---


def sites(comparison: Comparison, *, aggregated: bool) -> Table:
    """Every inserted module and what it costs.

    Args:
        comparison: What was measured.
        aggregated: Whether modules whose names differ in numbers only share a row.
    """
    rows = []
    for arm in comparison.arms:
        groups: dict[str, list[str]] = {}
        for name in arm.sites:
            groups.setdefault(starred(name) if aggregated else name, []).append(name)
        for name, members in groups.items():
            rows.append(_site_row(arm, name, members, comparison.modes))
    header = ["arm", "module", "modules", "params", "MMACs", "traffic MiB"]
    for mode in comparison.modes:
        header += _SITE_TIMES[mode]
    caption = (
        "MACs (in millions) and traffic are for one image; time, share of the step and what is "
        "saved for the backward pass are for the batch. Time is under the profiler, which cannot "
        "tell modules apart in what is compiled."
    )
    return Table(caption, header, rows, keys=2)


_SITE_TIMES: dict[Mode, list[str]] = {
    "infer": ["infer: forward ms", "infer: share"],
    "train": ["train: forward ms", "train: backward ms", "train: share", "train: saved MiB"],
}


def _site_row(arm: Arm, name: str, members: Sequence[str], modes: Iterable[Mode]) -> list[Cell]:
    costs = [arm.sites[member] for member in members]
    row = [
        *words(arm.name, name),
        number(len(members), "d"),
        number(sum(cost.params for cost in costs), ",d"),
        number(sum(cost.macs for cost in costs) / 1e6, ",.2f"),
        number(sum(cost.bytes for cost in costs) / MIB, ",.2f"),
    ]
    for mode in modes:
        measured = arm.modes.get(mode)
        if measured is None:
            row += [NOTHING] * len(_SITE_TIMES[mode])
            continue
        own = [spent for spent in measured.time if spent.site in members]
        total = sum(spent.ms for spent in measured.time)
        for phase in ("forward", "backward") if mode == "train" else ("forward",):
            ms = sum(s.ms for s in own if s.phase == phase)
            row.append(NOTHING if arm.compiled else number(ms, ".2f"))
        share = sum(s.ms for s in own) / total if total and not arm.compiled else None
        row.append(number(share, ".1%"))
        if mode == "train":
            row.append(number(sum(_saved_under(measured, member) for member in members) / MIB))
    return row


def _saved_under(measured: Measured, module: str) -> int:
    saved = measured.memory.saved
    return sum(size for name, size in saved.items() if f"{name}.".startswith(f"{module}."))


def starred(name: str) -> str:
    """The name of a module with ``*`` for numbers, such as ``blocks.*.mlp.act``."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


# --- what is kept and what is run ---


def saved_activations(comparison: Comparison, *, most: int) -> Table:
    """What autograd keeps of a training step, by module, a column per arm.

    Args:
        comparison: What was measured.
        most: Modules that have a row; the others share one.
    """
    arms = [arm for arm in comparison.arms if "train" in arm.modes]
    kept: list[dict[str, int]] = []
    for arm in arms:
        kept.append({})
        for name, size in arm.modes["train"].memory.saved.items():
            kept[-1][starred(name)] = kept[-1].get(starred(name), 0) + size
    names = sorted(
        {name for own in kept for name in own},
        key=lambda name: (-max(own.get(name, 0) for own in kept), name),
    )
    rows = [_saved_row(name or "(the model itself)", kept, [name]) for name in names[:most]]
    foot = [_saved_row("all", kept, names)]
    if others := names[most:]:
        foot.insert(0, _saved_row(f"{len(others)} others", kept, others))
    return Table(
        "Activations saved for the backward pass of a batch, in MiB. * stands for any number.",
        ["module", *(f"{arm.name}, run eagerly" if arm.compiled else arm.name for arm in arms)],
        rows,
        foot=foot if names else (),
    )


def _saved_row(title: str, kept: Sequence[dict[str, int]], names: Sequence[str]) -> list[Cell]:
    sizes = [sum(own.get(name, 0) for name in names) / MIB for own in kept]
    return [Cell(title), *(number(size) for size in sizes)]


def changes(comparison: Comparison, most: int | None = None) -> Table:
    """Operators that an arm runs otherwise than the baseline.

    Args:
        comparison: What was measured.
        most: Rows per arm and mode; None takes all.
    """
    rows = []
    for mode, arm, _ in measurements(comparison):
        if mode not in comparison.arm(comparison.baseline).modes:
            continue
        for change in operator_changes(comparison, arm.name, mode)[:most]:
            before, after = change.before, change.after
            rows.append([
                *words(mode, arm.name, change.name, change.kind),
                number(before.calls, "g"), number(after.calls, "g"),
                number(before.self_ms, ".2f"), number(after.self_ms, ".2f"),
            ])  # fmt: skip
    header = (
        "mode", "arm", "operator", "what it does", "calls before", "after", "own ms before",
        "own ms after",
    )  # fmt: skip
    return Table("Operators that differ from the baseline's, in one step", header, rows, keys=3)


def no_changes(comparison: Comparison) -> str:
    """What to say where no operator differs."""
    if not comparison.arm(comparison.baseline).modes:
        return f"{comparison.baseline} failed, so there is nothing to compare operators with."
    return f"Every arm runs the operators of {comparison.baseline}, as often as it does."


def convolutions(comparison: Comparison) -> Table:
    """Which convolutions every arm has."""
    names = dict.fromkeys(name for arm in comparison.arms for name in arm.convolutions)
    return Table(
        "Convolutions in every arm, by module. * stands for any number.",
        ["module", *(arm.name for arm in comparison.arms)],
        [
            [Cell(name), *(number(arm.convolutions.get(name, 0), "d") for arm in comparison.arms)]
            for name in names
        ],
    )
