"""A report as Markdown, for pages that show nothing else."""

from collections.abc import Mapping, Sequence

from tokenconv.reports.table import Cell, Table


def markdown_page(
    title: str,
    introduction: Sequence[str],
    found: Sequence[str],
    notes: Mapping[str, Sequence[str]],
    sections: Mapping[str, str],
) -> str:
    """A whole page.

    Args:
        title: Its heading.
        introduction: Paragraphs.
        found: A line each.
        notes: Lines by what they are, such as ``Warning``.
        sections: Text by heading; one without text is left out.
    """
    parts = [f"# {title}", *introduction, "\n".join(f"- {line}" for line in found)]
    parts += ["\n".join(f"> - {kind}: {line}" for line in lines) for kind, lines in notes.items()]
    parts += [f"## {heading}\n\n{text}" for heading, text in sections.items() if text]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_section(table: Table) -> str:
    """A table with its caption; empty where there are no rows."""
    (caption,) = _escaped([table.caption])
    return f"{caption}\n\n{markdown_table(table)}" if table.rows else ""


def markdown_table(table: Table) -> str:
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


def markdown_facts(facts: Mapping[str, str]) -> str:
    """A line for each."""
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())
