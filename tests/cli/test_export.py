"""``export``: what it writes and prints, and how it refuses."""

import re
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import tokenconv as tc
from tokenconv.cli import main

SMALL = ["export", "test_vit", "--img-size", "32", "48", "--num-classes", "4", "--to", "pt2"]


def test_a_folded_hybrid_of_any_size(tmp_path: Path, capsys):
    torch.manual_seed(0)  # as the command does
    model = timm.create_model("test_vit", num_classes=4, dynamic_img_size=True, img_size=(32, 48))
    tc.insert_(model, "mix_ffn", blocks=slice(3, None))
    for name, parameter in model.named_parameters():
        if ".before." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tc.save(model, tmp_path / "hybrid")
    out = tmp_path / "hybrid.pt2"
    words = ["--hybrid", str(tmp_path / "hybrid"), "--fold", "--dynamic", "hw,batch"]
    assert main([*SMALL, *words, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("3 of 3 inserted modules folded\n")
    folding = re.search(r"^  largest difference from before: (\S+) of the", printed, re.MULTILINE)
    assert folding
    assert 0 < float(folding[1]) < 1e-5  # another kernel ran
    assert f"{out}: pt2, float32, " in printed
    assert "open: batch and hw; sizes from 32x32 on, in steps of 16x16" in printed
    images = torch.randn(3, 3, 80, 64)
    with torch.no_grad():
        expected = model.eval()(images)
        torch.testing.assert_close(
            torch.export.load(out).module()(images), expected, rtol=1e-4, atol=1e-5
        )


def test_folding_that_changes_the_output_is_refused(tmp_path: Path, monkeypatch, capsys):
    def fold_wrongly(model):
        model.blocks[0].mlp.fc2.weight.mul_(2)

    monkeypatch.setattr("tokenconv.cli.exporting.fold_", fold_wrongly)
    words = ["--block", "mix_ffn", "--fold", "--out", str(tmp_path / "a.pt2")]
    assert main([*SMALL, *words]) == 1
    assert "folding changes the output by" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_file_of_eight_bits(tmp_path: Path, capsys):
    (tmp_path / "photographs").mkdir()
    for number in range(3):
        picture = Image.effect_noise((80, 60), 40 + number).convert("RGB")
        picture.save(tmp_path / "photographs" / f"{number}.png")
    words = ["export", "test_vit", "--out", str(tmp_path / "a.onnx"), "--keep-float", "ends"]
    assert main([*words, "--calibration", str(tmp_path / "photographs")]) == 0
    printed = capsys.readouterr().out
    assert "a.onnx: onnx, float32 and int8, " in printed
    assert "24 of 26 layers with weights in int8" in printed
    assert "float, first and last layer: patch_embed.proj, head" in printed


def test_calibration_is_of_the_size_that_is_asked_for(tmp_path: Path, capsys):
    (tmp_path / "photographs").mkdir()
    Image.effect_noise((200, 180), 40).convert("RGB").save(tmp_path / "photographs" / "a.png")
    words = ["export", "test_vit", "--img-size", "64", "--dynamic", "hw", "--multiple-of", "32"]
    words += ["--calibration", str(tmp_path / "photographs"), "--out", str(tmp_path / "a.onnx")]
    assert main(words) == 0
    assert "    1x3x64x64 " in capsys.readouterr().out


def test_a_calibration_folder_without_images(tmp_path: Path, capsys):
    (tmp_path / "photographs").mkdir()
    words = ["export", "test_vit", "--out", str(tmp_path / "a.onnx"), "--calibration"]
    for folder, message in (("photographs", "holds no photographs (.bmp"), ("no", "is not a fold")):
        assert main([*words, str(tmp_path / folder)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["photographs"]


def test_a_plan_from_a_file(tmp_path: Path, capsys):
    assert main(["plan", "test_vit", "--block", "peg", "--blocks", "0", "--json"]) == 0
    (tmp_path / "plan.json").write_text(capsys.readouterr().out)
    words = ["--plan", str(tmp_path / "plan.json"), "--dtype", "bfloat16", "--dynamic", "none"]
    assert main([*SMALL, *words, "--out", str(tmp_path / "a.pt2")]) == 0
    program = torch.export.load(tmp_path / "a.pt2")
    assert "blocks.0.after.proj.weight" in program.state_dict
    assert {t.dtype for t in program.state_dict.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "a.onnx"], "pt2 is written to a file ending in .pt2, got a.onnx"),
        (["--out", "no/a.pt2"], "no/a.pt2 cannot be a file: its folder is missing"),
        (["--out", "a.pt2", "--plan", "no.json"], "No such file or directory: 'no.json'"),
        (["--out", "a.pt2", "--hybrid", "no"], "no"),
        (["--out", "a.pt2", "--block", "mixffn"], "unknown block 'mixffn'"),
    ],
)
def test_one_line_and_nothing_left(tmp_path: Path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tokenconv: error: ")
    assert message in line
    assert not [*tmp_path.iterdir()]


def test_a_model_of_one_size_says_so(tmp_path: Path, capsys):
    words = ["--img-size", "64", "--dynamic", "hw", "--out", str(tmp_path / "a.onnx")]
    assert main(["export", "mixer_s32_224", *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not take images of" in line
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fold"], "--fold is about what was inserted"),
        (["--block", "peg", "--fold", "--dtype", "bfloat16"], "16 bits lose them"),
        (["--site", "beside_mlp"], "name it with --block"),
        (["--to", "executorch"], "one shape of images: add --dynamic none"),
        (["--opset", "20"], "--opset is of ONNX files, not of pt2"),
        (["--multiple-of", "16"], "add hw to --dynamic"),
        (["--calibration", "."], "--calibration is of ONNX files, not of pt2"),
        (["--keep-float", "ends"], "add --calibration DIR"),
        (["--keep-float", "heads"], "invalid choice: 'heads'"),
        (["--dynamic", "width"], "expected batch, hw, hw,batch or none, got 'width'"),
        (["--block", "peg", "--hybrid", "dir"], "not allowed with argument"),
    ],
)
def test_wrong_usage(capsys, words, message):
    with pytest.raises(SystemExit) as left:
        main([*SMALL, "--out", "a.pt2", *words])
    assert left.value.code == 2
    assert message in capsys.readouterr().err
