"""Whole published models made of our blocks: as many parameters, and where they exist, as others'.

Attention, stems, norms and heads are torch's own; the feed-forwards are ours.
"""

from functools import partial
from itertools import pairwise

import pytest
import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from transformers import SegformerConfig, SegformerModel
from transformers.models.segformer.modeling_segformer import SegformerDecodeHead

import tokenconv as tc


class Attention(nn.Module):
    """Self-attention; keys and values may be of a smaller map, by a convolution or pooled."""

    def __init__(self, dim, heads, reduction=1, pooled=False):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.sr = None
        if pooled or reduction > 1:
            side = 1 if pooled else reduction
            self.pool = nn.AdaptiveAvgPool2d(7) if pooled else nn.Identity()
            self.sr = nn.Conv2d(dim, dim, side, side)
            self.norm = nn.LayerNorm(dim, eps=1e-5)
            self.act = nn.GELU() if pooled else nn.Identity()

    def forward(self, x, grid):
        source = x
        if self.sr is not None:
            fmap = self.sr(self.pool(tc.tokens_to_map(x, grid)))
            source = self.act(self.norm(tc.map_to_tokens(fmap)))
        q, k, v = (
            rearrange(y, "b n (heads c) -> b heads n c", heads=self.heads)
            for y in (self.q(x), *self.kv(source).chunk(2, dim=-1))
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(y, "b heads n c -> b n (heads c)"))


class Block(nn.Module):
    """Attention, then ``mlp``; without ``norm2`` that has its residual in itself."""

    def __init__(self, attn, mlp, eps=1e-6, norm2=True):
        super().__init__()
        dim = attn.q.in_features
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps) if norm2 else None
        self.mlp = mlp

    def forward(self, x, grid):
        x = x + self.attn(self.norm1(x), grid)
        return self.mlp(x, grid) if self.norm2 is None else x + self.mlp(self.norm2(x), grid)


class Stage(nn.Module):
    """From a map to a smaller one: a convolution with overlap, blocks, a norm."""

    def __init__(self, in_dim, blocks, eps):
        super().__init__()
        dim = blocks[0].norm1.normalized_shape[0]
        side, stride = (7, 4) if in_dim == 3 else (3, 2)
        self.downsample = nn.ModuleDict(
            {
                "proj": nn.Conv2d(in_dim, dim, side, stride, side // 2),
                "norm": nn.LayerNorm(dim, eps=1e-5),
            }
        )
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, eps)

    def forward(self, fmap):
        fmap = self.downsample["proj"](fmap)
        grid = tc.TokenGrid(fmap.shape[2:])
        x = self.downsample["norm"](tc.map_to_tokens(fmap))
        for block in self.blocks:
            x = block(x, grid)
        return tc.tokens_to_map(self.norm(x), grid)


class Pyramid(nn.Module):
    """PVTv2, and with ``mlp_ratios`` of 4 the Mix Transformer of SegFormer."""

    def __init__(self, size, mlp_ratios=(8, 8, 4, 4), linear=False, eps=1e-6):
        super().__init__()
        dims, depths = SIZES[size]
        rows = zip(
            pairwise((3, *dims)), depths, (1, 2, 5, 8), (8, 4, 2, 1), mlp_ratios, strict=True
        )
        self.stages = nn.Sequential()
        for (in_dim, dim), depth, heads, reduction, ratio in rows:
            ffn = partial(tc.create_block, "mix_ffn", dim, mlp_ratio=ratio, linear=linear)
            attn = partial(Attention, dim, heads, reduction, pooled=linear)
            blocks = [Block(attn(), ffn(), eps) for _ in range(depth)]
            self.stages.append(Stage(in_dim, blocks, eps))
        self.head = nn.Linear(dims[-1], 1000)

    def forward(self, images):
        return self.head(self.stages(images).mean((2, 3)))


