"""Whole networks that begin with our stems: their published counts, and timm's outputs."""

from functools import partial
from itertools import pairwise

import pytest
import timm
import torch
from timm.layers import Mlp
from timm.models.xcit import ClassAttentionBlock, PositionalEncodingFourier
from torch import nn

import tokenconv as tc
from tokenconv.blocks.official import load_official

make = tc.create_block


class Block(nn.Module):
    """Parts one after another, each behind its norm, scaled and added; some without a norm."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(nn.ModuleList(part) for part in parts)

    def forward(self, x, grid):
        for *norm, part in self.parts:
            y = norm[0](x) if norm else x
            y = part(y, grid)
            x = x + y if norm else y  # what has no norm adds its input itself
        return x


class Norm(nn.BatchNorm1d):
    """BatchNorm of tokens."""

    def forward(self, input):
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


class Pyramid(nn.Module):
    """Stages of a stem and blocks, the mean of the last tokens, a head."""

    def __init__(self, stems, stages, last, prefix=0):
        super().__init__()
        self.stems, self.last = nn.ModuleList(stems), nn.Sequential(*last)
        self.stages = nn.ModuleList(nn.ModuleList(blocks) for blocks in stages)
        self.cls_token = nn.Parameter(torch.zeros(1, prefix, stems[-1].dim)) if prefix else None

    def forward(self, images):
        x, grid = self.stems[0](images)
        for i, blocks in enumerate(self.stages):
            if i:
                x, grid = self.stems[i](x, grid)
            if self.cls_token is not None and i == len(self.stages) - 1:
                x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
                grid = tc.TokenGrid(grid.size, 1)
            for block in blocks:
                x = block(x, grid)
        return self.last(x.mean(1) if self.cls_token is None else x[:, 0])


def stages(dims, depths, block):
    rows = enumerate(zip(dims, depths, strict=True))
    return [[block(i, dim) for _ in range(depth)] for i, (dim, depth) in rows]


def later(name, dims, **kwargs):
    return [make(name, b, in_chans=a, **kwargs) for a, b in pairwise(dims)]


def cvt(depths):
    dims = (64, 192, 384)

    def block(i, dim):
        attn = make("cvt_attn", dim, num_heads=(1, 3, 6)[i])
        return Block((nn.LayerNorm(dim), attn), (nn.LayerNorm(dim), make("mlp", dim)))

    stems = [make("conv_embed", 64), *later("conv_embed", dims, kernel_size=3, stride=2)]
    last = nn.LayerNorm(384), nn.Linear(384, 1000)
    return Pyramid(stems, stages(dims, depths, block), last, prefix=1)


def cmt():
    """CMT-Ti, for images of 160 x 160; one relative position for all blocks of a stage."""
    dims, depths = (46, 92, 184, 368), (2, 2, 10, 2)
    norm = partial(nn.LayerNorm, eps=1e-6)

    def block(i, dim):
        attn = make("lmhsa", dim, num_heads=2**i, sr_ratio=2 ** (3 - i), size=(40 // 2**i,) * 2,
                    qkv_bias=True)  # fmt: skip
        ffn = make("irffn", dim, mlp_ratio=3.6)
        return Block((make("lpu", dim),), (norm(dim), attn), (norm(dim), ffn))

    stems = [make("cmt_stem", 46, width=16),
             *later("patch_embed", dims, kernel_size=2, stride=2, padding=0)]  # fmt: skip
    last = nn.Linear(368, 1280), nn.BatchNorm1d(1280), nn.SiLU(), nn.Linear(1280, 1000)
    made = stages(dims, depths, block)
    for row in made:
        for other in row[1:]:
            other.parts[1][1].relative_pos = row[0].parts[1][1].relative_pos
    return Pyramid(stems, made, last)


def uniformer():
    dims, depths = (64, 128, 320, 512), (3, 4, 8, 3)

    def block(i, dim):
        if i < 2:
            return Block((make("dpe", dim),), (make("uniformer_mixer", dim),),
                         (Norm(dim), make("mlp", dim)))  # fmt: skip
        attn = SelfAttention(dim, dim // 64)
        norm = partial(nn.LayerNorm, dim, eps=1e-6)
        return Block((make("dpe", dim),), (norm(), attn), (norm(), make("mlp", dim)))

    patches = {"kernel_size": 2, "stride": 2, "padding": 0}
    stems = [make("patch_embed", 64, kernel_size=4, stride=4, padding=0),
             *later("patch_embed", dims, **patches)]  # fmt: skip
    return Pyramid(stems, stages(dims, depths, block), [nn.BatchNorm1d(512), nn.Linear(512, 1000)])


class SelfAttention(nn.MultiheadAttention):
    """torch's."""

    def __init__(self, dim, heads):
        super().__init__(dim, heads, batch_first=True)

    def forward(self, x, grid):
        return super().forward(x, x, x, need_weights=False)[0]


