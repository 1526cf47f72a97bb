"""``report.md``: what was found first, then the figures, then how to repeat it."""

from collections.abc import Mapping, Sequence

from tokenconv.profiling.report import findings, tables
from tokenconv.profiling.report.environment import environment, shared_environment
from tokenconv.profiling.report.glossary import GLOSSARY
from tokenconv.profiling.report.sweep import points_table
from tokenconv.profiling.results import Comparison, Point
from tokenconv.reports.markdown import (
    markdown_facts,
    markdown_page,
    markdown_section,
    markdown_table,
)

_MOST_CHANGES = _MOST_SAVED = 6


def to_markdown(comparison: Comparison) -> str:
    """The whole report of a comparison as Markdown."""
    about = comparison.about
    sections = {
        "Arms": markdown_facts(findings.arms(comparison)),
        "Figures": markdown_section(tables.figures(comparison))
        + "\n\n![latency, memory, time and roofline](compare.png)",
        "Memory": markdown_section(tables.memory(comparison)),
        "Where the time goes": markdown_section(tables.time_shares(comparison)),
        "What was inserted": markdown_section(tables.sites(comparison, aggregated=True)),
        "Activations saved": markdown_section(
            tables.saved_activations(comparison, most=_MOST_SAVED)
        ),
        "Operators that differ": changes_table(comparison, most=_MOST_CHANGES),
        "Convolutions": markdown_section(tables.convolutions(comparison)),
        "How to repeat it": markdown_facts(environment(comparison)),
        "What the words mean": markdown_facts(GLOSSARY),
    }
    return markdown_page(
        findings.title(about, [arm.name for arm in comparison.arms]),
        [findings.summary(comparison), findings.introduction(comparison)],
        findings.findings(comparison),
        {"Failed": findings.failures(comparison), "Warning": comparison.warnings},
        sections,
    )


def sweep_to_markdown(points: Sequence[Point], about: Mapping[str, str]) -> str:
    """The whole report of a sweep as Markdown.

    Args:
        points: What was measured.
        about: What no point knows itself, such as ``model`` and ``command``.
    """
    measured = findings.measured_points(points)
    facts = shared_environment(measured[0][1], about) if measured else about
    return markdown_page(
        findings.title(about, findings.sweep_arms(points)),
        [findings.sweep_introduction(points)],
        findings.sweep_findings(points),
        {"Failed": findings.sweep_failures(points), "Warning": findings.sweep_warnings(points)},
        {
            "Points": markdown_section(points_table(points)) + "\n\n![curves](sweep.png)",
            "How to repeat it": markdown_facts(facts),
            "What the words mean": markdown_facts(GLOSSARY),
        },
    )


def changes_table(comparison: Comparison, *, most: int | None = None) -> str:
    """Operators that an arm runs otherwise than the baseline, as a Markdown table.

    Args:
        comparison: What was measured.
        most: Rows per arm and mode; None takes all.
    """
    return markdown_table(tables.changes(comparison, most)) or tables.no_changes(comparison)
