import argparse
import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

import tokenconv as tc

WORDS = [
    *("--steps", "8", "--base-steps", "8", "--scenes", "64", "--test-scenes", "32"),
    *("--size", "16", "--width", "32", "--depth", "1", "--batch-size", "8"),
]


@pytest.fixture
def accuracy(load_benchmark):
    return load_benchmark("accuracy")


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


def test_arms_that_adapt_have_as_many_parameters(accuracy, args):
    args.width, args.depth, args.size = 64, 3, 24
    trained = {}
    for name, arm in accuracy.ADAPT.items():
        if arm.block:
            with torch.device("meta"):
                model = accuracy.insert(accuracy.plain("vit", args), arm, args)
            tc.trainable_(model, "inserted")
            trained[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    wanted = trained["mix_ffn"]
    assert 1.2 * wanted < trained.pop("peg") < 1.3 * wanted
    assert all(0.97 * wanted <= count <= 1.03 * wanted for count in trained.values())


def test_bases_are_named_by_how_they_were_trained(accuracy, args):
    few = accuracy.base_file(0, args)
    args.base_steps = 9
    assert accuracy.base_file(0, args) != few


def test_many_comparisons_ask_for_more(accuracy):
    """Significant alone at 5 %, and not as one of 21."""
    vit, peg = [0.2, 0.3, 0.5, 0.35], [0.3, 0.35, 0.58, 0.44]
    rows = accuracy.summary(result_of(accuracy, {"vit": vit, "peg": peg}))
    row = next(row for row in rows if row["arm"] == "peg")
    assert stats.ttest_rel(peg, vit).pvalue == pytest.approx(row["p"])
    assert 0.05 / 21 < row["p"] < 0.05
    assert row["verdict"] == "not shown"


def test_a_run_that_fails_ends_the_benchmark_and_keeps_the_others(accuracy, args, monkeypatch):
    first, second = [*accuracy.all_runs(args)][:2]
    monkeypatch.setattr(accuracy, "all_runs", lambda args: [first, second])
    monkeypatch.setattr(accuracy, "ProcessPoolExecutor", ThreadPool)

    def perform(run, args):
        if run == second:
            assert wait_for(args.out)  # until the first is kept
            raise RuntimeError("no")
        return {"curve": []}

    monkeypatch.setattr(accuracy, "perform", perform)
    monkeypatch.setattr(accuracy, "base_file", lambda seed, args: None)
    result = accuracy.open_result(args)
    with pytest.raises(RuntimeError, match="no"):
        accuracy.perform_all(args, result)
    assert json.loads(args.out.read_text())["runs"] == {first.key: {"curve": [], "session": 0}}


def wait_for(path, seconds=30):
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)
    return path.exists()


class ThreadPool(ThreadPoolExecutor):
    def __init__(self, workers, context, initializer, arguments):
        super().__init__(1)


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


@pytest.mark.parametrize("arm", ["head only", "convpass"])
def test_adapting_leaves_the_base_alone(accuracy, args, arm):
    run = accuracy.Run("adapt", "classification", arm, 1.0, 0)
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
    assert next(r for r in rows if r["arm"] == "pvt_v2")["verdict"] == "not shown"


def test_tables_and_curves_show_every_arm(accuracy, tmp_path):
    result = result_of(accuracy, {"vit": [0.2, 0.3, 0.5, 0.35], "leff": [0.1, 0.19, 0.41, 0.25]})
    table = accuracy.markdown(accuracy.summary(result))
    assert "| leff | 0.0 k | 23.8 (-10.0 ± " in table
    assert "worse" in table
    accuracy.draw(result, tmp_path / "curves.json")
    assert (tmp_path / "curves.png").is_file()
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
        "accuracy.json", "accuracy.png", "accuracy.svg",
    }  # fmt: skip
    monkeypatch.setattr(accuracy, "perform", None)  # nothing is left to be performed
    accuracy.main()
    assert json.loads(args.out.read_text())["runs"] == first["runs"]
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *words, "--lr", "0.5"])
    with pytest.raises(SystemExit, match="has other settings"):
        accuracy.main()
