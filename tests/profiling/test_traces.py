"""Where the time goes, the peak of memory, and trace files that TensorBoard's plugin reads."""

import copy
import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tokenconv import insert_
from tokenconv.profiling.measurement import Mode, Step
from tokenconv.profiling.traces import Category, Profiled, _annotated, _Classifier, profile_step

CPU = torch.device("cpu")
MIB = 2**20
TRANSFORMER = (Category.ATTENTION, Category.MLP_MATMUL, Category.NORM, Category.ACTIVATION)


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def profiled(model: nn.Module, batch: Tensor, mode: Mode, trace_dir: Path | None = None):
    step = Step(model, batch, mode)
    step()
    return profile_step(step, CPU, trace_dir)


# --- time, of models with one heavy part ---


@pytest.mark.parametrize(("mode", "batch_size"), [("infer", 16), ("train", 1)])
def test_a_depthwise_convolution_is_found(mode: Mode, batch_size: int):
    model = nn.Sequential(nn.Conv2d(64, 64, 5, padding=2, groups=64))
    share = profiled(model, images(batch_size, 64, 64, 64), mode).time_share
    assert share[Category.DEPTHWISE] > 0.5
    assert share[Category.MLP_MATMUL] == share[Category.ATTENTION] == 0


@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize(
    ("dim", "groups"), [(8, 1), (8, 2), (1, 1)], ids=["dense", "grouped", "one channel"]
)
def test_another_convolution_is_not_depthwise(dim: int, groups: int, mode: Mode):
    model = nn.Sequential(nn.Conv2d(dim, 8, 3, padding=1, groups=groups))
    share = profiled(model, images(8, dim, 16, 16), mode).time_share
    assert share[Category.DEPTHWISE] == 0


class Transposes(nn.Module):
    """Moves its input about and does nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = x.transpose(1, -1).contiguous()
        return x


def test_layout_copies_are_found():
    share = profiled(Transposes(), images(1, 64, 192, 192), "infer").time_share
    assert share[Category.LAYOUT] > 0.5


class Planted(nn.Module):
    """One linear, under a name that says what it is for."""

    def __init__(self, name: str, linear: nn.Module):
        super().__init__()
        self.name = name
        self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.name)(x)


@pytest.mark.parametrize(
    ("name", "category"),
    [("mlp", Category.MLP_MATMUL), ("attn", Category.ATTENTION), ("head", Category.OTHER)],
)
def test_matmuls_belong_to_the_module_they_run_in(name: str, category: Category):
    model = Planted(name, nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)))
    share = profiled(model, images(1024, 512), "infer").time_share
    assert share[category] > 0.5
    for other in {Category.MLP_MATMUL, Category.ATTENTION} - {category}:
        assert share[other] == 0


@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize(
    ("layer", "category"),
    [
        (nn.LayerNorm(256), Category.NORM),
        (nn.BatchNorm1d(4096), Category.NORM),
        (nn.GELU(), Category.ACTIVATION),
    ],
    ids=["layer_norm", "batch_norm", "gelu"],
)
def test_norms_and_activations_are_found(layer: nn.Module, category: Category, mode: Mode):
    """Also inside an MLP, whose matmuls alone count as the MLP's."""
    model = Planted("mlp", nn.Sequential(nn.Linear(256, 256, bias=False), layer))
    share = profiled(model, images(1, 4096, 256), mode).time_share
    assert share[category] > 0.02
    assert share[Category.MLP_MATMUL] > 0.02


# --- classification, operator by operator ---


