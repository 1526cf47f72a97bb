"""Whole runs: what is trained, kept, resumed and refused."""

import json
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
import timm
import torch
import train_segmentation
from filelock import FileLock
from safetensors.torch import load_file
from torchvision import tv_tensors
from training import checkpoints
from training.checkpoints import last, save_weights
from training.engine import Training
from training.errors import ResumeError, TrainingError

import tokenconv as tc

SCRIPTS = {"classification": "train_classification.py", "segmentation": "train_segmentation.py"}
METRIC = {"classification": "top1", "segmentation": "miou"}


def read(path):
    return json.loads(path.read_text())


def weights_of(folder):
    """All weights at the end of a run."""
    return load_file(last(folder / "checkpoints") / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("task", SCRIPTS)
def test_a_run_keeps_curves_checkpoints_and_weights(train, task):
    folder = train(task, "--insert", "mix_ffn", "--insert", "peg", "--ema", "0.5")
    epochs = read(folder / "history.json")
    assert [epoch["epoch"] for epoch in epochs] == [1, 2]
    assert all(0 <= epoch[METRIC[task]] <= 1 for epoch in epochs)
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"step-00000004", "step-00000008"}
    assert len(list((folder / "weights").iterdir())) == 1
    settings = read(folder / "settings.json")
    assert settings["task"] == task
    assert settings["insert"] == ["mix_ffn", "peg"]
    assert list((folder / "tensorboard").rglob("events.*"))


def test_curves_and_pictures_are_in_tensorboard(train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train("segmentation", "--insert", "mix_ffn")
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    tags = events.Tags()
    assert tags["images"] == ["val/samples"]
    assert {"train/loss", "train/lr", "val/miou", "val/iou/background", "val/iou/9"} <= {
        *tags["scalars"]
    }
    losses = events.Scalars("train/loss")
    assert [one.step for one in losses] == list(range(1, 9))
    shown = events.Images("val/samples")[-1]
    assert shown.width > 8 * 32
    assert shown.height > 3 * 32


@pytest.mark.parametrize("task", SCRIPTS)
def test_only_what_was_inserted_and_the_head_are_trained(train, task):
    # A class token would not let a gradient through to the last convolution.
    run = ["--insert", "mix_ffn", "--trainable", "inserted+head", "--model-arg=global_pool=avg"]
    before = weights_of(train(task, *run, "--lr", "0", out="before"))
    after = weights_of(train(task, *run, out="after"))
    moved = {key for key in after if not torch.equal(before[key], after[key])}
    chosen = {k for k in after if "act.before" in k or re.match(r"(backbone\.)?head\.", k)}
    assert chosen
    assert moved == chosen


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "pvt_v2_b0"])
def test_a_control_is_the_same_run_with_attention_only(train, tiny, model):
    tiny = [word for word in tiny if "=" not in word]
    folder = train(
        "classification", "--insert", "mix_ffn", "--control", "--model", model, tiny=tiny
    )
    keys = weights_of(folder).keys()
    assert not any("dwconv" in key or "before" in key for key in keys)
    assert not (last(folder / "weights") / "plan.json").exists()


def test_a_control_starts_from_the_same_weights_and_batches(train):
    """Zero convolutions that are not trained change nothing."""
    ends = []
    shared = ["--insert", "mix_ffn", "--clip-grad", "0"]  # which would judge their gradients, too
    for number, words in enumerate((["--control"], ["--inserted-lr-scale", "0"])):
        ends.append(weights_of(train("classification", *shared, *words, out=str(number))))
    control, hybrid = ends
    assert len(hybrid) > len(control)
    assert same(control, {key: hybrid[key] for key in control})


def test_the_average_of_weights_is_that_of_all_steps(train, monkeypatch):
    seen = []
    part = Training._part

    def watch(self, batch):
        loss = part(self, batch)
        seen.append({key: value.clone() for key, value in self.model.state_dict().items()})
        return loss

    monkeypatch.setattr(Training, "_part", watch)
    folder = train("classification", "--insert", "mix_ffn", "--ema", "0.7", "--epochs", "1")
    kept = load_file(last(folder / "weights") / "model.safetensors")
    for key, value in kept.items():
        average = seen[0][key]
        for after in seen[1:]:
            average = 0.7 * average + 0.3 * after[key]
        torch.testing.assert_close(value, average, rtol=1e-5, atol=1e-7)
    assert not same(kept, weights_of(folder))


