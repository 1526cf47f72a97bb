"""``list``, ``plan`` and ``compare``: what they print and what they leave in the folder."""

import contextlib
import copy
import gzip
import io
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from tokenconv import BLOCKS, insert_, list_blocks, plan
from tokenconv.blocks.official import SOURCES
from tokenconv.cli import commands, main
from tokenconv.cli.arms import build_arms
from tokenconv.cli.inputs import build_model, load_images
from tokenconv.errors import MeasurementError
from tokenconv.profiling import read_comparison, report
from tokenconv.profiling.results import SCHEMA_VERSION

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def _allocator_as_it_is() -> Iterator[None]:
    """The command changes the allocator of the whole process for good: not of this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "steady_allocator", lambda: "not touched")
        yield


@dataclass(frozen=True)
class Run:
    """One ``compare``, and all that came of it."""

    words: list[str]
    status: int
    out: str
    err: str
    folder: Path

    @property
    def content(self) -> dict[str, Any]:
        return json.loads((self.folder / "compare.json").read_text())

    def arm(self, name: str) -> dict[str, Any]:
        (arm,) = (arm for arm in self.content["arms"] if arm["name"] == name)
        return arm


def compare(folder: Path, options: str) -> Run:
    words = ["compare", *shlex.split(options), "--out", str(folder)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(words)
    return Run(words, status, out.getvalue(), err.getvalue(), folder)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A ViT in both modes with traces, on scikit-learn's photographs."""
    options = "test_vit --block mix_ffn --batch-size 2 --repeats 2 --trace --trace-diff"
    return compare(tmp_path_factory.mktemp("vit") / "deep" / "report", options)


