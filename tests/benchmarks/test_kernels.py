import json
import math
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FULL = ["2x4x5x16", "1x3x4x8", "2x3x3x8+1"]
SHAPES = [*FULL, "2x4x5x8+1/9"]
EAGER = ["naive", "timm", "ours", "copy", "activation"]
# The whole process would keep its memory, and other tests share it.
IN_PROCESS = ["--quick", "--allocator", "system", "--arms", "naive", "timm", "ours", "--shapes"]


@pytest.fixture
def kernels(load_benchmark):
    return load_benchmark("kernels")


def started(*words, without=""):
    """The benchmark in a process of its own, in which one package is not installed."""
    start = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({without.split()}));"
        f"sys.path.insert(0, {str(BENCHMARKS)!r}); sys.argv = ['kernels.py', *sys.argv[1:]];"
        f"runpy.run_path({str(BENCHMARKS / 'kernels.py')!r}, run_name='__main__')"
    )
    words = ["--quick", "--threads", "1", *map(str, words)]
    done = subprocess.run([sys.executable, "-c", start, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def make_wrong(right, change):
    """An arm that is another one except for one change."""

    def make(layer):
        arm = right(layer)
        return lambda x: change(arm(x), x)

    return make


def test_writes_what_was_measured_and_how(tmp_path):
    out = tmp_path / "new" / "kernels.json"
    done = started("--out", out, "--arms", *EAGER, "--shapes", *SHAPES)
    assert "Warning" not in done.stderr
    result = json.loads(out.read_text())
    assert {path.name for path in out.parent.iterdir()} == {
        out.name, "kernels.png", "kernels.svg",
    }  # fmt: skip
    assert out.with_suffix(".svg").read_text().rstrip().endswith("</svg>")

    assert re.fullmatch(r"unknown|[0-9a-f]{40}", result["commit"])
    assert all((BENCHMARKS.parent / path).exists() for path in result["uncommitted"])
    assert result["threads"] == 1
    assert result["dtype"] == "float32"
    assert result["activation"] == "gelu"
    assert result["kernel_size"] == 3
    assert result["repeats"] == 5
    assert result["device"]
    assert result["allocator"]
    assert "kernels.py --quick --threads 1" in result["command"]
    assert result["versions"]["torch"] == torch.__version__.partition("+")[0]

    modes = ("forward", "forward+backward")
    assert [(row["case"], row["mode"]) for row in result["rows"]] == [
        (shape, mode) for shape in SHAPES for mode in modes
    ]
    for row in result["rows"]:
        arms = [arm for arm in EAGER if arm != "copy" or row["mode"] == "forward"]
        assert list(row["latency_ms"]) == arms
        assert list(row["ratio"]) == [f"{arm}/ours" for arm in arms if arm != "ours"]
        assert 0 <= row["largest_difference"] < 1e-5
        for spread in (*row["latency_ms"].values(), *row["ratio"].values()):
            assert 0 < spread["q25"] <= spread["median"] <= spread["q75"]
        assert f"{row['ratio']['timm/ours']['median']:.3f}" in done.stdout
    assert {line["what"] for line in result["summary"]} == {
        "naive/ours", "timm/ours", "bandwidth ours/copy", "saved bytes ours/timm",
        "backward/forward",
    }  # fmt: skip
    assert all(f"{line['geomean']:.3f}" in done.stdout for line in result["summary"])


def test_runs_where_reports_cannot_be_drawn(tmp_path):
    out = tmp_path / "kernels.json"
    words = ["--out", out, "--arms", "timm", "ours", "--shapes", FULL[0]]
    done = started(*words, without="matplotlib jinja2 pydantic safetensors")
    assert "no figure: matplotlib is not installed" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.slow
@pytest.mark.compile
def test_compiled_arms_compute_the_same(tmp_path):
    out = tmp_path / "kernels.json"
    started("--out", out, "--shapes", *SHAPES)
    rows = json.loads(out.read_text())["rows"]
    assert all("timm_compiled/ours_compiled" in row["ratio"] for row in rows)
    assert all(0 < row["largest_difference"] < 1e-5 for row in rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_runs_on_a_gpu(tmp_path, dtype):
    out = tmp_path / "kernels.json"
    shapes = ["2x14x14x64", "2x14x14x64+1"]
    started("--device", "cuda", "--dtype", dtype, "--out", out, "--shapes", *shapes)
    result = json.loads(out.read_text())
    for row in result["rows"]:
        assert row["buffers"] * row["input_bytes"] > 3 * 2**20
        assert row["peak_bytes"]["triton"] <= row["peak_bytes"]["timm"]
    assert set(result["compilations"]) == {"forward", "forward+backward"}
    assert set(result["host_us"]) == {"inference", "training"}


@pytest.mark.parametrize(
    "change",
    [
        lambda out, x: out * 1.001,
        lambda out, x: out + (x - x.detach()),  # the output is right, the gradient is not
        lambda out, x: out.detach() + 0 * x,
        lambda out, x: out * float("nan"),
        lambda out, x: out[:, 1:],
    ],
    ids=["output", "gradient", "no gradient of weights", "nan", "shape"],
)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[-1]])
def test_refuses_to_time_arms_that_differ(kernels, monkeypatch, tmp_path, capsys, shape, change):
    monkeypatch.setitem(kernels.COMPARED, "ours", make_wrong(kernels.ours, change))
    monkeypatch.setattr(kernels, "time_arms", lambda *args: pytest.fail("timed"))
    out = tmp_path / "kernels.json"
    assert kernels.main([*IN_PROCESS, FULL[1], shape, "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert re.search(r"error: ours differs from naive by \S+ of the largest value on ", printed.err)
    assert not printed.out
    assert not list(tmp_path.iterdir())


def test_the_interpreter_of_triton_is_not_timed(kernels, capsys):
    with pytest.raises(SystemExit):
        kernels.main([*IN_PROCESS, FULL[0], "--arms", "timm", "triton"])
    assert "triton: Triton makes no code for CPUs" in capsys.readouterr().err


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "silu", "relu"])
def test_all_arms_have_the_activation_that_was_asked_for(kernels, activation):
    words = ["--activation", activation, "--kernel-size", "5", "--arms", "naive", "timm", "ours"]
    args = kernels.parse([*words, "activation"])
    layer = kernels.Layer.of(kernels.Case.parse("2x6x7x8+1"), args)
    assert max(kernels.compare(layer, args).values()) < 1e-5
    arms = kernels.arms_of(layer, "forward", args)
    assert ("activation" in arms) == (activation != "none")
    x = layer.buffers(1)[0][0]
    expected = kernels.ACTIVATIONS[activation]()(x[:, :1])
    for arm in arms.values():
        torch.testing.assert_close(arm(x)[:, :1], expected)


@pytest.mark.parametrize("shape", FULL)
def test_arms_are_written_as_they_say(kernels, shape):
    """``naive`` hands the convolution real NCHW copies, ``timm`` a view of the tokens."""
    layer = kernels.Layer.of(kernels.Case.parse(shape), kernels.parse([]))
    assert str(layer.case) == shape
    seen = {}
    ((x, _),) = layer.buffers(1)
    for name in ("naive", "timm"):
        hook = layer.conv.register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0]})
        )
        out = kernels.COMPARED[name](layer)(x)
        hook.remove()
        shares_memory = seen[name].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert shares_memory == (name == "timm")
        assert out.shape == x.shape
    assert seen["naive"].is_contiguous()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_arms_and_cases_are_those_of_the_device(kernels, device):
    args = kernels.parse(["--device", device])
    assert ("triton_compiled" in args.arms) == (device == "cuda")
    assert {"naive", "timm", "timm_compiled", "ours", "ours_compiled"} < {*args.arms}
    plain = {str(case) for case in args.shapes if case.left is None}
    assert {f"{shape}+1" for shape in plain if "+" not in shape} == {s for s in plain if "+" in s}
    sparse = kernels.Layer.of(kernels.Case.parse("2x4x5x8/9"), kernels.parse([]))
    assert not any("triton" in name for name in kernels.arms_of(sparse, "forward", args))