def test_a_gradient_is_clipped(train):
    """To so little that AdamW's epsilon is larger."""
    words = ["--weight-decay", "0", "--insert", "mix_ffn"]
    begin, clipped, free = (
        weights_of(train("classification", *words, *more, out="".join(more)))
        for more in (("--lr", "0"), ("--clip-grad", "1e-12"), ("--clip-grad", "0"))
    )
    for key, value in begin.items():
        moved = (clipped[key] - value).abs().max()
        assert moved <= 0.02 * (free[key] - value).abs().max()


def test_mixed_precision_trains_nearly_the_same(train):
    words = ["--insert", "mix_ffn", "--epochs", "1", "--lr", "1e-2"]
    whole, mixed = (
        weights_of(train("classification", *words, "--precision", precision, out=precision))
        for precision in ("no", "bf16")
    )
    assert not same(whole, mixed)
    for key, value in whole.items():
        assert mixed[key].dtype == torch.float32
        torch.testing.assert_close(mixed[key], value, rtol=0.1, atol=0.05)


def test_the_delta_is_a_small_part_of_the_whole(tmp_path):
    model = tc.insert_(timm.create_model("vit_small_patch16_224"), "mix_ffn")
    tc.trainable_(model, "inserted+head")
    save_weights(model, tmp_path, epoch=1)
    delta, whole = (
        (tmp_path / "epoch-0001" / f"{name}.safetensors").stat().st_size
        for name in ("delta", "model")
    )
    assert whole > 80e6
    assert delta < 0.05 * whole


def test_pictures_and_masks_of_a_folder_are_learned(train, masked):
    """Of several sizes, larger and smaller than what the model sees at a time."""
    words = ["--data", str(masked(count=8, size=(28, 60))), "--num-classes", "2", "--lr", "3e-3"]
    words += ["--decoder", "linear", "--epochs", "2", "--batch-size", "4", "--insert", "mix_ffn"]
    words += ["--model-arg=patch_size=4"]
    folder = train("segmentation", *words, "--class-names", "ground", "red")
    history = read(folder / "history.json")
    assert history[-1]["miou"] > 0.8  # 0.44 with the weights that it begins with
    assert history[-1]["iou/red"] > 0.7
    assert (folder / "samples.png").exists()


