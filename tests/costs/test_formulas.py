"""Closed formulas against brute force, our modules, code that is not ours, and published counts."""

import itertools
from functools import partial

import bsconv.pytorch
import pytest
import timm
import torch
from torch import nn

import tokenconv as tc
from tokenconv.costs import Price
from tokenconv.costs.formulas import (
    blueprint_s,
    blueprint_u,
    depthwise,
    esp,
    grouped,
    out_size,
    pyramid,
    separable,
    separable_ratio,
    smallest_out_dim,
    standard,
    total,
)
from tokenconv.layers import GridConv

SETTINGS = list(
    itertools.product((1, 4, 6), (2, 6), (1, 3, 5), ((4, 7), (5, 5), (1, 6)), (1, 2, 3), (1, 2))
)
"""Widths, kernel sides, sizes, strides, groups."""


def counted(dim, out_dim, side, size, stride, groups):
    """Multiply-accumulates of a forward pass and of both gradients, one by one."""
    reach, wide, narrow = side // 2, out_dim // groups, dim // groups
    rows, cols = (range(-reach, length - side + reach + 1, stride) for length in size)
    taps = [*itertools.product(range(side), range(side))]
    places = itertools.product(rows, cols, range(out_dim))
    forward = sum(i // narrow == o // wide for _, _, o in places for i in range(dim) for _ in taps)
    # the gradient of x[r, c, i], padding included, is summed up from where it was a factor
    pads = [range(-reach, length + reach) for length in size]
    by_input = sum(
        r - j in rows and c - k in cols and i // narrow == o // wide
        for r, c, i in itertools.product(*pads, range(dim))
        for j, k in taps
        for o in range(out_dim)
    )
    weights = itertools.product(range(out_dim), range(narrow), taps)
    by_weight = sum(1 for _ in weights for _ in itertools.product(rows, cols))
    return forward, by_input + by_weight


@pytest.mark.parametrize("setting", SETTINGS[:: len(SETTINGS) // 60], ids=str)
def test_a_convolution_is_what_is_counted_one_by_one(setting):
    dim, out_dim, side, size, stride, groups = setting
    groups = groups if dim % groups == 0 else 1
    found = grouped(dim, out_dim, side, size, groups=groups, stride=stride)
    assert (found.macs, found.backward_macs) == counted(dim, out_dim, side, size, stride, groups)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_depthwise_convolution_is_what_is_counted_one_by_one(stride):
    found = depthwise(4, 3, (5, 6), stride=stride)
    assert (found.macs, found.backward_macs) == counted(4, 4, 3, (5, 6), stride, 4)


# --- the same as what our modules cost, and the authors' ---

block = tc.create_block
SIZE = (9, 6)
KINDS = {
    "standard": (
        partial(standard, 10, 15, 3, bias=True),
        lambda s: block("grouped_conv", 10, out_dim=15, stride=s),
    ),
    "standard, dilated": (
        partial(standard, 10, 15, 3, bias=True),
        lambda s: block("grouped_conv", 10, out_dim=15, stride=s, dilation=2),
    ),
    "grouped": (
        partial(grouped, 10, 15, 5, groups=5),
        lambda s: block(
            "grouped_conv", 10, out_dim=15, kernel_size=5, groups=5, stride=s, bias=False
        ),
    ),
    "depthwise": (
        partial(depthwise, 10, 3, bias=True),
        lambda s: block("grouped_conv", 10, groups=10, stride=s),
    ),
    "separable": (
        partial(separable, 10, 15, 3),
        lambda s: nn.Sequential(
            nn.Conv2d(10, 10, 3, s, 1, groups=10, bias=False), nn.Conv2d(10, 15, 1, bias=False)
        ),
    ),
    "blueprint U": (
        partial(blueprint_u, 10, 15, 3, bias=True),
        lambda s: block("bsconv_u", 10, out_dim=15, stride=s),
    ),
    "blueprint U of its authors": (
        partial(blueprint_u, 10, 15, 3),
        lambda s: bsconv.pytorch.BSConvU(10, 15, 3, stride=s, padding=1, bias=False),
    ),
    "blueprint S": (
        partial(blueprint_s, 40, 15, 5, p=0.3, bias=True),
        lambda s: block("bsconv_s", 40, out_dim=15, kernel_size=5, p=0.3, stride=s),
    ),
    "blueprint S of its authors": (
        partial(blueprint_s, 40, 15, 3, p=0.25),
        lambda s: bsconv.pytorch.BSConvS(40, 15, 3, stride=s, padding=1, p=0.25, bias=False),
    ),
    "blueprint S, narrow": (
        partial(blueprint_s, 10, 15, 3, bias=True),
        lambda s: block("bsconv_s", 10, out_dim=15, stride=s),
    ),
    "pyramid, added": (
        partial(pyramid, 10, 16, add=True),
        lambda s: block("pydmobilenet", 10, out_dim=16, add=True, stride=s),
    ),
    "pyramid, concatenated": (
        partial(pyramid, 16, 16, width_ratio=0.75),
        lambda s: block("pydmobilenet", 16, width_ratio=0.75, stride=s),
    ),
    "pyramid of two": (
        partial(pyramid, 16, 16, kernel_sizes=(3, 9)),
        lambda s: block("pydmobilenet", 16, kernel_size=(3, 9), stride=s),
    ),
    "ESP": (partial(esp, 17, 17), lambda s: block("esp", 17, stride=s)),
    "ESP, wider": (partial(esp, 10, 23), lambda s: block("esp", 10, out_dim=23, stride=s)),
    "ESP of two": (
        partial(esp, 16, 16, branches=2, kernel_size=5),
        lambda s: block("esp", 16, dilations=(1, 3), kernel_size=5, stride=s),
    ),
}


def cost_inside(module, dim, size):
    """What a module costs behind something trainable, so that its input wants a gradient."""
    model = nn.Sequential(nn.BatchNorm2d(dim), module)
    return tc.cost(model, (dim, *size), sites=["1"]).sites["1"]


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_formula_is_what_the_module_costs(kind, stride):
    formula, make = KINDS[kind]
    expected, module = formula(SIZE, stride=stride), make(stride)
    found = cost_inside(module, formula.args[0], SIZE)
    for figure in ("params", "macs", "backward_macs", "bytes", "intensity"):
        assert getattr(found, figure) == getattr(expected, figure), figure


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (tc.DWConv(12, 5), depthwise(12, 5, SIZE, bias=True)),
        (tc.DWConv(12, dilation=3, bias=False), depthwise(12, 3, SIZE)),
        (tc.SeparableConv(12, out_dim=7), separable(12, 7, 3, SIZE, bias=True)),
        (GridConv(12, 8, groups=4), grouped(12, 8, 3, SIZE, groups=4, bias=True)),
    ],
    ids=["depthwise", "dilated", "separable", "grouped"],
)
def test_layers_on_tokens_cost_what_the_formulas_say(layer, expected):
    found = tc.cost(layer, (12, *SIZE))
    assert (found.params, found.macs, found.bytes) == (
        expected.params, expected.macs, expected.bytes,
    )  # fmt: skip


def test_prices_add_up():
    one, other = depthwise(4, 3, (5, 5)), standard(4, 8, 1, (5, 5))
    assert one + other == separable(4, 8, 3, (5, 5)) == total([one, other])
    assert (total([]).bytes, total([]).intensity) == (0, 0.0)
    assert one.intensity == 4 * 9 * 25 / (4 * (4 * 25 + 4 * 9 + 4 * 25))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kernel_size": 4}, "odd kernel_size, got dim=6, out_dim=4, kernel_size=4"),
        ({"dim": 0}, "expected positive numbers"),
        ({"size": (0, 5)}, "expected positive numbers"),
        ({"groups": 3}, "expected groups to divide dim=6 and out_dim=4, got groups=3"),
    ],
)
def test_wrong_numbers_say_so(wrong, message):
    right = {"dim": 6, "out_dim": 4, "kernel_size": 3, "size": (5, 5), "groups": 2}
    with pytest.raises(ValueError, match=message):
        grouped(**{**right, **wrong})


