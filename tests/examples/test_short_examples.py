"""Domains, detection, denoising and clips: a few steps of each, and what they promise."""

import json
from itertools import pairwise

import denoise
import detect
import numpy as np
import pytest
import torch
import train_domains
import video
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision.ops import masks_to_boxes
from training.checkpoints import last
from training.digits import DigitScenes
from training.errors import TrainingError
from training.hybrids import create_model

import tokenconv as tc
from tokenconv.surgery import load_domain

pytestmark = pytest.mark.usefixtures("forget_accelerator")
FEW = ["--workers", "0", "--batch-size", "16"]


def read(path):
    return json.loads(path.read_text())


def size_of(picture):
    with Image.open(picture) as image:
        return image.size


def weights_of(folder):
    """All weights at the end of a run."""
    return load_file(last(folder / "checkpoints") / "model.safetensors")


def moved(one, other):
    """Keys of the values that differ."""
    assert one.keys() == other.keys()
    return {key for key in one if not torch.equal(one[key], other[key])}


# --- train_domains.py ---

TINY = [
    *("--img-size", "32", "--scenes", "64", "--epochs", "1", "--lr", "1e-2", *FEW),
    *(f"--model-arg={a}" for a in ("patch_size=8", "embed_dim=32", "depth=2", "num_heads=2")),
    "--model-arg=global_pool=avg",  # so that the last convolution is trained
]
OWN = {
    *("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"),
    *(f"blocks.{i}.norm{j}.{leaf}" for i in (0, 1) for j in (1, 2) for leaf in ("weight", "bias")),
}


@pytest.fixture
def domains(tmp_path):
    """Runs train_domains.py and gives its folder, and the table."""

    def run(*words):
        args = train_domains.parse([*TINY, *words, "--out", str(tmp_path / "domains")])
        return args, train_domains.run(args)

    return run


def kernels(weights):
    return {key for key in weights if weights[key].ndim == 4 and weights[key].shape[1] == 1}


def linear(weights):
    return {key for key in weights if weights[key].ndim == 2 and not key.startswith("head")}


def test_further_domains_train_depthwise_norms_and_head_and_leave_the_first(domains):
    args, table = domains()
    first, *others = (weights_of(args.out / name) for name in ("digits", "negatives", "edges"))
    assert len(kernels(first)) == 2
    for other in others:
        changed = moved(first, other)
        assert kernels(first) < changed
        assert not linear(first) & changed
        biases = {key.replace("weight", "bias") for key in kernels(first)}
        assert changed <= OWN | kernels(first) | biases
        assert {"fc_norm.weight", "head.weight"} <= changed
    # Judged again once all domains are trained, with the same result.
    for name, row in table.items():
        assert row["accuracy"] == pytest.approx(read(args.out / name / "history.json")[-1]["top1"])
    assert table["digits"]["trained"] == sum(value.numel() for value in first.values())
    assert table["edges"]["trained"] == table["negatives"]["trained"] < 4000
    assert read(args.out / "domains.json") == table


def test_domains_are_saved_for_a_model_that_has_the_shared_weights(domains):
    args, _ = domains()
    model = create_model(args, 10)
    model.load_state_dict(weights_of(args.out / "digits"))
    load_domain(model, "edges", args.out / "domains")
    assert not moved(model.state_dict(), weights_of(args.out / "edges"))


@pytest.mark.parametrize("share", ["depthwise", "none"])
def test_controls_train_what_they_do_not_share(domains, share):
    args, table = domains("--share", share, "--domains", "digits", "edges")
    first, other = (weights_of(args.out / name) for name in ("digits", "edges"))
    changed = moved(first, other)
    assert linear(first) <= changed
    assert "head.weight" in changed
    if share == "depthwise":
        assert not kernels(first) & changed
        assert "patch_embed.proj.weight" not in changed
        assert table["edges"]["trained"] < table["digits"]["trained"]
    else:
        assert kernels(first) | {"patch_embed.proj.weight"} <= changed
        assert table["edges"]["trained"] == table["digits"]["trained"]
    assert table["digits"]["accuracy"] == read(args.out / "digits" / "history.json")[-1]["top1"]