class Mixed(nn.Module):
    """The width of a linear says whose matmul it is: 24 the stem's, 48 the MLP's, else 12."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.stem = nn.Linear(24, 12)
        self.attn = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        self.mlp = nn.Sequential(nn.Linear(12, 48), nn.GELU(), nn.Linear(48, 12))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2).transpose(1, 2)  # (B, 24, H, W) -> (B, H*W, 24)
        return self.mlp(self.norm(self.attn(self.stem(tokens.contiguous()))))


@pytest.fixture(scope="module")
def operators() -> list[tuple[str, set[int], Category, bool]]:
    """Name, sizes, category and whether backward, of every operator of a training step."""
    torch.manual_seed(0)
    model, batch = Mixed(), images(2, 24, 5, 5)
    model(batch).square().mean().backward()
    with (
        _annotated(model),
        profile(activities=[ProfilerActivity.CPU], record_shapes=True) as run,
    ):
        model(batch).square().mean().backward()
    events: list[Any] = [e for e in run.events() or () if e.device_type == DeviceType.CPU]
    classifier = _Classifier(events)
    return [
        (
            event.name,
            {size for shape in event.input_shapes or () for size in shape},
            classifier.category(event),
            _in_backward(event),
        )
        for event in events
    ]


def _in_backward(event: Any) -> bool:
    while event is not None and not event.name.startswith("autograd::engine"):
        event = event.cpu_parent
    return event is not None


def _expected_by_width(sizes: set[int]) -> Category:
    if 48 in sizes:
        return Category.MLP_MATMUL
    return Category.OTHER if 24 in sizes else Category.ATTENTION


@pytest.mark.parametrize(
    ("name", "backward", "counts"),
    [
        ("aten::addmm", False, {"MLP matmul": 2, "attention": 1, "other": 1}),
        ("aten::mm", True, {"MLP matmul": 4, "attention": 2, "other": 2}),
    ],
    ids=["forward", "backward"],
)
def test_every_matmul_is_classified(
    operators: list[tuple[str, set[int], Category, bool]],
    name: str,
    backward: bool,
    counts: dict[str, int],
):
    found: dict[str, int] = {}
    for operator, sizes, category, is_backward in operators:
        if operator == name and is_backward == backward:
            assert category == _expected_by_width(sizes), sizes
            found[category.value] = found.get(category.value, 0) + 1
    assert found == counts


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("aten::conv2d", Category.DEPTHWISE),
        ("aten::convolution_backward", Category.DEPTHWISE),
        ("aten::native_layer_norm", Category.NORM),
        ("aten::native_layer_norm_backward", Category.NORM),
        ("aten::gelu", Category.ACTIVATION),
        ("aten::gelu_backward", Category.ACTIVATION),
        ("aten::clone", Category.LAYOUT),
        ("aten::mean", Category.OTHER),
        ("tokenconv: attention: attn", Category.ATTENTION),
        ("tokenconv: MLP matmul: mlp", Category.OTHER),  # no matmul itself
    ],
)
def test_operators_are_known_by_name(
    operators: list[tuple[str, set[int], Category, bool]], name: str, category: Category
):
    found = {by for operator, _, by, _ in operators if operator == name}
    assert found == {category}


def test_autograd_nodes_belong_to_what_they_undo(
    operators: list[tuple[str, set[int], Category, bool]],
):
    engine = "autograd::engine::evaluate_function: "
    nodes = [(n.removeprefix(engine), by) for n, _, by, _ in operators if n.startswith(engine)]
    assert ("ConvolutionBackward0", Category.DEPTHWISE) in nodes
    assert ("GeluBackward0", Category.ACTIVATION) in nodes
    assert ("NativeLayerNormBackward0", Category.NORM) in nodes
    linears = [category for name, category in nodes if name == "AddmmBackward0"]
    assert sorted(linears) == ["MLP matmul", "MLP matmul", "attention", "other"]


def test_hooks_are_gone_afterwards():
    model = timm.create_model("test_vit", img_size=32, depth=1)
    with _annotated(model):
        assert any(module._forward_hooks for module in model.modules())
    profiled(model, images(1, 3, 32, 32), "infer")
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


# --- memory ---


class Allocates(nn.Module):
    """Takes ``count`` buffers of 64 MiB, either one after the other or all at once."""

    def __init__(self, count: int, *, at_once: bool):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.count, self.at_once = count, at_once

    def forward(self, x: Tensor) -> Tensor:
        held = []
        for _ in range(self.count):
            held.append(torch.zeros(16 * MIB))
            x = x * self.scale + held[-1][0]
            if not self.at_once:
                held.clear()
        return x


@pytest.mark.parametrize(
    ("count", "at_once", "expected_mib"),
    [(1, False, 64), (3, False, 64), (2, True, 128)],
    ids=["one", "one after the other", "two at once"],
)
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_peak_of_memory_is_that_of_a_known_buffer(
    count: int, at_once: bool, expected_mib: int, mode: Mode
):
    found = profiled(Allocates(count, at_once=at_once), images(1, 8), mode)
    assert found.transient_bytes / MIB == pytest.approx(expected_mib, rel=0.02)


# --- a whole ViT, with traces ---


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces") / "mix_ffn"


@pytest.fixture(scope="module")
def vit(traces: Path) -> dict[tuple[str, Mode], Profiled]:
    """A ViT in both modes, as it is and with mix_ffn; the latter leaves its traces."""
    torch.manual_seed(0)
    plain = timm.create_model("test_vit", img_size=96, depth=2)
    hybrid = insert_(copy.deepcopy(plain), "mix_ffn")
    batch = images(2, 3, 96, 96)
    modes: tuple[Mode, Mode] = ("infer", "train")
    return {("plain", mode): profiled(plain, batch, mode) for mode in modes} | {
        ("hybrid", mode): profiled(hybrid, batch, mode, traces) for mode in modes
    }


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_the_parts_of_a_vit_are_found(vit: dict[tuple[str, Mode], Profiled], mode: Mode):
    plain, hybrid = vit["plain", mode].time_share, vit["hybrid", mode].time_share
    for share in (plain, hybrid):
        assert list(share) == [category.value for category in Category]
        assert sum(share.values()) == pytest.approx(1)
        assert all(share[category] > 0 for category in TRANSFORMER)
    assert plain[Category.DEPTHWISE] == 0
    assert hybrid[Category.DEPTHWISE] > 0


def trace_of(folder: Path, mode: Mode) -> list[dict[str, Any]]:
    (path,) = folder.glob(f"{mode}.*.pt.trace.json.gz")
    with gzip.open(path) as file:
        return json.load(file)["traceEvents"]


@pytest.mark.usefixtures("vit")
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_trace_is_gzipped_json_with_our_ranges(traces: Path, mode: Mode):
    assert len(list(traces.iterdir())) == 2, "one per mode"
    names = [event.get("name", "") for event in trace_of(traces, mode)]
    ranges = {name for name in names if name.startswith("tokenconv: ")}
    for block in range(2):
        assert f"tokenconv: attention: blocks.{block}.attn" in ranges
        assert f"tokenconv: MLP matmul: blocks.{block}.mlp" in ranges
        assert f"tokenconv: depthwise convolution: blocks.{block}.mlp.act.before" in ranges
    assert any(name.startswith("ProfilerStep#") for name in names)
    assert "aten::addmm" in names
    backward = [name for name in names if name.startswith("autograd::engine")]
    assert bool(backward) is (mode == "train")


READ_WITH_PLUGIN = """
import json, sys
from torch_tb_profiler.io import Cache
from torch_tb_profiler.profiler.loader import RunLoader

