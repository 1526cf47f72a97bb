import re
import runpy
import sys
from pathlib import Path

import pytest

from tokenconv import profiling

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Starts an example as ``python examples/...`` does and returns what it prints."""
    # It concerns the whole process, which other tests share.
    monkeypatch.setattr(profiling, "steady_allocator", lambda: "as the system has it")

    def run(example, *words):
        path = str(EXAMPLES / example)
        monkeypatch.setattr(sys, "argv", [path, *words])
        runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("model", ["test_vit", "pvt_v2_b0"])
def test_insert_timm_leaves_trains_and_restores_the_logits(run, model):
    printed = run("insert_timm.py", model, "--steps", "2")
    assert re.search(r"\d+ sites, params \+[\d,]+, MACs \+[\d,]+; output unchanged", printed)
    assert "inserted: logits are bit-equal: True" in printed
    first, second = (float(loss) for loss in re.findall(r"step \d: loss ([\d.]+)", printed))
    assert second < first
    moved = re.search(r"trained: logits moved by up to ([\d.]+)", printed)
    assert moved
    assert float(moved[1]) > 0
    assert "removed: logits are bit-equal: True" in printed


def test_profile_memory_speed_prints_costs_and_measurements_and_keeps_traces(run, tmp_path):
    traces = tmp_path / "traces"
    printed = run("profile_memory_speed.py", "test_vit", "--repeats", "2", "--trace", str(traces))
    plain, mixed = (
        int(re.search(rf"^{name}: ([\d,]+) parameters", printed, re.M)[1].replace(",", ""))
        for name in ("plain", "mix_ffn")
    )
    assert mixed - plain == 6 * 10 * 192  # six blocks, 3x3 weights and a bias, 192 channels
    rows = [line.split() for line in printed.splitlines()]
    arms = [(row[0], row[1]) for row in rows if row and row[0] in ("infer", "train")]
    assert arms == [(mode, arm) for mode in ("infer", "train") for arm in ("plain", "mix_ffn")]
    assert f"tensorboard --logdir {traces}" in printed
    assert "https://ui.perfetto.dev" in printed
    for arm in ("plain", "mix_ffn"):
        assert len(list(traces.glob(f"{arm}/*.pt.trace.json.gz"))) == 2


def test_video_tokens_are_mixed_over_frames_and_leave_the_logits(run):
    printed = run("video_tokens.py", "test_vit", "--frames", "5")
    assert "grid (5, 10, 10): 500 tokens; logits (2, 1000)" in printed
    assert "zero kernel: tokens are bit-equal: True" in printed
    assert "DWConv: [2]" in printed
    assert "DWConv3d: [1, 2, 3]" in printed


def test_rgbd_tokens_do_not_meet_in_a_convolution(run):
    printed = run("rgbd_tokens.py")
    assert "maps ((6, 10), (3, 5)), 76 tokens; logits (2, 10)" in printed
    assert "leaves the photograph's convolutions alone: True" in printed
    assert "but not the logits: True" in printed