def test_pictures_are_trained_at_the_scale_that_they_are_judged_at():
    words = ["--data", "folder", "--img-size", "32", "--least-scale", "0.5", "--color-jitter", "0"]
    args = train_segmentation.parse(words)
    config = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    augment, _ = train_segmentation.transforms(args, config, 4)
    stripes = (torch.arange(400) // 40 % 2).expand(300, 400)  # longer than a window
    image = tv_tensors.Image(255 * stripes.to(torch.uint8).expand(3, 300, 400))
    widths = []
    for _ in range(200):
        seen, mask = augment((image, tv_tensors.Mask(stripes)))
        assert seen.shape == (3, 32, 32)
        assert (seen[0].round() == mask).float().mean() > 0.9
        widths.append(max(mask[0].long().bincount().tolist()))
    # A stripe of 40 pixels is 20 to 80 wide: mostly more than half of a row is of one.
    assert statistics.median(widths) > 24


# --- going on ---


@pytest.mark.parametrize("task", SCRIPTS)
@pytest.mark.parametrize("extra", [[], ["--ema", "0.9", "--accumulate", "2", "--workers", "1"]])
def test_a_run_that_is_cut_off_ends_as_one_that_is_not(train, monkeypatch, task, extra):
    words = ["--insert", "mix_ffn", "--drop-path", "0.2", "--save-every", "1", *extra]
    whole = train(task, *words, out="whole")

    step = Training._part
    for end in (3, 6):  # in the middle of an epoch
        monkeypatch.setattr(Training, "_part", cut_off(step, end))
        with pytest.raises(KeyboardInterrupt):
            train(task, *words, "--resume", "auto", out="cut")
    monkeypatch.undo()
    cut = train(task, *words, "--resume", "auto", out="cut")

    assert same(weights_of(whole), weights_of(cut))
    assert same(*(load_file(last(f / "weights") / "model.safetensors") for f in (whole, cut)))
    assert read(whole / "history.json") == read(cut / "history.json")


@pytest.mark.parametrize("number", [1, 2])
def test_a_run_that_is_asked_to_end_while_it_is_judged_is_judged_when_it_goes_on(
    train, monkeypatch, number
):
    words = ["--insert", "mix_ffn", "--drop-path", "0.2"]
    whole = train("classification", *words, out="whole")
    show, epochs = Training._show, []

    def ask(self, picture):
        show(self, picture)
        epochs.append(self.progress.epoch)
        if len(epochs) == number:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Training, "_show", ask)
    cut = train("classification", *words, out="cut")
    assert last(cut / "checkpoints").name == f"step-{4 * number:08d}"
    assert not (cut / "history.json").exists() or len(read(cut / "history.json")) < number
    train("classification", *words, "--resume", "auto", out="cut")
    assert epochs == ([1, 1, 2] if number == 1 else [1, 2, 2])
    assert same(weights_of(whole), weights_of(cut))
    assert read(whole / "history.json") == read(cut / "history.json")
    assert same(*(load_file(last(f / "weights") / "model.safetensors") for f in (whole, cut)))


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_picture_loses_nothing_that_was_learned(train, pictures, monkeypatch, split):
    root = pictures(count=24)
    words = ["--data", str(root), "--epochs", "1", "--batch-size", "8", "--img-size", "32"]
    whole = train("classification", *words, out="whole")
    damaged = sorted((root / split).rglob("*.png"))[-1]
    kept = damaged.read_bytes()
    damaged.write_bytes(kept[:60])
    with pytest.raises(TrainingError, match=f"cannot read {damaged}"):
        train("classification", *words, out="cut")
    saved = last(whole.parent / "cut" / "checkpoints")
    assert int(saved.name.partition("-")[2]) >= (1 if split == "train" else 6)
    damaged.write_bytes(kept)
    cut = train("classification", *words, "--resume", "auto", out="cut")
    assert same(weights_of(whole), weights_of(cut))
    assert read(whole / "history.json") == read(cut / "history.json")


def cut_off(step, end):
    def part(self, batch):
        if self.progress.step == end:
            raise KeyboardInterrupt
        return step(self, batch)

    return part


def test_a_finished_run_has_nothing_left_to_do(train):
    folder = train("classification", "--insert", "mix_ffn")
    before = weights_of(folder)
    again = train("classification", "--insert", "mix_ffn", "--resume", "auto")
    assert same(before, weights_of(again))


def test_a_run_is_not_begun_again_by_mistake(train):
    train("classification", "--epochs", "1")
    with pytest.raises(TrainingError, match=r"holds a run already: go on with --resume auto"):
        train("classification", "--epochs", "1")


def test_a_run_does_not_go_on_with_other_settings(train):
    folder = train("classification", "--insert", "mix_ffn")
    before = weights_of(folder)
    wanted = (
        r"--insert was \['mix_ffn'\] and is \['peg'\]; --lr was 0.001 and is 0.01: use the same"
    )
    with pytest.raises(ResumeError, match=wanted):
        train("classification", "--insert", "peg", "--lr", "0.01", "--resume", "auto")
    assert same(before, weights_of(folder))


def test_a_damaged_checkpoint_is_told_by_its_name(train):
    folder = train("classification")
    damaged = last(folder / "checkpoints")
    (damaged / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ResumeError, match=f"cannot resume from .*{damaged.name}: .*remove it"):
        train("classification", "--epochs", "2", "--resume", "auto")


