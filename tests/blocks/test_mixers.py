"""Convolutional token mixers against code we did not write, or the papers' facts written here.

Every oracle has the keys of the official code, or timm's, so that weights go through
``load_official``.
"""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models import _efficientnet_blocks as efficientnet
from timm.models import convnext, fastvit, focalnet, inception_next, metaformer, repvit, starnet
from torch import nn

import tokenconv as tc
from tokenconv.blocks.official import SOURCES, load_official
from tokenconv.blocks.reparam import DILATIONS

from .conftest import Net, assert_same_on_maps, bn, dw, on_channels, pw, randomize_, scale

D, ROWS, COLS = 24, 5, 7
MIXERS = [name for name, info in tc.BLOCKS.items() if info.group == "mixer"]


def draw(*shape, scale=1.0):
    generator = torch.Generator().manual_seed(sum(shape))
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


# --- references written from the published facts, where nothing can be imported ---


def grn(x, gamma, beta):
    norm = (x * x).sum((2, 3), keepdim=True).sqrt()
    share = norm / (norm.mean(1, keepdim=True) + 1e-6)
    return gamma.reshape(-1, 1, 1) * (x * share) + beta.reshape(-1, 1, 1) + x


def van(sides=(5, 7), dilation=3):
    def run(m, x):
        y = F.gelu(m.proj_1(x))
        unit = m.spatial_gating_unit
        return m.proj_2(y * unit.conv1(unit.conv_spatial(unit.conv0(y)))) + x

    unit = Net(conv0=dw(D, sides[0]), conv_spatial=dw(D, sides[1], dilation), conv1=pw(D, D))
    return Net(run, proj_1=pw(D, D), spatial_gating_unit=unit, proj_2=pw(D, D))


def conv2former():
    def run(m, x):
        y = on_channels(m.norm, x)
        return m.proj(m.att(y) * m.v(y))

    att = nn.Sequential(pw(D, D), nn.GELU(), dw(D, 11))
    return Net(run, norm=nn.LayerNorm(D, eps=1e-6), att=att, v=pw(D, D), proj=pw(D, D))


def replknet(small=5, width=D):
    def run(m, x):
        y = F.relu(m.pw1.bn(m.pw1.conv(m.prelkb_bn(x))))
        large = m.large_kernel
        out = large.lkb_origin.bn(large.lkb_origin.conv(y))
        if small:
            out = out + large.small_conv.bn(large.small_conv.conv(y))
        return x + m.pw2.bn(m.pw2.conv(F.relu(out)))

    def branch(side):
        return Net(conv=dw(width, side, bias=False), bn=bn(width))

    kernels = {"lkb_origin": branch(13), **({"small_conv": branch(small)} if small else {})}
    return Net(
        run, prelkb_bn=bn(D), pw1=Net(conv=pw(D, width, bias=False), bn=bn(width)),
        large_kernel=Net(**kernels), pw2=Net(conv=pw(width, D, bias=False), bn=bn(D)),
    )  # fmt: skip


TABLE = {
    17: [(5, 1), (9, 2), (3, 4), (3, 5), (3, 7)],
    15: [(5, 1), (7, 2), (3, 3), (3, 5), (3, 7)],
    13: [(5, 1), (7, 2), (3, 3), (3, 4), (3, 5)],
    11: [(5, 1), (5, 2), (3, 3), (3, 4), (3, 5)],
    9: [(5, 1), (5, 2), (3, 3), (3, 4)],
    7: [(5, 1), (3, 2), (3, 3)],
    5: [(3, 1), (3, 2)],
}
"""(k; r) of UniRepLKNet, from the paper's code."""


def dilated(side):
    def run(m, x):
        out = m.origin_bn(m.lk_origin(x))
        for k, r in TABLE[side]:
            conv, norm = (getattr(m, f"dil_{kind}_k{k}_{r}") for kind in ("conv", "bn"))
            out = out + norm(conv(x))
        return out

    parts = {}
    for k, r in TABLE[side]:
        parts[f"dil_conv_k{k}_{r}"] = dw(D, k, r, bias=False)
        parts[f"dil_bn_k{k}_{r}"] = bn(D)
    return Net(run, lk_origin=dw(D, side, bias=False), origin_bn=bn(D), **parts)


