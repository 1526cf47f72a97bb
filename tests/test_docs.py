"""The documentation is whole: every page can be reached, and what is generated can be generated."""

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import generate
import pytest
from generate import api, diagrams
from generate.included import localise

import tokenconv as tc
from tokenconv.blocks import BLOCKS
from tokenconv.surgery.sites import SITES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TOCTREE = re.compile(r"^```{toctree}\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)")


@pytest.fixture(scope="module")
def pages():
    """The text of every page by its name, as Sphinx calls it."""
    made = {f"{generate.FOLDER}/{name}": text for name, text in generate.pages().items()}
    written = {
        path.relative_to(DOCS).with_suffix("").as_posix(): path.read_text()
        for path in DOCS.rglob("*.md")
        if path.relative_to(DOCS).parts[0] not in (generate.FOLDER, "_build")
    }
    assert "index" in written
    assert not made.keys() & written.keys()
    return {**made, **written}


def entries(name, text):
    """The pages in the toctrees of a page."""
    for block in TOCTREE.findall(text):
        for line in block.splitlines():
            if line and not line.startswith(":"):
                target = re.sub(r".*<(.+)>", r"\1", line.strip())
                yield (Path(name).parent / target).as_posix()


def test_every_page_is_in_one_toctree(pages):
    listed = [entry for name, text in pages.items() for entry in entries(name, text)]
    assert sorted(listed) == sorted(pages.keys() - {"index"})


def test_links_to_pages_lead_somewhere(pages):
    for name, text in pages.items():
        for link in LINK.findall(
            re.sub(r"```.*?```", "", localise(text, DOCS / f"{name}.md"), flags=re.DOTALL)
        ):
            if link.endswith(".md") and not link.startswith("http"):
                path = DOCS / link[1:] if link[0] == "/" else (DOCS / name).parent / link
                found = path.resolve().relative_to(DOCS).with_suffix("").as_posix()
                assert found in pages, f"{name} links to {link}"


# --- gallery ---


def test_every_block_has_a_section_with_what_there_is_to_know(pages):
    for name, info in BLOCKS.items():
        page = pages[f"generated/blocks/{info.group}"]
        start = page.index(f"(block-{name})=")
        section = page[start : page.find("\n(block-", start + 1)]
        for fact in (info.formula, info.params, info.macs, info.prefix_policy):
            assert fact in section
        for paper in info.papers:
            assert f"[{paper.name}]({paper.url})" in section
        assert re.findall(r'aria-label="\S+ at (\w+):', section) == list(info.sites)
        label = re.search(r"\]\(#(test-[\w-]+)\)", section)[1]
        file, _, test = info.parity_test.partition("::")
        proof = pages[f"generated/tests/{Path(file).stem}"]
        assert f"({label})=\n## {test}\n" in proof
        assert f"(#block-{name})" in proof


def test_sites_of_drawings_are_those_of_surgery():
    assert diagrams.SITES.keys() == SITES.keys() - {"remove_conv"}  # nothing is inserted there
    for info in BLOCKS.values():
        assert info.sites.keys() <= diagrams.SITES.keys()


@pytest.mark.parametrize("site", diagrams.SITES)
def test_a_drawing_shows_the_block_once_where_it_goes(site):
    drawn = ElementTree.fromstring(diagrams.diagram(site, "a<b"))
    boxes = [
        (float(group.find("rect").get("x")), group.find("text").text, group.get("class"))
        for group in drawn.iter("g")
        if group.find("rect") is not None
    ]
    new = [text for _, text, kind in boxes if kind == "new"]
    assert new == ["a<b"]
    row = [text for _, text, _ in sorted(boxes)]
    at = row.index("a<b")
    neighbours = row[max(0, at - 1) : at], row[at + 1 : at + 2]
    expected = {
        "before_act": (["fc1"], ["act"]), "after_act": (["act"], ["fc2"]),
        "before_mlp": (["norm"], ["fc1"]), "before_attn": (["norm"], ["attention"]),
        "replace_attn": (["norm"], ["norm"]), "before_block": ([], ["norm"]),
        "after_block": (["fc2"], []), "replace_patch_embed": (["image"], ["tokens"]),
    }  # fmt: skip
    if site in expected:
        assert neighbours == expected[site]
    widths = {float(r.get("x")) + float(r.get("width")) for r in drawn.iter("rect")}
    assert max(widths) < float(drawn.get("viewBox").split()[2])
    assert ("attention" in row) == (site not in ("replace_attn", "replace_patch_embed"))


@pytest.mark.parametrize(("site", "beside"), [
    ("beside_mlp", ["fc1", "act", "fc2"]), ("beside_attn", ["attention"]), ("merge_conv", ["conv"]),
])  # fmt: skip
def test_a_branch_spans_what_it_stands_beside(site, beside):
    drawn = ElementTree.fromstring(diagrams.diagram(site, "block"))
    (branch,) = [p.get("d") for p in drawn.findall("path") if p.get("class") == "new"]
    left, right = (
        float(re.match(r"M([\d.]+)", branch)[1]),
        float(re.findall(r"H([\d.]+)", branch)[1]),
    )
    inside = [
        group.find("text").text
        for group in drawn.iter("g")
        if group.find("rect") is not None
        and group.get("class") != "new"
        and left < float(group.find("rect").get("x")) < right
    ]
    assert inside == beside


# --- reference ---


def test_the_reference_has_every_public_name(pages):
    offered = {id(value) for package in api.PACKAGES for value in api.offered(package).values()}
    for name in tc.__all__:
        value = getattr(tc, name)
        assert name == "analysis" or id(value) in offered, name
        assert name == "analysis" or f"{name} <tokenconv.{name}>" in pages["generated/api/index"]


def test_a_name_without_a_docstring_is_an_error():
    with pytest.raises(LookupError, match=r"tokenconv\.blocks\.NOTHING has no docstring"):
        api._about("blocks", "NOTHING", 3)


# --- files that pages include ---


def test_links_of_included_files_are_those_of_the_site():
    text = (
        "[a](../walkthrough.py) ![b](curves.png) [c](../../README.md#x) [d](https://e.f) `g[0](h)`"
    )
    assert localise(text, ROOT / "examples" / "walkthrough" / "README.md") == (
        "[a](/../examples/walkthrough.py) ![b](/../examples/walkthrough/curves.png) "
        "[c](/index.md#x) [d](https://e.f) `g[0](h)`"
    )
    assert localise(
        "[w](walkthrough/README.md) [t](../docs/tutorial.md)", ROOT / "examples" / "serve.md"
    ) == ("[w](/examples/walkthrough.md) [t](/tutorial.md)")


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-d"]
    run = subprocess.run(
        [*build, str(tmp_path / "doctrees"), str(DOCS), str(tmp_path / "html")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (0, "")
    pages = list((tmp_path / "html").rglob("*.html"))
    assert len(pages) > 60
    for page in pages:
        parts = re.findall(r"<(?:script|link|img|iframe)[^>]*>", page.read_text())
        away = [part for part in parts if re.search(r"(?:src|href)=\"(?:https?:)?//", part)]
        assert not away, page
