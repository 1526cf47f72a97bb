"""Whole networks of our blocks: their published counts, and the outputs of code not ours."""

import bsconv.pytorch
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import tokenconv as tc

block = tc.create_block


def conv(dim, out_dim, side, stride=1, bias=False):
    return nn.Conv2d(dim, out_dim, side, stride, side // 2, bias=bias)


def conv_norm_act(dim, out_dim, side, stride=1, act=nn.ReLU):
    return [conv(dim, out_dim, side, stride), nn.BatchNorm2d(out_dim), act()]


def head(dim, classes):
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(dim, classes)]


def chain(dim, rows, make):
    """A row of blocks, from (width, stride) of each."""
    blocks = []
    for width, stride in rows:
        blocks.append(make(dim, width, stride))
        dim = width
    return blocks


# --- MobileNets, EfficientNet, ShuffleNets, Xception ---

V1 = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2),
      (1024, 1)]  # fmt: skip


def mobilenetv1():
    def make(dim, width, stride):
        return block("mobilenetv1", dim, out_dim=width, stride=stride, act_layer=nn.ReLU6)

    stem = conv_norm_act(3, 32, 3, 2, nn.ReLU6)
    return nn.Sequential(*stem, *chain(32, V1, make), *head(1024, 1000))


def stages(table):
    """Rows (expansion, width, stride, kernel side) from (expansion, width, count, stride, side)."""
    return [
        (t, c, s if i == 0 else 1, k) for t, c, n, s, k in table for i in range(n)
    ]  # fmt: skip


def inverted(name, dim, rows):
    blocks = []
    for ratio, width, stride, side in rows:
        kwargs = {"out_dim": width, "stride": stride, "kernel_size": side}
        blocks.append(block(name, dim, expand_ratio=ratio, **kwargs))
        dim = width
    return blocks


def mobilenetv2():
    table = [(1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 32, 3, 2, 3), (6, 64, 4, 2, 3),
             (6, 96, 3, 1, 3), (6, 160, 3, 2, 3), (6, 320, 1, 1, 3)]  # fmt: skip
    return nn.Sequential(
        *conv_norm_act(3, 32, 3, 2, nn.ReLU6), *inverted("inverted_residual", 32, stages(table)),
        *conv_norm_act(320, 1280, 1, 1, nn.ReLU6), *head(1280, 1000),
    )  # fmt: skip


def efficientnet_b0():
    table = [(1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3),
             (6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3)]  # fmt: skip
    return nn.Sequential(
        *conv_norm_act(3, 32, 3, 2, nn.SiLU), *inverted("mbconv", 32, stages(table)),
        *conv_norm_act(320, 1280, 1, 1, nn.SiLU), *head(1280, 1000),
    )  # fmt: skip


def shufflenetv2():
    def make(dim, width, stride):
        return block("shufflenetv2", dim, out_dim=width, stride=stride)

    rows = [(c, 2 if i == 0 else 1) for c, n in ((116, 4), (232, 8), (464, 4)) for i in range(n)]
    return nn.Sequential(
        *conv_norm_act(3, 24, 3, 2), nn.MaxPool2d(3, 2, 1), *chain(24, rows, make),
        *conv_norm_act(464, 1024, 1), *head(1024, 1000),
    )  # fmt: skip


def shufflenetv1(groups, widths):
    def make(dim, width, stride):
        first = 1 if dim == widths[0] else groups
        return block("shufflenetv1", dim, out_dim=width, stride=stride, groups=groups,
                     first_groups=first)  # fmt: skip

    rows = [(c, 2 if i == 0 else 1) for c, n in zip(widths[1:], (4, 8, 4)) for i in range(n)]  # noqa: B905
    return nn.Sequential(
        *conv_norm_act(3, widths[0], 3, 2), nn.MaxPool2d(3, 2, 1), *chain(widths[0], rows, make),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 1000, bias=False),
    )  # fmt: skip


class Separable(nn.Sequential):
    """Xception's separable convolution by itself, at the end of the network."""

    def __init__(self, dim, out_dim):
        super().__init__(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False), conv(dim, out_dim, 1)
        )


def xception():
    def make(dim, width, stride, **kwargs):
        kwargs = {"repeats": 2 if stride == 2 else 3, **kwargs}
        return block("xception", dim, out_dim=width, stride=stride, **kwargs)

    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        make(64, 128, 2, start_with_act=False), make(128, 256, 2), make(256, 728, 2),
        *chain(728, [(728, 1)] * 8, make), make(728, 1024, 2, grow_first=False),
        Separable(1024, 1536), nn.BatchNorm2d(1536), nn.ReLU(),
        Separable(1536, 2048), nn.BatchNorm2d(2048), nn.ReLU(), *head(2048, 1000),
    )  # fmt: skip


