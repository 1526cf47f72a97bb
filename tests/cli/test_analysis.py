"""``analyze``: what it prints and what it leaves in the folder."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import tokenconv as tc
from tokenconv.analysis import factorise
from tokenconv.cli import main

NO_FIELDS = ["analyze", "resnet10t", "--img-size", "64", "--out"]


def test_it_prints_and_writes_what_was_found(tmp_path: Path, capsys):
    out = tmp_path / "report"
    assert main([*NO_FIELDS, str(out), "--layers", "layer1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 dense convolutions, 0 worth taking apart at 95% of the energy")
    assert f"report: {out / 'report.html'}" in printed
    kept = json.loads((out / "analysis.json").read_text())
    assert kept["input_size"] == [3, 64, 64]
    assert [layer["name"] for layer in kept["layers"]] == ["layer1.0.conv1", "layer1.0.conv2"]
    assert kept["command"].startswith("tokenconv analyze resnet10t --img-size 64 --out")
    assert kept["fields"] == []


def test_weights_from_a_file(tmp_path: Path, capsys):
    model = timm.create_model("resnet10t", num_classes=4)
    conv = model.get_submodule("layer2.0.conv2")
    conv.weight.data.copy_(factorise(conv.weight, 1).expand())
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    words = [str(tmp_path / "out"), "--checkpoint", str(tmp_path / "weights.pt")]
    assert main([*NO_FIELDS, *words, "--num-classes", "4"]) == 0
    printed = capsys.readouterr().out
    assert "layer2.0.conv2  dw_pw rank 1, error 0.000, MACs 0.1" in printed
    text = (tmp_path / "out" / "report.md").read_text()
    assert "The weights are random" not in text
    assert str(tmp_path / "weights.pt") in text


def test_a_saved_hybrid_is_shown_beside_the_model_without(tmp_path: Path, capsys):
    torch.manual_seed(0)  # as the command does
    model = timm.create_model("test_vit")
    tc.insert_(model, "mix_ffn")
    nn.init.constant_(model.blocks[1].mlp.act.before.weight, 10)
    tc.save(model, tmp_path / "hybrid")
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (200, 180), (90, 120, 30)).save(images / "a.png")
    words = ["--hybrid", str(tmp_path / "hybrid"), "--fields", "--images", str(images)]
    out = tmp_path / "out"
    assert main(["analyze", "test_vit", *words, "--batch-size", "1", "--out", str(out)]) == 0
    kept = json.loads((out / "analysis.json").read_text())
    plain, hybrid = kept["fields"]
    assert (plain["name"], hybrid["name"]) == ("baseline", "hybrid")
    assert len(hybrid["attention_distance_tokens"]) == 6
    assert hybrid["radius_pixels"]["0.5"] > plain["radius_pixels"]["0.5"]
    moved = {each["name"]: each["distance_from_identity"][1] for each in kept["depthwise"]}
    assert moved == {f"blocks.{i}.mlp.act.before": 30.0 if i == 1 else 0.0 for i in range(6)}


def test_maps_without_attention_have_a_field_as_well(tmp_path: Path):
    out = tmp_path / "out"
    assert main([*NO_FIELDS, str(out), "--fields", "--batch-size", "1"]) == 0
    (field,) = json.loads((out / "analysis.json").read_text())["fields"]
    assert field["attention_distance_tokens"] == []
    assert 0 < field["radius_pixels"]["0.5"] < field["radius_pixels"]["0.9"] <= 32


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resnet10x"], "unknown model 'resnet10x': did you mean resnet10t"),
        (["resnet10t", "--layers", "stage7"], "unknown dense convolution 'stage7'"),
        (["resnet10t", "--checkpoint", "no.pt"], "--checkpoint no.pt is no file"),
        (["resnet10t", "--checkpoint", __file__], "test_analysis.py does not fit: "),
        (["test_vit", "--hybrid", "nowhere"], "nowhere"),
    ],
)
def test_failures_are_one_line_and_leave_nothing(tmp_path: Path, capsys, words, message):
    assert main(["analyze", *words, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("tokenconv: error: ")
    assert message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words", [["--energy", "1.5"], ["--pretrained", "--checkpoint", "x"], ["--img-size", "0"]]
)
def test_wrong_usage(words):
    with pytest.raises(SystemExit) as left:
        main(["analyze", "resnet10t", *words])
    assert left.value.code == 2
