"""The command line: parses, calls, prints. Exit 0 done, 1 failed with one line, 2 wrong usage."""

from tokenconv.cli.main import main

__all__ = ["main"]
