import time

import pytest
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tokenconv as tc
from tokenconv.blocks.ffn import MultiScaleFFN
from tokenconv.costs import Category, formulas, meta_copy
from tokenconv.costs.meter import AttentionAsOne, Meter
from tokenconv.layers import DWConv3d

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


def on_meta(name):
    with torch.device("meta"):
        return timm.create_model(name)


@pytest.mark.parametrize(
    ("name", "size", "params", "giga_macs"),
    [
        ("pvt_v2_b0", 224, 3_666_760, 0.5661),
        ("pvt_v2_b1", 224, 14_009_000, 2.1084),
        ("pvt_v2_b2_li", 224, 22_553_512, 3.8889),
        ("pvt_v2_b2", 224, 25_362_856, 4.0267),
        ("convformer_s18", 224, 26_774_448, 3.941),
        ("caformer_s18", 224, 26_341_656, 4.107),
        ("inception_next_tiny", 224, 28_055_680, 4.189),
        ("mobilenetv1_100", 224, 4_231_976, 0.5687),
        ("mobilenetv2_100", 224, 3_504_872, 0.3008),
        ("legacy_xception", 299, 22_855_952, 8.357),
        ("efficientnet_b0", 224, 5_288_548, 0.39),
        ("resnet18", 224, 11_689_512, 1.81),
    ],
)
def test_whole_models_have_their_known_counts(name, size, params, giga_macs):
    cost = tc.cost(on_meta(name), (3, size, size))
    digits = len(str(giga_macs).partition(".")[2])
    assert (cost.params, round(cost.macs / 1e9, digits)) == (params, giga_macs)


@pytest.mark.parametrize("name", ["vit_giant_patch14_dinov2", "pvt_v2_b5"])
def test_the_largest_models_take_less_than_two_seconds(name):
    model = on_meta(name)
    before = time.process_time()  # of this process: others may keep it waiting
    tc.cost(model, model.pretrained_cfg["input_size"])
    assert time.process_time() - before < 2


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


def test_tensors_that_are_plain_attributes_are_weightless_too():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    model.table, model.scale = torch.ones(4, 8, 8), torch.tensor(2.0)
    meta = meta_copy(model)
    assert (meta.table.device.type, meta.table.shape) == ("meta", (4, 8, 8))
    assert meta.scale.device.type == model.table.device.type == "cpu"


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


# --- bytes ---


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_vit", 160),
        ("pvt_v2_b0", 64),
        ("pvt_v2_b2_li", 64),
        ("resnetv2_50", 64),
        ("mobilenetv1_100", 64),
        ("convnext_atto", 64),
        ("swin_tiny_patch4_window7_224", 224),
        ("caformer_s18", 64),
    ],
)
def test_a_pass_that_computes_moves_the_same_bytes(name, size):
    model = timm.create_model(name).eval()
    meter, images = Meter(model.parameters()), torch.zeros(1, 3, size, size)
    meter.is_image(images)
    with torch.no_grad(), meter, AttentionAsOne(meter):
        model(images)
    cost = tc.cost(model, (3, size, size))
    assert (cost.macs, cost.backward_macs, cost.bytes) == tuple(vars(meter.total).values())
    assert cost.intensity == cost.macs / cost.bytes


# --- the backward pass ---


def flop_counter_backward_macs(model, size):
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH):
        loss = model.eval()(torch.zeros(1, 3, size, size)).sum()
        with counter:
            loss.backward()
    return counter.get_total_flops() // 2


def freeze(model, *trainable):
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(trainable)


TRAINABLE = {
    "all": ("",),
    "last blocks": ("blocks.6", "blocks.7", "blocks.8", "blocks.9", "blocks.1", "head", "norm"),
    "head": ("head",),
    "position": ("pos_embed",),
    "a norm": ("blocks.5.norm1",),
    "attention": tuple(f"blocks.{i}.attn.qkv" for i in range(3, 12)),
}


@pytest.mark.parametrize("what", TRAINABLE)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "matmuls"])
def test_backward_macs_of_a_vit_agree_with_the_flop_counter(what, fused):
    model = timm.create_model("vit_tiny_patch16_224", img_size=64)
    for block in model.blocks:
        block.attn.fused_attn = fused
    freeze(model, *TRAINABLE[what])
    assert tc.cost(model, (3, 64, 64)).backward_macs == flop_counter_backward_macs(model, 64)


@pytest.mark.parametrize("what", [("",), ("layer3", "layer4", "fc"), ("layer2.0.conv1",), ("bn1",)])
def test_backward_macs_of_a_resnet_agree_with_the_flop_counter(what):
    model = timm.create_model("resnet18")
    freeze(model, *what)
    assert tc.cost(model, (3, 64, 64)).backward_macs == flop_counter_backward_macs(model, 64)


