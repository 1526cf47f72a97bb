"""``BlockInfo``: what a row of the catalogue says; and how blocks are found and built by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn


@dataclass(frozen=True)
class Paper:
    """A paper that has a block."""

    name: str
    """How its model is called."""
    arxiv: str
    """Its number at arXiv."""
    arguments: str = ""
    """What makes the block this paper's, as Python keyword arguments."""
    source: str = ""
    """Its name for ``load_official``, if weights of it can be loaded."""

    @property
    def url(self) -> str:
        """Its address."""
        return f"https://arxiv.org/abs/{self.arxiv}"


@dataclass(frozen=True, kw_only=True)
class BlockInfo:
    """What there is to know about a block without building it.

    ``formula``, ``params`` and ``macs`` speak of C channels and O that come out, h hidden ones, K
    kernel side, w width of a bottleneck, E experts, N tokens on the grid; of attention also n
    heads, s side of squares or windows, M keys that a token sees; of a stem, I channels come in, C
    and N come out.
    """

    factory: Callable[..., nn.Module]
    """``factory(dim, **kwargs)`` builds the whole block."""
    group: str
    """Where it stands: ``ffn``, ``mixer``, ``attention``, ``position``, ``stem``, ``adapter`` or
    ``separable``."""
    papers: tuple[Paper, ...]
    """The papers that have it, its source first."""
    formula: str
    """What it computes."""
    params: str
    """Number of parameters, as a Python expression."""
    macs: str
    """Multiply-accumulates for one image, as a Python expression."""
    prefix_policy: str
    """What happens to class and register tokens."""
    kind: Literal["tokens", "maps", "scales", "stem"]
    """``tokens`` blocks obey ``forward(x, *grid)``; ``maps`` blocks do on one full grid, and take
    maps ``(B, C, H, W)`` without a grid; ``scales`` take several maps; a ``stem`` takes images
    ``(B, I, H, W)`` and gives tokens ``(B, N, C)`` and their grid, as a pair."""
    parity_test: str
    """The pytest node that proves the block equal to code we did not write."""
    sites: Mapping[str, Callable[..., nn.Module]] = field(default_factory=dict)
    """Where surgery can put it, the usual place first: from a site to ``fragment(dim, **kwargs)``,
    which builds only what is new; ``dim`` is the width of the tokens at the site. A fragment maps
    tokens to tokens like a block. Its ``init_neutral_()``, which also resets it there, makes it
    return its input where it stands ``before_`` or ``after_`` something, and zero ``beside_``
    something. For ``merge_conv`` it is a ``DWConv`` whose kernel is added to that of the MLP's own
    convolution."""

    @property
    def paper(self) -> str:
        """Address of the source paper."""
        return self.papers[0].url
