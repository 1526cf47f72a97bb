"""Whole networks of our attention: timm's outputs with its weights, and published counts."""

import math
import re
from functools import partial
from itertools import pairwise

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.mvitv2 import MultiScaleAttention
from torch import nn

import tokenconv as tc
from tokenconv.blocks.official import load_official

make = tc.create_block


class Block(nn.Module):
    """A mixer and a feed-forward, each behind a norm and added; perhaps a position in front.

    Without ``eps`` the two have their norms in themselves.
    """

    def __init__(self, dim, attn, mlp, eps=None, cpe=None):
        super().__init__()
        self.norm1, self.norm2 = (
            nn.Identity() if eps is None else nn.LayerNorm(dim, eps=eps) for _ in range(2)
        )
        self.attn, self.mlp, self.cpe = attn, mlp, cpe

    def forward(self, x, grid):
        if self.cpe is not None:
            x = self.cpe(x, grid)
        x = x + self.attn(self.norm1(x), grid)
        return x + self.mlp(self.norm2(x), grid)


class Pyramid(nn.Module):
    """Stems and blocks by turns, then the mean of the tokens; or a class token, one per stage."""

    def __init__(self, stems, stages, last, classes=False):
        super().__init__()
        self.stems, self.norm = nn.ModuleList(stems), nn.Sequential(*last)
        self.stages = nn.ModuleList(nn.ModuleList(blocks) for blocks in stages)
        self.cls_tokens = nn.ParameterList(torch.zeros(1, 1, s.dim) for s in stems if classes)
        self.head = nn.Linear(last[-1].normalized_shape[0], 1000)

    def forward(self, fmap):
        for i, (stem, blocks) in enumerate(zip(self.stems, self.stages, strict=True)):
            fmap = stem.run(fmap)
            prefix = [token.expand(len(fmap), -1, -1) for token in [*self.cls_tokens][i : i + 1]]
            grid = tc.TokenGrid(fmap.shape[2:], len(prefix))
            x = tc.map_to_tokens(fmap, *prefix)
            for block in blocks:
                x = block(x, grid)
            fmap = tc.tokens_to_map(x, grid)
        x = self.norm(x)
        return self.head(x[:, 0] if self.cls_tokens else x.mean(1))


def settled(theirs, generator):
    """Timm's model with weights of which every one can be seen."""
    for key, value in theirs.state_dict().items():
        random = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        value.copy_((1 if "norm" in key and "weight" in key else 0) + 0.1 * random)
    return theirs


def renamed(state_dict, names):
    """Under our names; a name of None is left out."""
    out = {}
    for key, value in state_dict.items():
        for theirs, ours in names.items():
            if re.match(theirs, key):
                key = None if ours is None else re.sub(theirs, ours, key)
                break
        if key is not None:
            out[key] = value
    return out


def count_of(model):
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def assert_same_outputs(ours, theirs, source, names, size):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ours.double().eval(), settled(theirs.double().eval(), generator)
    load_official(ours, renamed(theirs.state_dict(), names), source=source)
    assert count_of(ours) == count_of(theirs)
    images = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)
    expected = theirs(images)
    assert expected.std(0).min() > 1e-6  # of one image and the other
    assert expected.std() > 0.01
    torch.testing.assert_close(ours(images), expected, rtol=1e-9, atol=1e-9)


# --- CoaT-Lite: one position and one relative position for all blocks of a stage ---


def coat_lite(dims=(64, 128, 256, 320), ratios=(8, 8, 4, 4), depths=(2, 2, 2, 2)):
    stems, stages = [], []
    for i, (in_chans, dim) in enumerate(pairwise((3, *dims))):
        side = 2 if i else 4
        stems.append(make("patch_embed", dim, in_chans=in_chans, kernel_size=side, stride=side,
                          padding=0))  # fmt: skip
        cpe, blocks = make("cpe", dim), []
        for _ in range(depths[i]):
            attn = make("coat_attn", dim, num_heads=8, qkv_bias=True)
            if blocks:
                attn.crpe = blocks[0].attn.crpe
            blocks.append(Block(dim, attn, make("mlp", dim, mlp_ratio=ratios[i]), 1e-6, cpe))
        stages.append(blocks)
    return Pyramid(stems, stages, [nn.LayerNorm(dims[-1], eps=1e-6)], classes=True)


COAT = {
    r"c(r?)pe\d\.": None,  # which the blocks have, too
    **{rf"patch_embed{i}\.": rf"stems.{i - 1}.body." for i in range(1, 5)},
    **{rf"cls_token{i}$": rf"cls_tokens.{i - 1}" for i in range(1, 5)},
    **{
        rf"serial_blocks{i}\.(\d+)\.(factoratt_crpe)\.": rf"stages.{i - 1}.\1.attn."
        for i in range(1, 5)
    },
    **{rf"serial_blocks{i}\.": rf"stages.{i - 1}." for i in range(1, 5)},
    r"norm4\.": "norm.0.",
}


def test_coat_lite_is_that_of_timm():
    size = (96, 64)
    theirs = timm.create_model("coat_lite_tiny", img_size=size)
    assert_same_outputs(coat_lite(), theirs, "coat", COAT, size)


