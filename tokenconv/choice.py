"""Options that are one of a few names."""

import re
from enum import StrEnum
from typing import Self

from tokenconv.errors import UnknownNameError


class Choice(StrEnum):
    """An enumeration that is also written as a plain string."""

    @classmethod
    def of(cls, name: str) -> Self:
        """The member of this name, or an error that lists the nearest ones."""
        try:
            return cls(name)
        except ValueError:
            option = re.sub("(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()
            raise UnknownNameError(option, str(name), list(cls)) from None