def test_soft_sharing_trains_gates_for_the_kernels_of_all_domains(domains):
    args, _ = domains("--share", "soft", "--domains", "digits", "edges")
    hard = [weights_of(args.out / name) for name in ("digits", "edges")]
    soft = weights_of(args.out / "edges-soft")
    for key in kernels(hard[0]):
        host = key.removesuffix(".weight")
        for number, weights in enumerate(hard):
            assert torch.equal(soft[f"{host}.layers.{number}.weight"], weights[key])
        assert not torch.equal(*(soft[f"{host}.layers.{i}.weight"] for i in (0, 1)))
    assert not any(
        torch.equal(soft[key], hard[1][key]) for key in ("head.weight", "fc_norm.weight")
    )
    assert all(torch.equal(soft[key], hard[0][key]) for key in linear(hard[0]))
    assert sum("gate" in key for key in soft) == 2 * 4


@pytest.mark.parametrize("prefix", [0, 1])
def test_soft_sharing_mixes_outputs_by_gates_of_the_means_over_the_grid(prefix):
    grid = tc.TokenGrid((3, 4), num_prefix_tokens=prefix)
    layers = [tc.DWConv(8, residual=True) for _ in range(3)]
    soft = train_domains.SoftDepthwise(layers)
    x = torch.randn(2, prefix + 12, 8)
    gates = soft.gate(x[:, prefix:].mean(1))
    assert gates.sum(1).tolist() == pytest.approx([1, 1])
    assert soft.gate[0].out_features == 8 // 4 + 1
    mixed = sum(gates[:, i, None, None] * layer(x, grid) for i, layer in enumerate(layers))
    torch.testing.assert_close(soft(x, grid), mixed)
    assert [n for n, p in soft.named_parameters() if p.requires_grad] == [
        f"gate.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")
    ]


def test_soft_sharing_mixes_the_convolutions_that_a_model_has_of_its_own():
    conv = [nn.Conv2d(8, 8, 3, padding=1, groups=8) for _ in range(2)]
    x = torch.randn(2, 8, 5, 6)
    soft = train_domains.SoftDepthwise(conv)
    nn.init.zeros_(soft.gate[2].weight)
    nn.init.zeros_(soft.gate[2].bias)
    torch.testing.assert_close(soft(x), (conv[0](x) + conv[1](x)) / 2)


def test_domains_are_read_from_the_layout_of_the_decathlon(domains, tmp_path):
    rng = np.random.default_rng(0)
    for domain, classes in (("birds", "abc"), ("signs", "xy")):
        for split in ("train", "val"):
            for name in classes:
                folder = tmp_path / "data" / domain / split / name
                folder.mkdir(parents=True)
                for number in range(8):
                    pixels = rng.integers(0, 255, (36, 40, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{number}.jpg")
    words = ["--data", str(tmp_path / "data")]
    args, table = domains(*words, "--domains", "signs", "birds")
    assert list(table) == ["signs", "birds"]
    shapes = [weights_of(args.out / name)["head.weight"].shape[0] for name in table]
    assert shapes == [2, 3]
    with pytest.raises(TrainingError, match="no domain cars: there are birds, signs"):
        domains(*words, "--domains", "signs", "cars")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data", "nowhere"], "--data nowhere is no folder"),
        (["--domains", "digits"], "expected two or more --domains"),
        (["--ema", "0.9"], "--fsdp and --ema keep weights outside"),
    ],
)
def test_domains_that_cannot_be_learned_are_told(domains, words, told):
    with pytest.raises(TrainingError, match=told):
        domains(*words)


# --- detect.py ---