def unireplknet(side):
    def run(m, x):
        y = m.norm(m.dwconv(x))
        gate = m.se.up(F.relu(m.se.down(y.mean((2, 3), keepdim=True)))).sigmoid()
        y = F.gelu(on_channels(m.pwconv1[1], y * gate))
        y = grn(y, m.act[1].gamma, m.act[1].beta)
        return x + m.gamma[:, None, None] * m.pwconv2[2](on_channels(m.pwconv2[0], y))

    norm = Net(gamma=scale(1, 1, 1, 4 * D), beta=scale(1, 1, 1, 4 * D))
    last = nn.Sequential(nn.Linear(4 * D, D, bias=False), nn.Identity(), bn(D))
    return Net(
        run, dwconv=dilated(side) if side > 5 else dw(D, side, bias=False), norm=bn(D),
        se=Net(down=pw(D, D // 4), up=pw(D // 4, D)),
        pwconv1=nn.Sequential(nn.Identity(), nn.Linear(D, 4 * D)),
        act=nn.Sequential(nn.GELU(), norm), pwconv2=last, gamma=scale(D),
    )  # fmt: skip


def convnext_official(v2):
    def run(m, x):
        y = F.gelu(on_channels(m.pwconv1, on_channels(m.norm, m.dwconv(x))))
        y = on_channels(m.pwconv2, grn(y, m.grn.gamma, m.grn.beta) if v2 else y)
        return x + (y if v2 else m.gamma[:, None, None] * y)

    norm = Net(gamma=scale(1, 1, 1, 4 * D), beta=scale(1, 1, 1, 4 * D))
    own = {"grn": norm} if v2 else {"gamma": scale(D)}
    return Net(run, dwconv=dw(D, 7), norm=nn.LayerNorm(D, eps=1e-6), pwconv1=nn.Linear(D, 4 * D),
               pwconv2=nn.Linear(4 * D, D), **own)  # fmt: skip


def moganet():
    first, second, third = D - D * 3 // 8 - D // 2, D * 3 // 8, D // 2

    def run(m, x):
        y = m.proj_1(x)
        y = F.silu(y + m.sigma.scale * (y - y.mean((2, 3), keepdim=True)))
        z = m.value.DW_conv0(y)
        parts = z[:, :first], z[:, first : first + second], z[:, -third:]
        z = [parts[0], m.value.DW_conv1(parts[1]), m.value.DW_conv2(parts[2])]
        z = m.value.PW_conv(torch.cat(z, dim=1))
        return x + m.proj_2(F.silu(m.gate(y)) * F.silu(z))

    value = Net(DW_conv0=dw(D, 5), DW_conv1=dw(second, 5, 2), DW_conv2=dw(third, 7, 3),
                   PW_conv=pw(D, D))  # fmt: skip
    return Net(run, proj_1=pw(D, D), gate=pw(D, D), value=value, proj_2=pw(D, D),
               sigma=Net(scale=scale(1, D, 1, 1)))  # fmt: skip


def uniformer():
    return Net(lambda m, x: x + m.conv2(m.attn(m.conv1(m.norm1(x)))),
               norm1=bn(D), conv1=pw(D, D), attn=dw(D, 5), conv2=pw(D, D))  # fmt: skip


def smt(heads, bias):
    part = D // heads

    def run(m, x):
        s, outs = on_channels(m.s, x), []
        for i in range(heads):
            conv = getattr(m, f"local_conv_{i + 1}")
            outs.append(conv(s[:, i * part : (i + 1) * part]))
        mixed = [outs[i][:, c] for c in range(part) for i in range(heads)]
        y = m.proj1(F.gelu(m.bn(m.proj0(torch.stack(mixed, dim=1)))))
        return on_channels(m.proj, y * on_channels(m.v, x))

    convs = {f"local_conv_{i + 1}": dw(part, 3 + 2 * i) for i in range(heads)}
    return Net(run, v=nn.Linear(D, D, bias=bias), s=nn.Linear(D, D, bias=bias), **convs,
               proj0=pw(D, 2 * D, groups=part), bn=bn(2 * D), proj1=pw(2 * D, D),
               proj=nn.Linear(D, D))  # fmt: skip


class RepMixerOfficial(Net):
    """timm's, under the official names."""

    def __init__(self):
        def part(convs):
            branch = {"rbr_conv": nn.ModuleList([Net(conv=dw(D, 3, bias=False), bn=bn(D))]),
                      "rbr_scale": Net(conv=dw(D, 1, bias=False), bn=bn(D))}  # fmt: skip
            return Net(**(branch if convs else {}), rbr_skip=bn(D))

        super().__init__(self.official, mixer=part(True), norm=part(False))
        self.layer_scale = scale(D, 1, 1)

    @staticmethod
    def official(m, x):
        (large,), small = m.mixer.rbr_conv, m.mixer.rbr_scale
        mixed = large.bn(large.conv(x)) + small.bn(small.conv(x)) + m.mixer.rbr_skip(x)
        return x + m.layer_scale * (mixed - m.norm.rbr_skip(x))


def uib(out_dim=D, stride=1, start=0, mid=3, end=0, ratio=4.0, value=None):
    return efficientnet.UniversalInvertedResidual(
        D, out_dim, start, mid, end, stride, exp_ratio=ratio, layer_scale_init_value=value
    )


def focal(**kwargs):
    norm = partial(LayerNorm2d, eps=1e-5)
    return focalnet.FocalModulation(D, 3, norm_layer=norm, **kwargs)


UIBS = {
    "both": ({"dw_kernel_size_start": 5}, {"start": 5}),
    "start": ({"dw_kernel_size_start": 5, "dw_kernel_size_mid": 0}, {"start": 5, "mid": 0}),
    "none": ({"dw_kernel_size_mid": 0, "exp_ratio": 2.3}, {"mid": 0, "ratio": 2.3}),
    "end": ({"dw_kernel_size_mid": 0, "dw_kernel_size_end": 3, "layer_scale_init_value": 1.0},
            {"mid": 0, "end": 3, "value": 1.0}),
    "all": ({"kernel_size": 5, "dw_kernel_size_start": 3, "dw_kernel_size_end": 3},
            {"start": 3, "mid": 5, "end": 3}),
}  # fmt: skip
STRIDE = {"out_dim": 40, "stride": 2}
V2 = {"use_grn": True, "ls_init_value": None}
SMALL_INCEPTION = {"kernel_size": 5, "band_kernel_size": 9, "branch_ratio": 0.25}

CASES = {
    "sep_conv": ("metaformer", {}, lambda: metaformer.SepConv(D)),
    "sep_conv wide": (
        "metaformer",
        {"expansion_ratio": 3, "kernel_size": 5, "bias": True, "act1_layer": nn.GELU},
        lambda: metaformer.SepConv(D, 3, nn.GELU, bias=True, kernel_size=5, padding=2),
    ),
    "inception_dwconv": ("inceptionnext", {}, lambda: inception_next.InceptionDWConv2d(D)),
    "inception_dwconv small": ("inceptionnext", SMALL_INCEPTION, lambda:
        inception_next.InceptionDWConv2d(D, 5, 9, 0.25)),
    "inceptionnext_block": ("inceptionnext", {}, lambda: inception_next.MetaNeXtBlock(D)),
    "inceptionnext_block atto": (
        "inceptionnext",
        {"band_kernel_size": 9, "branch_ratio": 0.25, "mlp_ratio": 2},
        lambda: inception_next.MetaNeXtBlock(D, mlp_ratio=2, token_mixer=partial(
            inception_next.InceptionDWConv2d, band_kernel_size=9, branch_ratio=0.25)),
    ),
    "lka": ("van", {}, van),
    "lka small": ("van", {"kernel_size": (3, 5), "dilation": 2}, partial(van, (3, 5), 2)),
    "conv_modulation": ("conv2former", {}, conv2former),
    "focal_modulation": ("focalnet", {}, lambda: focal(focal_level=2)),
    "focal_modulation large": (
        "focalnet",
        {"focal_level": 3, "use_postln": True, "normalize_modulator": True, "bias": False},
        lambda: focal(focal_level=3, use_post_norm=True, normalize_modulator=True, bias=False),
    ),
    "rep_mixer": ("fastvit", {}, lambda: fastvit.RepMixer(D)),
    "rep_mixer official": ("fastvit", {}, RepMixerOfficial),
    "rep_mixer bare": ("fastvit", {"kernel_size": 5, "layer_scale_init_value": None}, lambda:
        fastvit.RepMixer(D, 5, layer_scale_init_value=None)),
    "replknet_block": ("replknet", {"kernel_size": 13}, replknet),
    "replknet_block wide": ("replknet", {"kernel_size": 13, "small_kernel": 3, "dw_ratio": 1.5},
                            partial(replknet, 3, 36)),
    "replknet_block alone": ("replknet", {"kernel_size": 13, "small_kernel": None},
                             partial(replknet, None)),
    **{f"dilated_reparam {k}": ("unireplknet", {"kernel_size": k}, partial(dilated, k))
       for k in TABLE},
    **{f"unireplknet_block {k}": ("unireplknet", {"kernel_size": k}, partial(unireplknet, k))
       for k in (3, 5, 7, 13)},
    "convnext_block": ("convnext", {}, lambda: convnext.ConvNeXtBlock(D)),
    "convnext_block official": ("convnext", {}, partial(convnext_official, False)),
    "convnext_block v2": ("convnext", V2, lambda:
        convnext.ConvNeXtBlock(D, use_grn=True, ls_init_value=None)),
    "convnext_block v2 official": ("convnext", V2, partial(convnext_official, True)),
    "moga_aggregation": ("moganet", {}, moganet),
    "uniformer_mixer": ("uniformer", {}, uniformer),
    "sam": ("smt", {}, partial(smt, 4, True)),
    "sam three": ("smt", {"kernel_size": (3, 5, 7), "qkv_bias": False}, partial(smt, 3, False)),
    "starnet_block": ("starnet", {}, lambda: starnet.Block(D)),
    "starnet_block wide": ("starnet", {"mlp_ratio": 4}, lambda: starnet.Block(D, 4)),
    "repvit_mixer": ("repvit", {}, lambda: repvit.RepVggDw(D, 3)),
    "repvit_mixer large": ("repvit", {"kernel_size": 7}, lambda: repvit.RepVggDw(D, 7)),
    "repvit_block": ("repvit", {}, lambda: repvit.RepViTBlock(D, 2, 3, False, nn.GELU)),
    "repvit_block se": ("repvit", {"use_se": True, "kernel_size": 5}, lambda:
        repvit.RepViTBlock(D, 2, 5, True, nn.GELU)),
    "uib": ("mobilenetv4", {}, uib),
    **{f"uib {label}": ("mobilenetv4", ours, partial(uib, **theirs))
       for label, (ours, theirs) in UIBS.items()},
    **{f"uib {label} stride": ("mobilenetv4", {**ours, **STRIDE}, partial(uib, **theirs, **STRIDE))
       for label, (ours, theirs) in UIBS.items() if label != "none"},
}  # fmt: skip


def build(label):
    """The block and its oracle with the same values, and which of its keys is which of ours."""
    source, kwargs, make = CASES[label]
    ours = tc.create_block(label.split()[0], D, **kwargs).double()
    theirs = randomize_(make().double())
    state = theirs.state_dict()
    numbers = {key: torch.full_like(value, i) for i, (key, value) in enumerate(state.items())}
    load_official(ours, numbers, source=source)
    keys = list(state)
    pairs = {mine: keys[int(value.flatten()[0])] for mine, value in ours.state_dict().items()}
    assert sorted(pairs.values()) == sorted(keys)
    return load_official(ours, state, source=source), theirs, pairs


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("label", CASES)
def test_mixer_is_that_of_its_paper(label, scale, training):
    ours, theirs, pairs = build(label)
    ours.train(training)
    theirs.train(training)
    fmaps = [draw(2, D, *size, scale=scale) for size in ((ROWS, COLS), (8, 5))]
    assert_same_on_maps(ours, theirs, pairs, fmaps, atol=1e-12)


def test_every_source_of_a_mixer_is_tested_and_named_by_the_paper_that_it_is_of():
    tested = {(source, label.split()[0]) for label, (source, _, _) in CASES.items()}
    known = {(source, block) for source, row in SOURCES.items() for block in row}
    assert tested == {row for row in known if row[1] in MIXERS}
    assert tested == {(p.source, name) for name in MIXERS for p in tc.BLOCKS[name].papers}


@pytest.mark.parametrize("label", CASES)
def test_tokens_are_maps_in_another_order_and_prefix_tokens_pass(label):
    ours, _, _ = build(label)
    ours.eval()
    x = draw(2, ROWS * COLS, D)
    expected = ours(x.transpose(1, 2).unflatten(2, (ROWS, COLS))).flatten(2).transpose(1, 2)
    if ours.stride > 1:
        out, grid = ours(x, ROWS, COLS)
        assert grid == tc.TokenGrid((3, 4))
    else:
        prefix = draw(2, 3, D)
        out = ours(torch.cat([prefix, x], dim=1), tc.TokenGrid((ROWS, COLS), 3))
        assert torch.equal(out[:, :3], prefix)
        out = out[:, 3:]
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)


ADDED = ["lka", "rep_mixer", "replknet_block", "unireplknet_block", "convnext_block",
         "inceptionnext_block", "moga_aggregation", "uniformer_mixer", "starnet_block",
         "uib"]  # fmt: skip


@pytest.mark.parametrize("name", MIXERS)
def test_the_residual_can_be_left_out_and_what_is_left_made_zero(name):
    block = tc.create_block(name, D).double().eval()
    branch = tc.create_block(name, D, residual=False).double().eval()
    branch.load_state_dict(block.state_dict())
    fmap = draw(2, D, ROWS, COLS)
    expected = branch(fmap) + (fmap if name in ADDED else 0)
    torch.testing.assert_close(block(fmap), expected, rtol=1e-11, atol=1e-11)
    if tc.BLOCKS[name].sites and name != "inception_dwconv":  # most of whose channels pass
        branch.init_neutral_()
        assert torch.equal(branch.train()(fmap), torch.zeros_like(fmap))


def test_a_difference_without_a_scale_is_made_zero():
    block = tc.create_block("rep_mixer", D, layer_scale_init_value=None)
    block.init_neutral_()
    fmap = draw(2, D, ROWS, COLS)
    assert torch.equal(block.train().float()(fmap.float()), fmap.float())


# --- folding ---

MERGING = ["rep_mixer", "dilated_reparam", "repvit_mixer"]
LARGE = [label for label in CASES if label.split()[0] in MERGING]
FOLDING = [label for label in CASES if label.split()[0] in (
    *MERGING, "replknet_block", "unireplknet_block", "repvit_block", "uib", "sam",
    "starnet_block")]  # fmt: skip
NORMS_LEFT = {"replknet_block": 1}  # which stands in front


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("label", FOLDING)
def test_folded_is_equal(label, dtype, tolerance):
    block, _, _ = build(label)
    block.to(dtype).eval()
    fmap = draw(2, D, 19, 21).to(dtype)
    before = block(fmap)
    assert block.fold_()
    assert (block(fmap) - before).abs().max() <= tolerance * before.abs().max()
    left = sum(isinstance(m, nn.BatchNorm2d) for m in block.modules())
    assert left == NORMS_LEFT.get(label.split()[0], 0)
    assert not block.fold_()


@pytest.mark.parametrize("label", LARGE)
@pytest.mark.parametrize("residual", [None, False, True])
def test_branches_become_one_convolution(label, residual):
    _, kwargs, _ = CASES[label]
    block = tc.create_block(label.split()[0], D, residual=residual, **kwargs)
    randomize_(block.double()).eval()
    fmap = draw(2, D, ROWS, COLS)
    before = block(fmap)
    block.fold_()
    (conv,) = block.body
    side = block.kernel_size
    assert conv.weight.shape == (D, 1, side, side)
    assert sum(p.numel() for p in block.parameters()) == (side * side + 1) * D
    reference = F.conv2d(fmap, conv.weight, conv.bias, padding=side // 2, groups=D)
    torch.testing.assert_close(reference, before, rtol=1e-12, atol=1e-12)
    assert torch.equal(block(fmap), reference)


def test_the_merged_kernel_of_rep_mixer_is_that_of_its_authors():
    block, theirs, _ = build("rep_mixer")
    theirs.eval().reparameterize()
    block.eval().fold_()
    conv = block.get_submodule("body.conv")
    for name in ("weight", "bias"):
        mine, other = (getattr(m, name) for m in (conv, theirs.reparam_conv))
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-13)


def test_the_merged_kernel_of_repvit_is_that_of_its_authors():
    block, theirs, _ = build("repvit_mixer")
    fused = theirs.eval().fuse()
    block.eval().fold_()
    conv = block.get_submodule("body.conv")
    torch.testing.assert_close(conv.weight, fused.weight.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(conv.bias, fused.bias.double(), rtol=1e-6, atol=1e-6)


def test_the_table_of_dilations_is_the_papers():
    assert {k: [(s, r) for r, s in row.items()] for k, row in DILATIONS.items()} == TABLE


def test_folding_keeps_what_is_frozen_and_refuses_training_and_half():
    block = tc.create_block("rep_mixer", D).requires_grad_(False)
    with pytest.raises(ValueError, match="call eval"):
        block.fold_()
    with pytest.raises(ValueError, match="fewer than 32 bits"):
        copy.deepcopy(block).half().eval().fold_()
    with torch.inference_mode():
        block.eval().fold_()
    assert not any(p.requires_grad or p.is_inference() for p in block.parameters())


# --- starts, and what is refused ---


@pytest.mark.parametrize(
    ("name", "key", "std"),
    [
        ("sep_conv", "body.dwconv", 0.02),
        ("lka", "body.lka.context.1", 2**0.5 / 7),
        ("lka", "body.proj_1", (2 / 96) ** 0.5),
        ("conv_modulation", "body.modulate.context.2", 0.02),
        ("focal_modulation", "body.f", 0.02),
        ("focal_modulation", "body.focal.h", (3 * 96) ** -0.5),
        ("focal_modulation", "body.focal.layers.0.0", 27**-0.5),
        ("rep_mixer", "body.mix.mixer.branches.0.conv", 27**-0.5),
        ("unireplknet_block", "body.dwconv.body.sum.branches.0.conv", 0.02),
        ("convnext_block", "body.fc1", 0.02),
        ("moga_aggregation", "body.modulate.context.0", 2**0.5 / 5),
        ("sam", "body.proj", 0.02),
        ("sam", "body.modulate.context.0", 0.02),
        ("sam", "body.modulate.context.3", (2 / 8) ** 0.5),
        ("sam", "body.modulate.context.6", (2 / 96) ** 0.5),
        ("starnet_block", "body.g.conv", 0.02),
        ("uib", "body.dw_mid.conv", 2**0.5 / 3),
    ],
)
def test_starts_as_the_papers_code_does(name, key, std):
    torch.manual_seed(0)
    weight = tc.create_block(name, 96).get_submodule(key).weight
    assert weight.std().item() == pytest.approx(std, rel=0.1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("convnext_block", 1e-6), ("unireplknet_block", 1e-6), ("rep_mixer", 1e-5)],
)
def test_gamma_starts_small(name, value):
    gamma = tc.create_block(name, D).get_parameter("body.layer_scale.gamma")
    assert torch.equal(gamma, torch.full((D,), value))


def test_the_last_norm_of_repvit_starts_from_zero():
    weight = tc.create_block("repvit_block", D).get_parameter("body.channel_mixer.fc2.norm.weight")
    assert not weight.any()


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("lka", {"out_dim": 8}, "LKA keeps width and size, got dim=24, out_dim=8"),
        ("convnext_block", {"stride": 2}, "ConvNeXtBlock keeps width and size"),
        ("lka", {"kernel_size": 5}, r"two kernel sides, got \(5,\)"),
        ("inception_dwconv", {"branch_ratio": 0.01}, "at least one of 24 channels"),
        ("inception_dwconv", {"branch_ratio": 0.4}, "branch_ratio=0.4"),
        ("inception_dwconv", {"band_kernel_size": 4}, "odd band_kernel_size"),
        ("focal_modulation", {"focal_level": 0}, "focal_level >= 1"),
        ("focal_modulation", {"focal_factor": 1}, "even focal_factor"),
        ("moga_aggregation", {"channel_split": (1, 30, 1)}, "a channel for each of"),
        ("moga_aggregation", {"dilations": (1, 2)}, "three kernel sides, dilations and shares"),
        ("sam", {"kernel_size": (3,) * 5}, "5 heads of .* to divide dim, got dim=24"),
        ("replknet_block", {"kernel_size": 3}, "small_kernel of at most 3, got 5"),
        ("replknet_block", {"small_kernel": 4}, "an odd small_kernel of at most 27, got 4"),
        ("dilated_reparam", {"kernel_size": 3}, r"from \[5, 7, .*\], got 3"),
        ("unireplknet_block", {"kernel_size": 19}, r"from \[5, 7, .*\], got 19"),
        ("uib", {"dw_kernel_size_start": 4}, "odd kernel sizes, or 0"),
        ("uib", {"dw_kernel_size_mid": 0, "stride": 2}, "convolution to take stride=2"),
    ],
)
def test_bad_arguments(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        tc.create_block(name, D, **kwargs)
