import pytest
import torch
import torch.nn.functional as F
from timm.models.coat import ConvPosEnc
from timm.models.fastvit import RepConditionalPosEnc
from timm.models.tiny_vit import TinyVitBlock
from timm.models.twins import PosConv
from timm.models.xcit import LPI
from torch import nn
from transformers import PvtConfig
from transformers.models.pvt.modeling_pvt import PvtPatchEmbeddings

import tokenconv as tc

from .conftest import randomize_

DIM = 12


class OnMaps(nn.Module):
    """Calls a module for maps ``(B, C, H, W)`` with tokens."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, rows, cols):
        fmap = x.transpose(1, 2).unflatten(2, (rows, cols))
        return self.module(fmap).flatten(2).transpose(1, 2)


class WithoutPrefix(nn.Module):
    """CoaT's encoding, which wants a class token, and gets one that is forgotten."""

    def __init__(self):
        super().__init__()
        self.proj = ConvPosEnc(DIM).proj

    def forward(self, x, rows, cols):
        theirs = ConvPosEnc(DIM)
        theirs.proj = self.proj
        return theirs(F.pad(x, (0, 0, 1, 0)), (rows, cols))[:, 1:]


class LiteralEncoding(nn.Module):
    """``x + conv(x)``, as CMT, UniFormer, RMT and BiFormer write it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM)

    def forward(self, x):
        return x + self.conv(x)


class OnTokens(nn.Module):
    """timm's modules that are called with a size."""

    def __init__(self, module, pair):
        super().__init__()
        self.module, self.pair = module, pair

    def forward(self, x, rows, cols):
        return self.module(x, (rows, cols)) if self.pair else self.module(x, rows, cols)


ENCODINGS = {
    "peg": lambda: OnTokens(PosConv(DIM, DIM), pair=True),
    "lpu": lambda: OnMaps(LiteralEncoding()),
    "cpe": WithoutPrefix,
    "dpe": lambda: OnMaps(LiteralEncoding()),
    "rep_cpe": lambda: OnMaps(RepConditionalPosEnc(DIM)),
}


def assert_same(ours, theirs, rows, cols):
    x = torch.randn(2, rows * cols, DIM, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (ours, theirs):
        out = module(x, rows, cols)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [x, *module.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("rows", "cols"), [(5, 7), (1, 9), (8, 3)])
@pytest.mark.parametrize("name", ENCODINGS)
def test_encoding_is_that_of_its_paper(name, rows, cols):
    theirs = randomize_(ENCODINGS[name]().double())
    ours = tc.create_block(name, dim=DIM).double()
    state = zip(ours.state_dict(), theirs.state_dict().values(), strict=True)
    ours.load_state_dict(dict(state))
    assert_same(ours, theirs, rows, cols)


def test_learned_positions_are_those_of_pvt():
    config = PvtConfig(image_size=1, hidden_dropout_prob=0.0)
    theirs = PvtPatchEmbeddings(config, (10, 14), 2, 2, 3, DIM).double()
    ours = tc.create_block("abs_pos_embed", dim=DIM, size=(5, 7)).double()
    ours.pos_embed.data.copy_(theirs.position_embeddings)
    images = torch.randn(2, 3, 10, 14, dtype=torch.float64)
    expected, rows, cols = theirs(images)
    tokens = theirs.layer_norm(theirs.projection(images).flatten(2).transpose(1, 2))
    found = ours(tokens, rows, cols)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    (of_ours,) = torch.autograd.grad(found.sin().sum(), [ours.pos_embed], retain_graph=True)
    (of_theirs,) = torch.autograd.grad(expected.sin().sum(), [theirs.position_embeddings])
    torch.testing.assert_close(of_ours, of_theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(5, 7), (8, 3), (6, 8)])
def test_learned_positions_are_resized_as_in_pvt(size):
    rows, cols = size
    block = tc.create_block("abs_pos_embed", dim=DIM, size=(6, 8)).double()
    fmap = block.pos_embed.reshape(1, 6, 8, DIM).permute(0, 3, 1, 2)
    resized = F.interpolate(fmap, size=size, mode="bilinear")
    expected = resized.reshape(1, DIM, rows * cols).permute(0, 2, 1)
    zeros = torch.zeros(2, rows * cols, DIM, dtype=torch.float64)
    found = block(zeros, rows, cols)
    torch.testing.assert_close(found, expected.expand_as(zeros), rtol=1e-12, atol=1e-12)
    frames = block(zeros.repeat(1, 3, 1), 3, rows, cols)
    assert torch.equal(frames, found.repeat(1, 3, 1))


