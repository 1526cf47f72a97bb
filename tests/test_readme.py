"""Figures of the README, and its promise that one command is enough; its code is in test_pages."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tokenconv.blocks import BLOCKS
from tokenconv.profiling import read_comparison
from tokenconv.profiling.report.markdown import to_markdown

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_insertion_takes_ten_lines():
    insertion = next(block for block in PYTHON if "insert_" in block)
    assert len([line for line in insertion.splitlines() if line.strip()]) <= 10


def test_the_table_of_blocks_is_that_of_the_catalogue():
    rows = re.findall(
        r"^\| `(\w+)` \| `(.+?)` \| `(.+?)` \| \[(.+)\]\((.+)\) \|$", README, re.MULTILINE
    )
    assert len(rows) >= 5
    for name, *told in rows:
        info = BLOCKS[name]
        paper = info.papers[0]
        assert told == [info.formula, info.params, paper.name, paper.url]


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "pvt_v2_b0"])
def test_tables_are_those_that_the_command_made(model):
    kept = f"benchmarks/results/0.1.0/compare-{model}--2-core-avx512--cpu.json"
    comparison = read_comparison(ROOT / kept)
    command, _, _ = comparison.about["command"].partition(" --out ")
    assert f"\n{command}" in README
    assert f"({kept})" in README
    shown = README[README.index(command) :]
    report = to_markdown(comparison)
    rows = [line for line in report[report.index("## Figures") :].splitlines() if "|" in line]
    count = 2 + len(comparison.modes) * len(comparison.arms)
    assert "\n".join(rows[:count]) in shown


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


def test_the_accuracy_table_is_that_of_the_runs():
    results = ROOT / "benchmarks" / "results" / "0.1.0"
    table = (results / "accuracy--2-core-avx512--cpu.md").read_text().strip()
    assert table in README
    runs = json.loads((results / "accuracy--2-core-avx512--cpu.json").read_text())
    assert len(runs["runs"]) == 480
    assert len([row for row in runs["summary"] if row["difference"]]) == 78
