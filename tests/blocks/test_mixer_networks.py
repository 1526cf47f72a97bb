"""Whole networks of our mixers: timm's with our blocks in them, and published counts."""

import pytest
import timm
import torch
from timm.models import _efficientnet_blocks as efficientnet
from timm.models import convnext, fastvit, focalnet, inception_next, metaformer, repvit, starnet
from torch import nn

import tokenconv as tc
from tokenconv.blocks.map_layers import LayerScale2d, Residual
from tokenconv.blocks.official import load_official

# --- timm's networks, with its weights in our blocks ---


def uib(block):
    def side(part):
        return part.conv.kernel_size[0] if hasattr(part, "conv") else 0

    places = {f"dw_kernel_size_{end}": side(getattr(block, f"dw_{end}"))
              for end in ("start", "mid", "end")}  # fmt: skip
    ends = block.dw_mid, block.dw_start, block.dw_end
    stride = next((part.conv.stride[0] for part in ends if hasattr(part, "conv")), 1)
    expand, project = block.pw_exp.conv, block.pw_proj.conv
    return {
        **places, "stride": stride, "out_dim": project.out_channels,
        "exp_ratio": expand.out_channels / expand.in_channels, "residual": block.has_skip,
    }  # fmt: skip


def ratio(block):
    return {"mlp_ratio": block.mlp.fc1.out_channels / block.mlp.fc1.in_channels}


def nothing(block):
    return {}


SWAPS = {
    "convformer_s18": (metaformer.SepConv, "sep_conv", "metaformer", nothing),
    "inception_next_tiny": (
        inception_next.MetaNeXtBlock, "inceptionnext_block", "inceptionnext", ratio),
    "inception_next_atto": (
        inception_next.InceptionDWConv2d, "inception_dwconv", "inceptionnext", lambda block: {
            "branch_ratio": 0.25, "band_kernel_size": block.dwconv_w.kernel_size[1]}),
    "focalnet_tiny_lrf": (focalnet.FocalModulation, "focal_modulation", "focalnet", lambda block: {
        "focal_level": block.focal_level, "kernel_size": block.focal_window}),
    "fastvit_t8": (fastvit.RepMixer, "rep_mixer", "fastvit", nothing),
    "convnext_atto": (convnext.ConvNeXtBlock, "convnext_block", "convnext", nothing),
    "convnextv2_atto": (convnext.ConvNeXtBlock, "convnext_block", "convnext", lambda block: {
        "use_grn": True, "ls_init_value": None}),
    "starnet_s1": (starnet.Block, "starnet_block", "starnet", lambda block: {"mlp_ratio": 4}),
    "repvit_m0_9": (repvit.RepViTBlock, "repvit_block", "repvit", lambda block: {
        "use_se": not isinstance(block.se, nn.Identity)}),
    "mobilenetv4_conv_small": (
        efficientnet.UniversalInvertedResidual, "uib", "mobilenetv4", uib),
}  # fmt: skip


def dim_of(block):
    """The width of what comes in."""
    if isinstance(block, inception_next.InceptionDWConv2d):
        return sum(block.split_indexes)
    if isinstance(block, inception_next.MetaNeXtBlock):
        return block.norm.num_features
    return next(m for m in block.modules() if isinstance(m, nn.Conv2d)).in_channels


def settle_(model):
    """Norms that have seen something, and gammas that let blocks be seen."""
    generator = torch.Generator().manual_seed(0)
    for key, value in model.state_dict().items():
        if "running" in key or "gamma" in key or key.endswith("bn.weight"):
            random = torch.rand(value.shape, generator=generator).to(value)
            value.copy_(0.5 + random if "mean" not in key else 0.1 * random)
    return model


@pytest.mark.parametrize("name", SWAPS)
@torch.no_grad()
def test_timms_network_with_our_blocks_is_timms(name):
    kind, block, source, kwargs_of = SWAPS[name]
    torch.manual_seed(0)
    model = settle_(timm.create_model(name)).double().eval()
    images = torch.randn(2, 3, 96, 64, dtype=torch.float64)
    expected = model(images)
    count = sum(p.numel() for p in model.parameters())
    places = [path for path, module in model.named_modules() if type(module) is kind]
    assert len(places) > 3
    for path in places:
        theirs = model.get_submodule(path)
        ours = tc.create_block(block, dim_of(theirs), **kwargs_of(theirs)).double()
        load_official(ours, theirs.state_dict(), source=source)
        model.set_submodule(path, ours.eval())
    assert sum(p.numel() for p in model.parameters()) == count
    torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)
    for path in places:
        model.get_submodule(path).fold_()
    torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


# --- networks that are nowhere to import: their published counts ---


