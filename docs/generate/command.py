"""The command line, as ``--help`` prints it."""

import contextlib
import io
import os
from unittest import mock

from tokenconv.cli.parser import parse

COMMANDS = ("list", "plan", "cost", "compare", "analyze", "export")


def pages() -> dict[str, str]:
    """The page by its name."""
    parts = [
        "# Command line\n\nWrong usage exits with 2, an error of tokenconv with 1 and one line. "
        "What follows is what `--help` prints."
    ]
    parts += [f"## tokenconv {name}\n\n```text\n{_help(name)}```" for name in COMMANDS]
    return {"cli": "\n\n".join(parts) + "\n"}


def _help(command: str) -> str:
    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "88", "NO_COLOR": "1"}),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        parse([command, "--help"])
    return printed.getvalue()
