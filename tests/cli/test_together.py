"""Commands that are started at the same time, to write to the same place."""

import subprocess
import sys
from pathlib import Path

import pytest

from tokenconv.profiling import read_comparison

pytestmark = pytest.mark.slow
FAST = "compare test_vit --repeats 3 --mode infer --batch-size 1 --img-size 32"


def together(folder: Path, *commands: str) -> list[tuple[int, str]]:
    """Exit status of each, and its last line on standard error."""
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tokenconv", *command.split()],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
        )
        for command in commands
    ]  # fmt: skip
    told = [one.communicate(timeout=300)[1] for one in running]
    assert not any("Traceback" in each for each in told), told
    ends = [each.strip().rpartition("\n")[2] for each in told]
    return [(one.returncode, end) for one, end in zip(running, ends, strict=True)]


def test_one_of_three_reports_is_written_and_whole(tmp_path: Path):
    blocks = ("mix_ffn", "peg", "conv_glu")
    ends = together(tmp_path, *(f"{FAST} --block {block} --out report" for block in blocks))
    won = [block for block, (status, _) in zip(blocks, ends, strict=True) if status == 0]
    assert won
    for status, line in ends:
        refused = "tokenconv: error: another run is writing to report: wait for it, or take"
        assert status == 0 or (status == 1 and line.startswith(refused))
    found = read_comparison(tmp_path / "report" / "compare.json")
    (block,) = {arm.name for arm in found.arms} - {"baseline"}
    assert block in won
    others = {*blocks} - {block}
    for name in ("report.html", "report.md"):
        text = (tmp_path / "report" / name).read_text()
        assert f"--block {block}" in text
        assert not [other for other in others if f"--block {other}" in text]
    assert not [path for path in tmp_path.rglob(".*") if path.name != ".cache"]


def test_other_commands_do_not_come_between(tmp_path: Path):
    ends = together(
        tmp_path,
        f"{FAST} --block mix_ffn --sweep batch-size=1,2 --out report",
        "analyze test_vit --img-size 32 --out report",
    )
    assert 0 in [status for status, _ in ends]
    assert {status for status, _ in ends} <= {0, 1}
    kinds = [(tmp_path / "report" / name).exists() for name in ("points", "analysis.json")]
    assert kinds == [status == 0 for status, _ in ends]


def test_an_exported_file_is_one_of_those_that_were_asked_for(tmp_path: Path):
    onnx = pytest.importorskip("onnx")
    sizes = (32, 64)
    ends = together(
        tmp_path, *(f"export test_vit --img-size {side} --out vit.onnx" for side in sizes)
    )
    assert [status for status, _ in ends] == [0, 0]
    model = onnx.load(tmp_path / "vit.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert model.graph.input[0].type.tensor_type.shape.dim[2].dim_value in sizes
    assert [path.name for path in tmp_path.iterdir()] == ["vit.onnx"]
