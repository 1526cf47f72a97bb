"""What the times of the ways come to: a summary, tables and a figure."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import write_figure
from kernel_arms import COMPARED, LIMITS, Case

from tokenconv.reports.table import aligned

GROUPS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "full grids": lambda row: row["left"] is None,
    "batch 1": lambda row: row["left"] is None and row["batch_size"] == 1,
    "prefix tokens": lambda row: row["left"] is None and row["num_prefix_tokens"] > 0,
    "missing tokens": lambda row: row["left"] is not None,
}
COSTS = ("backward/forward", "with/without prefix tokens", "saved bytes", "peak bytes")
"""Of these less is better, of all others more."""


def summary(rows: Sequence[Mapping[str, Any]], own: str) -> list[dict[str, Any]]:
    """Geometric mean and worst case of what an arm is judged by, for kinds of cases.

    Args:
        rows: Of ``measure``.
        own: The arm.
    """
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for what, row, value in _judged(rows, own):
        for group, belongs in GROUPS.items():
            if belongs(row):
                found.setdefault((what, row["mode"], group), {})[row["case"]] = value
    lines = []
    order = [*GROUPS]
    for (what, mode, group), values in sorted(
        found.items(), key=lambda item: (*item[0][:2], order.index(item[0][2]))
    ):
        worst = (max if what.startswith(COSTS) else min)(values, key=lambda case: values[case])
        mean = math.prod(values.values()) ** (1 / len(values))
        lines.append({"what": what, "mode": mode, "of": group, "cases": len(values),
                      "geomean": mean, "worst": values[worst], "worst_case": worst})  # fmt: skip
    return lines


def _judged(
    rows: Sequence[Mapping[str, Any]], own: str
) -> Iterator[tuple[str, Mapping[str, Any], float]]:
    """Each figure: what it is, the row it belongs to, its value."""
    ms = {(row["case"], row["mode"]): row["latency_ms"].get(own) for row in rows}
    for row in rows:
        for ratio in (f"timm/{own}", f"naive/{own}", f"timm_compiled/{own}_compiled"):
            if ratio in row["ratio"]:
                yield ratio, row, row["ratio"][ratio]["median"]
        if f"copy/{own}" in row["ratio"]:
            yield f"bandwidth {own}/copy", row, row["ratio"][f"copy/{own}"]["median"]
        for kind in ("saved_bytes", "peak_bytes"):
            arms = row.get(kind, {})
            if own in arms and "timm" in arms:
                yield f"{kind.replace('_', ' ')} {own}/timm", row, arms[own] / arms["timm"]
        mine = ms[row["case"], row["mode"]]
        if mine is None:
            continue
        ahead = ms.get((row["case"], "forward"))
        if row["mode"] != "forward" and ahead is not None:
            behind = max(mine["median"] - ahead["median"], 0.0)
            yield "backward/forward", row, behind / ahead["median"]
        plain = replace(Case.parse(row["case"]), num_prefix_tokens=0)
        without = ms.get((str(plain), row["mode"]))
        if row["num_prefix_tokens"] and without is not None:
            yield "with/without prefix tokens", row, mine["median"] / without["median"]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Medians in milliseconds, and ratios with their interquartile ranges in brackets."""
    arms = [name for name in (*COMPARED, *LIMITS) if any(name in r["latency_ms"] for r in rows)]
    ratios = dict.fromkeys(
        ratio for row in rows for ratio in row["ratio"] if ratio.startswith(("naive", "timm"))
    )
    lines = [["BxHxWxC+P/L", "mode", *(f"{name} ms" for name in arms), *ratios]]
    for row in rows:
        times = [f"{row['latency_ms'][a]['median']:.3f}" if a in row["latency_ms"] else ""
                 for a in arms]  # fmt: skip
        spreads = [row["ratio"].get(ratio) for ratio in ratios]
        paired = [f"{s['median']:.3f} ({s['iqr']:.3f})" if s else "" for s in spreads]
        lines.append([row["case"], row["mode"], *times, *paired])
    return aligned(lines, keys=2)


def summary_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """One line each."""
    cells = [["", "", "of", "cases", "geomean", "worst", "in"]]
    for line in lines:
        numbers = [f"{line[key]:.3f}" for key in ("geomean", "worst")]
        where = [line["of"], str(line["cases"]), *numbers, line["worst_case"]]
        cells.append([line["what"], line["mode"], *where])
    return aligned(cells, keys=2)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Bytes per second of every arm in the forward pass, beside the stroke of a copy.

    Counted are the two tensors that have to be moved, whatever an arm moves.

    Args:
        result: What is written.
        path: Where it is written; the pictures go beside it.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("no figure: matplotlib is not installed")
        return
    rows = [row for row in result["rows"] if row["mode"] == "forward"]
    arms = [name for name in COMPARED if any(name in row["latency_ms"] for row in rows)]
    colors = {name: f"C{i}" for i, name in enumerate(n for n in arms if "_compiled" not in n)}

    def reached(row: Mapping[str, Any], name: str) -> float:
        spread = row["latency_ms"].get(name)
        return 2e-6 * row["input_bytes"] / spread["median"] if spread else math.nan

    figure = Figure(figsize=(8.0, 1.6 + 0.42 * len(rows)), layout="constrained")
    axis = figure.subplots()
    lines = range(len(rows))
    for name in arms:
        color = colors.get(name.removesuffix("_compiled"), "gray")
        fill = "none" if name.endswith("_compiled") else color
        reach = [reached(row, name) for row in rows]
        axis.plot(
            reach, lines, "o", ms=9, mec=color, mfc=fill, mew=1.8, alpha=0.85, ls="", label=name
        )
    limits = [reached(row, "copy") for row in rows]
    if not all(map(math.isnan, limits)):
        axis.plot(limits, lines, "|", color="black", ms=18, mew=2, ls="", label="copy")
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_yticks(lines, [row["case"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel("GB/s of the two tensors that must be moved (logarithmic)")
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    axis.set_title(f"{result['device']}, {result['dtype']}, activation: {result['activation']}")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    write_figure(figure, path)
