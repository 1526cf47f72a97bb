"""What training made of kernels."""

import json

import look
import pytest
import torch
from predict import load_run


def test_runs_are_looked_at_beside_each_other(train, tmp_path, monkeypatch, capsys):
    control = train("classification", "--insert", "mix_ffn", "--control", out="control")
    hybrid = train("classification", "--insert", "mix_ffn", out="hybrid")
    monkeypatch.setattr("sys.argv", ["look.py"])
    look.main([str(control), str(hybrid), "--images", "4", "--out", str(tmp_path / "looks")])
    assert "1 dense convolutions" in capsys.readouterr().out
    kept = json.loads((tmp_path / "looks" / "analysis.json").read_text())
    assert [each["name"] for each in kept["fields"]] == ["control", "hybrid"]
    assert all(len(each["attention_distance_tokens"]) == 4 for each in kept["fields"])
    model, _ = load_run(hybrid)
    weight = model.blocks[2].mlp.act.before.weight
    (third,) = [each for each in kept["depthwise"] if each["name"].startswith("blocks.2.")]
    median = weight.double().flatten(1).norm(dim=1).quantile(torch.tensor(0.5).double()).item()
    assert third["distance_from_identity"][1] == pytest.approx(median) != 0
    assert (tmp_path / "looks" / "report.html").exists()
