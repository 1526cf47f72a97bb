"""How the keys of a paper's repository are written down."""

from collections.abc import Callable, Mapping

from torch import nn

Renames = Mapping[str, str | None]
"""From a name at the beginning of an official key to ours; None leaves the value out. The first
that fits counts."""
Source = Mapping[str, Renames | Callable[[nn.Module], Renames]]
"""By the name of a block: the names in it, or what tells them of a block."""
Sources = Mapping[str, Source]
"""By the name of a model: its blocks."""
