"""The support matrix, as ``tokenconv list --families`` prints it."""

from tokenconv.surgery.support import format_matrix


def pages() -> dict[str, str]:
    """The page by its name."""
    return {"families": f"# Families\n\n{format_matrix()}\n"}
