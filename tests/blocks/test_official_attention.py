"""Weights of attention under the keys of the papers' repositories.

Where their module cannot be imported, one with its keys is put together here, and runs as the
paper says.
"""

from collections import OrderedDict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct
from timm.models import (
    coat,
    edgenext,
    efficientvit_mit,
    mobilevit,
    mvitv2,
    nextvit,
    pvt_v2,
    swiftformer,
    xcit,
)
from timm.models.byobnet import LayerFn
from torch import nn

import tokenconv as tc
from tokenconv.blocks.official import SOURCES, load_official

from .conftest import Net, dw, randomize_

D, N, ROWS, COLS = 16, 2, 4, 6
SILU = LayerFn(conv_norm_act=partial(ConvNormAct, act_layer=nn.SiLU), act=nn.SiLU)


def shell(module, call=None, maps=False):
    """A module of timm; its keys are those of the module."""

    class Shell(nn.Module):
        def forward(self, x):
            if maps:
                return line(module(spread(x)))
            return module(x, *(() if call is None else call))

        def state_dict(self, **kwargs):
            return module.state_dict(**kwargs)

    made = Shell()
    made.module = module
    return made


def spread(x):
    return x.transpose(1, 2).unflatten(2, (ROWS, COLS))


def line(fmap):
    return fmap.flatten(2).transpose(1, 2)


def lin(bias=False, out=D, dim=D):
    return nn.Linear(dim, out, bias=bias)


def attend(q, k, v, n=N, **kwargs):
    q, k, v = (part.unflatten(2, (n, -1)).transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **kwargs).transpose(1, 2).flatten(2)


def cvt():
    def run(m, x):
        q, k, v = (line(m.get_submodule(f"conv_proj_{n}")(spread(x))) for n in "qkv")
        return m.proj(attend(m.proj_q(q), m.proj_k(k), m.proj_v(v), scale=D**-0.5))

    def projection(stride):
        conv = dw(D, stride=stride, bias=False)
        return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(D)))

    return Net(run, proj_q=lin(True), proj_k=lin(True), proj_v=lin(True), proj=lin(True),
               conv_proj_q=projection(1), conv_proj_k=projection(2),
               conv_proj_v=projection(2))  # fmt: skip


def cmt():
    def run(m, x):
        y = line(m.sr(spread(x)))
        return m.proj(attend(m.q(x), m.k(y), m.v(y), attn_mask=m.relative_pos))

    sr = nn.Sequential(nn.Conv2d(D, D, 2, stride=2, groups=D), nn.BatchNorm2d(D))
    return Net(run, q=lin(), k=lin(), v=lin(), sr=sr, proj=lin(True),
               relative_pos=nn.Parameter(torch.zeros(N, 24, 6)))  # fmt: skip


def restormer():
    def run(m, x):
        q, k, v = m.qkv_dwconv(m.qkv(spread(x))).chunk(3, 1)
        q, k, v = (part.flatten(2).unflatten(1, (N, -1)) for part in (q, k, v))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        out = (q @ k.transpose(2, 3) * m.temperature).softmax(-1) @ v
        return line(m.project_out(out.flatten(1, 2).unflatten(2, (ROWS, COLS))))

    return Net(run, temperature=nn.Parameter(torch.zeros(N, 1, 1)),
               qkv=nn.Conv2d(D, 3 * D, 1, bias=False), qkv_dwconv=dw(3 * D, bias=False),
               project_out=nn.Conv2d(D, D, 1, bias=False))  # fmt: skip