# --- what it saves ---


def test_the_ratio_of_the_textbooks():
    assert round(separable_ratio(3, 128), 4) == 0.1189
    parts = separable(64, 128, 3, (7, 7)), standard(64, 128, 3, (7, 7))
    for figure in ("params", "macs"):
        one, other = (getattr(part, figure) for part in parts)
        assert one / other == pytest.approx(separable_ratio(3, 128), rel=1e-12)


def test_a_saving_above_ten_takes_seventeen_channels_at_five_and_cannot_be_had_at_three():
    assert smallest_out_dim(10, 5) == 17
    with pytest.raises(
        ValueError, match=r"between 0 and 9, which a 3x3 kernel stays below .*got 10"
    ):
        smallest_out_dim(10, 3)
    with pytest.raises(ValueError, match="between 0 and 9"):
        smallest_out_dim(9, 3)  # it comes near, and never there


@pytest.mark.parametrize("side", [3, 5, 7])
@pytest.mark.parametrize("saving", [0.5, 1, 2, 4.5, 6.25, 8, 8.999])
def test_the_smallest_width_saves_more_and_the_next_smaller_does_not(saving, side):
    width = smallest_out_dim(saving, side)
    assert 1 / separable_ratio(side, width) > saving
    exact = (width - 1) * side**2  # saving * (width - 1 + side**2) where nothing more is saved
    assert exact <= saving * (width - 1 + side**2)


# --- published counts of whole networks ---


def linear(dim, out_dim, bias=True):
    return standard(dim, out_dim, 1, (1, 1), bias=bias)


def norm(dim):
    return Price(params=2 * dim, macs=0, backward_macs=0, bytes=0)


MOBILENET = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2),
             (1024, 1)]  # fmt: skip


