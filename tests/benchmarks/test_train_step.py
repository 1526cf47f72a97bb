import json
import sys

import pytest


@pytest.fixture
def train_step(load_benchmark, monkeypatch):
    module = load_benchmark("train_step")
    monkeypatch.setattr(module, "SKIPPED", 1)
    monkeypatch.setattr(module, "COUNTED", 1)
    monkeypatch.setattr(module, "PAIRS", module.PAIRS[:1])
    return module


def test_it_writes_what_it_prints(train_step, monkeypatch, tmp_path, capsys):
    out = tmp_path / "result.json"
    words = ["--quick", "--allocator", "system", "--loaders", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["train_step.py", *words])
    train_step.main()
    kept, printed = json.loads(out.read_text()), capsys.readouterr().out
    loading = kept["loading"]
    assert set(loading["latency_ms"]) == {"cached", "first_epoch", "later_epochs"}
    assert set(loading["ratio_to_cached"]) == {"first_epoch", "later_epochs"}
    assert f"later epochs: {loading['ratio_to_cached']['later_epochs']['median']:.3f}x" in printed
    (row,) = kept["memory"]
    peaks = row["peak_mib"]
    assert row["ratio"] == pytest.approx(peaks["inserted+head"] / peaks["all"])
    assert 0.2 < row["ratio"] < 0.9
    assert f"{row['ratio']:.3f}" in printed


def test_later_epochs_begin_with_scenes_that_are_there(train_step, monkeypatch):
    composed = []
    scenes = train_step.train_classification.DigitScenes
    compose = scenes._compose
    monkeypatch.setattr(scenes, "_compose", lambda self, i: composed.append(i) or compose(self, i))
    args = type("Args", (), {"batch_size": 4, "loaders": 0})
    source = train_step.batches(args, 16, 2)
    next(source)
    assert sorted(composed) == list(range(16))
    next(source)
    assert len(composed) == 16