def cswin():
    """Stripes as large as the grid."""

    def run(m, x):
        outs = []
        q, k, v = m.qkv(x).chunk(3, -1)
        for i, branch in enumerate(m.attns):
            part = slice(i * D // 2, (i + 1) * D // 2)
            own = attend(q[..., part], k[..., part], v[..., part], N // 2)
            outs.append(own + line(branch.get_v(spread(v[..., part]))))
        return m.proj(torch.cat(outs, -1))

    branches = [Net(get_v=dw(D // 2)) for _ in range(2)]
    return Net(run, qkv=lin(out=3 * D), attns=nn.ModuleList(branches), proj=lin(True))


def shunted():
    def run(m, x):
        outs = []
        for i, q in zip("12", m.q(x).chunk(2, -1), strict=True):
            y = m.get_submodule(f"sr{i}")(spread(x))
            size = y.shape[2:]
            y = F.gelu(m.get_submodule(f"norm{i}")(line(y)))
            k, v = m.get_submodule(f"kv{i}")(y).chunk(2, -1)
            local = m.get_submodule(f"local_conv{i}")(v.transpose(1, 2).unflatten(2, size))
            outs.append(attend(q, k, v + line(local), N // 2))
        return m.proj(torch.cat(outs, -1))

    layers = {}
    for i, side in (("1", 4), ("2", 2)):
        layers[f"sr{i}"] = nn.Conv2d(D, D, side, stride=side)
        layers |= {f"norm{i}": nn.LayerNorm(D), f"kv{i}": lin(True)}
        layers[f"local_conv{i}"] = dw(D // 2)
    return Net(run, q=lin(True), proj=lin(True), **layers)


def smt(bias):
    def run(m, x):
        k, v = m.kv(x).chunk(2, -1)
        return m.proj(attend(m.q(x), k, v) + line(m.local_conv(spread(v))))

    return Net(run, q=lin(bias), kv=lin(bias, 2 * D), local_conv=dw(D), proj=lin(True))


def hilo():
    def run(m, x):
        windows = m.h_qkv(x).unflatten(1, (ROWS // 2, 2, COLS // 2, 2)).transpose(2, 3)
        high = attend(*windows.reshape(-1, 4, 3 * D // 2).chunk(3, -1), 1)
        high = high.reshape(len(x), ROWS // 2, COLS // 2, 2, 2, D // 2).transpose(2, 3)
        y = line(F.avg_pool2d(spread(x), 2))
        k, v = m.l_kv(y).chunk(2, -1)
        low = attend(m.l_q(x), k, v, 1)
        return torch.cat([m.h_proj(high.reshape(len(x), -1, D // 2)), m.l_proj(low)], -1)

    half = D // 2
    return Net(run, h_qkv=lin(out=3 * half), h_proj=lin(True, half, half), l_q=lin(out=half),
               l_kv=lin(out=D), l_proj=lin(True, half, half))  # fmt: skip


def iformer():
    def run(m, x):
        a, b, c = spread(x).split([4, 4, 8], 1)
        a = F.gelu(m.high_mixer.proj1(m.high_mixer.conv1(a)))
        b = F.gelu(m.high_mixer.proj2(F.max_pool2d(b, 3, stride=1, padding=1)))
        small = F.avg_pool2d(c, 2)
        q, k, v = m.low_mixer.qkv(line(small)).chunk(3, -1)
        c = attend(q, k, v, 1).transpose(1, 2).unflatten(2, small.shape[2:])
        y = torch.cat([a, b, F.interpolate(c, scale_factor=2, mode="nearest")], 1)
        return line(m.proj(y + m.conv_fuse(y)))

    high = Net(conv1=nn.Conv2d(4, 8, 1, bias=False), proj1=dw(8, bias=False),
               proj2=nn.Conv2d(4, 8, 1))  # fmt: skip
    return Net(run, high_mixer=high, low_mixer=Net(qkv=lin(out=24, dim=8)),
               conv_fuse=dw(24, bias=False), proj=nn.Conv2d(24, D, 1))  # fmt: skip


def coat_timm():
    crpe = coat.ConvRelPosEnc(D // 8, 8, {3: 2, 5: 3, 7: 3})
    theirs = coat.FactorAttnConvRelPosEnc(D, 8, shared_crpe=crpe)
    return shell(theirs, ((ROWS, COLS),))


def edgenext_official():
    theirs = edgenext.SplitTransposeBlock(D, num_scales=3, num_heads=N)
    made = shell(theirs, maps=True)
    names = (("mlp.fc1.", "pwconv1."), ("mlp.fc2.", "pwconv2."))

    def renamed():
        state = theirs.state_dict()
        for timms, official in names:
            state = {key.replace(timms, official): value for key, value in state.items()}
        return state

    made.state_dict = renamed
    return made


HEADS = {"num_heads": N}
CASES = {
    "cvt": ("cvt", "cvt_attn", HEADS, cvt),
    "pvtv2": ("pvtv2", "sra", HEADS, lambda: shell(
        pvt_v2.Attention(D, N, sr_ratio=2), ((ROWS, COLS),))),
    "pvtv2 linear": ("pvtv2", "sra", {**HEADS, "linear": True}, lambda: shell(
        pvt_v2.Attention(D, N, linear_attn=True), ((ROWS, COLS),))),
    "segformer": ("segformer", "sra", HEADS, lambda: shell(
        pvt_v2.Attention(D, N, sr_ratio=2), ((ROWS, COLS),))),
    "cmt": ("cmt", "lmhsa", {**HEADS, "size": (ROWS, COLS)}, cmt),
    "restormer": ("restormer", "mdta", HEADS, restormer),
    "coat": ("coat", "coat_attn", {"num_heads": 8}, coat_timm),
    "cswin": ("cswin", "cswin_attn", HEADS, cswin),
    "shunted": ("shunted", "shunted_attn", {**HEADS, "sr_ratio": 4}, shunted),
    "shunted last": ("shunted", "lepe_attn", {**HEADS, "qkv_bias": True}, partial(smt, True)),
    "smt": ("smt", "lepe_attn", HEADS, partial(smt, False)),
    "xcit": ("xcit", "xca", {**HEADS, "qkv_bias": True}, lambda: shell(
        xcit.XCA(D, N, qkv_bias=True))),
    "litv2": ("litv2", "hilo", HEADS, hilo),
    "swiftformer": ("swiftformer", "additive_attn", {}, lambda: shell(
        swiftformer.EfficientAdditiveAttention(D, D), maps=True)),
    "efficientvit_mit": ("efficientvit_mit", "lite_mla", HEADS, lambda: shell(
        efficientvit_mit.LiteMLA(D, D, heads=N, dim=D // N), maps=True)),
    "nextvit": ("nextvit", "nextvit_attn", HEADS, lambda: shell(
        nextvit.EfficientAttention(D, head_dim=D // N, sr_ratio=2))),
    "nextvit conv": ("nextvit", "nextvit_conv", {"head_dim": 8}, lambda: shell(
        nextvit.ConvAttention(D, 8), maps=True)),
    "mobilevit": ("mobilevit", "mobilevit", {}, lambda: shell(
        mobilevit.MobileVitBlock(D, patch_size=2, layers=SILU), maps=True)),
    "mobilevitv2": ("mobilevitv2", "mobilevitv2", {}, lambda: shell(
        mobilevit.MobileVitV2Block(D, patch_size=2, layers=SILU), maps=True)),
    "edgenext timm": ("edgenext", "sdta", {**HEADS, "num_scales": 3}, lambda: shell(
        edgenext.SplitTransposeBlock(D, num_scales=3, num_heads=N), maps=True)),
    "edgenext": ("edgenext", "sdta", {**HEADS, "num_scales": 3}, edgenext_official),
    "iformer": ("iformer", "inception_mixer", HEADS, iformer),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_official_weights_give_the_official_output(name):
    source, block, kwargs, make = CASES[name]
    theirs = randomize_(make().double()).eval()
    ours = tc.create_block(block, D, **kwargs).double().eval()
    assert load_official(ours, theirs.state_dict(), source=source) is ours
    generator = torch.Generator().manual_seed(1)
    prefix = int(source == "coat")  # timm's wants a class token
    x = torch.randn(3, prefix + ROWS * COLS, D, generator=generator, dtype=torch.float64)
    close = {"rtol": 1e-4, "atol": 1e-4} if source == "efficientvit_mit" else {}  # in 32 bits
    grid = tc.TokenGrid((ROWS, COLS), prefix)
    torch.testing.assert_close(ours(x, grid), theirs(x), **{"rtol": 1e-9, "atol": 1e-9, **close})


@torch.no_grad()
def test_mvitv2_loads_on_a_square():
    theirs = mvitv2.MultiScaleAttention(
        D, D, (6, 6), N, has_cls_token=False, kernel_q=(3, 3), kernel_kv=(3, 3), stride_kv=(2, 2),
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    randomize_(theirs.double())
    ours = tc.create_block("mvitv2_attn", D, num_heads=N, size=(6, 6)).double()
    load_official(ours, theirs.state_dict(), source="mvitv2")
    x = torch.randn(2, 36, D, dtype=torch.float64)
    torch.testing.assert_close(ours(x, 6, 6), theirs(x, (6, 6))[0], rtol=1e-9, atol=1e-9)


def test_every_source_is_tested_and_named_by_the_paper_that_it_is_of():
    tested = {(source, block) for source, block, _, _ in CASES.values()} | {
        ("mvitv2", "mvitv2_attn")
    }
    attention = {name: info for name, info in tc.BLOCKS.items() if info.group == "attention"}
    rows = {(source, block) for source, row in SOURCES.items() for block in row}
    assert tested == {row for row in rows if row[1] in attention}
    papers = {(paper.source, name) for name, i in attention.items() for paper in i.papers}
    assert {row for row in papers if row[0]} == tested