@pytest.mark.parametrize(("dim", "size"), [(0, (2, 2)), (8, (0, 2))])
def test_learned_positions_need_a_size(dim, size):
    with pytest.raises(ValueError, match="expected positive dim and size, got dim="):
        tc.create_block("abs_pos_embed", dim=dim, size=size)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("rows", "cols"), [(5, 7), (8, 3)])
def test_lpi_matches_timm(rows, cols, training):
    theirs = randomize_(LPI(DIM).double()).train(training)
    ours = tc.create_block("lpi", dim=DIM).double().train(training)
    state = zip(ours.state_dict(), theirs.state_dict().values(), strict=True)
    ours.load_state_dict(dict(state))
    assert_same(ours, OnTokens(theirs, pair=False), rows, cols)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("rows", "cols"), [(5, 7), (8, 3)])
def test_tinyvit_conv_matches_timm(rows, cols, training):
    theirs = randomize_(TinyVitBlock(DIM, 2).local_conv.double()).train(training)
    ours = tc.create_block("tinyvit_conv", dim=DIM).double().train(training)
    state = zip(ours.state_dict(), theirs.state_dict().values(), strict=True)
    ours.load_state_dict(dict(state))
    assert_same(ours, OnMaps(theirs), rows, cols)


@pytest.mark.parametrize(
    ("name", "key", "side"), [("peg", "proj.0", 3), ("rep_cpe", "pos_enc", 7), ("cpe", "proj", 3)]
)
def test_official_keys_load(name, key, side):
    state = {f"{key}.weight": torch.randn(DIM, 1, side, side), f"{key}.bias": torch.randn(DIM)}
    block = tc.create_block(name, dim=DIM)
    block.load_state_dict(state, strict=True)
    assert torch.equal(block.proj.weight, state[f"{key}.weight"])


@pytest.mark.parametrize("name", [*ENCODINGS, "lpi", "tinyvit_conv", "abs_pos_embed"])
def test_prefix_tokens_pass_unchanged(name):
    block = randomize_(tc.create_block(name, dim=8)).eval()
    x = torch.randn(2, 2 + 12, 8)
    out = block(x, tc.TokenGrid((3, 4), num_prefix_tokens=2))
    assert torch.equal(out[:, :2], x[:, :2])
    torch.testing.assert_close(out[:, 2:], block(x[:, 2:], 3, 4))
    assert (out[:, 2:] - x[:, 2:]).abs().max() > 0.1


def test_parameter_counts_are_the_published_formulas():
    for name in ENCODINGS:
        block = tc.create_block(name, dim=8, kernel_size=5)
        assert sum(p.numel() for p in block.parameters()) == 8 * (5 * 5 + 1)
    assert sum(p.numel() for p in tc.create_block("lpi", dim=8).parameters()) == 20 * 8 + 2 * 8


@pytest.mark.parametrize(
    ("name", "std"),
    [("peg", (2 / 9) ** 0.5), ("lpu", (2 / 9 / 512) ** 0.5), ("cpe", 1 / 3 / 3**0.5),
     ("dpe", 1 / 3 / 3**0.5), ("rep_cpe", 1 / 7 / 3**0.5)],
)  # fmt: skip
def test_starts_as_the_papers_code_does(name, std):
    torch.manual_seed(0)
    weight = tc.create_block(name, dim=512).proj.weight
    assert weight.std().item() == pytest.approx(std, rel=0.05)


def test_only_twins_keeps_its_kernel_out_of_weight_decay():
    assert tc.create_block("peg", dim=8).no_weight_decay() == {"proj.weight"}
    assert not hasattr(tc.create_block("lpu", dim=8), "no_weight_decay")


def test_a_folded_encoding_is_timms_reparameterised_one():
    theirs = randomize_(RepConditionalPosEnc(DIM).double()).eval()
    ours = tc.create_block("rep_cpe", dim=DIM).double()
    state = zip(ours.state_dict(), theirs.state_dict().values(), strict=True)
    ours.load_state_dict(dict(state))
    before = ours(x := torch.randn(2, 35, DIM, dtype=torch.float64), 5, 7)
    assert ours.proj.fold_()
    theirs.reparameterize()
    torch.testing.assert_close(ours.proj.weight, theirs.reparam_conv.weight, rtol=0, atol=0)
    torch.testing.assert_close(ours(x, 5, 7), before, rtol=1e-12, atol=1e-12)
