"""What README and documentation say is run, not trusted.

The Python blocks of a page run in their order, in one namespace and an empty folder. What a block
prints is compared with the ``text`` block behind it, where ``...`` stands for anything, or else
with the comments behind its ``print`` calls, up to a colon. Commands of tokenconv run with few
repeats; those that train are in ``tests/examples``.
"""

import doctest
import re
import shlex
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import tokenconv as tc
from tokenconv.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("[!_]*.md"))]
PAGES += sorted((ROOT / "docs" / "guides").glob("*.md"))
SLOW = {"tutorial", "measure", "ship"}
"""Pages whose Python takes more than a few seconds."""
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PROMISE = re.compile(r"^ *print\(.*\)\s+# ([^:\n]+)", re.MULTILINE)


def named(path):
    return path.relative_to(ROOT).with_suffix("").as_posix()


def fences(path):
    return FENCE.findall(path.read_text())


def shell_lines(path):
    blocks = [text for language, text in fences(path) if language == "sh"]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := re.sub(r"\s+#.*", "", line).strip())]


SHELL = list(dict.fromkeys(line for page in PAGES for line in shell_lines(page)))
COMMANDS = [line for line in SHELL if line.startswith("tokenconv ")]


def _page(path):
    marks = pytest.mark.slow if path.stem in SLOW else ()
    return pytest.param(path, id=named(path), marks=marks)


RUNNABLE = [path for path in PAGES if "```python" in path.read_text()]


@pytest.mark.parametrize("path", [_page(path) for path in RUNNABLE])
def test_python_runs_and_prints_what_the_page_says(path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {}
    check = doctest.OutputChecker().check_output
    blocks = fences(path)
    for (language, source), following in zip(blocks, [*blocks[1:], ("", "")], strict=True):
        if language != "python":
            continue
        exec(compile(source, named(path), "exec"), namespace)
        printed = capsys.readouterr().out
        promised = "".join(f"{line}\n" for line in PROMISE.findall(source))
        if following[0] == "text":
            promised = following[1]
        assert check(promised, printed, doctest.ELLIPSIS), (
            f"{named(path)} promises\n{promised}but\n{source}prints\n{printed}"
        )


def test_pages_have_every_command():
    assert {command.split()[1] for command in COMMANDS} == {
        "plan", "compare", "cost", "analyze", "export", "list",
    }  # fmt: skip
    assert {"make demo", "make test", "make docs"} <= set(SHELL)


def _command(line):
    takes_long = any(option in line for option in ("--sweep", "--beside", "--budget", " export "))
    return pytest.param(line, id=line, marks=pytest.mark.slow if takes_long else ())


@pytest.mark.parametrize("command", [_command(line) for line in COMMANDS])
def test_commands_run(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)[1:]
    if words[0] == "compare":
        words += ["--repeats", "2", "--batch-size", "1", "--mode", "infer"]
    words = [word for word in words if word != "--pretrained"]  # nothing is downloaded
    said = dict(pairwise(words))
    if "--hybrid" in said:
        torch.manual_seed(0)  # as the command does
        base = timm.create_model(words[1], num_classes=int(said.get("--num-classes", 1000)))
        tc.save(tc.insert_(base, "mix_ffn"), said["--hybrid"])
    if "--calibration" in said:
        (tmp_path / said["--calibration"]).mkdir()
        Image.effect_noise((260, 240), 60).save(tmp_path / said["--calibration"] / "a.png")
    assert main(words) == 0
    if words[0] == "export":
        assert (tmp_path / words[words.index("--out") + 1]).is_file()
    assert capsys.readouterr().out
    made = {path.name for path in tmp_path.glob("tokenconv-[ra]*/[!.]*")}
    reports = {"report.html", "report.md"}
    if "--sweep" in words:
        assert made == {*reports, "sweep.png", "sweep.svg", "points"}
    elif words[0] == "compare":
        traces = {"traces"} if "--trace" in words else set()
        assert made == {*reports, "compare.json", "compare.png", "compare.svg", *traces}
    elif words[0] == "analyze":
        assert made == {*reports, "analysis.json", "analysis.png", "analysis.svg"}
    else:
        assert made == set()


def test_what_other_commands_name_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in SHELL:
        words = shlex.split(line)
        if words[0] == "make":
            assert words[1] in targets, line
        elif words[0] == "pip":
            named = re.search(r"\[(.*)\]", words[-1])
            assert {*named[1].split(",")} <= set(extras) if named else words[-1] == ".", line
        for word in words:
            if word.startswith(("examples/", "benchmarks/")) and word.endswith(".py"):
                assert (ROOT / word).is_file(), line


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", re.sub(FENCE, "", path.read_text()))
    local = [link for link in links if not link.startswith("http")]
    missing = [link for link in local if not (path.parent / link).exists()]
    made = [link for link in missing if link.startswith(("generated/", "../generated/"))]
    assert missing == made  # those are for test_docs
