"""Several processes on this machine, over gloo: Accelerate, DDP and FSDP2."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from predict import load_run
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training.checkpoints import last

EXAMPLES = Path(__file__).parents[3] / "examples"
SCRIPTS = {"classification": "train_classification.py", "segmentation": "train_segmentation.py"}


@pytest.fixture
def run(start, tiny, tmp_path):
    """Runs a script to its end and gives the losses and the history."""

    def finish(task, *words, out, **kwargs):
        process = start(SCRIPTS[task], *tiny, "--insert", "mix_ffn", *words, out=out, **kwargs)
        _, told = process.communicate(timeout=300)
        assert process.returncode == 0, told
        events = EventAccumulator(str(tmp_path / out / "tensorboard")).Reload()
        losses = [event.value for event in events.Scalars("train/loss")]
        return losses, json.loads((tmp_path / out / "history.json").read_text())

    return finish


@pytest.mark.parametrize(
    "task", ["classification", pytest.param("segmentation", marks=pytest.mark.slow)]
)
def test_two_processes_learn_and_judge_as_one_does(run, tmp_path, task):
    # 70 scenes to be judged by: the last batch is not full, and filled up for the second process.
    words = ["--scenes", "560", "--epochs", "1", "--batch-size", "80", "--accumulate", "2"]
    one = run(task, *words, out="one")
    two = run(task, *words, out="two", processes=2)
    assert len(one[0]) == 7
    assert one[0] == pytest.approx(two[0], abs=1e-5)
    assert one[1][0] == pytest.approx(two[1][0], abs=1e-3)
    weights = [
        load_file(last(tmp_path / f / "checkpoints") / "model.safetensors") for f in ("one", "two")
    ]
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=0, atol=1e-4)


@pytest.mark.parametrize("sharing", [[], pytest.param(["--fsdp"], marks=pytest.mark.slow)])
def test_two_processes_judge_pictures_of_their_own_sizes(run, masked, sharing):
    """One has more windows than the other, and the last has none of its own."""
    data = ["--data", str(masked(count=5, size=(30, 60))), "--num-classes", "2"]
    words = [*data, "--decoder", "linear", "--epochs", "1", "--batch-size", "4"]
    _, one = run("segmentation", *words, out="one")
    _, two = run("segmentation", *words, *sharing, out="two", processes=2)
    assert one[0] == pytest.approx(two[0], abs=1e-3)


@pytest.mark.slow
def test_shards_are_judged_by_two_processes_as_by_one(run, tmp_path, write_shards):
    """Weights stay what they are; each process trains on shards of its own."""
    for split, count in (("train", 8), ("val", 7)):
        write_shards(tmp_path, split, 2, count, "cls")
    words = ["--data", str(tmp_path / "{split}-*.tar"), "--num-classes", "2", "--samples", "16"]
    words += ["--lr", "0", "--batch-size", "4", "--epochs", "1"]
    _, one = run("classification", *words, out="one")
    _, two = run("classification", *words, out="two", processes=2)
    assert one == two


@pytest.mark.slow
def test_accelerate_launches_it(tiny, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    script = EXAMPLES / "train_classification.py"
    words = [*tiny, "--insert", "mix_ffn", "--out", str(tmp_path / "run")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *launch, str(script), *words],
        capture_output=True, text=True, env=env, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "run" / "history.json").read_text())) == 2


def test_weights_that_fsdp2_has_trained_load_on_one_process(run, tmp_path):
    words = ["--trainable", "inserted+head", "--model-arg=global_pool=avg"]
    losses, _ = run("classification", *words, out="plain")
    sharded, _ = run("classification", *words, "--fsdp", out="sharded", processes=2)
    assert losses == pytest.approx(sharded, abs=1e-4)
    names = {path.name for path in last(tmp_path / "sharded" / "checkpoints").iterdir()}
    assert "pytorch_model_fsdp.bin" in names  # which is read without pickle, unlike shards

    model, _ = load_run(tmp_path / "sharded")
    for key, value in trained(tmp_path / "plain").items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_fsdp2_goes_on_from_its_checkpoint(run, start, tiny, tmp_path):
    words = ["--fsdp", "--save-every", "1", "--resume", "auto", "--epochs", "4"]
    run("classification", *words, out="whole", processes=2)

    script = SCRIPTS["classification"]
    process = start(script, *tiny, "--insert", "mix_ffn", *words, out="cut", processes=2)
    end = time.monotonic() + 120
    while last(tmp_path / "cut" / "checkpoints") is None and time.monotonic() < end:
        time.sleep(0.05)
    process.terminate()  # torchrun tells its processes
    process.communicate(timeout=60)
    steps = int(last(tmp_path / "cut" / "checkpoints").name.partition("-")[2])
    assert 1 <= steps < 16
    run("classification", *words, out="cut", processes=2)
    for key, value in trained(tmp_path / "whole").items():
        torch.testing.assert_close(trained(tmp_path / "cut")[key], value, rtol=0, atol=1e-5)


def trained(folder):
    return load_file(last(folder / "weights") / "model.safetensors")
