"""Separable layers as the dense convolutions they are, and started from trained ones."""

import pytest
import timm
import torch
from bsconv.pytorch import BSConvS as PublishedS
from bsconv.pytorch import BSConvU as PublishedU
from torch import nn

import tokenconv as tc
from tokenconv.analysis import decompose, expand, expand_mlp, factors_of, init_from_dense_


def separable(bias):
    layer = tc.SeparableConv(6, 5, out_dim=4, dilation=2, bias=bias)
    return layer, lambda x: tc.tokens_to_map(layer(tc.map_to_tokens(x), *x.shape[2:]), x.shape[2:])


def on_maps(make):
    def made(bias):
        layer = make(bias)
        return layer, layer

    return made


LAYERS = {
    "SeparableConv": separable,
    "BSConvU": on_maps(lambda b: tc.create_block("bsconv_u", dim=6, out_dim=4, stride=2, bias=b)),
    "BSConvS": on_maps(lambda b: tc.create_block("bsconv_s", dim=6, out_dim=4, bias=b)),
    "published BSConv-U": on_maps(lambda b: PublishedU(6, 4, 3, padding=1, bias=b)),
    "published BSConv-S": on_maps(lambda b: PublishedS(6, 4, 3, padding=1, bias=b)),
    "three of dw_pw": on_maps(lambda b: decompose(nn.Conv2d(6, 4, 3, stride=2, bias=b), rank=3)),
    "two of pw_dw": on_maps(
        lambda b: decompose(nn.Conv2d(6, 4, (3, 5), groups=2, bias=b), rank=2, order="pw_dw")
    ),
    "reflecting": on_maps(
        lambda b: decompose(nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect", bias=b), rank=2)
    ),
    "two pointwise": on_maps(
        lambda b: nn.Sequential(
            nn.Conv2d(6, 6, 3, groups=6, bias=b), nn.Conv2d(6, 2, 1, bias=b), nn.Conv2d(2, 4, 1)
        )
    ),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_they_are_dense_convolutions(name, bias):
    layer, run = LAYERS[name](bias)
    layer.double()
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    dense = expand(layer)
    torch.testing.assert_close(dense(x), run(x))
    assert type(dense) is nn.Conv2d
    torch.testing.assert_close(factors_of(layer).expand(), dense.weight)


@pytest.mark.parametrize("name", LAYERS)
def test_started_from_what_they_can_be_they_are_it(name):
    torch.manual_seed(1)
    teacher, _ = LAYERS[name](True)
    student, run = LAYERS[name](True)
    dense = expand(teacher)
    x = torch.randn(2, 6, 9, 8)
    assert not torch.allclose(run(x), dense(x), atol=1e-2)
    assert init_from_dense_(student, dense) < 1e-6
    torch.testing.assert_close(run(x), dense(x), rtol=1e-4, atol=1e-5)


def test_started_from_any_kernel_they_are_the_nearest():
    dense = nn.Conv2d(6, 8, 3, padding=1)
    layer = tc.SeparableConv(6, 3, out_dim=8)
    error = init_from_dense_(layer, dense)
    nearest = decompose(dense, rank=1)
    assert error == pytest.approx(nearest.relative_error, rel=1e-4)
    torch.testing.assert_close(expand(layer).weight, expand(nearest).weight)
    torch.testing.assert_close(expand(layer).bias, dense.bias)


@pytest.mark.parametrize("order", ["dw_pw", "pw_dw"])
def test_patch_embeddings_and_stems_start_from_dense_ones(order):
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=3).eval()
    proj = vit.patch_embed.proj
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        expected = proj(x)
        started = decompose(proj, rank=3, order=order)
        assert started.relative_error < 1
        out = started(x)
        assert out.shape == expected.shape
        assert (out - expected).norm() < (1 + 1e-3) * expected.norm()
    blank = decompose(nn.Conv2d(3, 64, 16, stride=16), rank=3, order=order)
    error = init_from_dense_(blank, proj)
    assert error == pytest.approx(started.relative_error, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(blank(x), started(x), rtol=1e-4, atol=1e-4)


class WithNorm(nn.Sequential):
    pass


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            lambda: WithNorm(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1)),
            "WithNorm is no separable layer: it has a BatchNorm2d",
        ),
        (lambda: nn.Sequential(nn.Conv2d(4, 6, 1)), "expected one depthwise part at the beginning"),
        (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 1)), "expected one depthwise"),
        (lambda: nn.Identity(), "ones, got nothing"),
        (
            lambda: nn.Sequential(tc.DWConv(4, residual=True), nn.Linear(4, 6)),
            "has a residual or an activation",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 1, stride=2)),
            "no 1x1 convolution with stride 1",
        ),
        (
            lambda: nn.Sequential(
                nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 6, 1)
            ),
            "several pointwise parts of Sequential has groups",
        ),
    ],
)
def test_what_is_no_separable_layer(layer, message):
    with pytest.raises(tc.AnalysisError, match=message):
        expand(layer())


def test_a_bias_in_front_is_no_constant_at_the_borders():
    layer = nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6))
    with pytest.raises(tc.AnalysisError, match="near the borders"):
        expand(layer)
    init_from_dense_(layer, nn.Conv2d(4, 6, 3, padding=1))  # takes that bias away
    expand(layer)


