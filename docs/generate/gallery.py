"""The gallery of blocks, a page per group, from ``BLOCKS``; and the tests that prove them."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import nn

import tokenconv as tc
from generate.diagrams import SITES, diagram
from tokenconv.blocks import BLOCKS, BlockInfo
from tokenconv.blocks.listing import GROUPS, LEGEND

_TAKES = {
    "tokens": "`block(x, H, W)` or `block(x, grid)`, tokens `(B, N, C)`",
    "maps": "`block(fmap)`, maps `(B, C, H, W)`, and `block(x, H, W)`, tokens `(B, N, C)`",
    "scales": "`block(x, grid)`, tokens of several maps, with a `MultiGrid`",
    "stem": "`stem(images)`, images `(B, I, H, W)`; gives tokens and their grid",
}


def pages(root: Path) -> dict[str, str]:
    """All pages by name, without the end of it.

    Args:
        root: Of the repository, where the tests are.
    """
    found = {"blocks/index": _index()}
    for group, (title, about) in GROUPS.items():
        members = {name: info for name, info in BLOCKS.items() if info.group == group}
        found[f"blocks/{group}"] = _group(title, about, members)
    tests: dict[str, set[str]] = {}
    for info in BLOCKS.values():
        file, _, test = info.parity_test.partition("::")
        tests.setdefault(file, set()).add(test)
    found |= {f"tests/{Path(file).stem}": _test(root, file, tests[file]) for file in tests}
    return {**found, "blocks/common": _common(), "tests/index": _tests(tests)}


def _index() -> str:
    contents = "\n".join([*GROUPS, "common"])
    parts = [
        f"# Block gallery\n\n{len(BLOCKS)} blocks, made from `tokenconv.BLOCKS`; "
        f"`tokenconv list` prints them.\n\n{LEGEND}",
        f"```{{toctree}}\n:hidden:\n\n{contents}\n```",
    ]
    for group, (title, about) in GROUPS.items():
        rows = ["| block | papers | computes |", "| --- | --- | --- |"]
        for name, info in BLOCKS.items():
            if info.group == group:
                papers = ", ".join(f"[{paper.name}]({paper.url})" for paper in info.papers)
                rows.append(f"| {_link(name)} | {papers} | `{info.formula}` |")
        parts.append(f"## [{title}]({group}.md)\n\n{about}\n\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _group(title: str, about: str, members: dict[str, BlockInfo]) -> str:
    parts = [f"# {title}\n\n{about} What the letters mean is said in the [gallery](index.md)."]
    parts += [_block(name, info) for name, info in members.items()]
    return "\n\n".join(parts) + "\n"


def _common() -> str:
    """A page with the classes that blocks extend."""
    shared = dict.fromkeys(base for info in BLOCKS.values() for base in _bases(info))
    about = "Arguments and errors that several blocks share, by the class that they extend."
    return "\n\n".join([f"# In common\n\n{about}", *map(_documented, shared)]) + "\n"


def _block(name: str, info: BlockInfo) -> str:
    file, _, test = info.parity_test.partition("::")
    facts = {
        "papers": "<br>".join(_papers(name, info)),
        "parameters": f"`{info.params}`",
        "multiply-accumulates": f"`{info.macs}`",
        "called": _TAKES[info.kind],
        "prefix tokens": info.prefix_policy,
        "sites": ", ".join(f"`{site}`" for site in info.sites) or "none: it is used by itself",
        "parity test": f"[`{test}`](#{_test_label(file, test)})",
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    drawings = "\n".join(
        f"<figure><figcaption><code>{site}</code> {SITES[site]}</figcaption>"
        f"{diagram(site, name)}</figure>"
        for site in info.sites
    )
    drawn = f'<div class="sites">\n{drawings}\n</div>\n\n' if drawings else ""
    return f"""(block-{name})=
## {name}

```text
{info.formula}
```

| | |
| --- | --- |
{rows}

{drawn}{_documented(_class(info))}"""


def _papers(name: str, info: BlockInfo) -> Iterator[str]:
    for paper in info.papers:
        call = f", `{name}({paper.arguments})`" if paper.arguments else ""
        weights = f', weights by `source="{paper.source}"`' if paper.source else ""
        yield f"[{paper.name}]({paper.url}){call}{weights}"


def _class(info: BlockInfo) -> type[nn.Module]:
    assert isinstance(info.factory, type)
    return info.factory


def _bases(info: BlockInfo) -> list[type[nn.Module]]:
    """Classes that a block extends and that no other page documents, the nearest first."""
    blocks = {other.factory for other in BLOCKS.values()}
    return [
        base
        for base in _class(info).__mro__
        if base.__module__.startswith("tokenconv.blocks.")
        and base not in blocks
        and not base.__name__.startswith("_")
    ]


def _documented(module: type[nn.Module]) -> str:
    """The docstring of a class; where the reference has it, without an entry of its own."""
    public = getattr(tc, module.__name__, None) is module
    name = f"tokenconv.{module.__name__}" if public else f"{module.__module__}.{module.__name__}"
    option = "\n   :no-index:" if public else ""
    return f"```{{eval-rst}}\n.. autoclass:: {name}{option}\n   :show-inheritance:\n```"


def _link(name: str) -> str:
    return f"[`{name}`](#block-{name})"


# --- tests ---


def _tests(files: Iterable[str]) -> str:
    contents = "\n".join(Path(file).stem for file in files)
    return f"""# Parity tests

What proves each block equal to code we did not write, or to a reference written from its paper's
facts: outputs, gradients and running statistics, in float64. The pages show the tests as they are.

```{{toctree}}
:maxdepth: 1

{contents}
```
"""


def _test_label(file: str, test: str) -> str:
    return f"{Path(file).stem}-{test}".replace("_", "-")


def _test(root: Path, file: str, tests: set[str]) -> str:
    """A page with the source of a file of tests, those that prove blocks first."""
    tree = ast.parse((root / file).read_text())
    parts = [f"# {file}\n\n{ast.get_docstring(tree) or ''}\n\n```sh\npytest {file}\n```"]
    for test in sorted(tests):
        source = f"```{{literalinclude}} /../{file}\n:pyobject: {test}\n```"
        proven = [_link(name) for name, i in BLOCKS.items() if i.parity_test == f"{file}::{test}"]
        about = f"Proves {', '.join(proven)}."
        parts.append(f"({_test_label(file, test)})=\n## {test}\n\n{about}\n\n{source}")
    parts.append(f"## The whole file\n\n```{{literalinclude}} /../{file}\n:linenos:\n```")
    return "\n\n".join(parts) + "\n"
