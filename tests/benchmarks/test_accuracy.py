import argparse
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WORDS = [
    *("--steps", "8", "--base-steps", "8", "--scenes", "64", "--test-scenes", "32"),
    *("--size", "16", "--width", "32", "--depth", "1", "--batch-size", "8"),
]


@pytest.fixture
def accuracy(monkeypatch):
    """The benchmark as a module; it finds ``common`` beside it, as it does when started."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("accuracy", BENCHMARKS / "accuracy.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "accuracy", module)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("common", None)


@pytest.fixture
def args(accuracy, tmp_path):
    words = [*WORDS, "--out", str(tmp_path / "accuracy.json"), "--bases", str(tmp_path / "bases")]
    return accuracy.parse(words)


@pytest.mark.parametrize(
    ("width", "depth", "size"),
    [(64, 3, 24), pytest.param(192, 12, 64, marks=pytest.mark.slow)],
)
def test_arms_that_train_everything_have_as_many_parameters(accuracy, width, depth, size):
    args = argparse.Namespace(width=width, depth=depth, size=size)
    for name, arm in accuracy.SCRATCH.items():
        ratio = accuracy.matched_ratio(name, width, depth, size)
        base = accuracy.SCRATCH[accuracy.BASELINES["scratch"][arm.model]]
        with torch.device("meta"):
            model = accuracy.insert(accuracy.plain(arm.model, args, ratio), arm, args)
            baseline = accuracy.insert(accuracy.plain(arm.model, args), base, args)
        made, wanted = accuracy.count(model), accuracy.count(baseline)
        assert 0.99 * wanted <= made <= wanted


@pytest.mark.parametrize("task", ["classification", "segmentation"])
@pytest.mark.parametrize("setting", ["scratch", "adapt"])
def test_a_run_depends_on_its_seed_alone(accuracy, args, setting, task):
    arm = "mix_ffn"
    one, again, other = (
        accuracy.perform(accuracy.Run(setting, task, arm, 1.0, seed), args) for seed in (0, 0, 1)
    )
    assert [step for step, _ in one["curve"]] == list(range(1, 9))
    assert one["curve"] == again["curve"]
    assert (one["trained"] == one["params"]) == (setting == "scratch")
    assert one["params"] == other["params"]


def test_adapting_leaves_the_base_alone(accuracy, args):
    run = accuracy.Run("adapt", "classification", "convpass", 1.0, 0)
    model = accuracy.make_model(run, args)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    accuracy.train(model, run, args.steps, args)
    base = load_file(accuracy.base_file(0, args))
    moved = {key for key, value in model.state_dict().items() if not value.equal(before[key])}
    assert moved
    assert all(key.startswith("head.") or key not in base for key in moved)


def result_of(accuracy, values):
    """A result with these final values of ``vit`` and ``peg``, a seed each."""
    runs = {}
    for arm in accuracy.SCRATCH:
        for fraction in accuracy.FRACTIONS:
            for seed, value in enumerate(values.get(arm, [0.5] * 4)):
                run = accuracy.Run("scratch", "classification", arm, fraction, seed)
                runs[run.key] = {"curve": [(4, 0.1), (8, value)], "params": 10, "trained": 10}
    settings = {"settings": ["scratch"], "tasks": ["classification"], "seeds": 4, "scenes": 64}
    return {"settings": settings, "runs": runs}


def test_intervals_are_those_of_students_paired_test(accuracy):
    vit, peg = [0.2, 0.3, 0.5, 0.35], [0.3, 0.42, 0.58, 0.44]
    rows = accuracy.summary(result_of(accuracy, {"vit": vit, "peg": peg}))
    row = next(row for row in rows if row["arm"] == "peg")
    expected = stats.ttest_rel(peg, vit).confidence_interval(0.95)
    low, high = (row["difference"]["mean"] + sign * row["difference"]["half"] for sign in (-1, 1))
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert row["verdict"] == "better"
    assert next(row for row in rows if row["arm"] == "vit")["verdict"] == "baseline"
    assert next(r for r in rows if r["arm"] == "pvt_v2")["verdict"] == "no difference shown"


def test_tables_and_curves_show_every_arm(accuracy, tmp_path):
    result = result_of(accuracy, {"vit": [0.2, 0.3, 0.5, 0.35], "leff": [0.1, 0.2, 0.3, 0.25]})
    table = accuracy.markdown(accuracy.summary(result))
    assert "| leff | 0.0 k | 21.2 (-12.5 ± " in table
    assert "worse" in table
    accuracy.draw(result, tmp_path / "curves.svg")
    drawn = (tmp_path / "curves.svg").read_text()
    assert drawn.startswith("<?xml")


def test_what_is_there_is_not_run_again(accuracy, args, monkeypatch, capsys):
    words = ["--seeds", "2", "--settings", "scratch", "--tasks", "classification"]
    words += [*WORDS, "--out", str(args.out), "--bases", str(args.bases), "--workers", "2"]
    monkeypatch.setattr(accuracy, "SCRATCH", {"vit": accuracy.SCRATCH["vit"]})
    monkeypatch.setitem(accuracy.ARMS, "scratch", accuracy.SCRATCH)
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *words])
    accuracy.main()
    first = json.loads(args.out.read_text())
    assert len(first["runs"]) == 6
    assert all(math.isfinite(row["value"]["mean"]) for row in first["summary"])
    assert {path.name for path in args.out.parent.iterdir()} >= {
        "accuracy.json", "accuracy.md", "accuracy.png", "accuracy.svg",
    }  # fmt: skip
    monkeypatch.setattr(accuracy, "perform", None)  # nothing is left to be performed
    accuracy.main()
    assert json.loads(args.out.read_text())["runs"] == first["runs"]
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *words, "--lr", "0.5"])
    with pytest.raises(SystemExit, match="has other settings"):
        accuracy.main()
