"""The files of a comparison or a sweep: written whole, or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokenconv.errors import MeasurementError
from tokenconv.profiling.report.charts import comparison_charts, sweep_charts
from tokenconv.profiling.report.figure import write_figures
from tokenconv.profiling.report.findings import setting, sweep_modes, title
from tokenconv.profiling.report.html import sweep_to_html, to_html
from tokenconv.profiling.report.markdown import changes_table, sweep_to_markdown, to_markdown
from tokenconv.profiling.results import Comparison, Point, write_comparison

__all__ = ["changes_table", "report_folder", "write_report", "write_sweep", "write_views"]


@contextmanager
def report_folder(out: Path) -> Iterator[Path]:
    """A folder to write into; what is in it appears in ``out`` only if nothing failed.

    Args:
        out: Made if missing. Files of the same names in it are replaced, others are left.

    Raises:
        MeasurementError: If ``out`` cannot be written, before anything else is done.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists() and not (out.is_dir() and os.access(out, os.W_OK)):
            raise PermissionError("it is there and is no folder that can be written")
        beside = out if out.is_dir() else out.parent  # on the same disk, and known to be writable
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=beside))
    except OSError as error:
        raise MeasurementError(f"cannot write a report to {out}: {error}") from error
    try:
        yield staging
        _place(staging, out)
    except OSError as error:
        raise MeasurementError(f"cannot write a report to {out}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


_OF_COMPARISON = ("compare.*", "report.*", "traces/*/*.pt.trace.json.gz", "traces/*/*.pickle")


def _place(staging: Path, out: Path) -> None:
    """Move what was made; with a new comparison, all that shows an earlier one goes."""
    if (staging / "compare.json").exists():
        for stale in (path for pattern in _OF_COMPARISON for path in out.glob(pattern)):
            stale.unlink()
    for made in sorted(path for path in staging.rglob("*") if path.is_file()):
        target = out / made.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        made.replace(target)


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
    rows = [comparison_charts(comparison, mode) for mode in comparison.modes]
    write_figures(rows, title(comparison.about, [setting(comparison)]), folder / "compare")


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