def test_kernels_that_do_not_fit_change_nothing():
    layer = tc.SeparableConv(6, 3, out_dim=8, bias=False)
    before = [p.clone() for p in layer.parameters()]
    for conv, message in (
        (nn.Conv2d(6, 8, 5), r"expected a kernel \(8, 6, 3, 3\) .* got \(8, 6, 5, 5\)"),
        (nn.Conv2d(12, 8, 3, groups=2, bias=False), "in 1 groups as the layer has, got .* in 2"),
        (nn.Conv2d(6, 8, 3), "no place for one"),
    ):
        with pytest.raises(tc.AnalysisError, match=message):
            init_from_dense_(layer, conv)
    assert all(map(torch.equal, before, layer.parameters()))


# --- an MLP with an inserted convolution ---


@pytest.mark.parametrize("name", ["test_vit", "pvt_v2_b0"])
@pytest.mark.parametrize("size", [(3, 5), (1, 1), (8, 4)])
def test_an_mlp_with_a_convolution_is_a_dense_one_also_at_the_borders(name, size):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3)
    if name == "test_vit":
        tc.insert_(model, "mix_ffn")
        mlp = model.blocks[1].mlp
        conv = mlp.act.before
    else:
        mlp = model.stages[1].blocks[0].mlp
        conv = mlp.dwconv
    for parameter in (*mlp.fc1.parameters(), *conv.parameters()):
        nn.init.normal_(parameter)
    mlp.double()
    x = torch.randn(2, mlp.fc1.in_features, *size, dtype=torch.float64)
    hidden = mlp.fc1(tc.map_to_tokens(x))
    if name == "test_vit":
        convolved = tc.DWConv.forward(conv, hidden, *size)
        expected = tc.tokens_to_map(convolved, size)
    else:
        expected = conv(tc.tokens_to_map(hidden, size))
    dense = expand_mlp(mlp.fc1, conv)
    torch.testing.assert_close(dense(x), expected)
    taps = conv.weight[0].numel()
    dim, width = mlp.fc1.in_features, mlp.fc1.out_features
    assert dense.params == width * (dim + 1) + width * (taps + 1)
    assert dense.saving == pytest.approx(taps * dim * width / (width * dim + width * taps), rel=0.1)


def test_the_bias_of_the_linear_layer_is_what_differs_at_the_borders():
    fc1, conv = nn.Linear(4, 6).double(), tc.DWConv(6).double()
    dense = expand_mlp(fc1, conv)
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    constant = dense.bias + fc1.bias * conv.weight.sum((1, 2, 3))
    wrong = nn.functional.conv2d(x, dense.weight, constant, padding=1)
    difference = (wrong - dense(x)).abs().amax((0, 1)) > 1e-9
    inside = torch.zeros(5, 5, dtype=torch.bool)
    inside[1:-1, 1:-1] = True
    assert torch.equal(difference, ~inside)


@pytest.mark.parametrize(
    "conv",
    [
        tc.DWConv(5),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Conv2d(6, 6, 3, padding=1, stride=2, groups=6),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.Conv2d(6, 6, 2, padding=1, groups=6),
        nn.Conv2d(6, 6, (5, 3), padding=1, groups=6),
        nn.Conv2d(6, 6, 3, padding=1, dilation=(1, 2), groups=6),
    ],
)
def test_only_depthwise_convolutions_of_the_width_that_keep_the_size(conv):
    with pytest.raises(tc.AnalysisError, match="expected a depthwise convolution of 6 channels"):
        expand_mlp(nn.Linear(4, 6), conv)


@pytest.mark.parametrize("keeps", ["same", (1, 1)])
def test_paddings_that_keep_the_size(keeps):
    fc1, conv = nn.Linear(4, 6), nn.Conv2d(6, 6, 3, padding=keeps, groups=6)
    x = torch.randn(1, 4, 5, 7)
    expected = conv(tc.tokens_to_map(fc1(tc.map_to_tokens(x)), (5, 7)))
    torch.testing.assert_close(expand_mlp(fc1, conv)(x), expected)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Sequential(nn.Conv2d(4, 36, 3, groups=4), nn.Conv2d(36, 4, 1)),
        lambda: nn.Sequential(nn.Conv2d(1, 8, 1, bias=False), nn.Conv2d(8, 4, 3, groups=4)),
    ],
)
def test_more_pairs_than_any_kernel_needs(layer):
    layer = layer()
    conv = nn.Conv2d(layer[0].in_channels, 4, 3)
    assert init_from_dense_(layer, conv) < 1e-6
    x = torch.randn(2, conv.in_channels, 9, 8)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-4, atol=1e-5)


def test_a_wide_detour_is_no_obstacle():
    layer = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 12, 1), nn.Conv2d(12, 4, 1))
    conv = nn.Conv2d(6, 4, 3)
    nearest = decompose(conv, rank=1)
    assert init_from_dense_(layer, conv) == pytest.approx(nearest.relative_error, rel=1e-4)
    torch.testing.assert_close(expand(layer).weight, nearest.weight, rtol=1e-4, atol=1e-5)
