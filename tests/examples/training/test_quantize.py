"""Runs become files of eight bits, which are judged beside the model."""

import onnxruntime
import pytest
import quantize
import torch
from predict import load_run


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("classification", ["--insert", "conv_glu"]),
        ("classification", ["--insert", "mix_ffn", "--control"]),
        ("segmentation", ["--insert", "mix_ffn", "--decoder", "linear"]),
    ],
)
def test_runs_in_eight_bits(train, tmp_path, capsys, task, words):
    run = train(task, *words, "--epochs", "1")
    found = quantize.run(
        quantize.parse([str(run), "--calibration-images", "8", "--keep-float", "ends"])
    )
    assert [*found] == [
        "torch float32", "torchao int8_weight_only", "torchao int8_dynamic", "onnx float32",
        "onnx int8",
    ]  # fmt: skip
    assert found["onnx float32"] == pytest.approx(found["torch float32"])
    assert "first and last layer: " in capsys.readouterr().out
    model, _ = load_run(run)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
    for name, near, far in (("float32", 0, 1e-4), ("int8", 1e-5, 0.3)):
        session = onnxruntime.InferenceSession(run / "onnx" / f"{name}.onnx")
        (got,) = session.run(None, {"images": images.numpy()})
        off = (torch.from_numpy(got) - expected).abs().max() / expected.abs().max()
        assert near <= off < far


def test_calibration_sees_all_of_a_data_set():
    samples = quantize.Prepared(range(10), lambda sample: sample, most=4)
    assert [samples[i] for i in range(len(samples))] == [0, 2, 5, 7]
    assert len(quantize.Prepared(range(3), lambda sample: sample, most=4)) == 3
