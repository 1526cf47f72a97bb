"""``report.md``: what was found first, then the figures, then how to repeat it."""

from collections.abc import Sequence
from typing import Any

from tokenconv.profiling.results import Arm, Comparison, operator_changes, table

_CHANGES = ("mode", "arm", "operator", "", "calls before", "after", "own ms before", "after")
_MOST_CHANGES = 6
_VERBS = {"infer": "Inference", "train": "A training step"}


def to_markdown(comparison: Comparison, about: dict[str, Any]) -> str:
    """The whole report as Markdown.

    Args:
        comparison: What was measured.
        about: Further facts, listed under the environment.
    """
    others = [arm for arm in comparison.arms if arm.name != comparison.baseline]
    title = f"# {about.get('model', 'Comparison')}: {', '.join(a.name for a in comparison.arms)}"
    parts = [title, "\n".join(f"- {line}" for arm in others for line in _findings(arm, comparison))]
    parts.append("\n".join(f"> Warning: {line}" for line in comparison.warnings))
    header, *rows = table(comparison)
    parts += ["## Figures", _markdown_table(header, rows)]
    parts.append(
        "Latency is the median of one batch, with the interquartile range; `vs baseline` is the "
        "median of the ratios round by round, arms in turn and in random order, below 1 is faster, "
        "with its 99% bootstrap interval. The verdict is `faster` or `slower` only where the "
        "interval excludes 1; `no difference shown` is no proof that there is none. "
        f"Peak memory is counted by the {comparison.memory_source}: what is held between steps "
        "plus the most a step allocates. MACs count convolutions, linears, QK^T and AV."
    )
    parts += ["![latency, memory and time share](compare.png)", "## Where the time goes"]
    parts.append(_share_table(comparison))
    if comparison.compiled:
        parts.append("Compiled kernels do the work of several operators; they count as other.")
    parts += ["## Operators that differ", changes_table(comparison, most=_MOST_CHANGES)]
    parts += ["## How to repeat it", _environment(comparison, about)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _findings(arm: Arm, comparison: Comparison) -> list[str]:
    lines = []
    for mode, measured in arm.modes.items():
        latency, memory = arm.ratios[mode]["latency"], arm.ratios[mode]["peak_memory"]
        lines.append(
            f"{_VERBS[mode]} of **{arm.name}** takes {latency['median']:.2f}x the time of "
            f"{comparison.baseline} ({latency['low']:.2f} to {latency['high']:.2f}: "
            f"{latency['verdict']}; {measured.latency_ms.median:.1f} ms for "
            f"{comparison.batch_size} images) and {memory:.2f}x its memory."
        )
    difference = arm.max_abs_diff_at_insertion
    if arm.name != comparison.reference:
        lines.append(
            f"The output of **{arm.name}** is equal to that of {comparison.reference}, bit for bit."
            if difference == 0
            else f"The output of **{arm.name}** differs from that of {comparison.reference} by up "
            f"to {difference:.2g}."
        )
    if arm.macs != arm.macs_by_flop_counter:
        lines.append(
            f"MACs of **{arm.name}** are not confirmed: {arm.macs:,} by formula, "
            f"{arm.macs_by_flop_counter:,} by PyTorch's FlopCounterMode."
        )
    return lines


def _share_table(comparison: Comparison) -> str:
    modes = list(comparison.arms[0].modes)
    header = ["category", *(f"{mode}: {arm.name}" for mode in modes for arm in comparison.arms)]
    shares = [arm.modes[mode].time_share for mode in modes for arm in comparison.arms]
    rows = [[category, *(f"{share[category]:.1%}" for share in shares)] for category in shares[0]]
    return _markdown_table(header, rows)


def changes_table(comparison: Comparison, *, most: int | None = None) -> str:
    """Operators that an arm runs otherwise than the baseline, as a Markdown table.

    Args:
        comparison: What was measured.
        most: Rows per arm and mode; None takes all.
    """
    rows = []
    for arm in comparison.arms:
        for mode in arm.modes:
            for change in operator_changes(comparison, arm.name, mode)[:most]:
                before, after = change.before, change.after
                rows.append((
                    mode, arm.name, f"`{change.name}`", change.kind,
                    f"{before.calls:g}", f"{after.calls:g}",
                    f"{before.self_ms:.2f}", f"{after.self_ms:.2f}",
                ))  # fmt: skip
    if not rows:
        return "Every arm runs the operators of the baseline, as often as it does."
    return _markdown_table(_CHANGES, rows)


def _environment(comparison: Comparison, about: dict[str, Any]) -> str:
    size = "x".join(str(s) for s in comparison.input_size)
    facts = {
        **about,
        "images": f"{comparison.batch_size} of {size}, {comparison.dtype}",
        "device": f"{comparison.device}, {comparison.threads} threads",
        "compiled": "yes" if comparison.compiled else "no",
        "rounds": ", ".join(f"{count} {mode}" for mode, count in comparison.rounds.items()),
        "load": "{:.1f} before, {:.1f} after".format(*comparison.load),
        "governor": comparison.governor,
        "versions": ", ".join(f"{k} {v}" for k, v in comparison.versions.items()),
        "date": comparison.date,
    }
    return "\n".join(f"- {key}: {value}" for key, value in facts.items())


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
