"""Packages that only some exports need."""

import warnings
from importlib import import_module
from typing import Any

from tokenconv.errors import ExportError


def need(module: str, what: str, extra: str) -> Any:
    """Import a module of an extra.

    Args:
        module: Its whole name.
        what: Needs it, for the error.
        extra: Of this package, that installs it.

    Raises:
        ExportError: If it cannot be imported.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say of each other when they are imported
        try:
            return import_module(module)
        except ImportError as error:
            raise ExportError(
                f"{what} need {module.partition('.')[0]}, which cannot be imported: "
                f"pip install 'tokenconv[{extra}]'"
            ) from error
