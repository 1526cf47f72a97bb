"""Figures of the README, and its promise that one command is enough; its code is in test_pages."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tokenconv.blocks import BLOCKS

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