def test_boxes_of_a_scene_are_those_of_its_mask():
    scenes = DigitScenes("train", size=(64, 48), length=60)
    alone = 0
    for scene in (scenes[index] for index in range(60)):
        mask = torch.from_numpy(np.array(scene.mask))
        assert scene.boxes[0].digit == scene.label
        assert {box.digit + 1 for box in scene.boxes} >= set(mask.unique().tolist()) - {0}
        for box in scene.boxes:
            assert 0 <= box.left < box.right <= 48
            assert 0 <= box.top < box.bottom <= 64
            digits = [other.digit for other in scene.boxes]
            if digits.count(box.digit) == 1:
                left, top, right, bottom = masks_to_boxes(mask[None] == box.digit + 1)[0].tolist()
                alone += (left, top, right + 1, bottom + 1) == box[:4]
    assert alone > 90  # a corner of one may lie below another


def test_a_detector_is_told_the_boxes_of_a_scene():
    scene = DigitScenes("train", size=(64, 48), length=1)[0]
    image, targets = detect.to_tensors(scene)
    torch.testing.assert_close(
        image, torch.from_numpy(np.array(scene.image)).permute(2, 0, 1) / 255
    )
    told = [(*box[:4], box.digit + 1) for box in scene.boxes]
    assert targets[: len(told)].tolist() == [list(map(float, row)) for row in told]
    assert not targets[len(told) :].any()


def test_each_box_is_found_once_by_the_surest_box_of_its_class():
    there = torch.tensor([[0, 0, 10, 10, 3], [20, 20, 30, 30, 5], [0, 0, 0, 0, 0]])
    found = torch.tensor([
        [0, 0, 10, 9, 3, 0.7],  # right, but a surer one has it
        [0, 0, 10, 10, 3, 0.9],
        [20, 20, 30, 30, 4, 0.8],  # another digit
        [20, 20, 30, 24, 5, 0.6],  # too small
        [20, 20, 30, 30, 5, 0.4],  # not sure
    ])  # fmt: skip
    assert detect.matched(found, there).tolist() == [True, False, False, False]
    metric = detect.FoundBoxes()
    metric.update(found[None], there[None])
    metric.update(found[None, :0], there[None, :1])
    assert metric.compute() == {
        "recall": pytest.approx(1 / 3), "precision": pytest.approx(1 / 4),
        "f1": pytest.approx(2 / 7),
    }  # fmt: skip
    nothing = detect.FoundBoxes()
    nothing.update(found[None, :0], there[None, 2:])
    assert not any(nothing.compute().values())


def test_a_detector_learns_and_its_boxes_are_in_the_image():
    torch.manual_seed(0)
    model = detect.make_detector("pvt_v2_b0_mix_ffn", pretrained=False, size=48)
    scenes = DigitScenes("train", size=(48, 48), length=4)
    batch = [
        torch.stack(part)
        for part in zip(*(detect.to_tensors(scenes[i]) for i in range(4)), strict=True)
    ]
    task = detect.Detection()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    losses = []
    for _ in range(12):
        total, count = task.loss(model, batch)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        losses.append(total.item() / int(count))
    assert losses[-1] < 0.6 * losses[0]
    added = [p for n, p in model.named_parameters() if ".added." in n and n.endswith("weight")]
    assert len(added) == 8
    assert all(kernel.any() for kernel in added)  # they were zero

    model.eval().roi_heads.score_thresh = 0.0  # whatever it thinks of
    with torch.no_grad():
        found, _ = task.predict(model, batch)
    boxes = found[found[..., 5] > 0]
    assert len(boxes) > 8
    assert boxes[:, :4].min() >= 0
    assert boxes[:, :4].max() <= 48
    assert (boxes[:, 2:4] > boxes[:, :2]).all()
    assert set(boxes[:, 4].tolist()) <= set(range(1, 11))
    picture = task.picture(batch, found)
    assert picture.shape == (3, 2 + 4 * 48 + 2, 4 * (2 + 4 * 48) + 2)