COUNTS = {
    "CvT-13": (partial(cvt, (1, 2, 10)), 19_997_480),
    "CvT-21": (partial(cvt, (1, 4, 16)), 31_622_696),
    "CMT-Ti": (cmt, 9_492_426),
    "UniFormer-S": (uniformer, 21_545_256),
}


@pytest.mark.parametrize("name", COUNTS)
def test_count_is_the_published_one(name):
    build, published = COUNTS[name]
    with torch.device("meta"):
        assert sum(p.numel() for p in build().parameters()) == published


@pytest.mark.parametrize("name", ["CvT-13", "CMT-Ti", "UniFormer-S"])
def test_network_trains(name):
    model = COUNTS[name][0]()
    model(torch.randn(2, 3, 160, 160)).sin().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# --- XCiT: timm's, with its weights ---


class XCiTBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.attn, self.local_mp = (
            make("xca", dim, num_heads=heads, qkv_bias=True),
            make("lpi", dim),
        )
        self.mlp = Mlp(dim, 4 * dim)
        self.gamma1, self.gamma2, self.gamma3 = (nn.Parameter(torch.ones(dim)) for _ in range(3))

    def forward(self, x, grid):
        x = x + self.gamma1 * self.attn(self.norm1(x), grid)
        x = x + self.gamma3 * self.local_mp(self.norm3(x), grid)
        return x + self.gamma2 * self.mlp(self.norm2(x))


class XCiT(nn.Module):
    def __init__(self, dim, depth, heads):
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.patch_embed = make("xcit_stem", dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = PositionalEncodingFourier(dim=dim)
        self.blocks = nn.ModuleList(XCiTBlock(dim, heads) for _ in range(depth))
        self.cls_attn_blocks = nn.ModuleList(
            ClassAttentionBlock(dim, heads, qkv_bias=True, norm_layer=norm, eta=1.0)
            for _ in range(2)
        )
        self.norm, self.head = norm(dim), nn.Linear(dim, 1000)

    def forward(self, images):
        x, grid = self.patch_embed(images)
        x = x + tc.map_to_tokens(self.pos_embed(len(x), *grid.size))
        for block in self.blocks:
            x = block(x, grid)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.cls_attn_blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


@torch.no_grad()
def test_xcit_is_that_of_timm():
    theirs = timm.create_model("xcit_nano_12_p16_224").double().eval()
    generator = torch.Generator().manual_seed(0)
    for key, value in theirs.state_dict().items():
        if value.is_floating_point():
            random = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            around = 1 if "gamma" in key or ("norm" in key and "weight" in key) else 0
            value.copy_(0.5 + random.abs() if "var" in key else around + 0.1 * random)
    ours = XCiT(128, 12, 4).double().eval()
    load_official(ours, theirs.state_dict(), source="xcit")
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters())
    assert round(count / 1e6) == 3
    images = torch.randn(2, 3, 96, 64, generator=generator, dtype=torch.float64)
    expected = theirs(images)
    assert expected.std() > 0.01
    torch.testing.assert_close(ours(images), expected, rtol=1e-9, atol=1e-9)
