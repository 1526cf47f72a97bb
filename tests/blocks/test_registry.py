import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tokenconv as tc
from tokenconv.blocks.adapters import Adapter
from tokenconv.blocks.attention.base import Attention
from tokenconv.blocks.feed_forward import FeedForward
from tokenconv.blocks.ffn import MultiScaleFFN
from tokenconv.layers import StarReLU

ROOT = Path(__file__).parents[2]
TOKEN_BLOCKS = [name for name, info in tc.BLOCKS.items() if info.kind in ("tokens", "maps")]
ENTRIES = [(name, paper) for name, info in tc.BLOCKS.items() for paper in info.papers]


@pytest.mark.parametrize("name", TOKEN_BLOCKS)
@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 6),
    cols=st.integers(1, 6),
    prefix=st.integers(0, 3),
    dim=st.sampled_from([8, 12, 20]),
)
def test_token_blocks_keep_the_shape_and_the_batch_apart(name, batch, rows, cols, prefix, dim):
    torch.manual_seed(0)
    block = tc.create_block(name, dim=dim).double().eval()
    least = getattr(block, "sr_ratio", 1)
    grid = tc.TokenGrid((max(rows, least), max(cols, least)), prefix)
    x = torch.randn(batch, grid.num_tokens, dim, dtype=torch.float64)
    out = block(x, grid)
    assert out.shape == x.shape
    assert out.isfinite().all()
    assert torch.equal(out, block(x, grid))
    torch.testing.assert_close(out[-1:], block(x[-1:], grid), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, i in tc.BLOCKS.items() if i.kind == "maps"])
@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 3), rows=st.integers(1, 6), cols=st.integers(1, 6))
def test_map_blocks_keep_the_size_and_the_batch_apart(name, batch, rows, cols):
    torch.manual_seed(0)
    block = tc.create_block(name, dim=8).double().eval()
    fmap = torch.randn(batch, 8, rows, cols, dtype=torch.float64)
    out = block(fmap)
    assert out.shape == fmap.shape
    assert out.isfinite().all()
    assert torch.equal(out, block(fmap))
    torch.testing.assert_close(out[-1:], block(fmap[-1:]), rtol=1e-10, atol=1e-12)


C = 24


def symbols_of(name, block):
    """What the letters of a row mean for a block of C channels."""
    settings = {
        "inverted_residual": {"h": 6 * C},
        "mbconv": {"h": 6 * C},
        "uib": {"h": 4 * C},
        "shufflenetv1": {"w": C // 4},
        "pydmobilenet": {"w": C // 2},
        "esp": {"w": C // 5},
        "bsconv_s": {"w": C // 4},
        "dynamic_conv": {"w": C // 4, "E": 4},
        "condconv": {"E": 4},
        "conv_lora": {"w": 3, "E": 8},
        "conv_adapter": {"w": C // 8},
        "cct_tokenizer": {"w": 64},
        "ceit_stem": {"w": 64},
        "cmt_stem": {"w": 32},
        "conv2former_stem": {"w": C // 2},
        "mobilevit_stem": {"w": 16},
        "spatial_prior": {"w": 64},
        "nextvit_conv": {"w": C},
        "mobilevit": {"M": 4 * 6 // 4},
        "inception_mixer": {"M": 4 * 6 // 4},
        "sdta": {"n": 1},
        "lite_mla": {"K": 5},
    }.get(name, {})
    if isinstance(block, FeedForward):
        settings["h"] = block.hidden_dim_of(C, block.mlp_ratio)
    if isinstance(block, Adapter) and "w" not in settings:
        settings["w"] = block.width
    usual = 7 if name in ("cct_tokenizer", "shunted_stem") else 3
    side = getattr(block, "kernel_size", usual)
    if isinstance(block, Attention):
        shrink = getattr(block, "sr_ratio", getattr(block, "stride_kv", 2))
        settings["n"], settings["s"] = block.num_heads, shrink
        settings["M"] = 4 * 6 if name == "cswin_attn" else 4 * 6 // shrink**2
    known = {"C": C, "O": C, "I": 3, "H": 4, "W": 6, "N": 4 * 6}
    return {**known, "K": side if isinstance(side, int) else None, **settings}


class OnImages(nn.Module):
    """A block on the tokens that the pixels of an image are."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, images):
        rows, cols = images.shape[2:]
        tokens = images.flatten(2).transpose(1, 2)
        if isinstance(self.block, MultiScaleFFN):
            return self.block(tokens.repeat(1, 21, 1)[:, : 21 * rows * cols // 4], rows, cols)
        return self.block(tokens, rows, cols)


@pytest.mark.parametrize("name", tc.BLOCKS)
def test_the_formulas_of_a_row_are_what_the_block_counts(name):
    info = tc.BLOCKS[name]
    block = tc.create_block(name, dim=C)
    known = symbols_of(name, block)
    if info.kind == "stem":
        model, size = block, (3, 64, 96)
        known["N"] = block(torch.zeros(1, *size))[0].shape[1]
    else:
        model, size = OnImages(block), (C, 4, 6)
    assert eval(info.params, {}, known) == sum(p.numel() for p in block.parameters())
    assert eval(info.macs, {}, known) == tc.cost(model, size).macs


@pytest.mark.parametrize(("name", "paper"), ENTRIES, ids=[f"{n}-{p.name}" for n, p in ENTRIES])
def test_the_arguments_of_a_paper_are_those_of_the_block(name, paper):
    kwargs = eval(f"dict({paper.arguments})", {"nn": nn, "StarReLU": StarReLU})
    assert isinstance(tc.create_block(name, dim=16, **kwargs), nn.Module)
    assert paper.url.startswith("https://arxiv.org/abs/")


def test_unknown_block_lists_the_nearest():
    with pytest.raises(tc.UnknownNameError, match="unknown block 'mixffn': did you mean mix_ffn"):
        tc.create_block("mixffn", dim=8)


def test_list_blocks_takes_a_pattern():
    assert "mix_ffn" in tc.list_blocks()
    assert tc.list_blocks("*ffn*") == [n for n in sorted(tc.BLOCKS) if "ffn" in n]
    assert tc.list_blocks("no such") == []


def test_rows_cannot_be_changed():
    with pytest.raises(TypeError):
        tc.BLOCKS["mine"] = tc.BLOCKS["mix_ffn"]  # pyright: ignore[reportIndexIssue]


def test_every_parity_test_is_collected():
    nodes = sorted({info.parity_test for info in tc.BLOCKS.values()})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *nodes]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    tests = found.stdout.splitlines()
    for name, info in tc.BLOCKS.items():
        node = info.parity_test
        shared = [other for other, row in tc.BLOCKS.items() if row.parity_test == node]
        own = rf"\[{name}[ \-\]]" if len(shared) > 1 else ""
        assert any(re.match(re.escape(node) + own, test) for test in tests), name