def test_a_run_detects_and_keeps_a_picture_and_the_hybrid(tmp_path):
    words = ["--img-size", "32", "--scenes", "16", "--epochs", "1", "--workers", "0"]
    args = detect.parse([*words, "--batch-size", "8", "--out", str(tmp_path)])
    history = detect.run(args)
    assert history[0].keys() == {"epoch", "recall", "precision", "f1"}
    assert size_of(tmp_path / "samples.png") == (4 * 130 + 2, 2 * 130 + 2)
    kept = {path.name for path in last(tmp_path / "weights").iterdir()}
    assert kept == {"model.safetensors", "head.safetensors", "plan.json", "delta.safetensors"}


def test_what_is_no_pyramid_is_told(tmp_path):
    for name, told in (
        ("vit_tiny_patch16_224", "has maps of one size: take a model with a pyramid"),
        ("no_such_model", "timm cannot make a backbone of no_such_model: Unknown model"),
    ):
        with pytest.raises(TrainingError, match=told):
            detect.make_detector(name, pretrained=False, size=64)


# --- denoise.py ---

CROPS = ["--size", "32", "--dim", "16", "--blocks", "1", "--workers", "0", "--batch-size", "4"]


@pytest.mark.parametrize("block", denoise.BLOCKS)
def test_noise_is_taken_out_of_photographs(tmp_path, block):
    words = ["--crops", "128", "--epochs", "2", "--lr", "1e-2", "--block", block]
    history = denoise.run(denoise.parse([*CROPS, *words, "--out", str(tmp_path)]))
    before, first, after = history[0]["psnr_before"], history[0]["psnr"], history[-1]["psnr"]
    assert 20 < before < 21  # 20 log10(255 / 25), and what is cut off at black and white
    assert history[-1]["psnr_before"] == before
    assert after > first
    assert after > before + 0.3
    assert size_of(tmp_path / "samples.png") == (4 * 34 + 2, 3 * 34 + 2)


def test_a_denoiser_begins_with_the_picture_and_all_of_it_is_trained():
    torch.manual_seed(0)
    model = denoise.Denoiser(16, 1, "gdfn")
    x = torch.rand(2, 3, 32, 48)
    assert torch.equal(model(x), x)
    nn.init.normal_(model.head.weight)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_only_the_control_has_no_convolution_between_windows():
    x = torch.rand(1, 16, 16, 16)
    other = x.clone()
    other[:, 0, 7, 7] += 1  # the last pixel of the first window
    for name in denoise.BLOCKS:
        torch.manual_seed(0)
        block = denoise.Block(16, name).eval()
        with torch.no_grad():
            change = (block(x) - block(other)).abs().amax((0, 1)) > 0
        assert change[:8, :8].all()  # attention
        assert change[8, 8] == (name != "mlp")
        assert not change[9:, 9:].any()


def test_a_block_keeps_the_order_of_the_pixels():
    torch.manual_seed(0)
    block = denoise.Block(16, "gdfn").eval()
    nn.init.zeros_(block.attn.out_proj.weight)
    nn.init.zeros_(block.attn.out_proj.bias)
    x = torch.rand(2, 16, 24, 16)
    tokens = x.flatten(2).transpose(1, 2)
    expected = tokens + block.ffn(block.norm2(tokens), 24, 16)
    torch.testing.assert_close(block(x), expected.transpose(1, 2).unflatten(2, (24, 16)))


