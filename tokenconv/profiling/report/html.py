"""``report.html``: one file that opens anywhere, without a network."""

from collections.abc import Mapping, Sequence

from tokenconv.profiling.report import findings, tables
from tokenconv.profiling.report.charts import comparison_charts, sweep_charts
from tokenconv.profiling.report.environment import environment, shared_environment
from tokenconv.profiling.report.glossary import GLOSSARY
from tokenconv.profiling.report.sweep import points_table
from tokenconv.profiling.results import Comparison, Point
from tokenconv.reports.html import html_page

_PACKAGE = "tokenconv.profiling.report"
_MOST_CHANGES, _MOST_SAVED = 6, 12
_NOTHING = "There is nothing to compare with the baseline."


def to_html(comparison: Comparison) -> str:
    """The whole report of a comparison as a page."""
    return html_page(
        _PACKAGE,
        "report.html.jinja",
        title=findings.title(comparison.about, [arm.name for arm in comparison.arms]),
        summary=findings.summary(comparison),
        introduction=findings.introduction(comparison),
        arms=findings.arms(comparison),
        findings=findings.findings(comparison) or [_NOTHING],
        failures=findings.failures(comparison),
        warnings=comparison.warnings,
        figures=tables.figures(comparison),
        charts={
            findings.MODE_NAMES[mode]: comparison_charts(comparison, mode)
            for mode in comparison.modes
        },
        memory=tables.memory(comparison),
        time_shares=tables.time_shares(comparison),
        sites=tables.sites(comparison, aggregated=True),
        all_sites=tables.sites(comparison, aggregated=False),
        saved=tables.saved_activations(comparison, most=_MOST_SAVED),
        changes=tables.changes(comparison, _MOST_CHANGES),
        all_changes=tables.changes(comparison),
        no_changes=tables.no_changes(comparison),
        convolutions=tables.convolutions(comparison),
        facts=environment(comparison),
        glossary=GLOSSARY,
    )


def sweep_to_html(points: Sequence[Point], about: Mapping[str, str]) -> str:
    """The whole report of a sweep as a page.

    Args:
        points: What was measured.
        about: What no point knows itself, such as ``model`` and ``command``.
    """
    measured = findings.measured_points(points)
    return html_page(
        _PACKAGE,
        "sweep.html.jinja",
        title=findings.title(about, findings.sweep_arms(points)),
        summary="",  # the findings are few
        introduction=findings.sweep_introduction(points),
        findings=findings.sweep_findings(points) or [_NOTHING],
        failures=findings.sweep_failures(points),
        warnings=findings.sweep_warnings(points),
        points=points_table(points),
        charts={
            findings.MODE_NAMES[mode]: sweep_charts(points, mode)
            for mode in findings.sweep_modes(points)
        },
        facts=shared_environment(measured[0][1], about) if measured else about,
        glossary=GLOSSARY,
    )