# --- PydMobileNet, ESPNet, ResDSC ---


def pydmobilenet(add, repeats, ratio, *, widths=(32, 64, 128), imagenet=False):
    def make(dim, width, stride):
        return block("pydmobilenet", dim, out_dim=width, stride=stride, width_ratio=ratio, add=add)

    rows = [(c, 2 if i == 0 and c != widths[0] else 1) for c in widths for i in range(repeats)]
    last = [nn.BatchNorm2d(256), nn.ReLU(), conv(256, 1280, 1, bias=True), *head(1280, 1000)]
    return nn.Sequential(
        nn.BatchNorm2d(3, affine=False), conv(3, widths[0], 3), *chain(widths[0], rows, make),
        *(last if imagenet else head(widths[-1], 10)),
    )  # fmt: skip


def norm_act(dim):
    return [nn.BatchNorm2d(dim, eps=1e-3), nn.PReLU(dim)]


class ESPNetEncoder(nn.Module):
    """Photographs of smaller size, and what goes into a level, are carried past it."""

    def __init__(self, p, q, classes):
        super().__init__()
        self.level1 = nn.Sequential(conv(3, 16, 3, 2), *norm_act(16))
        self.b1 = nn.Sequential(*norm_act(19))
        self.down2, self.level2 = self.level(19, 64, p)
        self.b2 = nn.Sequential(*norm_act(131))
        self.down3, self.level3 = self.level(131, 128, q)
        self.b3 = nn.Sequential(*norm_act(256))
        self.classifier = conv(256, classes, 1)

    @staticmethod
    def level(dim, out_dim, count):
        down = block("esp", dim, out_dim=out_dim, stride=2)
        return down, nn.Sequential(*(block("esp", out_dim) for _ in range(count)))

    def forward(self, x):
        half = F.avg_pool2d(x, 3, 2, 1)
        first = self.level1(x)
        y = self.down2(self.b1(torch.cat([first, half], 1)))
        second = self.b2(torch.cat([self.level2(y), y, F.avg_pool2d(half, 3, 2, 1)], 1))
        y = self.down3(second)
        out = self.classifier(self.b3(torch.cat([y, self.level3(y)], 1)))
        return first, second, out


class ESPNet(nn.Module):
    def __init__(self, classes=20):
        super().__init__()
        self.encoder = ESPNetEncoder(2, 8, classes)
        self.third = nn.Sequential(
            nn.BatchNorm2d(classes, eps=1e-3),
            nn.ConvTranspose2d(classes, classes, 2, 2, bias=False),
        )
        self.second = conv(131, classes, 1)
        self.combine = nn.Sequential(
            *norm_act(2 * classes), block("esp", 2 * classes, out_dim=classes),
            nn.ConvTranspose2d(classes, classes, 2, 2, bias=False), *norm_act(classes),
        )  # fmt: skip
        self.last = nn.Sequential(
            conv(16 + classes, classes, 3), *norm_act(classes),
            nn.ConvTranspose2d(classes, classes, 2, 2, bias=False),
        )  # fmt: skip

    def forward(self, x):
        first, second, out = self.encoder(x)
        y = self.combine(torch.cat([self.second(second), self.third(out)], 1))
        return self.last(torch.cat([y, first], 1))


def resdsc26():
    """The network of one domain without its head; its first convolution is separable as well."""
    rows = [(c, 2 if i == 0 else 1) for c in (128, 256, 512) for i in range(4)]
    stem = [nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False), conv(3, 64, 1)]
    blocks = chain(64, rows, lambda d, c, s: block("resdsc", d, out_dim=c, stride=s))
    return nn.Sequential(*stem, nn.BatchNorm2d(64), *blocks, nn.BatchNorm2d(512), nn.ReLU())


# --- BSConv ---


