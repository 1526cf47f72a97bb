import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FULL = ["2x4x5x16", "1x3x4x8", "2x3x3x8+1"]
SHAPES = [*FULL, "2x4x5x8+1/9"]
# The whole process would keep its memory, and other tests share it.
IN_PROCESS = ["--quick", "--allocator", "system", "--shapes"]


@pytest.fixture
def token_conv(load_benchmark):
    return load_benchmark("token_conv")


def make_wrong(right, change):
    """An arm that is another one except for one change."""

    def make(case, conv):
        arm = right(case, conv)
        return lambda x: change(arm(x), x)

    return make


def test_writes_what_was_measured_and_how(tmp_path):
    out = tmp_path / "new" / "token_conv.json"
    words = ["--quick", "--threads", "1", "--out", str(out), "--shapes", *SHAPES]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "token_conv.py", *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    result = json.loads(out.read_text())
    assert [path.name for path in out.parent.iterdir()] == [out.name]

    assert re.fullmatch(r"unknown|[0-9a-f]{40}", result["commit"])
    assert all((BENCHMARKS.parent / path).exists() for path in result["uncommitted"])
    assert result["threads"] == 1
    assert result["dtype"] == "float32"
    assert result["repeats"] == 5
    assert result["device"]
    assert result["allocator"]
    assert "token_conv.py --quick --threads 1" in result["command"]
    assert result["versions"]["torch"] == torch.__version__.partition("+")[0]

    modes = ("forward", "forward+backward")
    assert [(row["case"], row["mode"]) for row in result["rows"]] == [
        (shape, mode) for shape in SHAPES for mode in modes
    ]
    for row in result["rows"]:
        assert list(row["latency_ms"]) == ["naive", "timm", "ours"]
        assert list(row["ratio_to_ours"]) == ["naive", "timm"]
        assert 0 <= row["largest_difference"] < 1e-5
        for spread in (*row["latency_ms"].values(), *row["ratio_to_ours"].values()):
            assert 0 < spread["q25"] <= spread["median"] <= spread["q75"]
        assert f"{row['ratio_to_ours']['timm']['median']:.3f}" in done.stdout


@pytest.mark.parametrize(
    "change",
    [
        lambda out, x: out * 1.001,
        lambda out, x: out + (x - x.detach()),  # the output is right, the gradient is not
        lambda out, x: out * float("nan"),
        lambda out, x: out[:, 1:],
    ],
    ids=["output", "gradient", "nan", "shape"],
)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[-1]])
def test_refuses_to_time_arms_that_differ(token_conv, monkeypatch, tmp_path, capsys, shape, change):
    monkeypatch.setitem(token_conv.ARMS, "ours", make_wrong(token_conv.ours, change))
    monkeypatch.setattr(token_conv, "time_arms", lambda *args: pytest.fail("timed"))
    out = tmp_path / "token_conv.json"
    assert token_conv.main([*IN_PROCESS, shape, "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert re.search(r"error: the arms differ by \S+ of the largest value on ", printed.err)
    assert shape in printed.err
    assert not printed.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", FULL)
def test_arms_are_written_as_they_say(token_conv, shape):
    """``naive`` hands the convolution real NCHW copies, ``timm`` a view of the tokens."""
    case = token_conv.Case.parse(shape)
    assert str(case) == shape
    seen = {}
    for name in ("naive", "timm"):
        conv = torch.nn.Conv2d(case.dim, case.dim, 3, padding=1, groups=case.dim)
        conv.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        num_tokens = case.num_prefix_tokens + case.rows * case.cols
        x = torch.randn(case.batch_size, num_tokens, case.dim)
        out = token_conv.ARMS[name](case, conv)(x)
        shares_memory = seen[name].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert shares_memory == (name == "timm")
        assert out.shape == x.shape
    assert seen["naive"].is_contiguous()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(token_conv, monkeypatch, tmp_path):
    def refuse(*args):
        raise OSError("disk full")

    out = tmp_path / "token_conv.json"
    token_conv.write_json(out, {"rows": []})
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        token_conv.write_json(out, {"rows": [1]})
    assert json.loads(out.read_text()) == {"rows": []}
    assert list(tmp_path.iterdir()) == [out]
