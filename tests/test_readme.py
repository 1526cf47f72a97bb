"""What the README says is run, not trusted."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import timm
import torch

import tokenconv as tc
from tokenconv.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
COMMANDS = [line for line in SHELL if line.startswith("tokenconv ")]


def test_python_blocks_run_in_order_and_print_what_their_comments_say(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in PYTHON:
        exec(compile(block, "README.md", "exec"), namespace)
    promised = re.findall(r"^print\(.*\)\s+# ([^:\n]+)", "".join(PYTHON), re.MULTILINE)
    assert len(promised) >= 3
    assert capsys.readouterr().out.splitlines() == promised
    assert {path.name for path in (tmp_path / "hybrid").iterdir()} == {
        "plan.json",
        "delta.safetensors",
    }
    assert (tmp_path / "hybrid.onnx").is_file()


def test_insertion_takes_ten_lines():
    insertion = next(block for block in PYTHON if "insert_" in block)
    assert len([line for line in insertion.splitlines() if line.strip()]) <= 10


def test_export_takes_two_lines():
    exporting = next(block for block in PYTHON if "tc.export" in block)
    assert len(exporting.splitlines()) == 3  # and one that makes a model


def test_readme_has_commands():
    assert {command.split()[1] for command in COMMANDS} == {
        "plan", "compare", "cost", "analyze", "export",
    }  # fmt: skip
    assert {"make demo", "make test"} <= set(SHELL)


def _command(line):
    takes_long = any(option in line for option in ("--sweep", "--beside", "--budget", " export "))
    return pytest.param(line, marks=pytest.mark.slow if takes_long else ())


@pytest.mark.parametrize("command", [_command(line) for line in COMMANDS])
def test_commands_run(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)[1:]
    if words[0] == "compare":
        words += ["--repeats", "2", "--batch-size", "1", "--mode", "infer"]
    if words[0] == "analyze":
        words = [word for word in words if word != "--pretrained"]  # nothing is downloaded
    if "--hybrid" in words:
        torch.manual_seed(0)  # as the command does
        hybrid = tc.insert_(timm.create_model(words[1]), "mix_ffn")
        tc.save(hybrid, words[words.index("--hybrid") + 1])
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


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    missing = [link for link in links if not (ROOT / link.partition("#")[0]).exists()]
    assert not missing


@pytest.mark.slow
def test_demo_in_a_fresh_clone(tmp_path):
    """``make demo`` makes its own environment, and uses it again the second time."""
    clone = tmp_path / "tokenconv"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    for _ in range(2):
        shutil.rmtree(clone / "tokenconv-report", ignore_errors=True)
        run = subprocess.run(
            ["make", "demo"], cwd=clone, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr[-2000:]
        for model in ("vit_tiny_patch16_224", "pvt_v2_b0"):
            report = clone / "tokenconv-report" / model
            assert (report / "compare.json").is_file()
            assert list(report.glob("traces/*/train.*.pt.trace.json.gz"))
            assert str(Path("tokenconv-report") / model / "report.md") in run.stdout
        assert "tensorboard --logdir" in run.stdout
    assert "setting up" not in run.stdout
