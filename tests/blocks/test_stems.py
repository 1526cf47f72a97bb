"""Stems against code we did not write, or a reference with the papers' own keys."""

import copy
from itertools import pairwise

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.convnext import ConvNeXt
from timm.models.fastvit import convolutional_stem
from timm.models.metaformer import Downsampling, LayerNorm2dNoBias, Stem
from timm.models.pvt_v2 import OverlapPatchEmbed
from timm.models.xcit import ConvPatchEmbed
from torch import nn
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer
from transformers.models.cvt.modeling_cvt import CvtConvEmbeddings
from transformers.models.segformer.modeling_segformer import SegformerOverlapPatchEmbeddings

import tokenconv as tc
from tokenconv.blocks.maps import MapBlock
from tokenconv.blocks.official import SOURCES, load_official
from tokenconv.blocks.stems import Stem as OurStem

from .conftest import Net, bn, on_channels, randomize_

D = 24


def conv(dim, out_dim, side, stride=1, padding=None, bias=False):
    around = side // 2 if padding is None else padding
    return nn.Conv2d(dim, out_dim, side, stride, around, bias=bias)


def embed(side, stride, padding, dim=3, eps=1e-5):
    """One convolution and a norm, under the names that most have."""
    proj = conv(dim, D, side, stride, padding, bias=True)
    return Net(lambda m, x: on_channels(m.norm, m.proj(x)), proj=proj, norm=nn.LayerNorm(D, eps))


def convnext(later):
    model = ConvNeXt(depths=(1, 1, 1, 1), dims=(3, D, 8, 8) if later else (D, 8, 8, 8))
    return model.stages[1].downsample if later else model.stem


def torchvision(*widths):
    rows = [ConvStemConfig(width, 3, 2) for width in widths]
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": D, "mlp_dim": D}
    return VisionTransformer(64, 16, **sizes, conv_stem_configs=rows).conv_proj


