import pytest
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tokenconv as tc

MODELS = {
    "test_vit": 160,
    "vit_tiny_patch16_224": 224,
    "vit_small_patch14_reg4_dinov2": 518,
    "pvt_v2_b0": 224,
    "pvt_v2_b2_li": 224,
    "resnet18": 224,
}


def flop_counter_macs(model, size):
    counter = FlopCounterMode(display=False)
    # As matmuls: torch 2.14 does not count the attention kernel of CPUs.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model.eval()(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(("name", "size"), MODELS.items(), ids=MODELS)
def test_macs_agree_with_the_flop_counter_on_a_real_forward(name, size):
    model = timm.create_model(name)
    cost = tc.cost(model, (3, size, size))
    assert cost.params == sum(p.numel() for p in model.parameters())
    assert cost.macs == flop_counter_macs(model, size)


def test_published_counts():
    """PVTv2's README gives 3.7 M parameters and 0.6 GMACs for B0; ResNet-18 has 1.8 GMACs."""
    pvt = tc.cost(timm.create_model("pvt_v2_b0"), (3, 224, 224))
    assert (round(pvt.params / 1e6, 1), round(pvt.macs / 1e9, 1)) == (3.7, 0.6)
    resnet = tc.cost(timm.create_model("resnet18"), (3, 224, 224))
    assert (resnet.params, round(resnet.macs / 1e9, 2)) == (11_689_512, 1.81)


@pytest.mark.parametrize(
    ("layer", "macs"),
    [
        (nn.Conv2d(6, 8, 3, padding=1), 5 * 7 * 8 * 6 * 9),
        (nn.Conv2d(6, 6, 5, padding=2, groups=6), 5 * 7 * 6 * 25),
        (nn.Conv2d(6, 12, 3, padding=1, groups=3), 5 * 7 * 12 * 2 * 9),
        (nn.Conv2d(6, 8, 3, stride=2, padding=1), 3 * 4 * 8 * 6 * 9),
        (nn.ConvTranspose2d(6, 8, 2, stride=2), 5 * 7 * 6 * 8 * 4),
        (nn.Sequential(nn.Flatten(2), nn.Linear(35, 11)), 6 * 35 * 11),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(6), nn.AvgPool2d(2)), 0),
    ],
    ids=lambda value: str(value)[:40],
)
def test_macs_of_single_layers_are_the_closed_formulas(layer, macs):
    assert tc.cost(layer, (6, 5, 7)).macs == macs


class Attention(nn.Module):
    """``heads`` heads of 4 channels over the 35 positions of a map."""

    def __init__(self, fused, heads=2):
        super().__init__()
        self.fused, self.heads = fused, heads

    def forward(self, x):
        q = x.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3)
        if self.fused:
            return nn.functional.scaled_dot_product_attention(q, key=q, value=q)
        return (q @ q.transpose(2, 3)).softmax(-1) @ q


@pytest.mark.parametrize("fused", [True, False])
def test_attention_counts_its_two_matmuls(fused):
    assert tc.cost(Attention(fused), (8, 5, 7)).macs == 2 * (2 * 35 * 35 * 4)


def test_fused_attention_moves_queries_keys_values_and_result_only():
    assert tc.cost(Attention(fused=True), (8, 5, 7)).bytes == 4 * (8 * 35) * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_what_operators_read_and_write(dtype):
    linear = nn.Linear(7, 11, bias=False, dtype=dtype)
    size = torch.finfo(dtype).bits // 8
    read, written = 6 * 5 * 7 + 7 * 11, 6 * 5 * 11
    assert tc.cost(linear, (6, 5, 7)).bytes == (read + written) * size
    views = nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (5, 7)), nn.Identity())
    assert tc.cost(views, (6, 5, 7)).bytes == 0
    activation = tc.cost(nn.ReLU().to(dtype), (6, 5, 7))
    assert activation.bytes == 2 * 6 * 5 * 7 * 4  # no parameter says a dtype: float32


def test_folding_tokens_is_free():
    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = tc.DWConv(6)

        def forward(self, x):
            return self.conv(x.flatten(2).transpose(1, 2).contiguous(), 5, 7)

    positions, weights = 5 * 7 * 6, 6 * 10
    cost = tc.cost(Conv(), (6, 5, 7))
    assert cost.sites["conv"].bytes == (2 * positions + weights) * 4
    assert cost.bytes == (4 * positions + weights) * 4  # and the copy in front of it


def test_sites_are_the_inserted_modules():
    model = tc.insert_(timm.create_model("test_vit"), "mix_ffn", blocks=[1, 3])
    cost = tc.cost(model, (3, 160, 160))
    assert list(cost.sites) == ["blocks.1.mlp.act.before", "blocks.3.mlp.act.before"]
    site = cost.sites["blocks.1.mlp.act.before"]
    hidden = model.get_submodule("blocks.1.mlp.fc1").out_features
    assert (site.params, site.macs, site.calls) == (10 * hidden, 100 * hidden * 9, 1)
    assert site.input_shape == (1, 101, hidden)


def test_a_given_site_is_priced_by_itself():
    cost = tc.cost(timm.create_model("test_vit"), (3, 160, 160), sites=["blocks.0.attn", "head"])
    assert list(cost.sites) == ["blocks.0.attn", "head"]
    assert 0 < cost.sites["head"].macs < cost.sites["blocks.0.attn"].macs < cost.macs


def test_costing_leaves_the_model_alone_and_takes_no_memory():
    with torch.device("meta"):
        model = timm.create_model("vit_giant_patch14_224").train()
    hooks = [len(m._forward_hooks) for m in model.modules()]
    assert tc.cost(model, (3, 224, 224)).macs > 250e9
    assert model.training
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


def test_unknown_sites_list_the_nearest():
    with pytest.raises(tc.UnknownNameError, match=r"unknown module 'blocks\.0\.atn'.*blocks"):
        tc.cost(timm.create_model("test_vit"), (3, 160, 160), sites=["blocks.0.atn"])


def test_inference_mode_counts_the_same():
    model = timm.create_model("test_vit")
    expected = tc.cost(model, (3, 160, 160))
    with torch.inference_mode():
        assert tc.cost(model, (3, 160, 160)) == expected


def test_refused_images_say_so():
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    with pytest.raises(tc.MeasurementError, match=r"refuses an image of 3x64x64: .*match model"):
        tc.cost(model, (3, 64, 64))