def test_a_frozen_model_has_no_backward_pass():
    cost = tc.cost(timm.create_model("test_vit").requires_grad_(False), (3, 160, 160))
    assert cost.backward_macs == 0 < cost.macs


def test_images_need_no_gradient_and_all_else_twice_the_forward_pass():
    cost = tc.cost(on_meta("mobilenetv1_100"), (3, 224, 224), sites=["conv_stem", "blocks"])
    stem, blocks = cost.sites.values()
    assert stem.backward_macs == stem.macs
    assert blocks.backward_macs == 2 * blocks.macs
    assert cost.backward_macs == 2 * cost.macs - stem.macs


def test_the_flop_counter_counts_too_much_for_a_depthwise_convolution():
    """Why it is no oracle there: it lets every channel see every other in the gradient."""
    dim = 6
    depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, dim, 1), depthwise)
    cost = tc.cost(model, (3, 8, 8), sites=["1", "2"])
    pointwise, site = cost.sites.values()
    assert site.backward_macs == formulas.depthwise(dim, 3, (8, 8)).backward_macs == 2 * site.macs
    counted = flop_counter_backward_macs(model, 8) - pointwise.backward_macs
    assert counted == site.backward_macs * (1 + dim) / 2


def test_checkpoints_do_not_change_the_price():
    model = timm.create_model("test_vit")
    expected = tc.cost(model, (3, 160, 160))
    model.set_grad_checkpointing()
    assert tc.cost(model, (3, 160, 160)) == expected


# --- categories ---


@pytest.mark.parametrize("name", ["pvt_v2_b0", "vit_tiny_patch16_224", "mobilenetv2_100"])
def test_categories_add_up_to_the_whole(name):
    cost = tc.cost(on_meta(name), (3, 224, 224))
    assert formulas.total(cost.categories.values()) == formulas.total([cost])


def test_every_operator_has_its_category():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, 2, 1)
            self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
            self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)
            self.pointwise = nn.Conv2d(16, 8, 1)
            self.norm, self.act = nn.BatchNorm2d(8), nn.PReLU(8)
            self.position = nn.Parameter(torch.zeros(1, 16, 8))
            self.unused = nn.Parameter(torch.zeros(5))
            self.head = nn.Linear(8, 10)

        def forward(self, x):
            x = self.pointwise(self.depthwise(self.grouped(self.stem(x))))
            x = self.act(self.norm(x)).flatten(2).transpose(1, 2) + self.position
            return self.head((x @ x.transpose(1, 2)).softmax(-1) @ x)

    found = tc.cost(Net(), (3, 8, 8)).categories
    assert list(found) == list(Category)
    assert {category: (price.params, price.macs) for category, price in found.items()} == {
        "depthwise convolution": (16 * 10, 16 * 16 * 9),
        "pointwise convolution": (16 * 8 + 8, 16 * 16 * 8),
        "convolution": (8 * 28 + 8 * 37, 16 * 8 * 27 + 16 * 8 * 36),
        "linear": (90, 16 * 80),
        "attention": (0, 2 * 16 * 16 * 8),
        "norm": (16, 0),
        "activation": (8, 0),
        "other": (16 * 8 + 5, 0),
    }
    assert all(price.bytes for price in found.values())


def test_a_parameter_belongs_to_where_it_meets_the_image():
    class Net(nn.Module):
        """A low-rank weight, a normalised kernel, and attention with learnt biases and queries."""

        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
            self.kernel = nn.Parameter(torch.ones(6, 3, 3, 3))
            self.bias = nn.Parameter(torch.zeros(4, 4))
            self.query = nn.Parameter(torch.zeros(1, 4, 6))

        def forward(self, x):
            kernel = nn.functional.layer_norm(self.kernel, (3, 3))
            x = nn.functional.conv2d(x, kernel).flatten(2).transpose(1, 2)
            x = x @ (self.up.weight @ self.down.weight)
            return nn.functional.scaled_dot_product_attention(self.query, x, x, self.bias)

    found = tc.cost(Net(), (3, 4, 4)).categories
    assert {category: price.params for category, price in found.items()} == {
        "convolution": 6 * 27, "linear": 24, "attention": 16 + 24, "norm": 0,
    }  # fmt: skip
    assert found[Category.LINEAR].macs == 6 * 2 * 6 + 4 * 6 * 6


