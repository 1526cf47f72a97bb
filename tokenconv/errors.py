"""The few exceptions a caller may want to catch, all under ``TokenConvError``."""

import difflib
from collections.abc import Iterable


class TokenConvError(Exception):
    """Base class of every error that tokenconv raises on purpose."""


class GridError(TokenConvError, ValueError):
    """Tokens and grid do not fit each other."""


class SurgeryError(TokenConvError, ValueError):
    """A block cannot go into, or come out of, this model; the model is left as it was."""


class CheckpointError(TokenConvError, ValueError):
    """A saved hybrid cannot be read, or does not belong to this model; nothing was changed."""


class MeasurementError(TokenConvError, RuntimeError):
    """A comparison cannot be run or its results cannot be kept."""


class AnalysisError(TokenConvError, ValueError):
    """A kernel cannot be analysed or taken apart; the model is left as it was."""


class ExportError(TokenConvError, RuntimeError):
    """A model cannot be exported so, or what was exported does not agree; no file is left."""


class UnknownNameError(TokenConvError, ValueError):
    """A name that is not in a list of valid names; the nearest ones are in the message."""

    def __init__(self, kind: str, name: str, choices: Iterable[str]):
        self.name = name
        self.choices = sorted(choices)
        near = difflib.get_close_matches(name, self.choices, n=4, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else _listing(self.choices)
        super().__init__(f"unknown {kind} {name!r}: {hint}")

    def __reduce__(self):
        return _restore_unknown_name, (self.args[0], self.name, self.choices)


def _restore_unknown_name(message: str, name: str, choices: list[str]) -> UnknownNameError:
    error = UnknownNameError("name", name, choices)
    error.args = (message,)
    return error


def _listing(choices: list[str], most: int = 20) -> str:
    shown = ", ".join(choices[:most])
    return f"expected one of {shown}" + (", ..." if len(choices) > most else "")
