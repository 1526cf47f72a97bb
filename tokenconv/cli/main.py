"""The entry point, and what happens to errors."""

import argparse
import os
import sys
from collections.abc import Sequence

from tokenconv.cli.parser import parse
from tokenconv.errors import TokenConvError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Words after ``tokenconv``; None takes those of the process.

    Returns:
        Exit status: 0 done, 1 failed with one clear line on standard error, 3 a regression is
        shown, 130 interrupted, 141 nobody reads the output any more. Wrong usage leaves through
        ``argparse`` with 2.
    """
    try:
        status = _run(parse(sys.argv[1:] if argv is None else list(argv)))
        print(end="", flush=True)  # or Python complains of a closed pipe when it exits
        return status
    except BrokenPipeError:  # such as head, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(args: argparse.Namespace) -> int:
    try:
        from tokenconv.cli import commands  # imports timm: not for --help

        return commands.COMMANDS[args.command](args) or 0
    except BrokenPipeError:
        raise
    except (TokenConvError, ValueError, RuntimeError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"tokenconv: error: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tokenconv: interrupted, nothing was written", file=sys.stderr)
        return 130
