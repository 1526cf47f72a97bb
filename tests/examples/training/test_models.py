"""Models that are trained, and what predicts with them."""

import json
import re

import numpy as np
import pytest
import torch
import train_classification
from PIL import Image
from predict import load_run, parse, run
from safetensors.torch import load_file
from training.checkpoints import last
from training.digits import DigitScenes
from training.errors import TrainingError
from training.hybrids import backbone_of, choose_trained, create_model, param_groups
from training.settings import Settings

import tokenconv as tc
from tokenconv.surgery import inserted_modules

SMALL = [
    "--img-size",
    "64",
    "--scenes",
    "16",
    "--batch-size",
    "8",
    "--workers",
    "0",
    "--epochs",
    "1",
]


@pytest.fixture
def scenes(tmp_path):
    """A folder of test scenes, larger than what a model is given at a time."""
    folder = tmp_path / "scenes"
    folder.mkdir()
    dataset = DigitScenes("test", size=(70, 100), length=3)
    for index in range(3):
        dataset[index].image.save(folder / f"scene{index}.png")
    return folder


def test_classes_are_predicted_from_a_delta_on_a_fresh_base(train, scenes, capsys):
    words = ["--insert", "mix_ffn", "--insert", "peg", "--trainable", "inserted+head"]
    folder = train("classification", *words)
    model, _ = load_run(folder)
    assert len(inserted_modules(model)) == 8
    whole = load_file(last(folder / "weights") / "model.safetensors")
    assert all(torch.equal(value, whole[key]) for key, value in model.state_dict().items())

    capsys.readouterr()
    run(parse([str(folder), str(scenes)]))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["picture", "class", "p", "or", "p"]
    for index, line in enumerate(printed[1:]):
        picture, name, p, _, other = line.split()
        assert picture.endswith(f"scene{index}.png")
        assert name in "0123456789"
        assert float(p) >= float(other) > 0


@pytest.mark.parametrize(
    "words",
    [
        ["--decoder", "linear", "--insert", "mix_ffn"],
        ["--decoder", "pyramid", "--insert", "convpass", "--trainable", "inserted+head"],
        ["--decoder", "dpt", "--insert", "mix_ffn"],
        ["--model", "pvt_v2_b0", "--decoder", "unet", "--insert", "mix_ffn", "--insert", "peg"],
        ["--model", "pvt_v2_b0", "--decoder", "fpn", "--control", "--insert", "mix_ffn"],
        ["--model", "pvt_v2_b0", "--decoder", "linear", "--insert", "mix_ffn"],
    ],
    ids=lambda words: "-".join(words[1::2]),
)
def test_masks_are_predicted_from_a_delta_on_a_fresh_base(train, scenes, words, capsys):
    folder = train("segmentation", *words, tiny=SMALL)
    kept = last(folder / "weights")
    model, _ = load_run(folder)
    whole = load_file(kept / "model.safetensors")
    assert all(torch.equal(value, whole[key]) for key, value in model.state_dict().items())
    inserted = inserted_modules(backbone_of(model))
    assert bool(inserted) == (kept / "plan.json").exists() == ("--control" not in words)

    run(parse([str(folder), str(scenes), "--out", str(folder / "overlays")]))
    printed = capsys.readouterr().out
    for index in range(3):
        assert re.search(rf"overlays/scene{index}.png  .*\d%", printed)
        overlay = Image.open(folder / "overlays" / f"scene{index}.png")
        assert overlay.width == 200
        assert overlay.height > 140
        assert len(np.unique(np.array(overlay).reshape(-1, 3), axis=0)) > 10


def test_another_base_is_refused(train):
    folder = train("classification", "--insert", "mix_ffn", "--trainable", "inserted+head")
    settings = folder / "settings.json"
    settings.write_text(settings.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(tc.CheckpointError, match="other values"):
        load_run(folder)


def test_what_cannot_be_predicted_with_is_told(train, tmp_path, scenes):
    with pytest.raises(TrainingError, match="holds no run"):
        run(parse([str(tmp_path), str(scenes)]))
    (tmp_path / "settings.json").write_text('{"task": "video"}')
    with pytest.raises(TrainingError, match="is a run for video, not for classification or"):
        run(parse([str(tmp_path), str(scenes)]))
    (tmp_path / "settings.json").write_text('{"task": "classification"}')
    with pytest.raises(TrainingError, match="no epoch has ended"):
        run(parse([str(tmp_path), str(scenes)]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingError, match="no pictures in"):
        run(parse([str(tmp_path), str(tmp_path / "empty")]))
    folder = train("classification")
    (scenes / "scene0.png").write_bytes(b"no picture")
    with pytest.raises(TrainingError, match=r"cannot read .*scene0.png"):
        run(parse([str(folder), str(scenes)]))


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": "x"},
        {"model": 3},
        {"model_arg": [["depth", None]]},
        {"classes": None},
        {"model": ""},
    ],
    ids=str,
)
def test_settings_that_no_run_has_written_are_told(train, changed):
    folder = train("classification", "--epochs", "1")
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps({**settings, **changed}))
    with pytest.raises(TrainingError):
        load_run(folder)
    for text in ("[" * 100_000, '"text"', '{"task": "classification"}'):
        (folder / "settings.json").write_text(text)
        with pytest.raises(TrainingError, match="holds no run"):
            load_run(folder)