if __name__ == "__main__":  # the loader spawns a process per trace
    with Cache() as cache:
        run = RunLoader("run", sys.argv[1], cache).load()
    told = {}
    for worker in run.workers:
        (found,) = run.get_profiles(worker=worker)
        told[worker] = {
            "views": [view.display_name for view in found.views],
            "steps": len(found.overview["steps"]["rows"]),
            "operators": [row["name"] for row in found.operation_table_by_name["data"]],
        }
    print(json.dumps(told))
"""


def run_in_its_own_group(command: list[str], timeout: float) -> str:
    """Standard output of a command; nothing that it started outlives this."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, err
    return out


@pytest.mark.usefixtures("vit")
def test_tensorboard_plugin_reads_the_traces(traces: Path, tmp_path: Path):
    script = tmp_path / "read_with_plugin.py"
    script.write_text(READ_WITH_PLUGIN)
    told = json.loads(run_in_its_own_group([sys.executable, str(script), str(traces)], 240))
    assert set(told) == {"infer", "train"}
    for mode, found in told.items():
        assert {"Overview", "Operator", "Trace", "Memory"} <= set(found["views"])
        assert found["steps"] == 2, "as many as were profiled"
        assert {"aten::addmm", "aten::native_layer_norm", "aten::gelu"} <= set(found["operators"])
        assert ("aten::convolution_backward" in found["operators"]) is (mode == "train")


def test_no_trace_is_kept_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert profiled(nn.Conv2d(3, 3, 1), images(1, 3, 4, 4), "infer").transient_bytes > 0
    assert not list(tmp_path.iterdir())
