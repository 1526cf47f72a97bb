"""Drawings of a Transformer block, with what is inserted at one site of it.

They are inline SVG whose ink is ``currentColor`` and whose accent is the theme's, so that one
drawing serves light and dark pages.
"""

from dataclasses import dataclass
from html import escape

SITES = {
    "before_act": "inside the MLP, in front of its activation; in a gated MLP in the gate half",
    "after_act": "inside the MLP, behind its activation",
    "merge_conv": "added to the kernel of the convolution that the MLP has",
    "before_mlp": "in front of the MLP, behind its norm",
    "beside_mlp": "beside the MLP: both see the same tokens, and what they give is added",
    "before_attn": "in front of attention, behind its norm",
    "beside_attn": "beside attention: both see the same tokens, and what they give is added",
    "replace_attn": "in place of attention; this changes the output of the model",
    "before_block": "in front of the whole block",
    "after_block": "behind the whole block",
    "replace_patch_embed": "in place of the patch embedding; this changes the output of the model",
}
"""Where ``tokenconv`` can insert a block, in words."""

_ROW, _RESIDUAL, _BRANCH = 58, 104, 18  # heights of the three lines
_BOX, _GAP, _DOT, _MARGIN = 28, 16, 9, 4
_LETTER = 7.3  # width, of 12 px monospaced


@dataclass(frozen=True)
class _Box:
    """A module; what is inserted has the accent."""

    text: str
    inserted: bool = False

    @property
    def width(self) -> float:
        return round(len(self.text) * _LETTER + 14, 1)


@dataclass(frozen=True)
class _Fork:
    """A point from which a second line leaves, below or above the row."""

    above: bool = False
    width: float = 0


@dataclass(frozen=True)
class _Space:
    """A line without anything on it."""

    width: float


@dataclass(frozen=True)
class _Plus:
    """A sum with the line that left at the last fork of that side."""

    above: bool = False
    width: float = 2 * _DOT


_Item = _Box | _Fork | _Space | _Plus


def diagram(site: str, block: str) -> str:
    """A Transformer block with a block at one of its sites, as an ``<svg>`` element.

    Args:
        site: A key of ``SITES``.
        block: What stands there.
    """
    items, branch = _items(site, block)
    return _draw(items, branch, f"{block} at {site}: {SITES[site]}")


def _items(site: str, block: str) -> tuple[list[_Item], _Box | None]:
    """What stands in the row, from left to right, and what stands above it."""
    new = _Box(block, inserted=True)
    if site == "replace_patch_embed":
        return [_Box("image"), new, _Box("tokens"), _Box("blocks")], None
    attention: list[_Item] = [_Box("attention")]
    mlp: list[_Item] = [_Box("fc1"), _Box("act"), _Box("fc2")]
    at = {"before_act": 1, "after_act": 2, "before_mlp": 0}
    if site in at:
        mlp.insert(at[site], new)
    elif site == "merge_conv":
        mlp[1:1] = [_Fork(above=True), _Box("conv"), _Plus(above=True)]
    elif site == "beside_mlp":
        mlp = [_Fork(above=True), *mlp, _Plus(above=True)]
    elif site == "before_attn":
        attention = [new, *attention]
    elif site == "beside_attn":
        attention = [_Fork(above=True), *attention, _Plus(above=True)]
    elif site == "replace_attn":
        attention = [new]
    row = [_Fork(), _Box("norm"), *attention, _Plus(), _Fork(), _Box("norm"), *mlp, _Plus()]
    if site == "before_block":
        row = [new, *row]
    elif site == "after_block":
        row = [*row, new]
    return row, new if any(isinstance(item, _Fork) and item.above for item in row) else None


def _draw(items: list[_Item], branch: _Box | None, title: str) -> str:
    if branch is not None:
        items = _widened(items, branch.width + 2 * _GAP)
    lines, shapes = [], []
    x, left = float(_MARGIN), {True: 0.0, False: 0.0}
    for item in items:
        before = item.width if isinstance(item, _Space) else _GAP
        lines.append(f"M{x:g} {_ROW}h{before:g}")
        x += before
        if isinstance(item, _Box):
            shapes.append(_box(item, x, _ROW))
        elif isinstance(item, _Fork):
            left[item.above] = x
        elif isinstance(item, _Plus):
            middle = x + _DOT
            shapes.append(_plus(middle, inserted=item.above))
            if item.above:
                assert branch is not None
                start = (left[True] + middle - branch.width) / 2
                shapes.append(_box(branch, start, _BRANCH))
                way = f"M{left[True]:g} {_ROW}V{_BRANCH}H{start:g}"
                back = f"M{start + branch.width:g} {_BRANCH}H{middle:g}V{_ROW - _DOT}"
                shapes.append(f'<path class="new" d="{way}{back}"/>')
            else:
                lines.append(f"M{left[False]:g} {_ROW}V{_RESIDUAL}H{middle:g}V{_ROW + _DOT}")
        x += 0 if isinstance(item, _Space) else item.width
    lines.append(f"M{x:g} {_ROW}h{_GAP - 5}")
    tip = x + _GAP
    shapes.append(f'<path class="tip" d="M{tip:g} {_ROW}l-7 -4v8z"/>')
    width = tip + _MARGIN
    height = _RESIDUAL + 6 if any(isinstance(item, _Plus) for item in items) else _ROW + _BOX
    top = 0 if branch is not None else _ROW - _BOX
    label = escape(title)
    return (
        f'<svg class="site" role="img" aria-label="{label}" viewBox="0 {top} {width:g} '
        f'{height - top:g}" style="width:{width:g}px"><title>{label}</title>'
        f'<path d="{"".join(lines)}"/>{"".join(shapes)}</svg>'
    )


def _widened(items: list[_Item], least: float) -> list[_Item]:
    """The row with room for a branch of this width between its fork and its sum."""
    start = next(i for i, item in enumerate(items) if isinstance(item, _Fork) and item.above)
    end = next(i for i, item in enumerate(items) if isinstance(item, _Plus) and item.above)
    between = sum(item.width + _GAP for item in items[start + 1 : end]) + _GAP
    room = _Space(max(0.0, least - between) / 2)
    return [*items[: start + 1], room, *items[start + 1 : end], room, *items[end:]]


def _box(box: _Box, x: float, y: float) -> str:
    kind = ' class="new"' if box.inserted else ""
    return (
        f'<g{kind}><rect x="{x:g}" y="{y - _BOX / 2:g}" width="{box.width:g}" height="{_BOX}" '
        f'rx="4"/><text x="{x + box.width / 2:g}" y="{y + 4}">{escape(box.text)}</text></g>'
    )


def _plus(x: float, *, inserted: bool) -> str:
    kind = ' class="new"' if inserted else ""
    return (
        f'<g{kind}><circle cx="{x:g}" cy="{_ROW}" r="{_DOT}"/>'
        f'<path d="M{x - 5:g} {_ROW}h10M{x:g} {_ROW - 5}v10"/></g>'
    )
