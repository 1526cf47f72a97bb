import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = ["--quick", "--threads", "1", "--img-size", "32", "--batch-size", "1", "2"]
# The whole process would keep its memory, and other tests share it.
IN_PROCESS = [*SMALL, "--allocator", "system", "--arms", "eager", "accelerated", "plain"]


@pytest.fixture
def models(load_benchmark):
    return load_benchmark("models")


def test_writes_what_it_prints(models, tmp_path, capsys):
    out = tmp_path / "result.json"
    assert models.main([*IN_PROCESS, "--models", "pvt_v2_b0", "--out", str(out)]) == 0
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert re.fullmatch(r"unknown|[0-9a-f]{40}", result["commit"])
    assert result["img_size"] == 32
    assert [(row["model"], row["mode"], row["batch_size"]) for row in result["rows"]] == [
        ("pvt_v2_b0", "inference", 1),
        ("pvt_v2_b0", "inference", 2),
        ("pvt_v2_b0", "training", 2),
    ]
    for row in result["rows"]:
        assert list(row["latency_ms"]) == ["eager", "accelerated"]
        assert list(row["ratio"]) == ["eager/accelerated"]
        assert set(row["difference"]) == (
            {"logits", "gradients"} if row["mode"] == "training" else {"logits"}
        )
        assert all(0 <= share < 1e-5 for share in row["difference"].values())
        assert f"{row['ratio']['eager/accelerated']['median']:.3f}" in printed


@pytest.mark.slow
@pytest.mark.compile
def test_compiled_arms_compute_the_same(tmp_path):
    out = tmp_path / "result.json"
    words = [*SMALL, "--batch-size", "2", "--models", "pvt_v2_b0", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "models.py", *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for row in json.loads(out.read_text())["rows"]:
        assert "compiled/accelerated_compiled" in row["ratio"]
        assert all(0 < share < 1e-5 for share in row["difference"].values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_runs_on_a_gpu(models, tmp_path):
    out = tmp_path / "result.json"
    words = [*IN_PROCESS, "--device", "cuda", "--models", "vit_small_patch16_224"]
    assert models.main([*words, "--out", str(out)]) == 0
    for row in json.loads(out.read_text())["rows"]:
        assert set(row["peak_bytes"]) == {"eager", "accelerated", "plain"}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda out: out * 1.001, "logits"),
        (lambda out: out + 0.1 * (out - out.detach()), "gradients"),
        (lambda out: out * float("nan"), "logits"),
    ],
    ids=["logits", "gradients", "nan"],
)
def test_refuses_to_time_arms_that_differ(models, monkeypatch, tmp_path, capsys, change, what):
    right = models.arms_of

    def wrong(*args):
        arms = right(*args)
        arms["accelerated"].register_forward_hook(lambda module, args, out: change(out))
        return arms

    monkeypatch.setattr(models, "arms_of", wrong)
    monkeypatch.setattr(models, "time_arms", lambda *args: pytest.fail("timed"))
    out = tmp_path / "result.json"
    assert models.main([*IN_PROCESS, "--models", "pvt_v2_b0", "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert re.search(rf"error: accelerated differs .* on {what} of pvt_v2_b0, ", printed.err)
    assert not printed.out
    assert not list(tmp_path.iterdir())


def test_gradients_that_are_rounding_alone_are_not_compared_with_themselves(models):
    large, tiny = torch.ones(2), torch.tensor([1e-9, -1e-9])
    arms = {"eager": [large, tiny], "other": [large, -tiny]}
    assert models.check_alike(arms, 1e-4, "gradients", models.LEAST) < 1e-6
    with pytest.raises(ValueError, match=r"other differs from eager by 2.0e\+00 of the largest"):
        models.check_alike(arms, 1e-4, "gradients")


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch16_224",
        "segformer_b0",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("pvt_v2_b2", "segformer_b2")),
    ],
)
def test_arms_are_the_same_model_and_share_its_weights(models, name):
    args = models.parse([*IN_PROCESS, "--models", name])
    arms = models.arms_of(name, args)
    assert set(arms) == {"eager", "accelerated"} | ({"plain"} if "vit" in name else set())
    own = dict(arms["eager"].named_parameters())
    assert all(own[key] is parameter for key, parameter in arms["accelerated"].named_parameters())
    images = torch.randn(1, 3, 32, 32)
    for case in (models.Case(name, mode, 1, arms, images) for mode in models.MODES):
        assert max(case.check("float32").values()) < 1e-5
    if "plain" in arms:
        assert {id(p) for p in arms["plain"].parameters()} < {id(p) for p in own.values()}
        expected, got = (models.infer(arms[arm], images)[0] for arm in ("eager", "plain"))
        assert not torch.allclose(expected, got, rtol=0.01)  # the convolutions do something


def test_a_training_step_leaves_the_weights_and_no_gradients(models):
    args = models.parse([*IN_PROCESS, "--models", "pvt_v2_b0"])
    arms = models.arms_of("pvt_v2_b0", args)
    before = {key: value.clone() for key, value in arms["eager"].state_dict().items()}
    case = models.Case("pvt_v2_b0", "training", 1, arms, torch.randn(1, 3, 32, 32))
    for step in case.steps().values():
        step()
    assert all(torch.equal(before[key], value) for key, value in arms["eager"].state_dict().items())
    assert all(parameter.grad is None for parameter in arms["eager"].parameters())


def test_the_table_is_right_for_made_up_timings(models):
    spread = {"median": 2.0, "iqr": 0.25}
    rows = [
        {"model": "a", "mode": "inference", "batch_size": 4, "latency_ms": {"eager": spread},
         "ratio": {"eager/accelerated": {"median": 1.5, "iqr": 0.125}},
         "peak_bytes": {"eager": 3 * 2**20}},
        {"model": "b", "mode": "training", "batch_size": 4, "latency_ms": {"compiled": spread},
         "ratio": {}},
    ]  # fmt: skip
    header, first, second = models.table(rows).splitlines()
    assert re.split(r"\s{2,}", header) == [
        "model", "mode", "batch", "eager ms", "compiled ms", "eager/accelerated", "eager MiB",
    ]  # fmt: skip
    assert first.split() == ["a", "inference", "4", "2.00", "1.500", "(0.125)", "3"]
    assert second.split() == ["b", "training", "4", "2.00"]


def test_models_that_cannot_be_made_here_are_left_out(models, monkeypatch, capsys):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    args = models.parse([])
    assert args.models == ["pvt_v2_b0", "pvt_v2_b2", "vit_small_patch16_224"]
    assert "no SegFormer: transformers is not installed" in capsys.readouterr().out


def test_batch_sizes_are_those_of_the_device(models):
    assert models.parse([]).batch_size == [1, 4]
    assert models.parse(["--device", "cuda"]).batch_size == [64]