def mobilenet(make, classes, size, strides=MOBILENET, stem_stride=2):
    """MobileNetV1 of any separable convolution; ``make`` also gives its norms."""
    parts = [standard(3, 32, 3, size, stride=stem_stride), norm(32)]
    dim, size = 32, out_size(size, stem_stride)
    for width, stride in strides:
        parts += make(dim, width, size, stride)
        dim, size = width, out_size(size, stride)
    return total([*parts, linear(dim, classes)])


def of_mobilenet(dim, width, size, stride):
    return separable(dim, width, 3, size, stride=stride), norm(dim), norm(width)


def of_bsconv(dim, width, size, stride):
    return blueprint_u(dim, width, 3, size, stride=stride), norm(width)


def test_mobilenetv1_has_569_million_macs_and_4_2_million_parameters():
    found = mobilenet(of_mobilenet, 1000, (224, 224))
    assert (found.params, round(found.macs / 1e6, 1)) == (4_231_976, 568.7)


CIFAR = [(width, 1 if i in (0, 1) else stride) for i, (width, stride) in enumerate(MOBILENET)]


@pytest.mark.parametrize(
    ("make", "params"), [(of_mobilenet, 3_309_482), (of_bsconv, 3_308_490)], ids=["V1", "BSConv-U"]
)
def test_mobilenetv1_on_cifar_100_has_its_published_parameters(make, params):
    data_norm = 6  # the authors normalise photographs inside the network
    assert mobilenet(make, 100, (32, 32), CIFAR, 1).params + data_norm == params


def normed_blueprint_s(dim, out_dim, side, size, stride=1):
    """With norms behind both 1x1 convolutions, as in the authors' networks."""
    mid = min(dim, max(4, -(-dim // 4)))
    found = blueprint_s(dim, out_dim, side, size, stride=stride)
    return total([found, norm(mid), norm(out_dim)])


def resnet(count, make):
    """ResNet on CIFAR-100 of any 3x3 convolution; 1x1 ones where size or width change."""
    parts = [make(3, 16, 3, (32, 32)), norm(16)]
    dim, size = 16, (32, 32)
    for width, first in ((16, 1), (32, 2), (64, 2)):
        for stride in (first, *[1] * (count - 1)):
            parts += [make(dim, width, 3, size, stride=stride), norm(width)]
            if stride > 1:
                parts += [standard(dim, width, 1, size, stride=stride), norm(width)]
            dim, size = width, out_size(size, stride)
            parts += [make(dim, width, 3, size), norm(width)]
    return total([*parts, linear(64, 100)])


@pytest.mark.parametrize(
    ("make", "params"),
    [(standard, 278_330), (blueprint_u, 46_570), (normed_blueprint_s, 33_105)],
    ids=["standard", "BSConv-U", "BSConv-S"],
)
def test_resnet_20_on_cifar_100_has_its_published_parameters(make, params):
    assert resnet(3, make).params + 6 == params


def pyd(repeats, ratio, add):
    parts = [standard(3, 32, 3, (32, 32))]
    dim, size = 32, (32, 32)
    for width, first in ((32, 1), (64, 2), (128, 2)):
        for stride in (first, *[1] * (repeats - 1)):
            parts.append(pyramid(dim, width, size, width_ratio=ratio, add=add, stride=stride))
            dim, size = width, out_size(size, stride)
    return total([*parts, linear(128, 10)])


@pytest.mark.parametrize(
    ("repeats", "ratio", "add", "params"),
    [
        (3, 0.25, True, 59_586),
        (3, 0.5, True, 103_898),
        (3, 0.5, False, 169_754),
        (6, 0.75, False, 489_082),
    ],
)
def test_pydmobilenets_have_their_published_parameters(repeats, ratio, add, params):
    assert pyd(repeats, ratio, add).params == params


def test_the_smallest_pydmobilenet_has_10_75_million_macs():
    assert round(pyd(3, 0.25, add=True).macs / 1e6, 2) == 10.75


VGG = [64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0]


def test_vgg_16_has_15_3_billion_macs_in_convolutions_and_138_million_parameters():
    parts, dim, size = [], 3, (224, 224)
    for width in VGG:
        if width:
            parts.append(standard(dim, width, 3, size, bias=True))
            dim = width
        else:
            size = size[0] // 2, size[1] // 2
    convolutions = total(parts)
    whole = convolutions + linear(512 * 49, 4096) + linear(4096, 4096) + linear(4096, 1000)
    assert round(convolutions.macs / 1e9, 2) == 15.35
    assert (whole.params, whole.macs) == (138_357_544, 15_470_264_320)
    with torch.device("meta"):
        model = timm.create_model("vgg16")
    found = tc.cost(model, (3, 224, 224))
    assert (found.params, found.macs) == (whole.params, whole.macs)
    assert round(whole.macs / mobilenet(of_mobilenet, 1000, (224, 224)).macs) == 27  # the popular