def test_a_parameter_that_is_read_twice_belongs_to_the_first_reader():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(4, 4))

        def forward(self, x):
            return (x + self.table) @ self.table

    found = tc.cost(Net(), (3, 4, 4)).categories
    assert {category: price.params for category, price in found.items()} == {
        "linear": 0, "other": 16,
    }  # fmt: skip


def test_a_parameter_that_nothing_reads_is_counted():
    net = nn.Conv2d(3, 4, 3)
    net.register_parameter("unused", nn.Parameter(torch.zeros(5)))
    cost = tc.cost(net, (3, 8, 8))
    assert (cost.params, cost.categories[Category.OTHER].params) == (4 * 28 + 5, 5)


def test_a_place_that_is_empty_costs_nothing():
    net = nn.Conv2d(3, 4, 3)
    net.register_module("later", None)
    cost = tc.cost(net, (3, 8, 8))
    assert (cost.params, cost.sites) == (4 * 28, {})


def test_a_model_that_cannot_be_copied_is_told():
    net = nn.Conv2d(3, 4, 3)
    net.kept = [2 * net.weight]
    with pytest.raises(tc.MeasurementError, match="cannot be copied: Only Tensors created explici"):
        tc.cost(net, (3, 8, 8))


@pytest.mark.parametrize(
    ("conv", "category"),
    [
        (nn.Conv2d(1, 8, 3), Category.CONVOLUTION),  # of grey images
        (nn.Conv2d(1, 8, 1), Category.POINTWISE),
        (nn.Conv2d(4, 8, 3, groups=2), Category.CONVOLUTION),
        (nn.Conv2d(4, 8, 1, groups=2), Category.CONVOLUTION),
        (nn.Conv2d(4, 8, 1, groups=4), Category.DEPTHWISE),
        (nn.Conv1d(4, 4, 3, groups=4), Category.DEPTHWISE),
        (nn.Conv3d(4, 8, 1), Category.POINTWISE),
    ],
    ids=str,
)
def test_convolutions_are_told_apart_by_groups_and_kernel(conv, category):
    size = [conv.in_channels, *[5] * len(conv.kernel_size)]
    assert list(tc.cost(conv, size).categories) == [category]


# --- blocks ---


CONSTANT = {"sdta": 24 * 64 * 24}
"""MACs on what is no input: SDTA projects the waves that tell positions."""


@pytest.mark.parametrize("name", [name for name in tc.BLOCKS if tc.BLOCKS[name].kind != "stem"])
def test_blocks_cost_what_the_flop_counter_counts(name):
    dim, rows, cols = 24, 6, 4
    block = tc.create_block(name, dim=dim).eval()
    cost = tc.cost(block, (dim, rows, cols))
    count = rows * cols * (21 if isinstance(block, MultiScaleFFN) else 4) // 4
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        block(torch.zeros(1, count, dim), rows, cols)
    assert cost.macs == counter.get_total_flops() // 2
    assert cost.params == sum(p.numel() for p in block.parameters())
    # also of what it is given, as in a network
    assert cost.backward_macs == 2 * cost.macs - CONSTANT.get(name, 0)


@pytest.mark.parametrize("name", [name for name in tc.BLOCKS if tc.BLOCKS[name].kind == "stem"])
def test_stems_cost_what_the_flop_counter_counts(name):
    stem = tc.create_block(name, dim=24).eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        stem(torch.zeros(1, 3, 96, 64))
    cost = tc.cost(stem, (3, 96, 64))
    assert cost.macs == counter.get_total_flops() // 2 > 0
    assert cost.params == sum(p.numel() for p in stem.parameters())


def test_a_block_takes_the_tokens_of_a_grid():
    cost = tc.cost(tc.create_block("mix_ffn", dim=384), (384, 14, 14))
    hidden = 4 * 384
    assert cost.macs == 196 * (2 * 384 * hidden + 9 * hidden)
    assert cost.categories[Category.DEPTHWISE].macs == 196 * 9 * hidden


def test_a_frozen_block_passes_gradients_on():
    block = tc.create_block("mix_ffn", dim=24).requires_grad_(False)
    cost = tc.cost(block, (24, 6, 4))
    assert cost.backward_macs == cost.macs


def test_layers_take_the_tokens_of_a_video():
    cost = tc.cost(DWConv3d(6, (3, 5, 5)), (6, 4, 5, 7))
    assert cost.macs == 6 * 75 * 4 * 5 * 7


def test_a_block_refuses_a_grid_that_it_cannot_take():
    with pytest.raises(tc.MeasurementError, match="refuses an image of 24x5x4: expected an even"):
        tc.cost(tc.create_block("multi_scale_ffn", dim=24), (24, 5, 4))