def test_photographs_of_a_folder_are_read_and_small_ones_told(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        Image.new("L", (40, 36), 128).save(tmp_path / split / "grey.png")
    photos = denoise.read_photos(tmp_path, "train", 32)
    assert [photo.mode for photo in photos] == ["RGB"]
    noisy, clean = denoise.noisy_crop(32, 25.0, photos[0])
    assert noisy.shape == clean.shape == (3, 32, 32)
    assert (noisy - clean).std() == pytest.approx(25 / 255, rel=0.1)
    with pytest.raises(TrainingError, match=r"grey.png of \(40, 36\) pixels is smaller than --siz"):
        denoise.read_photos(tmp_path, "val", 48)
    with pytest.raises(TrainingError, match="no pictures in"):
        denoise.read_photos(tmp_path / "train", "train", 32)
    with pytest.raises(TrainingError, match="expected --size to be a multiple of 16"):
        denoise.run(denoise.parse(["--size", "40", "--out", str(tmp_path / "run")]))


# --- video.py ---

CLIPS = ["--frames", "4", "--dim", "16", "--depth", "1", "--clips", "64", "--epochs", "2", *FEW]


@pytest.mark.parametrize("label", video.LABELS)
def test_a_run_classifies_clips(tmp_path, label):
    words = ["--label", label, "--out", str(tmp_path), "--lr", "1e-2"]
    history = video.run(video.parse([*CLIPS, *words]))
    assert [epoch["epoch"] for epoch in history] == [1, 2]
    weights = weights_of(tmp_path)
    assert weights["head.weight"].shape[0] == len(video.LABELS[label])
    assert weights["blocks.0.mlp.act.conv.weight"].shape == (4 * 16, 1, 3, 3, 3)
    assert size_of(tmp_path / "samples.png") == (5 * 34 + 2, 8 * 34 + 2)


def test_digits_move_the_way_that_the_class_says():
    clips = video.MovingDigits("val", 40, frames=5, size=32, label="way")
    digits = video.MovingDigits("val", 40, frames=5, size=32, label="digit")
    seen = set()
    for index in range(40):
        clip, way = clips[index]
        assert torch.equal(clip, digits[index][0])
        bright = clip > 0.4  # above the noise
        rows, cols = tuple(video.WAYS.values())[way]
        pace = [
            all(
                torch.equal(after, before.roll((rows * speed, cols * speed), (0, 1)))
                for before, after in pairwise(bright)
            )
            for speed in (2, 3, 4)
        ]
        assert sum(pace) == 1
        seen.add(way)
    assert seen == set(range(4))


def test_the_control_lacks_only_the_convolutions_which_see_other_frames():
    hybrid, control = (
        video.ClipClassifier(
            (4, 4, 4), patch=8, dim=16, depth=2, num_classes=8, with_conv=with_conv
        )
        for with_conv in (True, False)
    )
    convs = [f"blocks.{i}.mlp.act.conv" for i in (0, 1)]
    added = [f"{name}.{leaf}" for name in convs for leaf in ("weight", "bias")]
    assert hybrid.load_state_dict(control.state_dict(), strict=False).missing_keys == added
    clips = torch.rand(2, 4, 32, 32)
    hybrid(clips)[:, 0].sum().backward()
    for name in convs:
        assert hybrid.get_parameter(f"{name}.weight").grad.any(-1).any(-1).any(0).all()
    for name in convs:
        hybrid.get_submodule(name).init_neutral_()
    torch.testing.assert_close(hybrid(clips), control(clips))


@pytest.mark.slow
@pytest.mark.parametrize(("words", "low", "high"), [([], 0.9, 1.0), (["--control"], 0.1, 0.4)])
def test_the_way_is_learned_with_the_convolution_only(tmp_path, words, low, high):
    words = [*words, "--frames", "6", "--size", "24", "--clips", "1024", "--epochs", "2", *FEW]
    args = video.parse([*words, "--dim", "32", "--depth", "2", "--out", str(tmp_path)])
    assert low < video.run(args)[-1]["top1"] <= high  # one in four by chance


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--size", "34"], "in multiples of --patch"),
        (["--dim", "40"], "and --dim of 16"),
        (["--size", "8"], "--size 16"),
        (["--grad-checkpointing"], "--grad-checkpointing: ClipClassifier has none"),
    ],
)
def test_clips_that_cannot_be_are_told(tmp_path, words, told):
    with pytest.raises(TrainingError, match=told):
        video.run(video.parse([*words, "--out", str(tmp_path)]))