def test_what_is_kept_for_the_backward_pass_counts_once(kernels):
    args = kernels.parse([])
    layer = kernels.Layer.of(kernels.Case.parse("2x4x5x16"), args)
    (buffer,) = layer.buffers(1)
    size = buffer[0].nbytes
    kept = {
        name: kernels.saved_bytes(make(layer), layer, buffer)
        for name, make in (kernels.COMPARED | kernels.LIMITS).items()
        if "triton" not in name and "compiled" not in name
    }
    assert kept == {  # what is convolved and what is activated, which naive copies; gelu's input
        "naive": 2 * size, "timm": 2 * size, "ours": 2 * size, "copy": 0, "activation": size,
    }  # fmt: skip


def row(case, mode, ratio=None, saved=None, **ms):
    """A row as it is written, with these medians."""
    shape, _, left = case.partition("/")
    shape, _, prefix = shape.partition("+")
    return {
        "case": case, "mode": mode, "batch_size": int(shape.split("x")[0]),
        "num_prefix_tokens": int(prefix or 0), "left": int(left) if left else None,
        "latency_ms": {name: {"median": value} for name, value in ms.items()},
        "ratio": {name: {"median": value} for name, value in (ratio or {}).items()},
        "saved_bytes": saved or {},
    }  # fmt: skip


