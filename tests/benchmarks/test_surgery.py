import copy
import json

import pytest
import torch

OPTIONS = ["--quick", "--allocator", "system", "--batch-size", "1", "--models"]
MODEL = "vit_tiny_patch16_224"


@pytest.fixture
def surgery(load_benchmark, monkeypatch):
    module = load_benchmark("surgery")
    monkeypatch.setattr(module, "LARGE", MODEL)
    return module


def test_it_writes_what_it_prints(surgery, tmp_path, capsys):
    out = tmp_path / "result.json"
    assert surgery.main([*OPTIONS, MODEL, "--out", str(out)]) == 0
    kept = json.loads(out.read_text())
    (row,) = kept["rows"]
    assert row["model"] == MODEL
    assert set(row["latency_ms"]) == {"plain", "binding"}
    assert f"{row['ratio']['binding/plain']['median']:.3f}" in capsys.readouterr().out
    assert set(kept["seconds"]) == {"plan", "insert_", "remove_"}


def test_it_refuses_a_binding_that_changes_the_output(surgery, monkeypatch, tmp_path, capsys):
    def wrong(model):
        model = copy.deepcopy(model)
        with torch.no_grad():
            model.norm.weight += 1
        return model

    monkeypatch.setattr(surgery, "bound", wrong)
    out = tmp_path / "result.json"
    assert surgery.main([*OPTIONS, MODEL, "--out", str(out)]) == 1
    assert "changes the output" in capsys.readouterr().err
    assert not out.exists()
