import json
import re

import pytest
import torch
import torchvision
from torch import nn

SMALL = ["--quick", "--threads", "1", "--allocator", "system", "--img-size", "64"]
MODELS = ["vgg16", "mobilenetv1_100", "mobilenetv2_100"]


@pytest.fixture
def classics(load_benchmark):
    return load_benchmark("classics")


def test_it_writes_what_it_prints(classics, tmp_path, capsys):
    out = tmp_path / "classics.json"
    words = [*SMALL, "--batch-size", "1", "2", "--models", *MODELS]
    assert classics.main([*words, "--out", str(out)]) == 0
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    assert {path.name for path in tmp_path.iterdir()} == {
        f"classics.{ending}" for ending in ("json", "png", "svg")
    }
    assert [row["model"] for row in result["prices"]] == MODELS
    assert [timing["batch_size"] for timing in result["timings"]] == [1, 2]
    for timing in result["timings"]:
        assert list(timing["latency_ms"]) == MODELS
        assert list(timing["ratio"]) == ["vgg16/mobilenetv1_100", "vgg16/mobilenetv2_100"]
        shown = f"{timing['ratio']['vgg16/mobilenetv1_100']['median']:.2f}"
        assert shown in printed
    vgg, mobilenet, _ = result["prices"]
    assert vgg["intensity"] == vgg["macs"] / vgg["bytes"]
    assert sum(mobilenet["macs_by_category"].values()) == mobilenet["macs"]


PUBLISHED = {
    "vgg16": "vgg16", "resnet50": "resnet50", "densenet121": "densenet121",
    "inception_v3": "inception_v3", "mobilenetv2_100": "mobilenet_v2",
    "efficientnet_b0": "efficientnet_b0",
    "legacy_xception": (22_855_952, 8.357), "mobilenetv1_100": (4_231_976, 0.569),
}  # fmt: skip
"""Whose weights torchvision publishes, with their counts; parameters and billions of the others."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_have_their_published_counts(classics, name):
    with torch.device("meta"):
        found = classics.price(name, classics.build(name), classics.parse([]))
    expected = PUBLISHED[name]
    if isinstance(expected, str):
        meta = torchvision.models.get_model_weights(expected).DEFAULT.meta
        expected = meta["num_params"], meta["_ops"]
    digits = len(str(expected[1]).partition(".")[2])
    assert round(found["macs"] / 1e9, digits) == expected[1]
    training_head = 3_326_696 if name == "inception_v3" else 0
    assert found["params"] + training_head == expected[0]


def test_all_networks_are_those_with_published_counts(classics):
    assert set(classics.SIZES) == set(PUBLISHED)


def test_the_table_is_right_for_made_up_timings(classics):
    def priced(name, macs):
        return {
            "model": name, "input_size": (3, 224, 224), "params": 2_500_000, "macs": macs,
            "bytes": 3 * 2**20, "intensity": 7.25,
        }  # fmt: skip

    def spread(median):
        return {"median": median, "iqr": median / 8}

    result = {
        "prices": [priced("vgg16", 15 * 10**9), priced("mobilenetv1_100", 6 * 10**8)],
        "timings": [
            {
                "batch_size": 4,
                "latency_ms": {"vgg16": spread(80.0), "mobilenetv1_100": spread(16.0)},
                "ratio": {"vgg16/mobilenetv1_100": spread(5.0)},
            }
        ],
    }
    header, vgg, mobilenet = classics.rows_of(result)
    assert header[4:] == [
        "MiB", "MACs/byte", "ms, batch 4", "vgg16 over it: MACs", "time, batch 4",
    ]  # fmt: skip
    assert vgg[2:] == ["2.5", "15.00", "3", "7.2", "80.0 (10.0)", "", ""]
    assert mobilenet[3:] == ["0.60", "3", "7.2", "16.0 (2.0)", "25.0", "5.00 (0.62)"]
    del result["prices"][0]
    assert not classics.ratios(result)
    assert len(classics.rows_of(result)[0]) == 7


def test_norms_know_the_images(classics):
    args = classics.parse([*SMALL, "--models", "mobilenetv1_100"])
    torch.manual_seed(0)
    model = classics.make("mobilenetv1_100", args)
    assert not model.training
    means = [norm.running_mean for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)]
    assert all(mean.abs().max() > 0 for mean in means)
    assert 0.1 < model.forward_features(torch.randn(2, 3, 64, 64)).std() < 10


def test_what_is_not_finite_is_not_timed(classics, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(classics.timm, "create_model", lambda name: nn.Threshold(1e9, torch.inf))
    monkeypatch.setattr(classics, "time_arms", lambda *args: pytest.fail("timed"))
    words = [*SMALL, "--models", "vgg16", "--out", str(tmp_path / "classics.json")]
    assert classics.main(words) == 1
    assert re.search(
        r"error: the output of vgg16 is not finite: not timed", capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())
