"""The files of a comparison or a sweep."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenconv.profiling.report.charts import comparison_charts, sweep_charts
from tokenconv.profiling.report.findings import setting, sweep_modes, title
from tokenconv.profiling.report.html import sweep_to_html, to_html
from tokenconv.profiling.report.markdown import changes_table, sweep_to_markdown, to_markdown
from tokenconv.profiling.results import Comparison, Point, write_comparison
from tokenconv.reports.figure import write_figures

__all__ = [
    "COMPARISON_FILES", "changes_table", "draw_comparison", "write_report", "write_sweep",
    "write_views",
]  # fmt: skip


COMPARISON_FILES = (
    "compare.*", "report.*", "traces/*/*.pt.trace.json.gz", "traces/*/*.pickle",
)  # fmt: skip
"""Patterns of all that shows a comparison."""


def write_report(comparison: Comparison, folder: Path) -> None:
    """Write ``compare.json``, ``report.md``, ``report.html``, ``compare.png`` and ``compare.svg``.

    Args:
        comparison: What was measured.
        folder: Exists already, see ``report_folder``.
    """
    write_comparison(comparison, folder / "compare.json")
    write_views(comparison, folder)


def write_views(comparison: Comparison, folder: Path) -> None:
    """Write what ``write_report`` does, but for ``compare.json``."""
    (folder / "report.md").write_text(to_markdown(comparison), "utf-8")
    (folder / "report.html").write_text(to_html(comparison), "utf-8")
    draw_comparison(comparison, folder / "compare")


def draw_comparison(comparison: Comparison, stem: Path) -> None:
    """Draw the charts of a comparison as PNG and SVG.

    Args:
        comparison: What was measured.
        stem: Where the pictures go, without the ends of their names.
    """
    rows = [comparison_charts(comparison, mode) for mode in comparison.modes]
    write_figures(rows, title(comparison.about, [setting(comparison)]), stem)


def write_sweep(points: Sequence[Point], folder: Path, about: Mapping[str, str]) -> None:
    """Write ``report.md``, ``report.html``, ``sweep.png`` and ``sweep.svg``.

    Args:
        points: What was measured; the report of each lies in ``points/<name>/``.
        folder: Exists already, see ``report_folder``.
        about: What no point knows itself, such as ``model`` and ``command``.
    """
    (folder / "report.md").write_text(sweep_to_markdown(points, about), "utf-8")
    (folder / "report.html").write_text(sweep_to_html(points, about), "utf-8")
    rows = [sweep_charts(points, mode) for mode in sweep_modes(points)]
    write_figures(rows, title(about, [f"{len(points)} points"]), folder / "sweep")
