"""``report.md``: what was found first, then the figures, then how to repeat it."""

from collections.abc import Mapping, Sequence

from tokenconv.profiling.report import findings, tables
from tokenconv.profiling.report.environment import environment, shared_environment
from tokenconv.profiling.report.glossary import GLOSSARY
from tokenconv.profiling.report.sweep import points_table
from tokenconv.profiling.report.table import Cell, Table
from tokenconv.profiling.results import Comparison, Point

_MOST_CHANGES = _MOST_SAVED = 6


def to_markdown(comparison: Comparison) -> str:
    """The whole report of a comparison as Markdown."""
    about = comparison.about
    sections = {
        "Arms": _facts(findings.arms(comparison)),
        "Figures": _section(tables.figures(comparison))
        + "\n\n![latency, memory, time and roofline](compare.png)",
        "Memory": _section(tables.memory(comparison)),
        "Where the time goes": _section(tables.time_shares(comparison)),
        "What was inserted": _section(tables.sites(comparison, aggregated=True)),
        "Activations saved": _section(tables.saved_activations(comparison, most=_MOST_SAVED)),
        "Operators that differ": changes_table(comparison, most=_MOST_CHANGES),
        "Convolutions": _section(tables.convolutions(comparison)),
        "How to repeat it": _facts(environment(comparison)),
        "What the words mean": _facts(GLOSSARY),
    }
    return _page(
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
    return _page(
        findings.title(about, findings.sweep_arms(points)),
        [findings.sweep_introduction(points)],
        findings.sweep_findings(points),
        {"Failed": findings.sweep_failures(points), "Warning": findings.sweep_warnings(points)},
        {
            "Points": _section(points_table(points)) + "\n\n![curves](sweep.png)",
            "How to repeat it": _facts(facts),
            "What the words mean": _facts(GLOSSARY),
        },
    )


def changes_table(comparison: Comparison, *, most: int | None = None) -> str:
    """Operators that an arm runs otherwise than the baseline, as a Markdown table.

    Args:
        comparison: What was measured.
        most: Rows per arm and mode; None takes all.
    """
    return _table(tables.changes(comparison, most)) or tables.no_changes(comparison)


def _page(
    title: str,
    introduction: Sequence[str],
    found: Sequence[str],
    notes: Mapping[str, Sequence[str]],
    sections: Mapping[str, str],
) -> str:
    parts = [f"# {title}", *introduction, "\n".join(f"- {line}" for line in found)]
    parts += ["\n".join(f"> - {kind}: {line}" for line in lines) for kind, lines in notes.items()]
    parts += [f"## {heading}\n\n{text}" for heading, text in sections.items() if text]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(table: Table) -> str:
    """A table with its caption; empty where there are no rows."""
    (caption,) = _escaped([table.caption])
    return f"{caption}\n\n{_table(table)}" if table.rows else ""


def _table(table: Table) -> str:
    """Empty where there are no rows."""
    if not table.rows:
        return ""
    rule = ["---:" if table.is_numeric(i) else "---" for i in range(len(table.header))]
    body = [[_text(cell) for cell in row] for row in (*table.rows, *table.foot)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (_escaped(table.header), rule, *body))


def _text(cell: Cell) -> str:
    (text,) = _escaped([cell.text])
    return f"[{text}]({cell.link})" if cell.link else text


def _escaped(texts: Sequence[str]) -> list[str]:
    """Bars would end the cell, stars would make it bold."""
    return [text.replace("|", "\\|").replace("*", "\\*") for text in texts]


def _facts(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())
