"""What an analysis says of whole models, and the report of it."""

import json

import pytest
import timm
import torch
from torch import nn

import tokenconv as tc
from tokenconv.analysis import (
    Fields,
    Order,
    analyze,
    depthwise_kernels,
    effective_receptive_field,
    factorise,
    moved,
)
from tokenconv.analysis.report import write_analysis
from tokenconv.analysis.report.findings import findings, warnings

PLANTED = "layer1.0.conv2"


@pytest.fixture(scope="module")
def resnet():
    """One of its kernels is a blueprint, with a little noise; the others are random."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5)
    conv = model.get_submodule(PLANTED)
    with torch.no_grad():
        noise = torch.randn_like(conv.weight)
        conv.weight.copy_(factorise(conv.weight, 1, order="pw_dw").expand())
        conv.weight += 0.05 * conv.weight.norm() / noise.norm() * noise
    return model


@pytest.fixture(scope="module")
def found(resnet):
    return analyze(resnet, (3, 64, 64))


def test_the_layer_that_is_nearly_separable_is_found(found):
    chosen = {name: option for name, option in found.recommended.items() if option}
    assert list(chosen) == [PLANTED]
    option = chosen[PLANTED]
    assert (option.order, option.rank) == (Order.PW_DW, 1)
    assert 0.03 < option.relative_error < 0.06
    assert option.energy == pytest.approx(1 - option.relative_error**2)
    text = str(found)
    assert text.startswith(f"{len(found.layers)} dense convolutions, 1 worth taking apart at 95%")
    assert f"{PLANTED}  pw_dw rank 1, error 0.0" in text
    assert text.count("keep dense") == len(found.layers) - 1


def test_what_is_said_is_what_decomposing_does(resnet, found):
    model = timm.create_model("resnet10t", num_classes=5)
    model.load_state_dict(resnet.state_dict())
    for layer in found.layers[1:]:
        for order in Order:
            option = layer.option(order, 0.9)
            before = tc.cost(model, (3, 64, 64))
            done = tc.decompose_(model, rank=option.rank, order=order, layers=[layer.name])
            after = tc.cost(model, (3, 64, 64), sites=[layer.name])
            site = after.sites[layer.name]
            assert (site.macs, site.params) == (option.macs, option.params)
            assert after.macs == found.macs_with(
                {name: option if name == layer.name else None for name in found.recommended}
            )
            assert before.macs == found.macs
            error = done.layers[layer.name].relative_error
            assert error == pytest.approx(option.relative_error, rel=1e-6)
            done.undo_()


def test_an_analysis_leaves_the_model_alone(resnet):
    state = {key: value.clone() for key, value in resnet.state_dict().items()}
    resnet.train()
    analyze(resnet, (3, 64, 64))
    assert resnet.training
    assert all(torch.equal(value, state[key]) for key, value in resnet.state_dict().items())


def test_the_report_says_it_in_words_and_in_numbers(resnet, found, tmp_path):
    about = {"model": "resnet10t", "weights": "random", "command": "tokenconv analyze resnet10t"}
    field = effective_receptive_field(nn.Conv2d(3, 2, 3, padding=1), torch.randn(1, 3, 9, 9))
    fields = [Fields("attention_only", field, [torch.tensor([1.0, 2.0]), torch.tensor([3.0])])]
    write_analysis(found, tmp_path, about, fields)
    assert {path.name for path in tmp_path.iterdir()} == {
        "analysis.json", "analysis.png", "analysis.svg", "report.html", "report.md",
    }  # fmt: skip
    kept = json.loads((tmp_path / "analysis.json").read_text())
    layers = {layer["name"]: layer for layer in kept["layers"]}
    assert layers[PLANTED]["recommended"]["order"] == "pw_dw"
    assert layers[PLANTED]["recommended"]["macs"] == found.recommended[PLANTED].macs
    assert kept["fields"][0]["radius_pixels"]["0.9"] == 1.5
    assert kept["fields"][0]["attention_distance_tokens"] == [[1.0, 2.0], [3.0]]
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text().replace("&#39;", "'")
        assert f"1 of {len(found.layers)} dense convolutions are nearly separable" in text
        assert f"one pair keeps 95% of their energy ({PLANTED})" in text
        assert "The weights are random" in text
        assert "attention looks 1.50 tokens far in the first layer and 3.00 in the last" in text
        assert "tokenconv analyze resnet10t" in text
        assert "1x1: it looks at one position" in text
    html = (tmp_path / "report.html").read_text()
    assert html.count("<svg") == 5
    assert html.count('href="data:image/png;base64,') == 3  # two heat maps and a field
    assert "http://" not in html.replace("http://www.w3.org", "")


def test_a_model_without_dense_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4))
    found = analyze(model, (3, 8, 8))
    assert found.layers == []
    assert findings(found, []) == ["There is no dense convolution."]
    assert warnings(found, {"weights": "x"}) == []


def test_bad_requests(resnet):
    with pytest.raises(tc.AnalysisError, match=r"expected 0 < energy <= 1, got 1\.2"):
        analyze(resnet, (3, 64, 64), energy=1.2)
    with pytest.raises(tc.UnknownNameError, match="unknown dense convolution 'layer9'"):
        analyze(resnet, (3, 64, 64), layers="layer9")
    with pytest.raises(tc.MeasurementError, match="refuses an image of 4x64x64"):
        analyze(resnet, (4, 64, 64))


# --- depthwise kernels ---


def test_inserted_kernels_begin_as_the_identity_and_are_seen_to_move():
    model = timm.create_model("test_vit", num_classes=3)
    tc.insert_(model, "mix_ffn")
    kernels = depthwise_kernels(model)
    assert [each.name for each in kernels] == [
        f"blocks.{i}.mlp.act.before" for i in range(len(kernels))
    ]
    assert all(each.has_residual for each in kernels)
    assert all(each.distance.eq(0).all() and each.off_centre.eq(0).all() for each in kernels)
    found = analyze(model, (3, 160, 160))
    assert "All 6 inserted depthwise convolutions are still the identity." in findings(found, [])
    before = timm.create_model("test_vit", num_classes=3)
    tc.insert_(before, "mix_ffn")
    model.blocks[2].mlp.act.before.weight.data[5, 0, 0, 1] = -3.0
    moved_one = depthwise_kernels(model)[2]
    assert moved_one.distance[5] == 3
    assert moved_one.off_centre[5] == pytest.approx(9 / 10)
    assert moved_one.distance.count_nonzero() == 1
    distances = moved(before, model)
    assert distances["blocks.2.mlp.act.before"][5] == 3
    assert sum(each.count_nonzero() for each in distances.values()) == 1
    (line,) = [
        line for line in findings(analyze(model, (3, 160, 160)), []) if "moved furthest" in line
    ]
    assert "blocks.2.mlp.act.before has moved furthest" in line


def test_kernels_of_the_models_own_convolutions_have_no_residual():
    kernels = depthwise_kernels(timm.create_model("pvt_v2_b0"))
    assert len(kernels) == 8
    assert not any(each.has_residual for each in kernels)
    assert depthwise_kernels(nn.Conv1d(4, 4, 3, groups=4)) == []
    assert depthwise_kernels(nn.Conv3d(4, 4, 3, groups=4)) == []


def test_fields_leave_the_model_alone():
    model = timm.create_model("resnet10t", num_classes=3)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    Fields.of("it", model, torch.randn(2, 3, 64, 64))
    assert model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_fields_need_intermediate_features():
    with pytest.raises(tc.AnalysisError, match="with forward_intermediates, got Sequential"):
        Fields.of("it", nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 8, 8))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.used(x)


def test_a_convolution_that_never_runs_is_passed_over():
    found = analyze(Unused(), (3, 8, 8))
    assert [layer.name for layer in found.layers] == ["used"]
    assert found.passed_over == {"unused": "does not run in a forward pass"}


def test_one_channel_is_no_sign_of_separability():
    """Kernels of one output, or of one input, are one pair whatever they are."""
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 1, 3))
    assert findings(analyze(model, (1, 9, 9)), [])[0].startswith("0 of 2 dense convolutions")


def test_less_than_a_tenth_is_not_worth_it():
    model = nn.Sequential(nn.Conv2d(16, 8, 3))
    with torch.no_grad():
        model[0].weight.copy_(factorise(model[0].weight, 4).expand())
    found = analyze(model, (16, 8, 8), energy=0.9999)
    option = found.layers[0].option(Order.DW_PW, 0.9999)
    assert (option.rank, option.macs / found.layers[0].macs) == (4, 4 * (9 + 8) / (9 * 8))
    assert found.recommended == {"0": None}


def test_a_stride_makes_fewer_parameters_the_more_arithmetic():
    """One blueprint per filter, of two: one pair with the pointwise part in front of the stride."""
    model = nn.Sequential(nn.Conv2d(32, 32, 3, stride=2, padding=1))
    blueprints = torch.einsum("ot,txy->oxy", torch.randn(32, 2), torch.randn(2, 3, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(32, 32, 1, 1) * blueprints[:, None])
    found = analyze(model, (32, 16, 16), energy=0.9999)
    first, second = (found.layers[0].option(order, 0.9999) for order in Order)
    assert (first.rank, second.rank) == (2, 1)
    assert second.params < first.params
    assert first.macs < second.macs
    assert found.recommended["0"] == first
    tc.decompose_(model, rank=2)
    after = tc.cost(model, (32, 16, 16))
    assert (after.macs, after.params) == (first.macs, first.params)


def test_structure_is_what_random_kernels_do_not_have(found):
    (line,) = [line for line in findings(found, []) if "within themselves" in line]
    assert line.startswith(f"The filters of 1 of {len(found.layers)} are")
