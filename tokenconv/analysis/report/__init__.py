"""The files of an analysis: figures as JSON, a page, and pictures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenconv.analysis.fields import Fields
from tokenconv.analysis.report.charts import analysis_charts, field_charts
from tokenconv.analysis.report.findings import findings, introduction, title, warnings
from tokenconv.analysis.report.glossary import GLOSSARY
from tokenconv.analysis.report.tables import all_tables
from tokenconv.analysis.survey import Analysis
from tokenconv.reports.figure import write_figures
from tokenconv.reports.html import html_page
from tokenconv.reports.markdown import markdown_facts, markdown_page, markdown_section

ANALYSIS_FILES = ("analysis.*", "report.*")
"""Patterns of all that shows an analysis."""


def write_analysis(
    analysis: Analysis,
    folder: Path,
    about: Mapping[str, str],
    fields: Sequence[Fields] = (),
) -> None:
    """Write ``analysis.json``, ``report.md``, ``report.html``, ``analysis.png`` and ``.svg``.

    Args:
        analysis: What was found.
        folder: Exists already, see ``reports.report_folder``.
        about: How to repeat it, such as ``model``, ``weights`` and ``command``.
        fields: How far models look, to be shown beside each other.
    """
    charts = {"Kernels": analysis_charts(analysis), "How far it looks": field_charts(fields)}
    charts = {heading: drawn for heading, drawn in charts.items() if drawn}
    tables = all_tables(analysis, fields)
    content: dict[str, Any] = {
        **about,
        **analysis.to_dict(),
        "fields": [each.to_dict() for each in fields],
    }
    (folder / "analysis.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    page = html_page(
        "tokenconv.analysis.report",
        "analysis.html.jinja",
        title=title(about),
        summary="",
        introduction=introduction(analysis),
        findings=findings(analysis, fields),
        failures=[],
        warnings=warnings(analysis, about),
        charts=charts,
        tables=tables,
        facts=about,
        glossary=GLOSSARY,
    )
    (folder / "report.html").write_text(page, "utf-8")
    sections = {heading: markdown_section(table) for heading, table in tables.items()}
    markdown = markdown_page(
        title(about),
        [introduction(analysis)],
        findings(analysis, fields),
        {"Warning": warnings(analysis, about)},
        {
            "Charts": "![what pairs keep, what they save, kernels](analysis.png)" if charts else "",
            **sections,
            "How to repeat it": markdown_facts(about),
            "What the words mean": markdown_facts(GLOSSARY),
        },
    )
    (folder / "report.md").write_text(markdown, "utf-8")
    if charts:
        rows = [drawn[i : i + 2] for drawn in charts.values() for i in range(0, len(drawn), 2)]
        write_figures(rows, title(about), folder / "analysis")
