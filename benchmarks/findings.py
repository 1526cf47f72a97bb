"""What is found in a kept result: its tables, and the figures that sentences about it need.

There is a function for each kind of result. The kind is the first word of the file's name: the
function of ``models-compiled--2-core-avx512--cpu.json`` is ``models``. It takes what the file holds
and returns what ``pages/results.md.jinja`` may use, by name.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accuracy import FRACTIONS
from accuracy import draw as draw_accuracy
from accuracy import markdown as accuracy_tables
from classics import draw as draw_classics
from classics import ratios as classic_ratios
from classics import rows_of as classic_rows
from kernel_report import draw as draw_kernels

from tokenconv.profiling import read_comparison
from tokenconv.profiling.report import draw_comparison
from tokenconv.profiling.report.tables import figures as comparison_table
from tokenconv.reports.markdown import markdown_table

Content = Mapping[str, Any]
Found = dict[str, Any]


@dataclass(frozen=True)
class Span:
    """Ratios, of which the smallest and the largest are told."""

    values: Sequence[float]

    @property
    def low(self) -> float:
        """The smallest."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The largest."""
        return max(self.values)

    @property
    def geomean(self) -> float:
        """Their geometric mean."""
        return math.prod(self.values) ** (1 / len(self.values))

    def __len__(self) -> int:
        return len(self.values)

    def __str__(self) -> str:
        ends = dict.fromkeys(f"{end:.2f}x" for end in (self.low, self.high))
        return " to ".join(ends)


def is_shown(spread: Content) -> bool:
    """Whether a paired ratio is further from 1 than its interquartile range is wide."""
    return abs(spread["median"] - 1) > spread["iqr"]


def paired(spread: Content | None) -> str:
    """A paired ratio, with its interquartile range in brackets."""
    return f"{spread['median']:.2f}x ({spread['iqr']:.2f})" if spread else ""


def timed(spread: Content | None, digits: int = 1) -> str:
    """A median, in the unit that it has."""
    return f"{spread['median']:.{digits}f}" if spread else ""


