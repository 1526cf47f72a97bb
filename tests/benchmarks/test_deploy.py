"""Models in and out of Python, timed beside each other."""

import json

import pytest
import torch

SMALL = ["--quick", "--threads", "1", "--allocator", "system", "--threads-of-arms", "1"]


@pytest.fixture
def deploy(load_benchmark, monkeypatch):
    return load_benchmark("deploy")


@pytest.mark.compile
@pytest.mark.slow
def test_it_writes_what_it_prints(deploy, tmp_path, capsys):
    out = tmp_path / "deploy.json"
    words = [*SMALL, "--models", "vit_tiny_patch16_224+mix_ffn", "--out", str(out)]
    assert deploy.main(words) == 0
    printed, (row,) = capsys.readouterr().out, json.loads(out.read_text())["rows"]
    assert [*row["latency_ms"]] == [*deploy.ARMS]
    assert [*row["ratio"]] == [f"{one}/{other}" for one, other in deploy.PAIRS]
    assert 0 < row["difference"]["float"] < 1e-4 < row["difference"]["int8"] < 0.1
    assert [*row["peak_bytes"]] == [*deploy.PROCESSES]
    assert row["peak_bytes"]["onnx"] < row["peak_bytes"]["eager"]  # it needs no torch
    assert row["file_bytes"]["onnx_int8"] < 0.4 * row["file_bytes"]["onnx"]
    assert f"{row['latency_ms']['onnx']['median']:.2f}" in printed


def case(deploy, **changed):
    images = torch.rand(1, 3)
    arms = {name: lambda images: 2 * images for name in ("eager", "onnx", "onnx_int8")} | changed
    return deploy.Case("a model", 1, arms, {}, images)


def test_arms_that_compute_something_else_are_not_timed(deploy):
    assert case(deploy).check() == {"float": 0, "int8": 0}
    rounded = case(deploy, onnx_int8=lambda images: 2.01 * images).check()
    assert 0.004 < rounded["int8"] < 0.006
    for wrong in ({"onnx": lambda i: 2.01 * i}, {"onnx_int8": lambda i: 4 * i}):
        with pytest.raises(ValueError, match=r"onnx.* differs from eager by .* not timed"):
            case(deploy, **wrong).check()


def test_a_peak_is_that_of_the_process_itself(deploy):
    """Not that of this one, which holds more."""
    little, much = (
        deploy.peak_of(f"import sys; held = b'1' * {size}", "", 1) for size in (1, 50 * 2**20)
    )
    assert little < 40 * 2**20
    # The kernel counts resident pages by the batch: a quarter of a MiB may be missing.
    assert 49 * 2**20 < much - little < 55 * 2**20


def test_models_are_as_they_are_said_to_be(deploy):
    model = deploy.make("mobilenetv1_100")
    with torch.no_grad():
        out = model(deploy.photographs(model, 2))
    assert 1e-3 < out.std() < 1e3
    assert not model.training
    names = [name for name in deploy.MODELS if "+" in name]
    assert names == ["vit_tiny_patch16_224+mix_ffn"]


def test_other_devices_are_refused(deploy, capsys):
    with pytest.raises(SystemExit):
        deploy.parse(["--dtype", "bfloat16"])
    assert "on the CPU, in float32" in capsys.readouterr().err
