"""Several processes on this machine, over gloo: Accelerate, DDP and FSDP2."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training.checkpoints import last

SCRIPTS = {"classification": "train_classification.py", "segmentation": "train_segmentation.py"}
METRIC = {"classification": "top1", "segmentation": "miou"}


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


@pytest.mark.parametrize("task", SCRIPTS)
def test_two_processes_learn_and_judge_as_one_does(run, tmp_path, task):
    # 70 scenes to be judged by: the last batch is not full, and filled up for the second process.
    words = ["--scenes", "560", "--epochs", "1", "--batch-size", "80", "--accumulate", "2"]
    one = run(task, *words, out="one")
    two = run(task, *words, out="two", processes=2)
    assert len(one[0]) == 7
    assert one[0] == pytest.approx(two[0], abs=1e-5)
    assert one[1][0] == pytest.approx(two[1][0], abs=1e-3)
    weights = [load_file(last(tmp_path / f / "checkpoints") / "model.safetensors") for f in ("one", "two")]
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=0, atol=1e-4)


def test_fsdp2_trains_goes_on_and_its_weights_load_on_one_process(run, start, tiny, tmp_path):
    words = ["--trainable", "inserted+head", "--seed", "3"]
    plain = run("classification", *words, "--epochs", "2", out="plain")
    first = run("classification", *words, "--fsdp", out="sharded", processes=2)
    assert plain[0] == pytest.approx(first[0], abs=1e-4)
    names = {path.name for path in (last(tmp_path / "sharded" / "checkpoints")).iterdir()}
    assert "pytorch_model_fsdp_0" in names

    kept = last(tmp_path / "sharded" / "weights")
    whole = load_file(kept / "model.safetensors")
    for key, value in load_file(last(tmp_path / "plain" / "weights") / "model.safetensors").items():
        torch.testing.assert_close(whole[key], value, rtol=0, atol=1e-3)
    assert (kept / "plan.json").exists()


def test_fsdp2_goes_on_from_its_checkpoint(run, start, tiny, tmp_path):
    words = [*tiny, "--insert", "mix_ffn", "--fsdp", "--save-every", "1", "--resume", "auto"]
    whole = run("classification", *words, out="whole", processes=2)
    process = start(SCRIPTS["classification"], *words, out="cut", processes=2)
    while process.poll() is None and last(tmp_path / "cut" / "checkpoints") is None:
        pass
    process.kill()
    process.communicate()
    _, told = (process := start(SCRIPTS["classification"], *words, out="cut", processes=2)).communicate()
    assert process.returncode == 0, told
    assert re.search(r"going on from step [1-8] of 8", _)
    ends = [load_file(last(tmp_path / f / "weights") / "model.safetensors") for f in ("whole", "cut")]
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=0, atol=1e-4)
    assert whole