def cct(side, count):
    widths, stride = [3, *[64] * (count - 1), D], max(1, side // 2 - 1)
    rows = [
        nn.Sequential(conv(a, b, side, stride, max(1, side // 2)), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        for a, b in pairwise(widths)
    ]
    return Net(conv_layers=nn.Sequential(*rows))


def ceit(width=64):
    backbone = Net(lambda m, x: F.max_pool2d(m.bn(m.conv(x)), 3, 2, 1),
                   conv=conv(3, width, 7, 2), bn=bn(width))  # fmt: skip
    return Net(backbone=backbone, proj=conv(width, D, 4, 4, 0, bias=True))


def cmt(width):
    def run(m, x):
        for i in (1, 2, 3):
            x = getattr(m, f"stem_norm{i}")(F.gelu(getattr(m, f"stem_conv{i}")(x)))
        return m.patch_embed_a(x)

    layers = {"stem_conv1": conv(3, width, 3, 2, bias=True), "stem_norm1": bn(width)}
    for i in (2, 3):
        layers |= {f"stem_conv{i}": conv(width, width, 3, bias=True), f"stem_norm{i}": bn(width)}
    return Net(run, **layers, patch_embed_a=embed(2, 2, 0, width))


def conv2former():
    w = D // 2
    return nn.Sequential(
        conv(3, w, 3, 2), nn.GELU(), bn(w), conv(w, w, 3), nn.GELU(), bn(w), conv(w, D, 2, 2, 0)
    )


def head(side, depth):
    rows = [conv(3, D, side, 2), bn(D), nn.ReLU()]
    for _ in range(depth):
        rows += [conv(D, D, 3), bn(D), nn.ReLU()]
    steps = nn.Sequential(*rows, conv(D, D, 2, 2, 0, bias=True))
    return Net(lambda m, x: on_channels(m.norm, m.conv(x)), conv=steps, norm=nn.LayerNorm(D))


class MobileViT(nn.Module):
    def __init__(self, name):
        super().__init__()
        model = timm.create_model(name)
        self.stem, self.stages = model.stem, model.stages[:2]

    def forward(self, x):
        return self.stages(self.stem(x))


def spatial_prior(width=64):
    def row(dim, out_dim, stride=2):
        return [conv(dim, out_dim, 3, stride), bn(out_dim), nn.ReLU()]

    w = width
    stem = [*row(3, w), *row(w, w, 1), *row(w, w, 1), nn.MaxPool2d(3, 2, 1)]
    return Net(
        stem=nn.Sequential(*stem), conv2=nn.Sequential(*row(w, 2 * w)),
        conv3=nn.Sequential(*row(2 * w, 4 * w)), conv4=nn.Sequential(*row(4 * w, 4 * w)),
        **{f"fc{i}": conv(n * w, D, 1, bias=True) for i, n in enumerate((1, 2, 4, 4), 1)},
    )  # fmt: skip


LATER = {"kernel_size": 3, "stride": 2}
ORACLES = {
    "patch_embed pvtv2": ("pvtv2", {}, lambda: OverlapPatchEmbed(7, 4, 3, D)),
    "patch_embed pvtv2 later": ("pvtv2", {**LATER, "in_chans": 8}, lambda:
        OverlapPatchEmbed(3, 2, 8, D)),
    "patch_embed segformer": ("segformer", {}, lambda: SegformerOverlapPatchEmbeddings(7, 4, 3, D)),
    "patch_embed transnext": ("transnext", {}, lambda: embed(7, 4, 3)),
    "patch_embed shunted": ("shunted", LATER, lambda: embed(3, 2, 1)),
    "patch_embed smt": ("smt", LATER, lambda: embed(3, 2, 1)),
    "patch_embed cmt": ("cmt", {"kernel_size": 2, "stride": 2, "padding": 0}, lambda:
        embed(2, 2, 0)),
    "conv_embed": ("cvt", {}, lambda: CvtConvEmbeddings(7, 3, D, 4, 2)),
    "conv_embed later": ("cvt", {**LATER, "in_chans": 8}, lambda:
        CvtConvEmbeddings(3, 8, D, 2, 1)),
    "metaformer_stem": ("metaformer", {}, lambda: Stem(3, D, LayerNorm2dNoBias)),
    "metaformer_stem later": ("metaformer", {**LATER, "pre_norm": True}, lambda:
        Downsampling(3, D, 3, 2, 1, LayerNorm2dNoBias)),
    "convnext_stem": ("convnext", {}, lambda: convnext(False)),
    "convnext_stem later": ("convnext", {"kernel_size": 2, "stride": 2, "pre_norm": True}, lambda:
        convnext(True)),
    "convnext_stem vit": (None, {"kernel_size": 8, "stride": 8, "norm": False}, lambda:
        PatchEmbed(None, 8, 3, D, flatten=False, strict_img_size=False, dynamic_img_pad=False)),
    "early_conv": ("early_conv", {"widths": (6, 8, 10, 12)}, lambda: torchvision(6, 8, 10, 12)),
    "cct_tokenizer": ("cct", {}, lambda: cct(7, 2)),
    "cct_tokenizer 3x1": ("cct", {"kernel_size": 3, "num_layers": 1}, lambda: cct(3, 1)),
    "ceit_stem": ("ceit", {}, ceit),
    "xcit_stem": ("xcit", {}, lambda: ConvPatchEmbed(64, 16, 3, D)),
    "xcit_stem 8": ("xcit", {"patch_size": 8}, lambda: ConvPatchEmbed(64, 8, 3, D)),
    "cmt_stem": ("cmt", {"width": 16}, lambda: cmt(16)),
    "conv2former_stem": ("conv2former", {}, conv2former),
    "shunted_stem": ("shunted", {}, lambda: head(7, 0)),
    "shunted_stem deep": ("shunted", {"depth": 2}, lambda: head(7, 2)),
    "shunted_stem smt": ("smt", {"kernel_size": 3}, lambda: head(3, 0)),
    "mobilevit_stem": ("mobilevit", {"dim": 64}, lambda: MobileViT("mobilevit_s")),
    "mobilevit_stem xxs": ("mobilevit", {"dim": 24, "expand_ratio": 2, "widths": (16, 16)}, lambda:
        MobileViT("mobilevit_xxs")),
    "fastvit_stem": ("fastvit", {}, lambda: convolutional_stem(3, D)),
}  # fmt: skip
STEMS = [name for name, info in tc.BLOCKS.items() if info.kind == "stem"]


def draw(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def as_map(theirs, images):
    """What a module makes of images, however it lays that out."""
    out = theirs(images)
    if isinstance(theirs, OverlapPatchEmbed):
        return out.movedim(-1, 1)
    if isinstance(theirs, SegformerOverlapPatchEmbeddings):
        return out[0].transpose(1, 2).unflatten(2, out[1:])
    if isinstance(theirs, ConvPatchEmbed):
        return out[0].transpose(1, 2).unflatten(2, out[1])
    return out


def pair(name):
    """A stem of ours and its oracle, with the same weights."""
    source, kwargs, make = ORACLES[name]
    theirs = randomize_(make().double())
    ours = tc.create_block(name.split()[0], **{"dim": D, **kwargs}).double()
    if source is None:
        ours.body.load_state_dict(theirs.state_dict())
    else:
        assert load_official(ours, theirs.state_dict(), source=source) is ours
    return ours, theirs


@pytest.mark.parametrize("size", [(65, 99), (64, 32)], ids=["odd", "even"])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", ORACLES)
def test_stem_is_that_of_its_paper(name, mode, size):
    ours, theirs = pair(name)
    ours.train(mode == "train"), theirs.train(mode == "train")
    images = [1e-2 * draw(2, ours.in_chans, *size) for _ in range(2)]  # eps shows
    one, other = (x.requires_grad_() for x in images)
    (tokens, grid), expected = ours(one), as_map(theirs, other)
    assert grid == tc.TokenGrid(expected.shape[2:])
    torch.testing.assert_close(tc.tokens_to_map(tokens, grid), expected, rtol=1e-9, atol=1e-9)
    weights = draw(*expected.shape)
    (tokens * tc.map_to_tokens(weights)).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-9)
    if ORACLES[name][0]:
        gradients = {**theirs.state_dict(), **{k: p.grad for k, p in theirs.named_parameters()}}
        wanted = load_official(copy.deepcopy(ours), gradients, source=ORACLES[name][0])
        for (key, p), q in zip(ours.named_parameters(), wanted.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.data, rtol=1e-8, atol=1e-8, msg=key)


@pytest.mark.parametrize("size", [(65, 99), (64, 32)], ids=["odd", "even"])
def test_spatial_prior_is_that_of_vit_adapter(size):
    theirs = randomize_(spatial_prior().double()).eval()
    levels = draw(3, D)
    ours = tc.create_block("spatial_prior", D).double().eval()
    load_official(ours, {**theirs.state_dict(), "level_embed": levels}, source="vit_adapter")
    one, other = (draw(2, 3, *size).requires_grad_() for _ in range(2))
    fmaps, x = [], other
    for part in ("stem", "conv2", "conv3", "conv4"):
        x = getattr(theirs, part)(x)
        fmaps.append(x)
    expected = [getattr(theirs, f"fc{i}")(x) for i, x in enumerate(fmaps, 1)]
    for got, wanted in zip(ours.maps(one), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    tokens, grid = ours(one)
    assert grid == tc.MultiGrid(tuple(tuple(x.shape[2:]) for x in expected[1:]))
    wanted = torch.cat(
        [x.flatten(2).transpose(1, 2) + levels[i] for i, x in enumerate(expected[1:])], dim=1
    )
    torch.testing.assert_close(tokens, wanted, rtol=1e-9, atol=1e-9)
    tokens.square().sum().backward(), wanted.square().sum().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9)


def test_every_source_of_a_stem_is_tested():
    tested = {(source, name.split()[0]) for name, (source, _, _) in ORACLES.items() if source}
    tested.add(("vit_adapter", "spatial_prior"))
    assert tested == {(s, block) for s, row in SOURCES.items() for block in row if block in STEMS}


@pytest.mark.parametrize("name", STEMS)
def test_batch_elements_are_independent(name):
    stem = randomize_(tc.create_block(name, D).double()).eval()
    images = draw(3, 3, 48, 80)
    tokens, grid = stem(images)
    assert tokens.shape == (3, grid.num_tokens, D)
    torch.testing.assert_close(stem(images[1:2])[0], tokens[1:2], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", STEMS)
def test_tokens_are_a_view_of_channels_last_memory(name):
    images = torch.randn(2, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        tokens, _ = tc.create_block(name, D).eval()(images)
    assert tokens.is_contiguous()


def test_a_stem_between_stages_takes_tokens_and_their_grid():
    stem = randomize_(tc.create_block("patch_embed", D, in_chans=16, kernel_size=3, stride=2))
    fmap = torch.randn(2, 16, 7, 10)
    tokens, grid = stem(tc.map_to_tokens(fmap), 7, 10)
    assert grid == tc.TokenGrid((4, 5))
    torch.testing.assert_close(tokens, stem(fmap)[0])
    torch.testing.assert_close(tc.tokens_to_map(tokens, grid), stem.run(fmap))
    with pytest.raises(tc.GridError, match="prefix tokens pass a block unchanged"):
        stem(torch.randn(2, 71, 16), tc.TokenGrid((7, 10), 1))


@pytest.mark.parametrize(
    "name", ["early_conv", "ceit_stem", "xcit_stem", "mobilevit_stem", "fastvit_stem",
             "shunted_stem", "spatial_prior"],
)  # fmt: skip
@torch.no_grad()
def test_norms_fold_into_convolutions(name):
    stem = randomize_(tc.create_block(name, D).double()).eval()
    images = draw(2, 3, 65, 99)
    expected = stem(images)[0]
    with pytest.raises(ValueError, match="call eval"):
        stem.train().fold_()
    assert stem.eval().fold_()
    assert not any(isinstance(part, nn.BatchNorm2d) for part in stem.modules())
    torch.testing.assert_close(stem(images)[0], expected, rtol=1e-11, atol=1e-11)
    assert not stem.fold_()


def test_a_norm_behind_an_activation_is_kept():
    assert not tc.create_block("cmt_stem", D).eval().fold_()


@pytest.mark.parametrize(
    ("name", "std"),
    [("patch_embed", (2 / (49 * 256)) ** 0.5), ("metaformer_stem", 0.02), ("convnext_stem", 0.02),
     ("early_conv", (2 / 256) ** 0.5), ("cmt_stem", (2 / (4 * 256)) ** 0.5)],
)  # fmt: skip
def test_weights_start_as_in_the_papers(name, std):
    torch.manual_seed(0)
    proj = tc.create_block(name, 256).body.proj
    assert proj.weight.std().item() == pytest.approx(std, rel=0.1)
    assert not proj.bias.any()


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("patch_embed", {"in_chans": 0}, "positive dim and in_chans, got dim=24, in_chans=0"),
        ("patch_embed", {"stride": 0}, "expected positive kernel_size and stride"),
        ("convnext_stem", {"norm": False, "pre_norm": True}, "expected norm=True"),
        ("xcit_stem", {"patch_size": 12}, "expected a power of 2 as patch_size, got 12"),
        ("xcit_stem", {"dim": 4}, r"expected positive widths, got \(0, 1, 2, 4\)"),
        ("cct_tokenizer", {"num_layers": 0}, "num_layers=0"),
        ("early_conv", {"kernel_size": 0}, "expected a kernel side of 1 or more, got 0"),
        ("shunted_stem", {"depth": -1}, "depth >= 0"),
        ("shunted_stem", {"kernel_size": 4}, "odd side, got depth=0, kernel_size=4"),
        ("spatial_prior", {"width": 0}, "expected positive widths"),
    ],
)
def test_error_names_what_was_expected_and_what_came(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        tc.create_block(name, **{"dim": D, **kwargs})


def test_images_of_another_width_are_refused():
    with pytest.raises(tc.GridError, match=r"expected a map \(B, 3, H, W\)"):
        tc.create_block("patch_embed", D)(torch.randn(2, 4, 32, 32))


def test_stems_are_no_blocks_on_maps():
    assert not any(issubclass(tc.BLOCKS[name].factory, MapBlock) for name in STEMS)
    assert sum(issubclass(tc.BLOCKS[name].factory, OurStem) for name in STEMS) == len(STEMS) - 1
