"""Trace files: what is in them, and that TensorBoard's plugin shows every view of them."""

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import tokenconv as tc
from tokenconv.profiling.measurement import Mode, Step
from tokenconv.profiling.traces import profile_step, record_trace

CPU = torch.device("cpu")
MODES: tuple[Mode, Mode] = ("infer", "train")


def step_of(model: nn.Module, mode: Mode, size: int = 96) -> Step:
    step = Step(model, torch.randn(2, 3, size, size), mode)
    step()
    return step


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The traces of a ViT with mix_ffn, in both modes."""
    folder = tmp_path_factory.mktemp("traces") / "mix_ffn"
    torch.manual_seed(0)
    model = tc.insert_(timm.create_model("test_vit", img_size=96, depth=2), "mix_ffn")
    for mode in MODES:
        record_trace(step_of(model, mode), CPU, folder)
    return folder


def trace_of(folder: Path, mode: Mode) -> list[dict[str, Any]]:
    (path,) = folder.glob(f"{mode}.*.pt.trace.json.gz")
    with gzip.open(path) as file:
        return json.load(file)["traceEvents"]


@pytest.mark.parametrize("mode", MODES)
def test_trace_is_gzipped_json_with_a_range_per_part(traces: Path, mode: Mode):
    assert len(list(traces.iterdir())) == 2, "one per mode"
    events = trace_of(traces, mode)
    names = [event.get("name", "") for event in events]
    ranges = {name for name in names if name.startswith("tokenconv: ")}
    expected = {"tokenconv: forward"}
    for block in range(2):
        expected |= {
            f"tokenconv: block: blocks.{block}",
            f"tokenconv: attention: blocks.{block}.attn",
            f"tokenconv: MLP matmul: blocks.{block}.mlp",
            f"tokenconv: site: blocks.{block}.mlp.act.before",
            f"tokenconv: depthwise convolution: blocks.{block}.mlp.act.before",
        }
    if mode == "train":
        expected |= {"tokenconv: backward", "tokenconv: optimizer"}
    assert ranges == expected
    assert any(name.startswith("ProfilerStep#") for name in names)
    assert "aten::addmm" in names
    assert any(name.startswith("nn.Module: Attention") for name in names)
    backward = [name for name in names if name.startswith("autograd::engine")]
    assert bool(backward) is (mode == "train")


def test_ranges_are_nested_as_the_modules_are(traces: Path):
    events = [e for e in trace_of(traces, "infer") if e.get("ph") == "X"]

    def first(name: str) -> tuple[float, float]:
        (start, duration), *_ = sorted(
            (e["ts"], e["dur"]) for e in events if e["name"] == f"tokenconv: {name}"
        )
        return start, start + duration

    act = "blocks.0.mlp.act.before"
    chain = ["forward", "block: blocks.0", "MLP matmul: blocks.0.mlp", f"site: {act}"]
    chain.append(f"depthwise convolution: {act}")
    for outer, inner in zip(map(first, chain), map(first, chain[1:]), strict=False):
        assert outer[0] <= inner[0] < inner[1] <= outer[1]


# --- TensorBoard ---


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Plugin:
    """The running plugin, asked over loopback as its own page asks it."""

    def __init__(self, port: int):
        self.root = f"http://127.0.0.1:{port}/data/plugin/pytorch_profiler"

    def ask(self, route: str, **query: str) -> Any:
        query_string = "&".join(f"{key}={value}" for key, value in query.items())
        with urllib.request.urlopen(f"{self.root}/{route}?{query_string}", timeout=60) as answer:
            content = answer.read()
            if answer.headers.get("Content-Encoding") == "gzip":
                content = gzip.decompress(content)
            return json.loads(content)


@pytest.fixture(scope="module")
def plugin(traces: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    port = free_port()
    log = (tmp_path_factory.mktemp("tensorboard") / "log").open("w+")
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(traces.parent)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--load_fast", "false"]
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    asked = Plugin(port)
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                if asked.ask("runs")["runs"] and not asked.ask("runs")["loading"]:
                    break
            except OSError:
                pass
            assert process.poll() is None, log.seek(0) or log.read()
            assert time.monotonic() < deadline, log.seek(0) or log.read()
            time.sleep(0.5)
        yield asked
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


@pytest.mark.parametrize("mode", MODES)
def test_tensorboard_shows_every_view(plugin: Plugin, mode: Mode):
    (run,) = plugin.ask("runs")["runs"]
    assert set(plugin.ask("workers", run=run, view="Overview")) == set(MODES)
    views = plugin.ask("views", run=run)
    assert {"Overview", "Operator", "Trace", "Memory", "Module"} <= set(views)
    where = {"run": run, "worker": mode, "span": plugin.ask("spans", run=run, worker=mode)[0]}
    overview = plugin.ask("overview", **where)
    assert len(overview["steps"]["rows"]) == 2, "as many as were profiled"
    table = plugin.ask("operation/table", **where, group_by="Operation")
    operators = {row["name"] for row in table["data"]}
    assert {"aten::addmm", "aten::native_layer_norm", "aten::gelu"} <= operators
    assert ("aten::convolution_backward" in operators) is (mode == "train")
    names = {event.get("name") for event in plugin.ask("trace", **where)["traceEvents"]}
    assert "tokenconv: block: blocks.1" in names
    assert {"aten::addmm", "aten::gelu"} <= {
        row[0] for rows in plugin.ask("memory", **where)["rows"].values() for row in rows
    }
    modules = json.dumps(plugin.ask("module", **where))
    assert "VisionTransformer" in modules
    assert "DWConv" in modules


def test_no_trace_is_kept_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert profile_step(step_of(nn.Conv2d(3, 3, 1), "infer", 4), CPU).peaks.forward > 0
    assert not list(tmp_path.iterdir())
