"""The catalogue as JSON and as a page; nothing in them is typed by hand."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from tokenconv.blocks.catalogue import BLOCKS
from tokenconv.blocks.registry import BlockInfo, Paper

LEGEND = """\
`tc.create_block(name, dim, **arguments)` builds one; `nn` is `torch.nn`, and `StarReLU` is in
`tokenconv.layers`. C is `dim`, O the channels that come out, h the hidden width, w that of a
bottleneck, K the kernel side, E the experts, N the tokens on the grid of H rows and W columns, n
the heads, s the side of squares or windows, M the keys that a token sees; of a stem, I channels
come in, and C and N come out. Parameters and multiply-accumulates (for one image) are those of the
block as it is built without arguments. Sites are where `tc.insert_` puts it (`site=`), the usual
one first. `source=` is for `tc.load_official`, which takes weights under the keys of that paper's
repository. Every block is compared with code we did not write, or with a reference written from the
paper's facts, in the test that it links to.
"""
"""What the letters and columns mean, in Markdown."""
_INTRODUCTION = f"""# Blocks

Made by `tokenconv list --markdown > BLOCKS.md`; do not edit. One row per paper.

{LEGEND}"""
GROUPS = {
    "ffn": ("Feed-forwards", "In place of the MLP of a Transformer block, or beside it."),
    "position": ("Position and local", "In front of a block, or beside its parts."),
    "mixer": (
        "Mixers",
        "In place of attention or beside it, on maps `(B, C, H, W)` and on tokens.",
    ),
    "attention": (
        "Attention with convolution",
        "In place of attention, or beside it; without a residual unless the formula has one.",
    ),
    "adapter": ("Adapters", "Trained beside or behind what is frozen."),
    "separable": (
        "Depthwise separable family",
        "On maps `(B, C, H, W)` and on tokens, most with `out_dim` and `stride`.",
    ),
    "stem": (
        "Stems",
        "`stem(images)` gives `(tokens, TokenGrid)`; in place of a patch embedding.",
    ),
}
"""Title of each group, and a sentence about it."""
_COLUMNS = (
    "paper", "block", "computes", "parameters", "multiply-accumulates", "prefix tokens",
    "sites", "`source=`", "test",
)  # fmt: skip


def to_json(names: Sequence[str]) -> str:
    """Rows of the catalogue, a list of objects."""
    return json.dumps([_row(name, BLOCKS[name]) for name in names], indent=1)


def to_markdown(names: Sequence[str]) -> str:
    """Rows of the catalogue as a page with a row per paper."""
    lines = [_INTRODUCTION]
    for group, (title, about) in GROUPS.items():
        rows = [
            _cells(_entry(name, info, paper))
            for name, info in BLOCKS.items()
            if info.group == group and name in names
            for paper in info.papers
        ]
        if rows:
            head = [_cells(_COLUMNS), _cells(["---"] * len(_COLUMNS))]
            lines += [f"## {title}", "", about, "", *head, *rows, ""]
    return "\n".join(lines).rstrip()


def _row(name: str, info: BlockInfo) -> dict[str, object]:
    facts = asdict(info)
    facts.pop("factory")
    sites = list(info.sites)
    sources = [paper.source for paper in info.papers if paper.source]
    return {"name": name, **facts, "paper": info.paper, "sites": sites, "sources": sources}


def _entry(name: str, info: BlockInfo, paper: Paper) -> list[str]:
    call = f"{name}({paper.arguments})" if paper.arguments else name
    file, _, test = info.parity_test.partition("::")
    return [
        f"[{paper.name}]({paper.url})",
        f"`{call}`",
        f"`{info.formula}`",
        f"`{info.params}`",
        f"`{info.macs}`",
        info.prefix_policy,
        ", ".join(f"`{site}`" for site in info.sites) or "none",
        f"`{paper.source}`" if paper.source else "none",
        f"[{test}]({file})",
    ]


def _cells(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |"
