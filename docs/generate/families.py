"""The support matrix, as ``tokenconv list --families`` prints it."""

from tokenconv.surgery.support import format_matrix


def pages() -> dict[str, str]:
    """The page by its name."""
    matrix = format_matrix().replace("\n\n| family", "\n\n{.matrix}\n| family")
    return {"families": f"---\nhide-toc: true\n---\n\n# Families\n\n{matrix}\n"}