class Unit(nn.Module):
    """ResNet's basic block, of any convolution."""

    def __init__(self, dim, width, stride, make):
        super().__init__()
        self.conv1, self.norm1 = make(dim, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = make(width, width, 3, 1), nn.BatchNorm2d(width)
        self.skip = nn.Identity()
        if stride > 1 or dim != width:
            self.skip = nn.Sequential(conv(dim, width, 1, stride), nn.BatchNorm2d(width))

    def forward(self, x):
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(self.skip(x) + y)


def blueprint(name, **kwargs):
    def make(dim, out_dim, side, stride=1):
        kwargs.setdefault("bias", False)
        return block(name, dim, out_dim=out_dim, kernel_size=side, stride=stride, **kwargs)

    return make


MAKERS = {
    "": conv,
    "_bsconvu": blueprint("bsconv_u"),
    "_bsconvs_p1d4": blueprint("bsconv_s", p=0.25, with_bn=True),
}


def resnet(make, counts, widths, classes=100, *, imagenet=False):
    """With a norm on the photograph, as the authors of BSConv have it."""
    rows = [
        (c, 2 if i == 0 and c != widths[0] else 1)
        for c, n in zip(widths, counts, strict=True)
        for i in range(n)
    ]
    first = [conv(3, widths[0], 7, 2)] if imagenet else [make(3, widths[0], 3)]
    pool = [nn.MaxPool2d(3, 2, 1)] if imagenet else []
    units = chain(widths[0], rows, lambda d, c, s: Unit(d, c, s, make))
    return nn.Sequential(
        nn.BatchNorm2d(3), *first, nn.BatchNorm2d(widths[0]), nn.ReLU(), *pool, *units,
        nn.AdaptiveAvgPool2d(1), conv(widths[-1], classes, 1, bias=True), nn.Flatten(),
    )  # fmt: skip


def mobilenetv1_cifar(make):
    rows = [(c, s if c in (256, 512, 1024) else 1) for c, s in V1]
    return nn.Sequential(
        nn.BatchNorm2d(3), *conv_norm_act(3, 32, 3), *chain(32, rows, make),
        nn.AdaptiveAvgPool2d(1), conv(1024, 100, 1, bias=True), nn.Flatten(),
    )  # fmt: skip


def dsc_unit(dim, width, stride):
    return block("mobilenetv1", dim, out_dim=width, stride=stride)


def bsconv_unit(dim, width, stride):
    one = block("bsconv_u", dim, out_dim=width, stride=stride, bias=False)
    return nn.Sequential(one, nn.BatchNorm2d(width), nn.ReLU())


# --- counts ---


def count(build):
    with torch.device("meta"):
        return sum(p.numel() for p in build().parameters())


COUNTS = {
    "MobileNetV1": (mobilenetv1, 4_231_976),
    "MobileNetV2": (mobilenetv2, 3_504_872),
    "EfficientNet-B0": (efficientnet_b0, 5_288_548),
    "Xception": (xception, 22_855_952),
    "ShuffleNetV2": (shufflenetv2, 2_278_604),
    "ShuffleNet g3": (lambda: shufflenetv1(3, (24, 240, 480, 960)), 1_864_728),
    "ShuffleNet g8": (lambda: shufflenetv1(8, (24, 384, 768, 1536)), 2_433_768),
    "Pyd-Add-29 0.25": (lambda: pydmobilenet(True, 3, 0.25), 59_586),
    "Pyd-Add-29 0.5": (lambda: pydmobilenet(True, 3, 0.5), 103_898),
    "Pyd-Concat-29 0.5": (lambda: pydmobilenet(False, 3, 0.5), 169_754),
    "Pyd-Concat-56 0.75": (lambda: pydmobilenet(False, 6, 0.75), 489_082),
    "Pyd-Concat-56 ImageNet": (
        lambda: pydmobilenet(False, 6, 0.25, widths=(64, 128, 256), imagenet=True), 2_231_304),
    "ESPNet-C q3": (lambda: ESPNetEncoder(2, 3, 20), 187_529),
    "ESPNet-C q8": (lambda: ESPNetEncoder(2, 8, 20), 349_449),
    "ESPNet": (ESPNet, 364_569),
    "ResDSC-26": (resdsc26, 2_656_667),
    "ResNet-20": (lambda: resnet(conv, [3] * 3, (16, 32, 64)), 278_330),
    "ResNet-20 BSConv-U": (lambda: resnet(MAKERS["_bsconvu"], [3] * 3, (16, 32, 64)), 46_570),
    "ResNet-20 BSConv-S": (
        lambda: resnet(MAKERS["_bsconvs_p1d4"], [3] * 3, (16, 32, 64)), 33_105),
    "ResNet-56 BSConv-U": (lambda: resnet(MAKERS["_bsconvu"], [9] * 3, (16, 32, 64)), 125_866),
    "ResNet-56 BSConv-S": (
        lambda: resnet(MAKERS["_bsconvs_p1d4"], [9] * 3, (16, 32, 64)), 83_505),
    "ResNet-110 BSConv-U": (lambda: resnet(MAKERS["_bsconvu"], [18] * 3, (16, 32, 64)), 244_810),
    "ResNet-110 BSConv-S": (
        lambda: resnet(MAKERS["_bsconvs_p1d4"], [18] * 3, (16, 32, 64)), 159_105),
    "MobileNetV1 CIFAR": (lambda: mobilenetv1_cifar(dsc_unit), 3_309_482),
    "MobileNetV1 CIFAR BSConv-U": (lambda: mobilenetv1_cifar(bsconv_unit), 3_308_490),
    **{
        f"ResNet-18{label}": (
            lambda make=make: resnet(make, [2] * 4, (64, 128, 256, 512), 1000, imagenet=True),
            total)
        for label, make, total in (
            ("", conv, 11_689_518), (" BSConv-U", MAKERS["_bsconvu"], 1_959_214),
            (" BSConv-S", MAKERS["_bsconvs_p1d4"], 1_336_782))
    },
}  # fmt: skip


@pytest.mark.parametrize(("build", "total"), COUNTS.values(), ids=COUNTS.keys())
def test_counts_are_the_published_ones(build, total):
    assert count(build) == total


def test_counts_of_pydmobilenet_round_to_its_table():
    """In thousands, as the README has them; its last digit is loose."""
    table = {(True, 3): {0.25: 60, 0.5: 104, 0.75: 148, 1: 193},
             (False, 3): {0.25: 92, 0.5: 170, 0.75: 247},
             (True, 6): {0.5: 200, 1: 382},
             (False, 6): {0.25: 175, 0.5: 332, 0.75: 489}}  # fmt: skip
    for (add, repeats), row in table.items():
        for ratio, thousands in row.items():
            total = count(lambda: pydmobilenet(add, repeats, ratio))  # noqa: B023
            assert abs(total / 1000 - thousands) < 1


def test_what_domains_share_and_own_in_resdsc():
    with torch.device("meta"):
        network = resdsc26()
    shared = sum(p.numel() for p in network.parameters() if p.ndim == 4 and p.shape[2] == 1)
    total = sum(p.numel() for p in network.parameters())
    assert shared == 2_580_672
    assert total - shared == 75_995
    assert shared + 10 * (total - shared) == 3_340_622


# --- outputs ---


def skips_last(values):
    """Keys in the order of ours, block by block: what the input goes through comes last."""
    keys, rows = list(values), []
    for key in keys:
        name = key.split(".")[0]
        rows.append((name, "skip" in key, key))
    order = {name: i for i, (name, _, _) in reversed(list(enumerate(rows)))}
    return [key for _, _, key in sorted(rows, key=lambda row: (order[row[0]], row[1]))]


def projections_last(values):
    """The same for the units of the BSConv authors, which hold theirs first or last."""
    keys = list(values)

    def unit(key):
        return key.split("unit")[0] + (key.split("unit")[1].split(".")[0] if "unit" in key else "")

    order = {}
    for key in keys:
        order.setdefault(unit(key), len(order))
    return sorted(keys, key=lambda key: (order[unit(key)], "projection" in key))


ORACLES = {
    "MobileNetV1": (mobilenetv1, lambda: timm.create_model("mobilenetv1_100"), list),
    "MobileNetV2": (mobilenetv2, torchvision.models.mobilenet_v2, list),
    "EfficientNet-B0": (efficientnet_b0, torchvision.models.efficientnet_b0, list),
    "ShuffleNetV2": (shufflenetv2, torchvision.models.shufflenet_v2_x1_0, list),
    "Xception": (xception, lambda: timm.create_model("legacy_xception"), skips_last),
    **{
        f"ResNet-20{label}": (
            lambda make=make: resnet(make, [3] * 3, (16, 32, 64)),
            lambda label=label: bsconv.pytorch.get_model(f"cifar_resnet20{label}",
                                                         num_classes=100),
            projections_last)
        for label, make in MAKERS.items()
    },
    "MobileNetV1 CIFAR BSConv-U": (
        lambda: mobilenetv1_cifar(bsconv_unit),
        lambda: bsconv.pytorch.get_model("cifar_mobilenetv1_w1_bsconvu", num_classes=100), list),
}  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs", "order"), ORACLES.values(), ids=ORACLES.keys())
@torch.no_grad()
def test_outputs_are_those_of_the_oracle(ours, theirs, order):
    ours, theirs = ours().eval(), theirs().eval()
    generator = torch.Generator().manual_seed(0)
    values = theirs.state_dict()
    for key, value in values.items():
        if "running_var" in key:
            value.uniform_(0.5, 2, generator=generator)
        elif "running_mean" in key:
            value.normal_(std=0.1, generator=generator)
    own = ours.state_dict()
    pairs = zip(own, order(values), strict=True)
    ours.load_state_dict({mine: values[other].reshape(own[mine].shape) for mine, other in pairs})
    images = torch.randn(2, 3, 64, 96, generator=generator)
    ours, theirs, images = ours.double(), theirs.double(), images.double()
    expected = theirs(images)
    assert expected.std() > 1e-4
    torch.testing.assert_close(ours(images), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_networks_without_an_oracle_run():
    for build, shape in (
        (lambda: pydmobilenet(False, 3, 0.5), (2, 10)),
        (ESPNet, (2, 20, 64, 96)),
        (resdsc26, (2, 512, 8, 12)),
        (lambda: shufflenetv1(3, (24, 240, 480, 960)), (2, 1000)),
    ):
        out = build().eval()(torch.randn(2, 3, 64, 96))
        assert out.shape == shape
        assert out.isfinite().all()