class PlainViT(nn.Module):
    """A Vision Transformer with a class token, on patches of 16.

    With ``layerwise`` one more block sees, as in CeiT, the class tokens of all layers, and the
    last of them is the output.
    """

    def __init__(self, stem, ffn, heads, *, layerwise=False, norm2=True, images=(224, 224)):
        super().__init__()
        self.stem = stem
        dim, depth = stem[-1].out_channels, 12
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + images[0] * images[1] // 16**2, dim))
        self.blocks = nn.ModuleList(
            Block(Attention(dim, heads), ffn(dim), norm2=norm2) for _ in range(depth)
        )
        self.lca = None
        if layerwise:
            self.pos_layer_embed = nn.Parameter(torch.zeros(1, depth, dim))
            self.lca = Block(Attention(dim, heads), tc.create_block("mlp", dim))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, 1000)

    def forward(self, images):
        fmap = self.stem(images)
        grid = tc.TokenGrid(fmap.shape[2:], num_prefix_tokens=1)
        x = tc.map_to_tokens(fmap, self.cls_token.expand(len(fmap), -1, -1)) + self.pos_embed
        classes = []
        for block in self.blocks:
            x = block(x, grid)
            classes.append(x[:, 0])
        last = classes[-1]
        if self.lca is not None:
            layers = torch.stack(classes, dim=1) + self.pos_layer_embed
            last = self.lca(layers, (1, len(classes)))[:, -1]
        return self.head(self.norm(last))


def vit(dim, heads, block="mlp", *, norm2=True, images=(224, 224), **options):
    stem = nn.Sequential(nn.Conv2d(3, dim, 16, 16))
    ffn = partial(tc.create_block, block, **options)
    return PlainViT(stem, ffn, heads, norm2=norm2, images=images)


def ceit(dim, heads, **options):
    stem = nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(64, dim, 4, 4),
    )  # fmt: skip
    return PlainViT(stem, partial(tc.create_block, "leff"), heads, layerwise=True, **options)


NARROW, WIDE = (32, 64, 160, 256), (64, 128, 320, 512)
SIZES = {
    "b0": (NARROW, (2, 2, 2, 2)),
    "b1": (WIDE, (2, 2, 2, 2)),
    "b2": (WIDE, (3, 4, 6, 3)),
    "b3": (WIDE, (3, 4, 18, 3)),
    "b4": (WIDE, (3, 8, 27, 3)),
    "b5": (WIDE, (3, 6, 40, 3)),
}
"""Widths and depths of the stages of PVTv2 and MiT."""

localvit = partial(vit, block="localvit_ffn", norm2=False)
mit = partial(Pyramid, mlp_ratios=(4, 4, 4, 4))
PVT_V2 = {
    "pvt_v2_b0": (partial(Pyramid, "b0"), 3_666_760),
    "pvt_v2_b1": (partial(Pyramid, "b1"), 14_009_000),
    "pvt_v2_b2_li": (partial(Pyramid, "b2", linear=True), 22_553_512),
    "pvt_v2_b2": (partial(Pyramid, "b2"), 25_362_856),
    "pvt_v2_b3": (partial(Pyramid, "b3"), 45_238_696),
    "pvt_v2_b4": (partial(Pyramid, "b4"), 62_556_072),
    "pvt_v2_b5": (partial(Pyramid, "b5", (4, 4, 4, 4)), 81_956_008),
}
PLAIN = {
    "CeiT-T": (partial(ceit, 192, 3), 6_356_904),
    "CeiT-S": (partial(ceit, 384, 6), 24_204_840),
    "LocalViT-T": (partial(localvit, 192, 4, act="hs"), 5_825_704),
    "LocalViT-T, SE 192": (partial(localvit, 192, 4, reduction=192), 5_908_696),
    "LocalViT-T, SE 4": (partial(localvit, 192, 4, reduction=4), 9_376_168),
    "LocalViT-S": (partial(localvit, 384, 8, reduction=384), 22_433_176),
}
COUNTS = {**PVT_V2, **PLAIN}
SEGFORMER = {"b0": 3.8, "b1": 13.7, "b2": 27.5, "b3": 47.3, "b4": 64.1, "b5": 84.7}
"""Published millions of parameters, with the head for the 150 classes of ADE20K."""


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(build):
    with torch.device("meta"):
        return build()


@pytest.mark.parametrize("name", COUNTS)
def test_count_is_the_published_one(name):
    build, published = COUNTS[name]
    assert count(on_meta(build)) == published