# --- MViTv2: where q is pooled too, between stages, attention is timm's ---


class MViTBlock(Block):
    def __init__(self, dim, out_dim, side, stride_kv):
        halves, heads = dim != out_dim, out_dim // 96
        kwargs = {"num_heads": heads}
        if halves:
            sides = {"kernel_q": (3, 3), "kernel_kv": (3, 3), "stride_q": (2, 2)}
            attn = MultiScaleAttention(
                dim, out_dim, (side, side), **kwargs, **sides, stride_kv=(stride_kv, stride_kv),
                has_cls_token=False, norm_layer=partial(nn.LayerNorm, eps=1e-6)
            )  # fmt: skip
        else:
            attn = make("mvitv2_attn", dim, **kwargs, stride_kv=stride_kv, size=(side, side))
        super().__init__(dim, attn, make("mlp", out_dim), eps=1e-6)
        self.norm2 = nn.LayerNorm(out_dim, eps=1e-6)
        self.shortcut = nn.Linear(dim, out_dim) if halves else None

    def forward(self, x, grid):
        if self.shortcut is None:
            return super().forward(x, grid), grid
        y = self.norm1(x)
        kept = F.max_pool2d(tc.tokens_to_map(self.shortcut(y), grid), 3, 2, 1)
        grid = tc.TokenGrid(kept.shape[2:])
        x = tc.map_to_tokens(kept) + self.attn(y, [2 * side for side in grid.size])[0]
        return x + self.mlp(self.norm2(x), grid), grid