class Touch:
    """What a pickle could do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.slow
def test_no_file_of_a_checkpoint_can_run_code(train, tmp_path):
    folder = train("classification", "--insert", "mix_ffn", "--ema", "0.9")
    checkpoint = last(folder / "checkpoints")
    names = [path.name for path in checkpoint.iterdir()]
    assert {"progress.json", "average.safetensors", "optimizer.bin"} <= {*names}
    kept = {name: (checkpoint / name).read_bytes() for name in names}
    for name in [*names, "custom_checkpoint_0.pkl"]:
        torch.save(Touch(tmp_path / "ran"), checkpoint / name)
        with suppress(ResumeError):  # Accelerate does without generators that it cannot read
            train("classification", "--insert", "mix_ffn", "--ema", "0.9", "--resume", "auto")
        assert not (tmp_path / "ran").exists(), name
        (checkpoint / name).unlink()
        for other, data in kept.items():
            (checkpoint / other).write_bytes(data)
    torch.load(_evil(tmp_path), weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


def _evil(folder):
    torch.save(Touch(folder / "ran"), folder / "evil.pth")
    return folder / "evil.pth"


@pytest.mark.parametrize("place", ["base", "checkpoint_path"])
def test_no_file_of_weights_can_run_code(train, tmp_path, place):
    words = {
        "base": ["--base", str(_evil(tmp_path))],
        "checkpoint_path": [f"--model-arg=checkpoint_path={_evil(tmp_path)}"],
    }
    with pytest.raises(TrainingError, match="--base"):
        train("classification", *words[place])
    assert not (tmp_path / "ran").exists()


def test_two_runs_do_not_share_a_folder(train, tmp_path, monkeypatch):
    monkeypatch.setattr(
        checkpoints, "FileLock", lambda path, timeout: FileLock(path, timeout=timeout / 100)
    )
    (tmp_path / "run").mkdir()
    with (
        FileLock(tmp_path / "run" / ".lock"),
        pytest.raises(TrainingError, match=r"another run trains in .*run: wait for it, or take"),
    ):
        train("classification")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    train("classification", "--epochs", "1")


@pytest.mark.slow
def test_of_two_runs_that_begin_together_one_trains(start, tiny, tmp_path):
    both = [start("train_classification.py", *tiny, "--epochs", "60") for _ in range(2)]
    ends = [(run.communicate(timeout=300)[1], run.returncode) for run in both]
    (lost,) = (told for told, status in ends if status)
    # Which of the two it finds depends on how far the other is.
    assert re.search("error: .*(another run trains in|holds a run already)", lost.splitlines()[-1])
    assert "Traceback" not in lost
    assert len(read(tmp_path / "run" / "history.json")) == 60
    assert weights_of(tmp_path / "run")


def test_sigterm_saves_and_ends_well(start, tiny, tmp_path):
    words = [*tiny, "--insert", "mix_ffn", "--epochs", "200"]
    process = start("train_classification.py", *words)
    history = tmp_path / "run" / "history.json"
    wait_for(lambda: history.exists() or process.poll() is not None, 120)
    process.send_signal(signal.SIGTERM)
    printed, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    stopped = re.search(r"stopped at step (\d+) of 800: go on with --resume auto", printed)
    assert stopped, printed
    saved = last(tmp_path / "run" / "checkpoints")
    assert saved.name == f"step-{int(stopped[1]):08d}"
    assert not (tmp_path / "run" / "checkpoints" / ".writing").exists()


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_bits(start, tiny, tmp_path):
    words = [*tiny, "--insert", "mix_ffn", "--drop-path", "0.2", "--ema", "0.9"]
    words += ["--epochs", "12", "--save-every", "1", "--workers", "1", "--resume", "auto"]
    script = "train_classification.py"
    begun = time.monotonic()
    whole = start(script, *words, out="whole")
    _, told = whole.communicate(timeout=300)
    assert whole.returncode == 0, told
    length = time.monotonic() - begun

    rng = random.Random(0)
    kills = 0
    while kills < 20:
        process = start(script, *words, out="cut")
        try:
            _, told = process.communicate(
                timeout=rng.uniform(0.5 * length, 0.9 * length) if kills else 1
            )
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            for kept in ("checkpoints", "weights"):
                found = last(tmp_path / "cut" / kept)
                if found is not None:
                    load_file(found / "model.safetensors")
        else:
            assert process.returncode == 0, told
            shutil.rmtree(tmp_path / "cut")  # it was done before it was killed: begin anew
    process = start(script, *words, out="cut")
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    ends = [tmp_path / name for name in ("whole", "cut")]
    assert same(*map(weights_of, ends))
    assert read(ends[0] / "history.json") == read(ends[1] / "history.json")


# --- what goes wrong ---


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(train, tmp_path):
    words = ["--save-every", "1", "--log-every", "1", "--clip-grad", "0", "--lr", "1e30"]
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step (\d+); .*--lr") as told:
        train("classification", *words)
    step = int(re.search(r"step (\d+)", str(told.value))[1])
    saved = last(tmp_path / "run" / "checkpoints")
    assert saved.name == f"step-{step - 1:08d}"
    assert load_file(saved / "model.safetensors")


@pytest.mark.parametrize("task", SCRIPTS)
def test_weights_that_are_no_numbers_are_not_kept(train, monkeypatch, tmp_path, task):
    """The loss of the step is one; its gradient is not."""
    part = Training._part

    def spoil(self, batch):
        if self.progress.step == 2:
            first = next(p for p in self.model.parameters() if p.requires_grad)
            first.register_hook(lambda gradient: gradient * torch.inf)
        return part(self, batch)

    monkeypatch.setattr(Training, "_part", spoil)
    with pytest.raises(TrainingError, match="weights are not finite behind step 3; the last"):
        train(task, "--save-every", "1")
    saved = last(tmp_path / "run" / "checkpoints")
    assert saved.name == "step-00000002"
    assert all(value.isfinite().all() for value in load_file(saved / "model.safetensors").values())


@pytest.mark.parametrize("longest", [40_000, 150_000])
def test_a_full_disk_is_told_and_leaves_the_checkpoint_before(
    train, monkeypatch, tmp_path, longest
):
    """From the second checkpoint on no file may be longer: as if the disk were full."""
    publish = checkpoints._publish

    def fill_the_disk(staging, target, kept):
        publish(staging, target, kept)
        resource.setrlimit(resource.RLIMIT_FSIZE, (longest, resource.RLIM_INFINITY))

    monkeypatch.setattr(checkpoints, "_publish", fill_the_disk)
    try:
        with pytest.raises(TrainingError, match=r"cannot write (a checkpoint|weights) to .*"):
            train("classification", "--save-every", "1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    monkeypatch.undo()
    checkpoint = last(tmp_path / "run" / "checkpoints")
    assert checkpoint.name == "step-00000001"
    assert {path.name for path in checkpoint.parent.iterdir()} == {checkpoint.name}
    folder = train("classification", "--save-every", "1", "--resume", "auto")
    assert same(weights_of(folder), weights_of(train("classification", out="whole")))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--batch-size", "128"], "fewer training samples than --batch-size 128: take"),
        (["--batch-size", "10", "--accumulate", "4"], "multiple of --accumulate, got 10 and 4"),
        (["--epochs", "0"], r"expected --epochs in 1 to inf, got 0"),
        (["--ema", "1.5"], r"expected --ema in 0 to 1, got 1.5"),
        (["--model", "no_such_vit"], "timm cannot make no_such_vit: Unknown model"),
        (["--model-arg", "colour=3"], "timm cannot make vit_tiny_patch16_224: .*colour"),
        (["--base", "nowhere.safetensors"], "--base nowhere.safetensors is no file"),
        (["--data", "nowhere"], "nowhere"),
        (["--seed", "-1"], r"expected --seed in 0 to inf, got -1"),
        (["--scenes", "0"], "expected a scene of 16x16 or more, got 0 of"),
        (["--img-size", "8"], r"expected a scene of 16x16 or more, got .* of \(8, 8\)"),
        (["--drop-path", "2"], "expected --drop-path from 0 to below 1, got 2"),
        (["--auto-augment", "nonsense"], "timm has no --auto-augment nonsense"),
        (["--mixup", "0.2", "--batch-size", "15"], "mix pairs: take parts of an even size"),
        (["--base", "damaged"], "--base damaged holds no weights: "),
        (["--fsdp"], "--fsdp needs several processes"),
    ],
)
def test_what_cannot_be_done_is_told(train, words, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("damaged").write_bytes(b"no weights")
    with pytest.raises(TrainingError, match=told):
        train("classification", *words)


def test_a_script_says_it_in_one_line(start, tiny):
    process = start("train_classification.py", *tiny, "--insert", "mix_fnn")
    printed, told = process.communicate(timeout=240)
    assert process.returncode == 1
    line = told.strip().splitlines()[-1]
    assert line.startswith("train_classification.py: error: ")
    assert "mix_ffn" in line
    assert "Traceback" not in told
    assert not printed