def test_the_summary_is_right_for_made_up_timings(kernels):
    rows = [
        row("1x2x2x8", "forward", {"timm/ours": 4.0, "copy/ours": 0.5}, ours=2.0),
        row("1x2x2x8+1", "forward", {"timm/ours": 9.0, "copy/ours": 0.9}, ours=3.0),
        row("8x2x2x8", "forward", {"timm/ours": 6.0}, ours=1.0),
        row("8x2x2x8/3", "forward", {"timm/ours": 0.25}, ours=1.0),
        row("1x2x2x8", "forward+backward", saved={"ours": 55, "timm": 100}, ours=6.0),
        row("8x2x2x8", "forward+backward", {"timm_compiled/ours_compiled": 1.5}, ours=9.0),
    ]
    found = {
        (line["what"], line["mode"], line["of"]): (
            line["cases"], pytest.approx(line["geomean"]), line["worst"], line["worst_case"],
        )
        for line in kernels.summary(rows, "ours")
    }  # fmt: skip
    both = "forward+backward"
    assert found["timm/ours", "forward", "full grids"] == (3, 6.0, 4.0, "1x2x2x8")
    assert found["timm/ours", "forward", "batch 1"] == (2, 6.0, 4.0, "1x2x2x8")
    assert found["timm/ours", "forward", "prefix tokens"] == (1, 9.0, 9.0, "1x2x2x8+1")
    assert found["timm/ours", "forward", "missing tokens"] == (1, 0.25, 0.25, "8x2x2x8/3")
    assert found["bandwidth ours/copy", "forward", "full grids"] == (
        2, math.sqrt(0.45), 0.5, "1x2x2x8",
    )  # fmt: skip
    assert found["with/without prefix tokens", "forward", "full grids"] == (
        1, 1.5, 1.5, "1x2x2x8+1",
    )  # fmt: skip
    assert found["backward/forward", both, "full grids"] == (2, 4.0, 8.0, "8x2x2x8")
    assert found["saved bytes ours/timm", both, "batch 1"] == (1, 0.55, 0.55, "1x2x2x8")
    ratio = "timm_compiled/ours_compiled"
    assert found[ratio, both, "full grids"] == (1, 1.5, 1.5, "8x2x2x8")
    assert ("timm/ours", both, "full grids") not in found


def test_times_are_of_a_call_and_ratios_of_a_round(kernels, monkeypatch):
    samples = {"a": [10.0, 20.0, 90.0], "b": [5.0, 20.0, 9.0]}
    timing = SimpleNamespace(failures={}, samples_ms=samples)
    monkeypatch.setattr(sys.modules["common"], "time_interleaved", lambda *args, **kw: timing)
    args, bar = kernels.parse([]), SimpleNamespace(update=None)
    found = kernels.time_arms({}, args, [("a", "b"), ("a", "c")], bar, 10)
    assert {name: spread["median"] for name, spread in found["latency_ms"].items()} == {
        "a": 2.0, "b": 0.9,
    }  # fmt: skip
    assert {name: spread["median"] for name, spread in found["ratio"].items()} == {"a/b": 2.0}


def test_a_step_on_a_gpu_takes_the_buffers_in_turn_and_keeps_its_results(kernels, monkeypatch):
    """Else results would be written to one place, which the cache holds."""
    log, alive = [], set()

    class Result:
        def __init__(self, buffer):
            alive.add(self.__dict__.setdefault("number", len(log)))
            log.append((buffer, len(alive)))

        def __del__(self):
            alive.discard(self.number)

    @contextmanager
    def within(*args, **kwargs):
        log.append("graph" if "pool" in kwargs else "aside")
        yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    graph = SimpleNamespace(replay="replay")
    for name, value in {
        "Stream": lambda: stream, "current_stream": lambda: stream, "stream": within,
        "CUDAGraph": lambda: graph, "graph": within,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    assert kernels.capture(Result, ["a", "b", "c"], 7, "pool") == "replay"
    captured = log[log.index("graph") + 1 :]
    assert log[: log.index("graph")] == ["aside", ("a", 1), ("b", 1)]
    assert [buffer for buffer, _ in captured] == list("abcabca")
    assert [count for _, count in captured] == [1, 2, 3, 4, 4, 4, 4]
    assert not alive


def test_versions_of_kernels_are_counted(kernels, monkeypatch):
    triton_kernels = ModuleType("triton_kernels")
    made = SimpleNamespace(device_caches={0: ({"key": 1, "other": 2}, "target"), 1: ({"key": 1},)})
    triton_kernels.convolve = made
    triton_kernels.tl = ModuleType("tl")
    from tokenconv.ops import depthwise_conv

    name = f"{depthwise_conv.__name__}.triton_kernels"
    monkeypatch.setitem(sys.modules, name, triton_kernels)
    monkeypatch.setattr(depthwise_conv, "triton_kernels", triton_kernels, raising=False)
    assert kernels.versions_of_kernels() == 3


def test_a_failed_write_leaves_the_old_file_and_nothing_else(kernels, monkeypatch, tmp_path):
    def refuse(*args):
        raise OSError("disk full")

    out = tmp_path / "kernels.json"
    kernels.write_json(out, {"rows": []})
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        kernels.write_json(out, {"rows": [1]})
    result = {"rows": [row("1x2x2x8", "forward", ours=1.0) | {"input_bytes": 9}]}
    with pytest.raises(OSError, match="disk full"):
        kernels.draw({"device": "", "dtype": "", "activation": "", **result}, out)
    assert json.loads(out.read_text()) == {"rows": []}
    assert list(tmp_path.iterdir()) == [out]