def table(rows: Sequence[Sequence[str]], keys: int = 1) -> str:
    """As Markdown.

    Args:
        rows: Header and others.
        keys: Columns from the left that lean there; the others hold numbers.
    """
    header, *others = rows
    rule = ["---" if i < keys else "---:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *others))


# --- a function for each kind ---


def accuracy(content: Content) -> Found:
    """Tables by setting and task, and differences from the baseline in points."""
    rows = content["summary"]
    compared = [row for row in rows if row["difference"]]

    def differences(setting: str, task: str, *arms: str) -> list[dict[str, Any]]:
        """Of these arms from their baselines; ``points`` in each is the difference."""
        return [
            {**row, "points": 100 * row["difference"]["mean"]}
            for row in compared
            if (row["setting"], row["task"]) == (setting, task) and row["arm"] in arms
        ]

    def last(setting: str, task: str, arm: str) -> Content:
        """With the most scenes."""
        own = [r for r in rows if (r["setting"], r["task"], r["arm"]) == (setting, task, arm)]
        return max(own, key=lambda row: row["scenes"])

    def short() -> str:
        """Every arm with the most scenes, a column for each setting and task."""
        columns = dict.fromkeys((row["setting"], row["task"], row["metric"]) for row in rows)
        most = max(row["scenes"] for row in rows)
        found = {(r["setting"], r["task"], r["arm"]): r for r in rows if r["scenes"] == most}
        lines = [
            [arm, *(_value(found.get((setting, task, arm))) for setting, task, _ in columns)]
            for arm in dict.fromkeys(row["arm"] for row in rows)
        ]
        header = [f"{setting}, {metric}" for setting, _, metric in columns]
        return table([[f"{most} scenes", *header], *lines])

    settings = content["settings"]
    return {
        "tables": accuracy_tables(rows),
        "short": short,
        "runs": len(content["runs"]),
        "comparisons": len(compared),
        "differences": differences,
        "last": last,
        "settings": settings,
        "tokens": (settings["size"] // 4) ** 2,
        "amounts": len(FRACTIONS),
    }


def _value(row: Content | None) -> str:
    """In percent, with the difference from the baseline and its interval."""
    if row is None:
        return ""
    difference = row["difference"]
    if difference is None:
        return f"{100 * row['value']['mean']:.1f} ± {100 * row['value']['half']:.1f}"
    apart = f"{100 * difference['mean']:+.1f} ± {100 * difference['half']:.1f}"
    return f"{100 * row['value']['mean']:.1f} ({apart})"


def classics(content: Content) -> Found:
    """Counts beside times, and both as ratios of the reference to the others."""
    ratios = classic_ratios(content)
    names = dict.fromkeys(row["model"] for row in ratios)
    return {
        "table": table(classic_rows(content)),
        "macs": {row["model"]: row["macs"] for row in ratios},
        "is_less": [row["time"]["median"] < row["macs"] for row in ratios],
        "times": {
            name: Span([row["time"]["median"] for row in ratios if row["model"] == name])
            for name in names
        },
    }


def compare(content: Content) -> Found:
    """The table of a ``compare.json``, and its ratios to the baseline."""
    comparison = read_comparison(content["path"])

    def ratio(arm: str, mode: str) -> Any:
        """To the baseline, with its interval and its verdict."""
        return comparison.arm(arm).modes[mode].ratio  # pyright: ignore[reportArgumentType]

    return {
        "table": markdown_table(comparison_table(comparison)),
        "ratio": ratio,
        "memory": lambda arm, mode: comparison.arm(arm).modes[mode].memory_ratio,
        "rounds": comparison.rounds,
        "warnings": comparison.warnings,
        "batch_size": comparison.batch_size,
        "side": comparison.input_size[-1],
    }


def deploy(content: Content) -> Found:
    """Times of a model in and out of Python, and the memory of a process that serves it."""
    rows = content["rows"]
    arms = max((row["latency_ms"] for row in rows), key=len)  # with a block, so with a fold
    pairs = max((row["ratio"] for row in rows), key=len)
    served = dict.fromkeys(arm for row in rows for arm in row["peak_bytes"])

    def spreads(pair: str, family: str | tuple[str, ...] = "") -> list[Content]:
        own = [row for row in rows if row["model"].startswith(family) and pair in row["ratio"]]
        return [row["ratio"][pair] for row in own]

    def ratio(pair: str, family: str | tuple[str, ...] = "") -> Span:
        """Of the first arm to the second, as in ``compiled/onnx``."""
        return Span([spread["median"] for spread in spreads(pair, family)])

    def shown(pair: str, family: str | tuple[str, ...] = "") -> list[bool]:
        """Of which of these ratios it is shown that they are not 1."""
        return [is_shown(spread) for spread in spreads(pair, family)]

    def cells(get: Callable[[Content], Sequence[str]], names: Sequence[str]) -> str:
        own = [[f"`{row['model']}`", str(row["threads"]), *get(row)] for row in rows]
        return table([["model", "threads", *names], *own], keys=2)

    return {
        "times": cells(
            lambda row: [timed(row["latency_ms"].get(arm)) for arm in arms],
            [f"{arm} ms" for arm in arms],
        ),
        "ratios": cells(
            lambda row: [paired(row["ratio"].get(pair)) for pair in pairs],
            [pair.replace("/", " / ") for pair in pairs],
        ),
        "peaks": cells(
            lambda row: [f"{row['peak_bytes'][arm] / 2**20:.0f}" for arm in served],
            [f"{arm} MiB" for arm in served],
        ),
        "ratio": ratio,
        "shown": shown,
        "largest_int8": max(row["difference"]["int8"] for row in rows),
    }


def kernels(content: Content) -> Found:
    """Times of every case, and the arms that are compared divided by ours."""
    rows = content["rows"]
    own = "triton" if any("timm/triton" in row["ratio"] for row in rows) else "ours"
    pairs = {f"{other}/{own}": f"{other} / {own}" for other in ("naive", "timm")}
    pairs[f"timm_compiled/{own}_compiled"] = f"timm / {own}, compiled"
    arms = ("naive", "timm", own)

    def chosen(mode: str, *, prefix: bool, one_image: bool | None, missing: bool) -> list[Content]:
        return [
            row
            for row in rows
            if row["mode"] == mode
            and (row["left"] is not None) == missing
            and bool(row["num_prefix_tokens"]) == prefix
            and one_image in (None, row["batch_size"] == 1)
        ]

    def over(
        other: str, mode: str, *, prefix: bool = False, one_image: bool | None = None,
        missing: bool = False,
    ) -> Span:  # fmt: skip
        """How many times as long another arm takes as ours."""
        own_rows = chosen(mode, prefix=prefix, one_image=one_image, missing=missing)
        return Span([row["ratio"][f"{other}/{own}"]["median"] for row in own_rows])

    def with_prefix(mode: str) -> Span:
        """Our time with a class token over that without."""
        ms = {(row["case"], row["mode"]): row["latency_ms"][own]["median"] for row in rows}
        plain = [row["case"] for row in rows if not row["num_prefix_tokens"]]
        return Span([
            ms[f"{case}+1", mode] / ms[case, mode] for case in plain if (f"{case}+1", mode) in ms
        ])  # fmt: skip

    header = ["shape", "mode", *(f"{arm} ms" for arm in arms), *pairs.values()]
    cells = [
        [
            row["case"], row["mode"],
            *(timed(row["latency_ms"].get(arm), 2) for arm in arms),
            *(paired(row["ratio"].get(pair)) for pair in pairs),
        ]
        for row in rows
    ]  # fmt: skip
    return {
        "table": table([header, *cells], keys=2), "over": over, "with_prefix": with_prefix,
    }  # fmt: skip


def models(content: Content) -> Found:
    """Times of whole models, and the ratios of their arms."""
    rows = content["rows"]
    arms = dict.fromkeys(arm for row in rows for arm in row["latency_ms"])
    pairs = dict.fromkeys(pair for row in rows for pair in row["ratio"])

    def spreads(
        pair: str,
        mode: str | None = None,
        *,
        one_image: bool | None = None,
        family: str | tuple[str, ...] = "",
    ) -> list[Content]:
        return [
            row["ratio"][pair]
            for row in rows
            if pair in row["ratio"]
            and mode in (None, row["mode"])
            and one_image in (None, row["batch_size"] == 1)
            and row["model"].startswith(family)
        ]

    def ratio(pair: str, mode: str | None = None, **which: Any) -> Span:
        """Of the first arm to the second, as in ``eager/accelerated``."""
        return Span([spread["median"] for spread in spreads(pair, mode, **which)])

    def shown(pair: str, mode: str | None = None, **which: Any) -> list[bool]:
        """Of which of these ratios it is shown that they are not 1."""
        return [is_shown(spread) for spread in spreads(pair, mode, **which)]

    header = [
        "model", "mode", "images", *(f"{arm} ms" for arm in arms),
        *(pair.replace("/", " / ") for pair in pairs),
    ]  # fmt: skip
    cells = [
        [
            f"`{row['model']}`", row["mode"], str(row["batch_size"]),
            *(timed(row["latency_ms"].get(arm)) for arm in arms),
            *(paired(row["ratio"].get(pair)) for pair in pairs),
        ]
        for row in rows
    ]  # fmt: skip
    return {
        "table": table([header, *cells], keys=2), "ratio": ratio, "shown": shown,
        "side": content["img_size"],
    }  # fmt: skip


def surgery(content: Content) -> Found:
    """What binding adds to a forward pass, and seconds of planning, insertion and removal."""
    bound = {
        # files of 2026-11-23 have it under another name
        row["model"]: row["ratio"]["binding/plain"]
        if "ratio" in row
        else row["ratio_to_plain"]["binding"]
        for row in content["rows"]
    }
    rows = [
        [
            f"`{row['model']}`",
            *(timed(row["latency_ms"][arm]) for arm in ("plain", "binding")),
            paired(bound[row["model"]]),
        ]
        for row in content["rows"]
    ]
    return {
        "table": table([["model", "plain ms", "binding ms", "binding / plain"], *rows]),
        "shown": [is_shown(spread) for spread in bound.values()],
        "seconds": {step: spread["median"] for step, spread in content["seconds"].items()},
    }


def train_step(content: Content) -> Found:
    """A step with loading over one without, and the memory that a frozen base saves."""
    loading = content["loading"]
    over_cached = loading["ratio_to_cached"]
    steps = [
        [name.replace("_", " "), timed(spread), paired(over_cached.get(name))]
        for name, spread in loading["latency_ms"].items()
    ]
    peaks = [
        [
            f"`{row['model']}`", f"`{row['block']}`",
            *(f"{row['peak_mib'][arm]:.1f}" for arm in ("all", "inserted+head")),
            f"{row['ratio']:.2f}x",
        ]
        for row in content["memory"]
    ]  # fmt: skip
    return {
        "loading": table([["batches", "ms a step", "over cached"], *steps]),
        "memory": table(
            [["model", "block", "all, MiB", "inserted+head, MiB", "ratio"], *peaks], keys=2
        ),
        "batch_size": loading["batch_size"],
        "over_cached": over_cached,
        "ratios": Span([row["ratio"] for row in content["memory"]]),
    }


KINDS: dict[str, Callable[[Content], Found]] = {
    kind.__name__: kind
    for kind in (accuracy, classics, compare, deploy, kernels, models, surgery, train_step)
}
"""To add a kind: a function above, its name here, and a section in ``pages/results.md.jinja``."""


def _of_content(draw: Callable[[Content, Path], None]) -> Callable[[Path], None]:
    return lambda path: draw(json.loads(path.read_text()), path)


FIGURES: dict[str, Callable[[Path], None]] = {
    "accuracy": _of_content(draw_accuracy),
    "classics": _of_content(draw_classics),
    "compare": lambda path: draw_comparison(read_comparison(path), path.with_suffix("")),
    "kernels": _of_content(draw_kernels),
}
"""Draws the PNG and the SVG that lie beside a file, by kind."""