class MViT(nn.Module):
    def __init__(self, side=56, depths=(1, 2, 5, 2)):
        super().__init__()
        self.stem = make("patch_embed", 96, norm=False)
        self.blocks = nn.ModuleList()
        for i, depth in enumerate(depths):
            for j in range(depth):
                halves = bool(i) and j == 0
                dims = 96 * 2**i // (2 if halves else 1), 96 * 2**i
                self.blocks.append(MViTBlock(*dims, side, max(4 // 2**i, 1)))
                side //= 2 if halves else 1
        self.norm, self.head = nn.LayerNorm(dims[-1], eps=1e-6), nn.Linear(dims[-1], 1000)

    def forward(self, images):
        x, grid = self.stem(images)
        for block in self.blocks:
            x, grid = block(x, grid)
        return self.head(self.norm(x).mean(1))


def test_mvitv2_is_that_of_timm():
    first = 0, 1, 3, 8
    names = {
        r"patch_embed\.": "stem.body.", r"head\.fc\.": "head.",
        **{rf"stages\.{i}\.blocks\.{j}\.(shortcut)_proj_attn\.": rf"blocks.{k + j}.\1."
           for i, k in enumerate(first) for j in range(5)},
        **{rf"stages\.{i}\.blocks\.{j}\.": f"blocks.{k + j}."
           for i, k in enumerate(first) for j in range(5)},
    }  # fmt: skip
    ours = MViT(side=24)
    kinds = [type(block.attn) is MultiScaleAttention for block in ours.blocks]
    assert (len(kinds), sum(kinds)) == (10, 3)
    theirs = timm.create_model("mvitv2_tiny", img_size=96)
    assert_same_outputs(ours, theirs, "mvitv2", names, (96, 96))


# --- networks that are nowhere to import ---


def cswin(dim, depths, heads):
    dims, stages = [dim * 2**i for i in range(4)], []
    stems = [make("conv_embed", dim)]
    stems += [make("conv_embed", b, in_chans=a, kernel_size=3, stride=2) for a, b in pairwise(dims)]
    for i, split_size in enumerate((1, 2, 7, 7)):
        attn = {"num_heads": heads * 2**i, "split_size": split_size, "last_stage": i == 3,
                "qkv_bias": True}  # fmt: skip
        width = dims[i]
        stages.append([
            Block(width, make("cswin_attn", width, **attn), make("mlp", width), eps=1e-5)
            for _ in range(depths[i])
        ])  # fmt: skip
    return Pyramid(stems, stages, [nn.LayerNorm(dims[-1], eps=1e-5)])


class Scaled(nn.Module):
    def __init__(self, part, dim):
        super().__init__()
        self.part, self.gamma = part, nn.Parameter(torch.full((dim,), 1e-6))

    def forward(self, x, grid):
        return self.gamma * self.part(x, grid)


def conv2former(dim, depths, kernel_size=11):
    dims = [dim * 2**i for i in range(4)]
    between = {"kernel_size": 2, "stride": 2, "pre_norm": True}
    stems = [make("conv2former_stem", dim)]
    stems += [make("convnext_stem", b, in_chans=a, **between) for a, b in pairwise(dims)]

    def block(width):
        attn = make("conv_modulation", width, kernel_size=kernel_size)
        return Block(width, Scaled(attn, width), Scaled(make("conv2former_mlp", width), width))

    stages = [[block(width) for _ in range(depths[i])] for i, width in enumerate(dims)]
    last = [nn.Linear(dims[-1], 1280), nn.GELU(), nn.LayerNorm(1280, eps=1e-6)]
    return Pyramid(stems, stages, last)


class Weights(nn.Module):
    """Those of TransNeXt's attention, which is not built here and cannot run.

    It is to all tokens, or with ``pooled`` to the nine around and to averages of all.
    """

    def __init__(self, dim, heads, pooled):
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.cpb = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, heads))
        self.temperature, self.query = (
            nn.Parameter(torch.ones(heads)),
            nn.Parameter(torch.ones(dim)),
        )
        if pooled:
            self.sr, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
            self.bias = nn.Parameter(torch.ones(heads, 9))
            self.tokens, self.tokens_bias = (
                nn.Parameter(torch.ones(rows, 9)) for rows in (dim, heads)
            )


def transnext(dim, depths):
    """To be counted. One more norm ends every stage."""
    dims = [dim * 2**i for i in range(4)]
    stems = [make("patch_embed", dim)]
    stems += [
        make("patch_embed", b, in_chans=a, kernel_size=3, stride=2) for a, b in pairwise(dims)
    ]
    stages = []
    for i, (width, ratio) in enumerate(zip(dims, (8, 8, 4, 4), strict=True)):
        made = [
            Block(width, Weights(width, width // 24, i < 3),
                  make("conv_glu", width, mlp_ratio=ratio), eps=1e-6)
            for _ in range(depths[i])
        ]  # fmt: skip
        stages.append([*made, nn.LayerNorm(width, eps=1e-6)])
    last = stages[-1].pop()
    return Pyramid(stems, stages, [last])


COUNTS = {
    "CoaT-Lite-Tiny": (coat_lite, 5_721_960, 5.7),
    "MViTv2-T": (MViT, 24_173_320, 24),
    "CSWin-T": (lambda: cswin(64, (1, 2, 21, 1), 2), 22_320_552, 23),
    "CSWin-S": (lambda: cswin(64, (2, 4, 32, 2), 2), 34_643_304, 35),
    "CSWin-B": (lambda: cswin(96, (2, 4, 32, 2), 4), 77_382_184, 78),
    "Conv2Former-N": (lambda: conv2former(64, (2, 2, 8, 2), 7), 14_992_840, 15),
    "Conv2Former-T": (lambda: conv2former(72, (3, 3, 12, 3)), 26_697_204, 27),
    "Conv2Former-S": (lambda: conv2former(72, (4, 4, 32, 4)), 50_032_692, 50),
    "Conv2Former-B": (lambda: conv2former(96, (4, 4, 34, 4)), 90_029_112, 90),
    "TransNeXt-Micro": (lambda: transnext(48, (2, 2, 15, 2)), 12_809_304, 12.8),
    "TransNeXt-Tiny": (lambda: transnext(72, (2, 2, 15, 2)), 28_258_960, 28.2),
    "TransNeXt-Small": (lambda: transnext(72, (5, 5, 22, 5)), 49_741_564, 49.7),
    "TransNeXt-Base": (lambda: transnext(96, (5, 5, 23, 5)), 89_721_496, 89.7),
}


@pytest.mark.parametrize("name", COUNTS)
def test_count_is_the_published_one(name):
    build, exact, millions = COUNTS[name]
    with torch.device("meta"):
        assert count_of(build()) == exact
    if name.startswith("CSWin"):  # the paper rounds up
        assert math.ceil(exact / 1e6) == millions
    elif name.startswith("TransNeXt"):  # and here down
        assert exact // 100_000 == round(10 * millions)
    else:
        assert round(exact / 1e6, 1 if isinstance(millions, float) else None) == millions


@pytest.mark.parametrize("name", ["CoaT-Lite-Tiny", "CSWin-T", "Conv2Former-N"])
def test_network_trains(name):
    model = COUNTS[name][0]()
    model(torch.randn(2, 3, 96, 64)).sin().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def by_formula_(model):
    """Give weights that depend on their shape alone, so that no names need to agree."""
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            sides = sum(side for side in value.shape if side > 1)
            waves = torch.arange(value.numel(), dtype=value.dtype).square().add(sides).sin()
            around = 1 if key.endswith(("var", "weight")) and value.ndim == 1 else 0
            value.copy_(around + 0.1 * waves.view(value.shape))
    return model


OFFICIAL = {
    "CSWin-T": [0.900670359426, -0.796573908895, 0.266769309728, 0.744070588391],
    "Conv2Former-N": [5.16384167237, 0.0117709868078, -1.51050311176, 0.584464724408],
}


@pytest.mark.parametrize("name", OFFICIAL)
@torch.no_grad()
def test_outputs_are_those_of_the_papers_code(name):
    """Which was run once, in 64 bits, on the same weights and image."""
    model = by_formula_(COUNTS[name][0]().double().eval())
    image = torch.arange(3 * 224 * 224, dtype=torch.float64).square().sin().view(1, 3, 224, 224)
    expected = torch.tensor(OFFICIAL[name], dtype=torch.float64)
    torch.testing.assert_close(model(image)[0, :4], expected, rtol=1e-9, atol=1e-9)