def conv(dim, out_dim, side, stride=1):
    return nn.Conv2d(dim, out_dim, side, stride, side // 2)


class OnTokens(nn.Module):
    """A block of tokens on a map."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        size = x.shape[2:]
        return tc.tokens_to_map(self.block(tc.map_to_tokens(x), *size), size)


class Tokens(nn.Sequential):
    """Of a map to its tokens, normalised, and back."""

    def __init__(self, dim):
        super().__init__(nn.LayerNorm(dim, eps=1e-6))

    def forward(self, x):
        return tc.tokens_to_map(super().forward(tc.map_to_tokens(x)), x.shape[2:])


def pair(dim, mixer, ffn, scale):
    """Mixer and feed-forward, each behind a BatchNorm, scaled and added."""
    return [
        Residual(nn.BatchNorm2d(dim), tc.create_block(mixer, dim), LayerScale2d(dim, scale)),
        Residual(nn.BatchNorm2d(dim), OnTokens(ffn), LayerScale2d(dim, scale)),
    ]


def pyramid(dims, depths, ratios, first, mixer, ffn, scale, last):
    rows, dim = [], None
    for width, depth, mlp_ratio in zip(dims, depths, ratios, strict=True):
        rows += first(width) if dim is None else [conv(dim, width, 3, 2), nn.BatchNorm2d(width)]
        for _ in range(depth):
            made = tc.create_block(ffn, width, mlp_ratio=mlp_ratio)
            rows += pair(width, mixer, made, scale)
        rows += [last(width)]
        dim = width
    return nn.Sequential(*rows, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(dim, 1000))


def van(dims, depths):
    def first(dim):
        return [conv(3, dim, 7, 4), nn.BatchNorm2d(dim)]

    return pyramid(dims, depths, (8, 8, 4, 4), first, "lka", "mix_ffn", 1e-2, Tokens)


def moganet(dims, depths):
    def first(dim):
        half = dim // 2
        return [conv(3, half, 3, 2), nn.BatchNorm2d(half), nn.GELU(),
                conv(half, dim, 3, 2), nn.BatchNorm2d(dim)]  # fmt: skip

    ratios = (8, 8, 4, 4)
    return pyramid(dims, depths, ratios, first, "moga_aggregation", "moga_ffn", 1e-5, Tokens)


def replknet():
    def part(dim, out_dim, side, stride=1, groups=1):
        layer = nn.Conv2d(dim, out_dim, side, stride, side // 2, groups=groups, bias=False)
        return [layer, nn.BatchNorm2d(out_dim), nn.ReLU()]

    dims, depths, sides = (128, 256, 512, 1024), (2, 2, 18, 2), (31, 29, 27, 13)
    rows = [*part(3, 128, 3, 2), *part(128, 128, 3, 1, 128), *part(128, 128, 1),
            *part(128, 128, 3, 2, 128)]  # fmt: skip
    for i, (dim, depth, side) in enumerate(zip(dims, depths, sides, strict=True)):
        if i:
            rows += [*part(dims[i - 1], dim, 1), *part(dim, dim, 3, 2, dim)]
        for _ in range(depth):
            rows += [tc.create_block("replknet_block", dim, kernel_size=side),
                     OnTokens(tc.create_block("replknet_ffn", dim))]  # fmt: skip
    last = [nn.BatchNorm2d(1024), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 1000)]
    return nn.Sequential(*rows, *last)


COUNTS = {
    "VAN-B0": (lambda: van((32, 64, 160, 256), (3, 3, 5, 2)), 4_105_800, 4.1),
    "VAN-B1": (lambda: van((64, 128, 320, 512), (2, 2, 4, 2)), None, 13.9),
    "VAN-B2": (lambda: van((64, 128, 320, 512), (3, 3, 12, 3)), None, 26.6),
    "MogaNet-XT": (lambda: moganet((32, 64, 96, 192), (3, 3, 10, 2)), None, 3.0),
    "MogaNet-T": (lambda: moganet((32, 64, 128, 256), (3, 3, 12, 2)), None, 5.2),
    "MogaNet-S": (lambda: moganet((64, 128, 320, 512), (2, 3, 12, 2)), None, 25.3),
    "RepLKNet-31B": (replknet, None, 79),
}


@pytest.mark.parametrize("name", COUNTS)
def test_count_is_the_published_one(name):
    make, exact, millions = COUNTS[name]
    with torch.device("meta"):
        count = sum(p.numel() for p in make().parameters())
    assert exact in (None, count)
    if name == "RepLKNet-31B":  # the paper rounds down
        assert count // 1_000_000 == millions
    else:
        assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize("name", ["VAN-B0", "MogaNet-XT"])
def test_network_trains(name):
    model = COUNTS[name][0]()
    model(torch.randn(2, 3, 64, 96)).sin().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