@pytest.mark.parametrize("name", PVT_V2)
def test_count_is_also_that_of_timm(name):
    assert count(on_meta(lambda: timm.create_model(name))) == PVT_V2[name][1]


@pytest.mark.parametrize("size", SEGFORMER)
def test_count_of_segformer_is_the_published_one(size):
    config = segformer_config(size)
    ours = count(on_meta(partial(mit, size)).stages)
    assert ours == count(on_meta(lambda: SegformerModel(config)))
    head = on_meta(lambda: SegformerDecodeHead(config))
    assert round((ours + count(head)) / 1e6, 1) == SEGFORMER[size]


def segformer_config(size):
    widths, depths = SIZES[size]
    return SegformerConfig(
        depths=depths,
        hidden_sizes=widths,
        decoder_hidden_size=256 if size in ("b0", "b1") else 768,
        num_labels=150,
        attn_implementation="sdpa",
    )


# --- outputs ---


def randomize_(module, std=0.1):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.double().eval().named_parameters():
            random = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.copy_(std * random)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.add_(1)
    return module


def assert_same_output(ours, theirs, images):
    with torch.inference_mode():
        one, other = ours.eval()(images), theirs(images)
    assert other.std() > 0.01
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def images_of(*size):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", ["pvt_v2_b0", "pvt_v2_b2_li"])
def test_pvt_v2_is_that_of_timm(name):
    theirs = randomize_(timm.create_model(name))
    ours = PVT_V2[name][0]().double()
    values = theirs.state_dict().items()
    ours.load_state_dict(
        {key.replace("patch_embed", "stages.0.downsample"): value for key, value in values}
    )
    assert_same_output(ours, theirs, images_of(64, 96))


SEGFORMER_KEYS = {
    "patch_embeddings.layer_norm": "downsample.norm",
    "patch_embeddings": "downsample",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.sequence_reduction.sequence_reduction": "attn.sr",
    "attention.sequence_reduction.layer_norm": "attn.norm",
    "attention.q_proj": "attn.q",
    "attention.o_proj": "attn.proj",
    "attention": "attn",
    "layer_norm": "norm",
}


def test_mit_is_that_of_transformers():
    theirs = randomize_(SegformerModel(segformer_config("b0")))
    ours = mit("b0", eps=1e-5).double()  # the authors have 1e-6
    values = {}
    for key, value in theirs.state_dict().items():
        for old, new in SEGFORMER_KEYS.items():
            key = key.replace(old, new)
        values[key] = value
    for key in [key for key in values if ".k_proj." in key]:
        both = [values.pop(key), values.pop(key.replace("k_proj", "v_proj"))]
        values[key.replace("k_proj", "kv")] = torch.cat(both)
    ours.stages.load_state_dict({key.removeprefix("stages."): values[key] for key in values})
    assert_same_output(
        ours.stages, lambda images: theirs(images).last_hidden_state, images_of(64, 96)
    )


def test_plain_vit_is_that_of_timm():
    """What CeiT and LocalViT are put into."""
    theirs = randomize_(timm.create_model("deit_tiny_patch16_224", img_size=(64, 96)))
    values = {}
    for key, value in theirs.state_dict().items():
        key = key.replace("patch_embed.proj", "stem.0")
        if ".qkv." in key:
            values[key.replace("qkv", "q")] = value[:192]
            values[key.replace("qkv", "kv")] = value[192:]
        else:
            values[key] = value
    ours = vit(192, 3, images=(64, 96)).double()
    ours.load_state_dict(values)
    assert_same_output(ours, theirs, images_of(64, 96))


@pytest.mark.parametrize("name", [*COUNTS, *(f"mit_{size}" for size in SEGFORMER)])
def test_model_trains(name):
    size = (32, 64)
    if name in PLAIN:
        model = PLAIN[name][0](images=size)
    else:
        model = PVT_V2[name][0]() if name in PVT_V2 else mit(name.removeprefix("mit_"))
    logits = model(images_of(*size).float())
    assert logits.shape == (2, 1000)
    assert logits.isfinite().all()
    logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