def test_an_overlay_replaces_no_picture_and_no_other_overlay(train, scenes):
    folder = train("segmentation", "--decoder", "linear", tiny=[*SMALL])
    before = (scenes / "scene0.png").read_bytes()
    with pytest.raises(TrainingError, match=r"scene0.png would be overwritten: take another --out"):
        run(parse([str(folder), str(scenes), "--out", str(scenes)]))
    Image.open(scenes / "scene0.png").save(scenes / "scene0.jpg")
    with pytest.raises(TrainingError, match="pictures of one name would have one overlay"):
        run(parse([str(folder), str(scenes)]))
    assert (scenes / "scene0.png").read_bytes() == before
    assert not (folder / "predictions").exists()


def test_layers_below_the_head_learn_more_slowly(tiny):
    args = train_classification.parse(
        [*tiny, "--layer-decay", "0.5", "--lr", "1", "--insert", "peg"]
    )
    model = create_model(args, 10)
    groups = param_groups(model, Settings.of(args))
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    own = [rates[id(block.mlp.fc1.weight)] for block in model.blocks]
    assert own == pytest.approx([0.5 ** (4 - i) for i in range(4)])
    assert rates[id(model.head.weight)] == 1
    assert rates[id(model.pos_embed)] == pytest.approx(0.5**5)


def test_arguments_of_a_model_are_values_of_python():
    words = ["class_token=False", "patch_size=8", "global_pool=avg", "norm_layer=layernorm"]
    args = train_classification.parse([f"--model-arg={word}" for word in words])
    assert dict(args.model_arg) == {
        "class_token": False, "patch_size": 8, "global_pool": "avg", "norm_layer": "layernorm",
    }  # fmt: skip


@pytest.mark.parametrize("trainable", ["inserted+head", "depthwise+norm+head", "all"])
def test_a_control_trains_what_it_shares_with_the_hybrid(tiny, trainable):
    """But not what was inserted."""
    trained = []
    for control in ([], ["--control"]):
        words = [*tiny, "--insert", "mix_ffn", "--trainable", trainable, *control]
        args = train_classification.parse(words)
        model = create_model(args, 10)
        choose_trained(model, args)
        trained.append({key for key, p in model.named_parameters() if p.requires_grad})
    hybrid, control = trained
    assert control == {key for key in hybrid if ".act.before." not in key}


def test_a_self_trained_base_is_adapted(train):
    base = train("classification", out="base")
    weights = last(base / "weights") / "model.safetensors"
    words = ["--base", str(weights), "--insert", "mix_ffn", "--trainable", "inserted+head"]
    folder = train("segmentation", *words)
    before = load_file(weights)
    after = load_file(last(folder / "weights") / "model.safetensors")
    for key, value in before.items():
        if not key.startswith("head."):
            assert torch.equal(after[f"backbone.{key}"], value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--decoder", "nothing"], "no nothing on vit_tiny_patch16_224"),
        (["--decoder", "unet"], "no unet on vit_tiny_patch16_224"),
        (["--model", "pvt_v2_b0"], "is a pyramid: use the linear head or a decoder"),
        (["--model", "pvt_v2_b0", "--decoder", "unet", "--img-size", "40"], "multiples of 32, got"),
    ],
)
def test_what_does_not_fit_is_told(train, words, told):
    with pytest.raises(TrainingError, match=told):
        train("segmentation", *words, tiny=[*SMALL])


AUGMENTED = ["--auto-augment", "rand-m9-mstd0.5", "--random-erasing", "0.2", "--mixup", "0.2"]


@pytest.mark.parametrize(
    "words",
    [
        ["--layer-decay", "0.7", "--grad-checkpointing", "--cutmix", "1.0", *AUGMENTED],
        ["--precision", "bf16", "--smoothing", "0", "--clip-grad", "0"],
        pytest.param(["--compile"], marks=[pytest.mark.compile, pytest.mark.slow]),
    ],
    ids=lambda words: words[0],
)
def test_recipes_move_every_weight(train, words):
    shared = ["--insert", "mix_ffn", "--model-arg=global_pool=avg", *words]
    before, after = (
        load_file(last(train("classification", *shared, "--lr", lr, out=lr) / "checkpoints")
                  / "model.safetensors")
        for lr in ("0", "1e-3")
    )  # fmt: skip
    assert all(value.isfinite().all() for value in after.values())
    assert [key for key in after if torch.equal(before[key], after[key])] == []
