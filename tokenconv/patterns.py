"""Regular expressions that somebody has typed."""

import re


def compiled(text: str) -> re.Pattern[str]:
    """A regular expression.

    Raises:
        ValueError: If it is none.
    """
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from error
