import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OPTIONS = ["--quick", "--allocator", "system", "--batch-size", "1", "--models"]
MODEL = "vit_tiny_patch16_224"


@pytest.fixture
def surgery(monkeypatch):
    """The benchmark as a module; it finds ``common`` beside it, as it does when started."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("surgery", BENCHMARKS / "surgery.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LARGE", MODEL)
    yield module
    sys.modules.pop("common", None)


def test_it_writes_what_it_prints(surgery, tmp_path, capsys):
    out = tmp_path / "result.json"
    assert surgery.main([*OPTIONS, MODEL, "--out", str(out)]) == 0
    kept = json.loads(out.read_text())
    (row,) = kept["rows"]
    assert row["model"] == MODEL
    assert set(row["latency_ms"]) == {"plain", "binding"}
    assert f"{row['ratio_to_plain']['binding']['median']:.3f}" in capsys.readouterr().out
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
