"""The depthwise separable family against code we did not write, on maps and on tokens."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from bsconv.pytorch import BSConvS, BSConvU
from timm.layers import CondConv2d, MixedConv2d
from timm.models import _efficientnet_blocks as efficientnet
from timm.models.xception import Block as XceptionBlock
from torch import nn
from torchvision.models import mobilenetv2, shufflenetv2

import tokenconv as tc
from tokenconv.blocks.blueprint import bsconv_reg_loss, orthonormal_loss
from tokenconv.layers import BatchNorm, DWConv3d

from .conftest import assert_same_on_maps, randomize_

ROWS, COLS = 6, 10


def draw(*shape, scale=1.0):
    generator = torch.Generator().manual_seed(sum(shape))
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


# --- references written from the published facts, where nothing can be imported ---


class Literal(nn.Module):
    """torch's own layers, in the order in which the block has them."""

    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


def conv(dim, out_dim, side=1, stride=1, dilation=1, groups=1):
    pad = dilation * (side - 1) // 2
    return nn.Conv2d(dim, out_dim, side, stride, pad, dilation, groups, bias=False)


class LiteralShuffleNetV1(Literal):
    def __init__(self, dim, out_dim, stride, groups, first):
        mid, made = out_dim // 4, out_dim - (dim if stride == 2 else 0)
        super().__init__(
            a=conv(dim, mid, groups=first), b=nn.BatchNorm2d(mid),
            c=conv(mid, mid, 3, stride, groups=mid), d=nn.BatchNorm2d(mid),
            e=conv(mid, made, groups=groups), f=nn.BatchNorm2d(made),
        )  # fmt: skip
        self.stride, self.groups = stride, groups

    def forward(self, x):
        y = self.d(self.c(F.relu(self.b(self.a(x)))))
        count = y.shape[1]
        order = [
            i * self.groups + j for j in range(self.groups) for i in range(count // self.groups)
        ]
        y = self.f(self.e(y[:, order]))
        if self.stride == 1:
            return F.relu(x + y)
        return torch.cat([F.avg_pool2d(x, 3, 2, 1), F.relu(y)], dim=1)


class LiteralPyd(Literal):
    def __init__(self, dim, out_dim, stride, add, mult=0.5):
        mid = int(out_dim * mult)
        wide = mid if add else 3 * mid
        super().__init__(
            n1=nn.BatchNorm2d(dim), reduce=conv(dim, mid), n2=nn.BatchNorm2d(mid),
            c3=conv(mid, mid, 3, stride, groups=mid), c5=conv(mid, mid, 5, stride, groups=mid),
            c7=conv(mid, mid, 7, stride, groups=mid), n3=nn.BatchNorm2d(wide),
            expand=conv(wide, out_dim), n4=nn.BatchNorm2d(out_dim),
        )  # fmt: skip
        self.skip = None
        if stride == 2:
            self.skip = nn.Sequential(conv(dim, out_dim, 1, 2), nn.BatchNorm2d(out_dim))
        self.add = add

    def forward(self, x):
        y = F.relu(self.n2(self.reduce(F.relu(self.n1(x)))))
        maps = [self.c3(y), self.c5(y), self.c7(y)]
        y = sum(maps) if self.add else torch.cat(maps, dim=1)
        y = self.n4(self.expand(F.relu(self.n3(y))))
        return y + (x if self.skip is None else self.skip(x))


class LiteralESP(Literal):
    def __init__(self, dim, out_dim, stride, add):
        n = int(out_dim / 5)
        n1 = out_dim - 4 * n
        super().__init__(
            c1=conv(dim, n, 3, 2) if stride == 2 else conv(dim, n), d1=conv(n, n1, 3),
            d2=conv(n, n, 3, dilation=2), d4=conv(n, n, 3, dilation=4),
            d8=conv(n, n, 3, dilation=8), d16=conv(n, n, 3, dilation=16),
            bn=nn.BatchNorm2d(out_dim, eps=1e-3), act=nn.PReLU(out_dim),
        )  # fmt: skip
        self.add = add

    def forward(self, x):
        y = self.c1(x)
        o1, o2 = self.d1(y), self.d2(y)
        o3 = o2 + self.d4(y)
        o4 = o3 + self.d8(y)
        out = torch.cat([o1, o2, o3, o4, o4 + self.d16(y)], dim=1)
        return self.act(self.bn(out + x if self.add else out))


class LiteralResDSC(Literal):
    def __init__(self, dim, out_dim, stride, domains=1):
        def gates(width):
            hidden = width // 4 + 1
            return [nn.Linear(width, hidden), nn.Linear(hidden, domains)] if domains > 1 else []

        def kernels(width):
            return nn.Parameter(torch.zeros(domains, width, 1, 3, 3))

        super().__init__(
            g1=nn.Sequential(*gates(dim)), pw1=conv(dim, out_dim), n1=nn.BatchNorm2d(out_dim),
            g2=nn.Sequential(*gates(out_dim)), pw2=conv(out_dim, out_dim),
            n2=nn.BatchNorm2d(out_dim),
        )  # fmt: skip
        self.dw1, self.dw2, self.stride = kernels(dim), kernels(out_dim), stride

    @staticmethod
    def depthwise(x, kernels, gates, stride):
        outs = [F.conv2d(x, k, stride=stride, padding=1, groups=x.shape[1]) for k in kernels]
        if len(outs) == 1:
            return outs[0]
        share = gates[1](F.relu(gates[0](x.mean((2, 3))))).softmax(1)
        return sum(share[:, i, None, None, None] * out for i, out in enumerate(outs))

    def forward(self, x):
        y = F.relu(self.n1(self.pw1(self.depthwise(x, self.dw1, self.g1, self.stride))))
        y = self.n2(self.pw2(self.depthwise(y, self.dw2, self.g2, 1)))
        if self.stride == 2:
            x = F.avg_pool2d(x, 2)
            x = torch.cat([x, torch.zeros_like(x)], dim=1)
        return F.relu(x + y)

    def order(self):
        """Its keys in the order of ours."""
        keys = []
        for i in (1, 2):
            keys += [f"dw{i}", *(key for key in self.state_dict() if key.startswith(f"g{i}."))]
            keys += [key for key in self.state_dict() if key.startswith((f"pw{i}.", f"n{i}."))]
        return keys


class LiteralDynamicConv(Literal):
    def __init__(self, dim, out_dim, stride, temperature, experts=4):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(experts, out_dim, dim, 3, 3))
        self.bias = nn.Parameter(torch.zeros(experts, out_dim))
        self.register_buffer("temperature", torch.tensor(temperature))
        self.fc1, self.fc2 = nn.Linear(dim, dim // 4), nn.Linear(dim // 4, experts)
        self.stride = stride

    def forward(self, x):
        share = self.fc2(F.relu(self.fc1(x.mean((2, 3))))) / self.temperature
        share = share.softmax(1)
        outs = []
        for i, image in enumerate(x):
            weight = (share[i, :, None, None, None, None] * self.weight).sum(0)
            bias = (share[i, :, None] * self.bias).sum(0)
            outs.append(F.conv2d(image[None], weight, bias, self.stride, padding=1))
        return torch.cat(outs)


class WithRouting(nn.Module):
    """timm's CondConv2d, with gates as in EfficientNet-CC."""

    def __init__(self, dim, out_dim, stride, groups, bias):
        super().__init__()
        settings = {"padding": 1, "groups": groups, "bias": bias}
        self.conv = CondConv2d(dim, out_dim, 3, stride, num_experts=4, **settings)
        self.fc = nn.Linear(dim, 4)

    def forward(self, x):
        return self.conv(x, self.fc(x.mean((2, 3))).sigmoid())


def skip_last(module):
    keys = list(module.state_dict())
    return [k for k in keys if "skip" not in k] + [k for k in keys if "skip" in k]


squeeze = partial(efficientnet.SqueezeExcite, rd_ratio=0.25 / 6)
CASES = {}


def case(label, name, oracle, **kwargs):
    CASES[f"{name} {label}".strip()] = (name, kwargs, oracle)


for stride, out in [(1, 12), (1, 20), (2, 20)]:
    label = f"{out}/{stride}"
    size = {"out_dim": out, "stride": stride}
    case(label, "mobilenetv1", partial(
        efficientnet.DepthwiseSeparableConv, 12, out, stride=stride, noskip=True, pw_act=True),
        **size)  # fmt: skip
    for repeats, start, grow in [(2, True, False), (3, False, True)]:
        case(f"{label} {repeats}", "xception",
             partial(XceptionBlock, 12, out, repeats, stride, start, grow),
             repeats=repeats, start_with_act=start, grow_first=grow, **size)  # fmt: skip
    for ratio in (1, 6):
        case(f"{label} {ratio}", "inverted_residual",
             partial(mobilenetv2.InvertedResidual, 12, out, stride, ratio), expand_ratio=ratio,
             **size)  # fmt: skip
    case(label, "mbconv", partial(
        efficientnet.InvertedResidual, 12, out, 5, stride, exp_ratio=6.0, act_layer=nn.SiLU,
        se_layer=squeeze), kernel_size=5, **size)  # fmt: skip
    for bn in (False, True):
        case(f"{label} {bn}", "bsconv_u", partial(
            BSConvU, 12, out, 3, stride, 1, bias=not bn, with_bn=bn), bias=not bn, with_bn=bn,
            **size)  # fmt: skip
        case(f"{label} {bn}", "bsconv_s", partial(
            BSConvS, 12, out, 5, stride, 4, 2, p=0.45, with_bn=bn), kernel_size=5, dilation=2,
            p=0.45, with_bn=bn, **size)  # fmt: skip
    case(label, "esp", partial(LiteralESP, 12, out, stride, add=out == 12), **size)
    case(label, "condconv", partial(WithRouting, 12, out, stride, 4, True), groups=4, bias=True,
         **size)  # fmt: skip
    case(label, "dynamic_conv", partial(LiteralDynamicConv, 12, out, stride, 30.0), **size)
    case(label, "grouped_conv", partial(nn.Conv2d, 12, out, 3, stride, 1, groups=4), groups=4,
         **size)  # fmt: skip
for stride, out in [(1, 12), (2, 24)]:
    size = {"out_dim": out, "stride": stride}
    case(
        f"{stride}", "shufflenetv2", partial(shufflenetv2.InvertedResidual, 12, out, stride), **size
    )
    case(f"{stride}", "resdsc", partial(LiteralResDSC, 12, out, stride), **size)
    case(f"{stride} soft", "resdsc", partial(LiteralResDSC, 12, out, stride, 3), num_domains=3,
         **size)  # fmt: skip
    for add in (False, True):
        case(
            f"{stride} {add}",
            "pydmobilenet",
            partial(LiteralPyd, 12, out, stride, add),
            add=add,
            **size,
        )
for stride, out, groups, first in [(1, 24, 3, 3), (2, 36, 3, 1), (1, 24, 1, 1), (2, 48, 2, 2)]:
    dim = 24 if stride == 1 else 12
    case(f"{stride} {groups} {first}", "shufflenetv1",
         partial(LiteralShuffleNetV1, dim, out, stride, groups, first), dim=dim, out_dim=out,
         stride=stride, groups=groups, first_groups=first)  # fmt: skip
for sides in ((3, 5, 7), (3, 5, 7, 9, 11)):
    for stride in (1, 2):
        case(f"{sides} {stride}", "mixconv",
             partial(MixedConv2d, 13, 13, list(sides), stride, depthwise=True), dim=13,
             kernel_size=sides, stride=stride)  # fmt: skip


def order_of(oracle):
    if isinstance(oracle, XceptionBlock):
        return skip_last(oracle)
    return oracle.order() if hasattr(oracle, "order") else list(oracle.state_dict())


def build(name, kwargs, oracle):
    """The block and its oracle, with the same values."""
    kwargs = dict(kwargs)
    ours = tc.create_block(name, kwargs.pop("dim", 12), **kwargs).double()
    theirs = randomize_(oracle().double(), but=("temperature",))
    values = theirs.state_dict()
    keys = order_of(theirs)
    assert sorted(keys) == sorted(values)
    assert len(keys) == len(ours.state_dict())
    pairs = dict(zip(ours.state_dict(), keys, strict=True))
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    ours.load_state_dict({k: values[pairs[k]].clone().reshape(shapes[k]) for k in pairs})
    return ours, theirs, pairs


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize(("name", "kwargs", "oracle"), CASES.values(), ids=CASES.keys())
def test_block_is_that_of_its_oracle(name, kwargs, oracle, scale, training):
    ours, theirs, pairs = build(name, kwargs, oracle)
    ours.train(training)
    theirs.train(training)
    dim = kwargs.get("dim", 12)
    sizes = [(ROWS, COLS)] if name == "resdsc" else [(ROWS, COLS), (5, 7)]
    fmaps = [draw(2, dim, *size, scale=scale) for size in sizes]
    assert_same_on_maps(ours, theirs, pairs, fmaps)


@pytest.mark.parametrize(("name", "kwargs", "oracle"), CASES.values(), ids=CASES.keys())
def test_tokens_are_maps_in_another_order(name, kwargs, oracle):
    ours, _, _ = build(name, kwargs, oracle)
    ours.eval()
    dim, stride = kwargs.get("dim", 12), kwargs.get("stride", 1)
    x = draw(2, ROWS * COLS, dim)
    expected = ours(x.transpose(1, 2).unflatten(2, (ROWS, COLS)))
    out = ours(x, ROWS, COLS)
    if stride > 1:
        out, grid = out
        assert grid == tc.TokenGrid((ROWS // 2, COLS // 2))
    torch.testing.assert_close(out, expected.flatten(2).transpose(1, 2), rtol=1e-11, atol=1e-11)


def test_the_size_behind_a_stride_is_that_of_torch():
    block = tc.create_block("mobilenetv1", 4, stride=2)
    prefix = torch.randn(1, 2, 4)
    out, grid = block(torch.cat([prefix, torch.randn(1, 35, 4)], 1), tc.TokenGrid((5, 7), 2))
    assert grid == tc.TokenGrid((3, 4), 2)
    assert out.shape == (1, 14, 4)
    assert torch.equal(out[:, :2], prefix)


@pytest.mark.parametrize("name", ["mbconv", "esp", "condconv"])
def test_frames_of_a_video_are_images(name):
    block = tc.create_block(name, 10).double().eval()
    x = draw(2, 1 + 3 * 20, 10)
    out = block(x, tc.TokenGrid((3, 4, 5), 1))
    assert torch.equal(out[:, :1], x[:, :1])
    for frame in range(3):
        part = slice(1 + frame * 20, 1 + (frame + 1) * 20)
        torch.testing.assert_close(out[:, part], block(x[:, part], 4, 5), rtol=1e-10, atol=1e-12)


def test_no_copies_at_fold_and_unfold():
    seen = []
    block = tc.create_block("grouped_conv", 8)
    block.body.conv.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    x = torch.randn(2, 15, 8)
    out = block(x, 3, 5)
    fmap, made = seen[0]
    assert fmap.data_ptr() == x.data_ptr()
    assert fmap.is_contiguous(memory_format=torch.channels_last)
    assert out.data_ptr() == made.data_ptr()


# --- what is added, and what is not ---


@pytest.mark.parametrize("name", ["inverted_residual", "mbconv", "xception", "pydmobilenet"])
def test_the_residual_can_be_left_out(name):
    block = tc.create_block(name, 12).double().eval()
    branch = tc.create_block(name, 12, residual=False).double().eval()
    branch.load_state_dict(block.state_dict())
    fmap = draw(2, 12, ROWS, COLS)
    torch.testing.assert_close(block(fmap), fmap + branch(fmap), rtol=1e-11, atol=1e-11)


def test_soft_sharing_with_one_domain_chosen_is_that_domain():
    soft = tc.create_block("resdsc", 8, num_domains=3).double().eval()
    alone = tc.create_block("resdsc", 8).double().eval()
    for name in ("depthwise1", "depthwise2"):
        experts = soft.get_submodule(f"body.{name}")
        experts.routing.fc2.weight.data.zero_()
        experts.routing.fc2.bias.data.copy_(torch.tensor([0.0, 1e3, 0.0]))
        alone.get_submodule(f"body.{name}").weight.data.copy_(experts.weight[1])
    for name in ("pointwise1", "pointwise2"):
        weight = soft.get_submodule(f"body.{name}").weight
        alone.get_submodule(f"body.{name}").weight.data.copy_(weight)
    fmap = draw(2, 8, 4, 6)
    torch.testing.assert_close(soft(fmap), alone(fmap), rtol=1e-11, atol=1e-11)


def test_images_of_one_batch_have_kernels_of_their_own():
    block = tc.create_block("condconv", 6).double()
    fmap = draw(3, 6, 4, 5)
    for i in range(3):
        torch.testing.assert_close(
            block(fmap)[i], block(fmap[i : i + 1])[0], rtol=1e-11, atol=1e-12
        )


def test_the_temperature_is_saved():
    block = tc.create_block("dynamic_conv", 8)
    block.temperature = 2.5
    other = tc.create_block("dynamic_conv", 8)
    assert other.temperature == 30.0
    other.load_state_dict(block.state_dict())
    assert other.temperature == 2.5
    other.reset_parameters()
    assert other.temperature == 30.0


def test_the_temperature_can_be_lowered():
    block = tc.create_block("dynamic_conv", 8).double()
    fmap = draw(1, 8, 4, 5)
    hot = block(fmap)
    block.temperature = 1.0
    assert block.temperature == 1.0
    assert not torch.equal(block(fmap), hot)
    with pytest.raises(ValueError, match="temperature > 0, got 0"):
        block.temperature = 0


@pytest.mark.parametrize(
    ("kernel_size", "norm", "act"),
    [(3, None, None), (5, nn.BatchNorm2d, nn.ReLU), (3, None, nn.ReLU)],
)
def test_a_separable_convolution_takes_norm_and_activation_between_its_parts(
    kernel_size, norm, act
):
    ours = tc.SeparableConv(
        6, kernel_size, out_dim=9,
        norm_layer=norm and BatchNorm, act_layer=act,
    ).double()  # fmt: skip
    parts = [nn.Conv2d(6, 6, kernel_size, padding=kernel_size // 2, groups=6)]
    parts += [norm(6)] if norm else []
    parts += [act()] if act else []
    theirs = randomize_(nn.Sequential(*parts, nn.Conv2d(6, 9, 1)).double())
    values = theirs.eval().state_dict().values()
    ours.eval()
    shapes = ours.state_dict()
    ours.load_state_dict(
        {k: v.reshape(shapes[k].shape) for k, v in zip(shapes, values, strict=True)}
    )
    x = draw(2, 15, 6)
    expected = theirs(x.transpose(1, 2).unflatten(2, (3, 5))).flatten(2).transpose(1, 2)
    torch.testing.assert_close(ours(x, 3, 5), expected, rtol=1e-11, atol=1e-11)


# --- the regulariser of BSConv-S ---


def test_the_regulariser_is_that_of_the_authors():
    weight = draw(4, 12, 1, 1)
    theirs = BSConvS(12, 20, 3, p=1 / 3).double()
    theirs.pw1.weight.data.copy_(weight)
    torch.testing.assert_close(orthonormal_loss(weight), theirs._reg_loss(), rtol=1e-12, atol=0)
    model = nn.Sequential(*(tc.create_block("bsconv_s", 12, p=1 / 3) for _ in range(2))).double()
    for block in model:
        block.body.pw1.weight.data.copy_(weight)
    torch.testing.assert_close(
        bsconv_reg_loss(model), 0.1 * 2 * theirs._reg_loss(), rtol=1e-12, atol=0
    )


def test_the_regulariser_makes_rows_orthonormal():
    torch.manual_seed(0)
    block = tc.create_block("bsconv_s", 12)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        bsconv_reg_loss(block, alpha=1.0).backward()
        optimizer.step()
    rows = block.body.pw1.weight.flatten(1)
    assert (rows @ rows.T - torch.eye(4)).abs().max() < 0.1


def test_the_regulariser_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="BSConvS blocks, got one without"):
        bsconv_reg_loss(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"got \(2, 3, 3, 3\)"):
        orthonormal_loss(torch.zeros(2, 3, 3, 3))


# --- video ---


@pytest.mark.parametrize("sides", [3, (1, 3, 3), (5, 3, 1)])
@pytest.mark.parametrize("residual", [False, True])
def test_a_video_convolution_is_that_of_torch(sides, residual):
    ours = DWConv3d(6, sides, residual=residual).double()
    weight_sides = (sides,) * 3 if isinstance(sides, int) else sides
    theirs = nn.Conv3d(6, 6, weight_sides, padding=[s // 2 for s in weight_sides], groups=6)
    theirs.double().load_state_dict(ours.state_dict())
    x = draw(2, 2 + 4 * 3 * 5, 6).requires_grad_()
    video = x[:, 2:].transpose(1, 2).unflatten(2, (4, 3, 5))
    expected = theirs(video) + (video if residual else 0)
    expected = torch.cat([x[:, :2], expected.flatten(2).transpose(1, 2)], dim=1)
    out = ours(x, tc.TokenGrid((4, 3, 5), 2))
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    for a, b in zip(
        torch.autograd.grad(out.sin().sum(), [x, ours.weight]),
        torch.autograd.grad(expected.sin().sum(), [x, theirs.weight]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_a_video_convolution_wants_frames():
    with pytest.raises(tc.GridError, match=r"grid \(T, H, W\), got \(3, 5\)"):
        DWConv3d(6)(torch.zeros(1, 15, 6), 3, 5)
    with pytest.raises(ValueError, match="odd kernel sides, got 2"):
        DWConv3d(6, 2)
    with pytest.raises(ValueError, match="expected dim >= 1, got 0"):
        DWConv3d(0)
    conv = DWConv3d(6, residual=True)
    assert str(conv) == "DWConv3d(6, kernel_size=(3, 3, 3), bias=True, residual=True)"
    conv.init_neutral_()
    x = torch.randn(1, 30, 6)
    assert torch.equal(conv(x, 2, 3, 5), x)


# --- folding ---

NORMS_LEFT = {"mobilenetv1": 0, "xception": 0, "inverted_residual": 0, "mbconv": 0,
              "shufflenetv1": 0, "shufflenetv2": 0, "resdsc": 0, "pydmobilenet": 2,
              "bsconv_u": 0, "bsconv_s": 0}  # fmt: skip


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("name", NORMS_LEFT)
def test_folded_is_equal(name, dtype, tolerance):
    kwargs = {"with_bn": True} if "bsconv" in name else {}
    block = randomize_(tc.create_block(name, 12, **kwargs).to(dtype)).eval()
    fmap = draw(2, 12, ROWS, COLS).to(dtype)
    before = block(fmap)
    assert block.fold_()
    assert (block(fmap) - before).abs().max() <= tolerance * before.abs().max()
    left = sum(isinstance(m, nn.BatchNorm2d) for m in block.modules())
    assert left == NORMS_LEFT[name]
    assert not block.fold_()


def test_folding_is_refused_in_training_and_in_half():
    block = tc.create_block("mobilenetv1", 4)
    with pytest.raises(ValueError, match="call eval"):
        block.fold_()
    with pytest.raises(ValueError, match="fewer than 32 bits"):
        copy.deepcopy(block).half().eval().fold_()


# --- bad input ---


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("mobilenetv1", {"kernel_size": 4}, "odd kernel_size, got 4"),
        ("mobilenetv1", {"kernel_size": (3, 5)}, r"odd kernel_size, got \(3, 5\)"),
        ("mobilenetv1", {"stride": 0}, "stride=0"),
        ("mobilenetv1", {"out_dim": 0}, "out_dim=0"),
        ("pydmobilenet", {"kernel_size": (3, 4)}, "one or several, got"),
        ("pydmobilenet", {"width_ratio": 0.01}, "positive bottleneck"),
        ("xception", {"repeats": 0}, "repeats >= 1"),
        ("inverted_residual", {"expand_ratio": 0}, "positive hidden width"),
        ("shufflenetv1", {"groups": 5}, "groups to divide dim=12 and out_dim=3, got groups=5"),
        ("shufflenetv1", {"out_dim": 24}, "out_dim == dim at stride 1"),
        ("shufflenetv2", {"out_dim": 13, "stride": 2}, "even out_dim"),
        ("esp", {"out_dim": 4}, "out_dim >= 5"),
        ("bsconv_s", {"p": 2.0}, "0 <= p <= 1, got 2"),
        ("mixconv", {"out_dim": 24}, "out_dim == dim"),
        ("mixconv", {"kernel_size": (3,) * 13}, "channel for each of 13"),
        ("grouped_conv", {"groups": 5}, "groups to divide dim=12"),
        ("grouped_conv", {"dilation": 0}, "dilation=0"),
        ("shufflenetv1", {"groups": 0, "first_groups": 1}, "groups >= 1, got 0"),
        ("mbconv", {"se_ratio": -1.0}, "se_ratio >= 0, got -1"),
        ("condconv", {"num_experts": 0}, "num_experts >= 1"),
        ("dynamic_conv", {"temperature": 0.0}, "temperature > 0"),
        ("resdsc", {"out_dim": 6}, "out_dim >= dim"),
        ("resdsc", {"num_domains": 0}, "num_domains >= 1"),
    ],
)
def test_bad_arguments(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        tc.create_block(name, 12, **kwargs)


@pytest.mark.parametrize("name", [n for n, info in tc.BLOCKS.items() if info.kind == "maps"])
def test_every_block_is_traced_takes_no_image_and_wants_its_own_width(name):
    block = tc.create_block(name, 12).eval()
    fmap = draw(2, 12, 4, 6).float()
    traced = torch.fx.symbolic_trace(Literal(block=block).requires_grad_(False))
    torch.testing.assert_close(traced(fmap), block(fmap))
    assert block(fmap[:0]).shape == (0, 12, 4, 6)
    assert block(fmap[:0].flatten(2).transpose(1, 2), 4, 6).shape == (0, 24, 12)
    with pytest.raises(tc.GridError, match=r"\(B, 12, H, W\), or tokens.*\(12, 4, 12\)"):
        block(torch.zeros(12, 4, 12))
    with pytest.raises(tc.GridError, match=r"tokens \(B, N, 12\), got .* \(1, 24, 8\)"):
        block(torch.zeros(1, 24, 8), 4, 6)


@pytest.mark.parametrize(
    ("name", "kwargs", "key", "std"),
    [
        ("mobilenetv1", {}, "depthwise", (2 / 9) ** 0.5),
        ("mobilenetv1", {}, "pointwise", (2 / 64) ** 0.5),
        ("mbconv", {"kernel_size": 5}, "depthwise", (2 / 25) ** 0.5),
        ("mbconv", {}, "project", (2 / 64) ** 0.5),
        ("inverted_residual", {}, "depthwise", (2 / 9 / 384) ** 0.5),
        ("xception", {}, "pointwise1", (2 / 64) ** 0.5),
        ("shufflenetv1", {"groups": 4}, "reduce", 1 / 16),
        ("shufflenetv1", {}, "depthwise", 1.0),
        ("shufflenetv2", {}, "halves.branches.1.0", (3 * 32) ** -0.5),
        ("resdsc", {}, "depthwise1", (2 / 9 / 64) ** 0.5),
        ("resdsc", {"num_domains": 4}, "depthwise1", (2 / 9 / 64) ** 0.5),
        ("bsconv_u", {}, "dw", 1 / 3 / 3**0.5),
    ],
)
def test_starts_as_the_papers_code_does(name, kwargs, key, std):
    torch.manual_seed(0)
    block = tc.create_block(name, 64, **kwargs)
    weight = block.get_submodule(f"body.{key}").weight
    assert weight.std().item() == pytest.approx(std, rel=0.1)


def test_the_norms_of_shufflenetv1_start_a_little_above_zero():
    block = tc.create_block("shufflenetv1", 8)
    assert torch.equal(block.body.norm3.bias, torch.full((8,), 1e-4))


def test_says_what_it_was_built_with():
    assert tc.create_block("mobilenetv1", 8, kernel_size=5).kernel_size == 5
    assert tc.create_block("pydmobilenet", 8, kernel_size=[3]).kernel_size == (3,)
    built = tc.create_block("mix_ffn", 8, kernel_size=5, mlp_ratio=2)
    assert (built.kernel_size, built.mlp_ratio) == (5, 2)


def test_bad_tokens():
    block = tc.create_block("mobilenetv1", 4, out_dim=6)
    with pytest.raises(tc.GridError, match="needs out_dim == dim, got 6 and 4"):
        block(torch.zeros(1, 7, 4), tc.TokenGrid((2, 3), 1))
    with pytest.raises(tc.GridError, match="expected 6 tokens"):
        block(torch.zeros(1, 7, 4), 2, 3)
    with pytest.raises(tc.GridError, match="fill one grid, got a SparseGrid"):
        block(torch.zeros(1, 1, 4), tc.SparseGrid(torch.zeros(1, 1, 2, dtype=torch.long)))
    with pytest.raises(tc.GridError, match=r"size that 2 divides, got \(5, 6\)"):
        tc.create_block("resdsc", 4, out_dim=8, stride=2)(torch.zeros(1, 4, 5, 6))
