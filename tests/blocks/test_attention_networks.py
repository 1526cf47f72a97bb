"""Whole networks of our attention: timm's outputs with its weights, and published counts."""

import re
from itertools import pairwise

import pytest
import timm
import torch
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


COUNTS = {
    "CoaT-Lite-Tiny": (coat_lite, 5_721_960, 5.7),
}


@pytest.mark.parametrize("name", COUNTS)
def test_count_is_the_published_one(name):
    build, exact, millions = COUNTS[name]
    with torch.device("meta"):
        assert count_of(build()) == exact
    assert round(exact / 1e6, 1) == millions