@pytest.fixture(scope="module")
def pvt(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A PVTv2, which has convolutions of its own."""
    options = "pvt_v2_b0 --block mix_ffn --img-size 64 --batch-size 1 --repeats 1 --mode infer"
    return compare(tmp_path_factory.mktemp("pvt") / "report", options)


@pytest.fixture(params=["vit", "pvt"])
def run(request: pytest.FixtureRequest) -> Run:
    return request.getfixturevalue(request.param)


# --- compare.json ---


def test_compare_succeeds(run: Run):
    assert run.status == 0, run.err
    assert "error" not in run.err
    assert "measuring: 100%" in run.err


def test_json_tells_where_and_with_what(run: Run):
    content = run.content
    assert content["schema_version"] == SCHEMA_VERSION
    assert f"({torch.backends.cpu.get_cpu_capability()})" in content["device"]
    assert content["dtype"] == "float32"
    assert content["threads"] == 1
    assert content["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert content["versions"]["timm"] == timm.__version__
    about = content["about"]
    assert (about["weights"], about["allocator"]) == ("random", "not touched")
    assert shlex.split(about["command"]) == ["tokenconv", *run.words]
    assert about["model"] == run.words[1]


def test_arms_of_a_vit(vit: Run):
    content = vit.content
    assert [arm["name"] for arm in content["arms"]] == ["baseline", "mix_ffn"]
    assert (content["baseline"], content["reference"]) == ("baseline", "baseline")
    assert (content["batch_size"], content["input_size"]) == (2, [3, 160, 160])
    assert [list(arm["modes"]) for arm in content["arms"]] == [["infer", "train"]] * 2


def test_arms_of_a_pvt(pvt: Run):
    content = pvt.content
    assert [arm["name"] for arm in content["arms"]] == ["attention_only", "original", "mix_ffn"]
    assert (content["baseline"], content["reference"]) == ("attention_only", "original")
    assert (content["batch_size"], content["input_size"]) == (1, [3, 64, 64])
    assert [list(arm["modes"]) for arm in content["arms"]] == [["infer"]] * 3


def test_every_arm_has_its_figures(run: Run):
    content = run.content
    for arm in content["arms"]:
        assert arm["macs"] == arm["macs_by_flop_counter"] > 0
        for mode, figures in arm["modes"].items():
            latency = figures["latency_ms"]
            assert 0 < latency["q25"] <= latency["median"] <= latency["q75"]
            assert latency["iqr"] == pytest.approx(latency["q75"] - latency["q25"])
            throughput = 1000 * content["batch_size"] / latency["median"]
            assert figures["images_per_s"] == pytest.approx(throughput)
            weights_mib = 4 * arm["params"] / 2**20
            memory = figures["memory"]
            assert memory["parameters"] == weights_mib * 2**20
            assert memory["forward_peak"] > 0
            assert bool(memory["saved"]) is bool(memory["gradients"]) is (mode == "train")
            assert sum(spent["ms"] for spent in figures["time"]) > 0


def test_the_baseline_is_one_times_itself(run: Run):
    content = run.content
    for found in run.arm(content["baseline"])["modes"].values():
        assert found["ratio"] == {
            "median": 1,
            "iqr": 0,
            "q25": 1,
            "q75": 1,
            "low": 1,
            "high": 1,
            "verdict": "no difference shown",
        }
        assert found["memory_ratio"] == 1


def num_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_params_are_those_of_the_models(vit: Run, pvt: Run):
    plain = timm.create_model("test_vit")
    assert vit.arm("baseline")["params"] == num_params(plain)
    assert vit.arm("mix_ffn")["params"] == num_params(insert_(plain, "mix_ffn"))
    plain = timm.create_model("pvt_v2_b0")
    bare = insert_(copy.deepcopy(plain), "none", allow_change=True)
    assert pvt.arm("attention_only")["params"] == num_params(bare)
    assert pvt.arm("original")["params"] == num_params(plain)
    assert pvt.arm("mix_ffn")["params"] == num_params(insert_(plain, "mix_ffn"))


def test_insertion_changes_no_output(vit: Run, pvt: Run):
    assert vit.arm("mix_ffn")["max_abs_diff_at_insertion"] == 0
    assert pvt.arm("mix_ffn")["max_abs_diff_at_insertion"] == 0
    assert pvt.arm("original")["max_abs_diff_at_insertion"] == 0
    assert pvt.arm("attention_only")["max_abs_diff_at_insertion"] > 0


def test_macs_grow_by_the_convolution(vit: Run, pvt: Run):
    added = plan(timm.create_model("test_vit"), "mix_ffn").added_macs
    assert vit.arm("mix_ffn")["macs"] - vit.arm("baseline")["macs"] == added > 0
    assert pvt.arm("attention_only")["macs"] < pvt.arm("original")["macs"]
    assert pvt.arm("mix_ffn")["macs"] == pvt.arm("original")["macs"], "kernels are added up"


def test_time_goes_to_a_depthwise_convolution_where_there_is_one(vit: Run, pvt: Run):
    expected = {"baseline": 0, "mix_ffn": 1, "attention_only": 0, "original": 1}
    for run in (vit, pvt):
        for arm in read_comparison(run.folder / "compare.json").arms:
            for figures in arm.modes.values():
                share = figures.time_share
                assert (share["depthwise convolution"] > 0) == expected[arm.name]
                assert share["attention"] > 0
                assert share["MLP matmul"] > 0


# --- the other files, and what is printed ---


def test_report_and_figure_are_written(run: Run):
    report = (run.folder / "report.md").read_text()
    for arm in run.content["arms"]:
        assert f" {arm['name']} |" in report
    assert run.content["about"]["command"] in report
    assert f"- device: {run.content['device']}, 1 thread\n" in report
    assert run.content["versions"]["torch"] in report
    with Image.open(run.folder / "compare.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 200


def test_traces_are_kept_only_when_asked_for(vit: Run, pvt: Run):
    files = {"compare.json", "report.md", "report.html", "compare.png", "compare.svg"}
    assert {path.name for path in pvt.folder.iterdir()} == files
    assert {path.name for path in vit.folder.iterdir()} == {*files, "traces"}


@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize("arm", ["baseline", "mix_ffn"])
def test_every_arm_leaves_a_trace_per_mode(vit: Run, arm: str, mode: str):
    folder = vit.folder / "traces" / arm
    assert len(list(folder.iterdir())) == 2
    (path,) = folder.glob(f"{mode}.*.pt.trace.json.gz")
    with gzip.open(path) as file:
        names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
    assert "tokenconv: attention: blocks.0.attn" in names
    assert "tokenconv: MLP matmul: blocks.5.mlp" in names
    ours = any(name.startswith("tokenconv: depthwise convolution: ") for name in names)
    assert ours is (arm == "mix_ffn")


def test_nothing_is_left_beside_the_report(run: Run):
    assert list(run.folder.parent.iterdir()) == [run.folder]


def test_compare_prints_the_table_and_the_files(run: Run):
    table, _, rest = run.out.partition("\n\n")
    files = rest.rpartition("\n\n")[2]
    if "--trace-diff" in run.words:
        assert "| mode | arm | operator |" in rest
        assert "| infer | mix_ffn | aten::" in rest
    lines = [line for line in table.splitlines() if not line.startswith("warning: ")]
    rows = [line.split()[:2] for line in lines[1:]]
    arms = run.content["arms"]
    assert rows == [[mode, arm["name"]] for mode in arms[0]["modes"] for arm in arms]
    for name in ("report.html", "report.md", "compare.png", "compare.json"):
        assert str(run.folder / name) in files
    assert ("tensorboard --logdir" in files) is ("--trace" in run.words)


@pytest.mark.parametrize(("factor", "status"), [(1.0, 0), (1e-6, 3)])
def test_against_an_earlier_run(vit: Run, tmp_path: Path, factor: float, status: int):
    """Once against what it was, and once as if it had needed a millionth of the memory."""
    earlier = copy.deepcopy(vit.content)
    for arm in earlier["arms"]:
        for mode in arm["modes"]:
            arm["modes"][mode]["memory_ratio"] *= factor
    (tmp_path / "earlier.json").write_text(json.dumps(earlier))
    options = "test_vit --block mix_ffn --batch-size 2 --repeats 2"
    run = compare(
        tmp_path / "report",
        f"{options} --against {tmp_path / 'earlier.json'} --fail-if memory>1000",
    )
    assert run.status == status, run.err
    assert run.out.count("REGRESSION" if status else "no regression shown") == 2
    assert "note: " not in run.out


def test_other_conditions_are_told_and_few_rounds_judge_no_latency(vit: Run, tmp_path: Path):
    earlier = vit.content | {"device": "a Cray", "threads": 64}
    (tmp_path / "earlier.json").write_text(json.dumps(earlier))
    options = (
        f"test_vit --block mix_ffn --batch-size 2 --repeats 2 --against {tmp_path}/earlier.json"
    )
    run = compare(tmp_path / "report", options)
    assert run.status == 1
    assert "cannot judge infer of mix_ffn by 2 rounds: measure at least 10, then and now" in run.err
    assert f"note: device: a Cray then, {vit.content['device']} now" in run.out
    assert "note: threads: 64 then, 1 now" in run.out
    assert (run.folder / "report.html").is_file()


def test_what_was_measured_is_kept_where_it_cannot_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*args: Any) -> None:
        raise OSError("No space left on device")

    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.html").write_text("of an earlier run")
    monkeypatch.setattr(report, "write_figures", fail)
    options = "test_vit --block mix_ffn --img-size 32 --batch-size 1 --repeats 1 --trace"
    run = compare(tmp_path / "report", options)
    assert run.status == 1
    assert "cannot write a report to" in run.err
    assert "No space left on device" in run.err
    assert [arm.name for arm in read_comparison(run.folder / "compare.json").arms] == [
        "baseline", "mix_ffn",
    ]  # fmt: skip
    assert list(run.folder.glob("traces/*/*.pt.trace.json.gz"))
    assert not (run.folder / "report.html").exists(), "it shows other figures"


def test_a_missing_earlier_run_is_told_before_measuring(tmp_path: Path):
    run = compare(tmp_path / "report", "test_vit --block mix_ffn --against nowhere.json")
    assert run.status == 1
    assert "cannot read a comparison from nowhere.json" in run.err
    assert "measuring" not in run.err
    assert not run.folder.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--fail-if speed>1", "expected 'ratio>1.05' or 'memory>1.1', got 'speed>1'"),
        ("--precision 2", "expected a number between 0 and 1, got 2"),
    ],
)
def test_rules_and_precisions_that_are_none(
    options: str, message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stop:
        main(["compare", "test_vit", "--block", "mix_ffn", *options.split()])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


# --- options ---


def module(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """``python -m tokenconv`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "tokenconv", *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_module_runs_as_a_command(tmp_path: Path):
    """And changes the allocator, which the other tests leave alone."""
    words = "compare test_vit --block mix_ffn --img-size 32 --batch-size 1 --repeats 1 --mode infer"
    done = module(tmp_path, *words.split(), "--out", "report")
    assert done.returncode == 0, done.stderr
    assert "report/report.md" in done.stdout
    lines = done.stderr.replace("\r", "\n").splitlines()
    assert all(line.startswith("measuring: ") for line in lines if line), "no library's chatter"
    content = json.loads((tmp_path / "report" / "compare.json").read_text())
    glibc = platform.libc_ver()[0] == "glibc"
    keeps = "glibc, keeps freed memory" if glibc else "as the system has it"
    assert content["about"]["allocator"] == keeps


@pytest.mark.parametrize("words", [["list"], ["list", "--markdown"]])
def test_a_reader_that_has_seen_enough_is_no_error(words: list[str]):
    with subprocess.Popen(
        [sys.executable, "-m", "tokenconv", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # as head does
        assert (process.wait(240), process.stderr.read()) == (141, "")


def test_module_passes_the_exit_status_on(tmp_path: Path):
    done = module(tmp_path, "plan", "test_vit", "--block", "mix_ff")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("tokenconv: error: unknown block 'mix_ff': did you mean mix_ffn")
    assert done.stderr.count("\n") == 1


def photographs(folder: Path, *, suffix: str = ".png") -> list[Image.Image]:
    """Two photographs of different size; ``b`` is written first."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    made = []
    for name, (height, width) in (("b", (120, 90)), ("a", (75, 140))):
        image = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        image.save(folder / f"{name}{suffix}")
        made.append(Image.open(folder / f"{name}{suffix}").convert("RGB"))
    (folder / "notes.txt").write_text("no photograph")
    return made[::-1]


def test_compare_on_own_photographs_of_another_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    photographs(tmp_path / "images", suffix=".JPG")
    batches: list[Tensor] = []
    measure = commands.compare

    def spy(arms: dict[str, nn.Module], images: Tensor, **kwargs: Any):
        batches.append(images)
        return measure(arms, images, **kwargs)

    monkeypatch.setattr(commands, "compare", spy)
    run = compare(
        tmp_path / "report",
        "test_vit --block mix_ffn --img-size 64 96 --batch-size 3 --repeats 1 "
        f"--mode infer --dtype bfloat16 --images {shlex.quote(str(tmp_path / 'images'))}",
    )
    assert run.status == 0, run.err
    assert run.content["input_size"] == [3, 64, 96]
    assert run.content["dtype"] == "bfloat16"
    assert list(run.arm("mix_ffn")["modes"]) == ["infer"]
    (batch,) = batches
    expected = load_images(build_model("test_vit", (64, 96)), tmp_path / "images", 3)
    assert expected.shape == (3, 3, 64, 96)
    assert torch.equal(batch, expected.bfloat16())


@pytest.mark.parametrize("suffix", [".png", ".jpeg"])
def test_photographs_go_through_the_models_own_transform(tmp_path: Path, suffix: str):
    """In order of name, and again from the first until the batch is full."""
    a, b = photographs(tmp_path / "images", suffix=suffix)
    model = timm.create_model("test_vit")
    transform: Any = create_transform(**resolve_model_data_config(model), is_training=False)
    batch = load_images(model, tmp_path / "images", 3)
    assert torch.equal(batch, torch.stack([transform(image) for image in (a, b, a)]))
    assert not torch.equal(batch[0], batch[1])
    assert len(load_images(model, tmp_path / "images", 1)) == 1


def test_default_photographs_are_two():
    batch = load_images(timm.create_model("test_vit"), None, 3)
    assert batch.shape == (3, 3, 160, 160)
    assert torch.equal(batch[0], batch[2])
    assert not torch.equal(batch[0], batch[1])


def test_options_reach_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[dict[str, Any]] = []

    def stop(arms: dict[str, nn.Module], images: Tensor, **kwargs: Any):
        kernels = {
            name: {m.kernel_size for m in arm.modules() if type(m).__name__ == "DWConv"}
            for name, arm in arms.items()
        }
        asked.append({"kernels": kernels, "images": images, **kwargs})
        raise MeasurementError("enough")

    monkeypatch.setattr(commands, "compare", stop)
    run = compare(
        tmp_path / "report",
        "test_vit --block mix_ffn --block mix_ffn --kernel-size 5 --repeats 7 "
        "--mode train --compile --trace --dtype bfloat16 --batch-size 5 "
        "--memory-format channels_last",
    )
    assert (run.status, run.err) == (1, "tokenconv: error: enough\n")
    (found,) = asked
    assert found["kernels"] == {"baseline": set(), "mix_ffn": {5}}
    assert (found["images"].shape, found["images"].dtype) == ((5, 3, 160, 160), torch.bfloat16)
    assert (found["repeats"], found["mode"]) == (7, "train")
    assert found["compiled"] == {"baseline", "mix_ffn"}
    assert found["images"].is_contiguous(memory_format=torch.channels_last)
    assert found["reference"] == "baseline"
    assert found["trace_dir"].name == "traces"
    assert not (tmp_path / "report").exists()


def test_an_arm_that_fails_is_told_and_the_others_are_measured(tmp_path, monkeypatch, capsys):
    def with_one_that_fails(*args: Any, **kwargs: Any) -> Any:
        built = build_arms(*args, **kwargs)
        built.models["peg"].register_forward_hook(lambda module, args, out: out / 0)
        return built

    monkeypatch.setattr("tokenconv.cli.commands.build_arms", with_one_that_fails)
    words = ["compare", "test_vit", "--block", "mix_ffn", "--block", "peg", "--mode", "infer"]
    assert main([*words, "--repeats", "2", "--out", str(tmp_path)]) == 1
    assert "tokenconv: error: infer of peg failed: " in capsys.readouterr().err
    arms = json.loads((tmp_path / "compare.json").read_text())["arms"]
    assert [arm["name"] for arm in arms if arm["modes"]] == ["baseline", "mix_ffn"]


def test_arms_have_the_same_weights():
    model = build_model("pvt_v2_b0", (64, 64))
    built = build_arms(model, ["mix_ffn", "none"], image_size=(64, 64))
    arms, reference = built.models, built.reference
    assert list(arms) == ["attention_only", "original", "mix_ffn"]
    assert reference == "original"
    own = dict(model.named_parameters())
    for arm in arms.values():
        shared = {name: p for name, p in arm.named_parameters() if name in own}
        assert len(shared) > len(own) / 2
        assert all(torch.equal(p, own[name]) for name, p in shared.items())


def test_a_second_run_replaces_the_report(tmp_path: Path):
    options = "test_vit --block mix_ffn --img-size 32 --batch-size 1 --repeats 1 --mode infer"
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "report.md").write_text("old")
    run = compare(folder, options)
    assert run.status == 0, run.err
    assert (folder / "notes.txt").read_text() == "mine"
    assert "mix_ffn" in (folder / "report.md").read_text()
    assert sorted(path.name for path in folder.iterdir()) == [
        "compare.json", "compare.png", "compare.svg", "notes.txt", "report.html", "report.md",
    ]  # fmt: skip


def test_interrupting_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(arms: dict[str, nn.Module], images: Tensor, *, trace_dir: Path, **kwargs: Any):
        trace_dir.mkdir()
        (trace_dir / "half.gz").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "compare", interrupted)
    run = compare(tmp_path / "report", "test_vit --block mix_ffn --trace")
    assert run.status == 130
    assert run.err == "tokenconv: interrupted, nothing was written\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.compile
@pytest.mark.slow
def test_compare_compiled(tmp_path: Path):
    torch._dynamo.utils.counters.clear()
    run = compare(
        tmp_path / "report",
        "test_vit --block mix_ffn --batch-size 1 --repeats 1 --mode infer --compile both",
    )
    assert run.status == 0, run.err
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "one for each arm"
    assert {arm["name"]: arm["compiled"] for arm in run.content["arms"]} == {
        "baseline": False, "mix_ffn": False, "baseline_compiled": True, "mix_ffn_compiled": True,
    }  # fmt: skip
    assert run.arm("mix_ffn")["max_abs_diff_at_insertion"] == 0
    assert run.arm("mix_ffn_compiled")["max_abs_diff_at_insertion"] < 1e-5
    assert run.arm("mix_ffn_compiled")["description"] == "mix_ffn through torch.compile"
    report = (run.folder / "report.md").read_text()
    assert "- compiled: baseline_compiled, mix_ffn_compiled" in report


# --- list and plan ---


@pytest.mark.parametrize("pattern", [None, "*ffn*", "nothing*"])
def test_list_prints_a_line_per_block(capsys: pytest.CaptureFixture[str], pattern: str | None):
    assert main(["list", *([pattern] if pattern else [])]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = list_blocks(pattern or "*")
    assert [line.split()[0] for line in lines] == names
    for line, name in zip(lines, names, strict=True):
        info = BLOCKS[name]
        assert {info.group, info.paper} <= set(line.split())
        assert info.prefix_policy in line
    assert bool(names) is (pattern != "nothing*")


@pytest.mark.parametrize("pattern", [None, "*ffn*", "nothing*"])
def test_list_as_json_says_all_that_is_known(
    capsys: pytest.CaptureFixture[str], pattern: str | None
):
    assert main(["list", *([pattern] if pattern else []), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list_blocks(pattern or "*")
    for row in rows:
        info = BLOCKS[row["name"]]
        assert row["sites"] == list(info.sites)
        assert sorted(row["sources"]) == sorted(
            source
            for source, blocks in SOURCES.items()
            if row["name"] in blocks
            for paper in info.papers
            if paper.source == source
        )
        assert row["paper"] == f"https://arxiv.org/abs/{row['papers'][0]['arxiv']}"
        for field in ("group", "prefix_policy", "params", "macs", "formula", "kind", "parity_test"):
            assert row[field] == getattr(info, field)


def test_the_page_of_blocks_is_the_one_that_is_kept(capsys: pytest.CaptureFixture[str]):
    assert main(["list", "--markdown"]) == 0
    page = capsys.readouterr().out
    assert page == (ROOT / "BLOCKS.md").read_text(), "tokenconv list --markdown > BLOCKS.md"
    table = [line for line in page.splitlines() if line.startswith("| [")]
    assert len(table) == sum(len(info.papers) for info in BLOCKS.values())
    for link in re.findall(r"\]\((tests/[^)]+)\)", page):
        assert (ROOT / link).is_file()


def test_the_page_can_be_of_some_blocks(capsys: pytest.CaptureFixture[str]):
    assert main(["list", "mb*", "--markdown"]) == 0
    page = capsys.readouterr().out
    assert [line.split("`")[1] for line in page.splitlines() if line.startswith("| [")] == [
        "mbconv"
    ]
    assert "## Feed-forwards" not in page


def test_list_prints_one_thing_at_a_time(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["list", "--json", "--families"])
    assert stop.value.code == 2
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "size", "block", "kwargs"),
    [
        ("test_vit --block mix_ffn", None, "mix_ffn", {}),
        (
            "test_vit --block mix_ffn --kernel-size 5 --img-size 64 96",
            (64, 96),
            "mix_ffn",
            {"kernel_size": 5},
        ),
        ("pvt_v2_b0 --block rep_cpe", None, "rep_cpe", {}),
        ("pvt_v2_b0 --block none", None, "none", {}),
    ],
)
def test_plan_prints_the_plan(
    capsys: pytest.CaptureFixture[str],
    words: str,
    size: tuple[int, int] | None,
    block: str,
    kwargs: dict[str, int],
):
    assert main(["plan", *words.split()]) == 0
    options = {"img_size": size} if size else {}
    model = timm.create_model(words.split()[0], **options)
    assert capsys.readouterr().out == f"{plan(model, block, **kwargs)}\n"


@pytest.mark.parametrize("name", ["test_vit", "pvt_v2_b0"])
def test_plan_is_for_the_image_size_that_was_asked_for(
    capsys: pytest.CaptureFixture[str], name: str
):
    """Also where the model itself does not know its size, as PVTv2."""
    assert main(["plan", name, "--block", "mix_ffn", "--img-size", "64", "96"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(", one image of 3x64x96")
