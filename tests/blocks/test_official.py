"""Weights under the keys of the papers' repositories.

Where their module cannot be imported, one with its keys is put together here, and runs as the
paper says.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from bsconv.pytorch import BSConvS, BSConvU
from timm.models import _efficientnet_blocks as efficientnet
from timm.models import coat, fastvit, mambaout, twins, xcit
from timm.models.efficientformer_v2 import ConvMlpWithNorm
from timm.models.tiny_vit import TinyVitBlock
from timm.models.xception import Block as XceptionBlock
from torch import nn
from torchvision.models import mobilenetv2, shufflenetv2
from torchvision.models.efficientnet import MBConv, MBConvConfig
from transformers import PvtV2Config, SegformerConfig
from transformers.models.pvt_v2.modeling_pvt_v2 import PvtV2ConvFeedForwardNetwork
from transformers.models.segformer.modeling_segformer import SegformerMixMLP

import tokenconv as tc
from tokenconv.blocks.official import SOURCES, load_official

from .conftest import Net, bn, dw, on_channels, pw, randomize_, scale

D, H, ROWS, COLS = 16, 64, 4, 6


def mix(conv=False, residual=False):
    def run(m, x):
        x = m.fc1(x) if conv else on_channels(m.fc1, x)
        y = m.dwconv.dwconv(x)
        x = F.gelu(x + y if residual else y)
        return m.fc2(x) if conv else on_channels(m.fc2, x)

    layer = pw if conv else nn.Linear
    return Net(run, fc1=layer(D, H), dwconv=Net(dwconv=dw(H)), fc2=layer(H, D))


def biformer():
    def run(m, x):
        parts = m.mlp
        return on_channels(parts[3], F.gelu(parts[1].dwconv(on_channels(parts[0], x))))

    mlp = nn.Sequential(nn.Linear(D, H), Net(dwconv=dw(H)), nn.GELU(), nn.Linear(H, D))
    return Net(run, mlp=mlp)


def ceit():
    def run(m, x):
        x = F.gelu(m.bn1(m.conv1(x)))
        return m.bn3(m.conv3(F.gelu(m.bn2(m.conv2(x)))))

    return Net(run, conv1=pw(D, H), conv2=dw(H), conv3=pw(H, D), bn1=bn(H), bn2=bn(H), bn3=bn(D))


def cmt():
    def run(m, x):
        x = m.conv1(x)
        return m.conv2(m.proj_bn(F.gelu(x + m.proj(x))))

    return Net(run, conv1=nn.Sequential(pw(D, H), nn.GELU(), bn(H)), proj=dw(H),
               conv2=nn.Sequential(pw(H, D), bn(D)), proj_bn=bn(H))  # fmt: skip


def localvit(act):
    def se(x):
        return F.hardsigmoid(gate.fc(x.mean((2, 3))))

    def eca(x):
        return torch.sigmoid(gate.conv(x.mean((2, 3))[:, None])[:, 0])

    class Gate(nn.Module):
        def forward(self, x):
            return x * (se if act == "hs+se" else eca)(x)[..., None, None]

    gate = Gate()
    if act == "hs+se":
        gate.fc = nn.Sequential(nn.Linear(H, H // 4), nn.ReLU(), nn.Linear(H // 4, H))
    else:
        gate.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)
    make = nn.ReLU6 if act == "relu6" else nn.Hardswish
    row = [pw(D, H, bias=False), bn(H), make(), dw(H, bias=False), bn(H), make()]
    row += [gate] if "+" in act else []
    return Net(lambda m, x: x + m.conv(x),
               conv=nn.Sequential(*row, pw(H, D, bias=False), bn(D)))  # fmt: skip


def uformer():
    def run(m, x):
        x = F.gelu(m.dwconv[0](F.gelu(on_channels(m.linear1[0], x))))
        x = on_channels(m.linear2[0], x)
        return x * torch.sigmoid(m.eca.conv(x.mean((2, 3))[:, None])[:, 0])[..., None, None]

    return Net(run, linear1=nn.Sequential(nn.Linear(D, H)), dwconv=nn.Sequential(dw(H)),
               linear2=nn.Sequential(nn.Linear(H, D)),
               eca=Net(conv=nn.Conv1d(1, 1, 3, padding=1, bias=False)))  # fmt: skip


def restormer():
    def run(m, x):
        a, b = m.dwconv(m.project_in(x)).chunk(2, dim=1)
        return m.project_out(F.gelu(a) * b)

    h = int(D * 2.66)
    return Net(run, project_in=pw(D, 2 * h, bias=False), dwconv=dw(2 * h, bias=False),
               project_out=pw(h, D, bias=False))  # fmt: skip


def transnext():
    def run(m, x):
        x, v = on_channels(m.fc1, x).chunk(2, dim=1)
        return on_channels(m.fc2, F.gelu(m.dwconv.dwconv(x)) * v)

    g = int(2 * H / 3)
    return Net(run, fc1=nn.Linear(D, 2 * g), dwconv=Net(dwconv=dw(g)), fc2=nn.Linear(g, D))


def rmt():
    def run(m, x):
        x = F.gelu(on_channels(m.fc1, x))
        return on_channels(m.fc2, x + on_channels(m.ffn_layernorm, m.dwconv.conv(x)))

    return Net(run, fc1=nn.Linear(D, H), fc2=nn.Linear(H, D),
               ffn_layernorm=nn.LayerNorm(H, eps=1e-6), dwconv=Net(conv=dw(H)))  # fmt: skip


def conv2former():
    def run(m, x):
        x = F.gelu(m.fc1(on_channels(m.norm, x)))
        return m.fc2(x + F.gelu(m.pos(x)))

    return Net(run, norm=nn.LayerNorm(D, eps=1e-6), fc1=pw(D, H), pos=dw(H), fc2=pw(H, D))


def efficientformer():
    """The official names, in which norm2 is the last norm."""

    def run(m, x):
        x = F.gelu(m.norm1(m.fc1(x)))
        return m.norm2(m.fc2(F.gelu(m.mid_norm(m.mid(x)))))

    return Net(run, fc1=pw(D, H), fc2=pw(H, D), mid=dw(H), mid_norm=bn(H), norm1=bn(H),
               norm2=bn(D))  # fmt: skip


def moganet():
    def run(m, x):
        x = F.gelu(m.dwconv(m.fc1(x)))
        return m.fc2(x + m.sigma.scale * (x - F.gelu(m.decompose(x))))

    return Net(run, fc1=pw(D, H), dwconv=dw(H), fc2=pw(H, D), decompose=pw(H, 1),
               sigma=Net(scale=scale(1, H, 1, 1)))  # fmt: skip


def convmlp():
    def mlp(part, x):
        return on_channels(part.fc2, F.gelu(on_channels(part.fc1, x)))

    def run(m, x):
        x = x + mlp(m.channel_mlp1, on_channels(m.norm1, x))
        x = m.connect(on_channels(m.connect_norm, x))
        return x + mlp(m.channel_mlp2, on_channels(m.norm2, x))

    def part():
        return Net(fc1=nn.Linear(D, 2 * D), fc2=nn.Linear(2 * D, D))

    norms = {name: nn.LayerNorm(D) for name in ("norm1", "connect_norm", "norm2")}
    return Net(run, channel_mlp1=part(), connect=dw(D, bias=False), channel_mlp2=part(), **norms)


def replknet():
    def run(m, x):
        y = m.pw1.bn(m.pw1.conv(m.preffn_bn(x)))
        return x + m.pw2.bn(m.pw2.conv(F.gelu(y)))

    return Net(run, preffn_bn=bn(D), pw1=Net(conv=pw(D, H, bias=False), bn=bn(H)),
               pw2=Net(conv=pw(H, D, bias=False), bn=bn(D)))  # fmt: skip


def unireplknet():
    def run(m, x):
        x = F.gelu(on_channels(m.pwconv1[1], x)).movedim(1, -1)
        norm = x.norm(dim=(1, 2), keepdim=True)
        share = norm / (norm.mean(-1, keepdim=True) + 1e-6)
        grn = m.act[1]
        x = (grn.gamma * (x * share) + grn.beta + x).movedim(-1, 1)
        return m.pwconv2[2](on_channels(m.pwconv2[0], x))

    grn = Net(gamma=scale(1, 1, 1, H), beta=scale(1, 1, 1, H))
    last = nn.Sequential(nn.Linear(H, D, bias=False), nn.Identity(), bn(D))
    return Net(run, pwconv1=nn.Sequential(nn.Identity(), nn.Linear(D, H)),
               act=nn.Sequential(nn.GELU(), grn), pwconv2=last)  # fmt: skip


def convpass():
    def gelu(x):
        return x * torch.sigmoid(1.702 * x)

    def run(m, x):
        y = gelu(m.adapter_conv(gelu(on_channels(m.adapter_down, x))))
        return on_channels(m.adapter_up, y)

    return Net(run, adapter_conv=nn.Conv2d(8, 8, 3, padding=1), adapter_down=nn.Linear(D, 8),
               adapter_up=nn.Linear(8, D))  # fmt: skip


def conv_adapter():
    return Net(lambda m, x: m.conv2(F.relu(m.conv1(x))) * m.se,
               conv1=nn.Conv2d(D, 2, 3, padding=1, groups=2), conv2=pw(2, D),
               se=scale(1, D, 1, 1))  # fmt: skip


def conv_lora():
    def run(m, x):
        y = F.conv2d(x, m.lora_A[..., None, None])
        gates = y.mean((2, 3)) @ m.lora_moe_gating.w_gate
        rows = []
        for image, i in zip(y, gates.argmax(1).tolist(), strict=True):
            size = (i + 1) * ROWS, (i + 1) * COLS
            large = F.interpolate(image[None], size=size, mode="bicubic") if i else image[None]
            made = F.gelu(m.lora_moe_experts[i][0](large))
            rows.append(F.interpolate(made, size=(ROWS, COLS), mode="bicubic") if i else made)
        return 32 / 3 * F.conv2d(y + torch.cat(rows), m.lora_B[..., None, None])

    gating = Net(w_gate=scale(3, 8), w_noise=scale(3, 8))
    gating.register_buffer("mean", torch.zeros(1))
    gating.register_buffer("std", torch.ones(1))
    experts = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.GELU()) for _ in range(8)]
    return Net(run, weight=scale(D, D), bias=scale(D), lora_A=scale(3, D), lora_B=scale(D, 3),
               lora_moe_gating=gating, lora_moe_experts=nn.ModuleList(experts))  # fmt: skip


def mona():
    def run(m, x):
        y = on_channels(m.norm, x) * m.gamma[:, None, None] + x * m.gammax[:, None, None]
        y = on_channels(m.project1, y)
        op = m.adapter_conv
        y = (op.conv1(y) + op.conv2(y) + op.conv3(y)) / 3 + y
        return x + on_channels(m.project2, F.gelu(y + op.projector(y)))

    op = Net(conv1=dw(64), conv2=dw(64, 5), conv3=dw(64, 7), projector=pw(64, 64))
    return Net(run, gamma=scale(D), gammax=scale(D), project1=nn.Linear(D, 64),
               project2=nn.Linear(64, D), adapter_conv=op, norm=nn.LayerNorm(D))  # fmt: skip


def rep_adapter():
    def run(m, x):
        y = m.conv_B(m.conv_A(x.flatten(2)))
        return x + y.unflatten(2, x.shape[2:])

    return Net(run, conv_A=nn.Conv1d(D, 8, 1), conv_B=nn.Conv1d(8, D, 1, groups=2))


def adaptformer():
    return Net(lambda m, x: 0.1 * on_channels(m.up_proj, F.relu(on_channels(m.down_proj, x))),
               down_proj=nn.Linear(D, 64), up_proj=nn.Linear(64, D))  # fmt: skip


def with_input(**names):
    """A bare convolution of which the Transformer block adds the result."""
    return Net(lambda m, x: x + getattr(m, next(iter(names)))(x), **names)


def shufflenetv1(groups):
    def run(m, x):
        y = m.branch_main_1(x)
        order = [i * groups + j for j in range(groups) for i in range(6 // groups)]
        return F.relu(x + m.branch_main_2(y[:, order]))

    first = [nn.Conv2d(24, 6, 1, groups=groups, bias=False), bn(6), nn.ReLU(), dw(6, bias=False)]
    second = [nn.Conv2d(6, 24, 1, groups=groups, bias=False), bn(24)]
    return Net(
        run, branch_main_1=nn.Sequential(*first, bn(6)), branch_main_2=nn.Sequential(*second)
    )


def esp(stride):
    def run(m, x):
        y = m.c1.conv(x)
        outs = [part.conv(y) for part in (m.d1, m.d2, m.d4, m.d8, m.d16)]
        for i in (2, 3, 4):
            outs[i] = outs[i] + outs[i - 1]
        out = torch.cat(outs, dim=1)
        return m.act(m.bn(out)) if stride == 2 else m.bn.act(m.bn.bn(out + x))

    def part(wide, dilation):
        return Net(conv=nn.Conv2d(3, wide, 3, padding=dilation, dilation=dilation, bias=False))

    first = nn.Conv2d(D, 3, 3, 2, 1, bias=False) if stride == 2 else pw(D, 3, bias=False)
    norm, act = nn.BatchNorm2d(D, eps=1e-3), nn.PReLU(D)
    last = {"bn": norm, "act": act} if stride == 2 else {"bn": Net(bn=norm, act=act)}
    return Net(run, c1=Net(conv=first), d1=part(D - 12, 1), d2=part(3, 2), d4=part(3, 4),
               d8=part(3, 8), d16=part(3, 16), **last)  # fmt: skip


def resdsc():
    def run(m, x):
        one, two = m.SeparableConv2d1, m.SeparableConv2d2
        y = F.relu(m.bns1[0](one.pointwise(one.depthwise[0](x))))
        return F.relu(x + m.bns2[0](two.pointwise(two.depthwise[0](y))))

    def separable():
        depthwise = nn.ModuleList([dw(D, bias=False)])
        return Net(depthwise=depthwise, pointwise=pw(D, D, bias=False))

    norms = {f"bns{i}": nn.ModuleList([bn(D)]) for i in (1, 2)}
    return Net(run, SeparableConv2d1=separable(), SeparableConv2d2=separable(), **norms)


class OnTokens(nn.Module):
    """A module for tokens and their size, on maps; its keys are those of the module."""

    def __init__(self, module, *, pair=False, prefix=False):
        super().__init__()
        self.module, self.pair, self.prefix = module, pair, prefix

    def forward(self, x):
        rows, cols = x.shape[2:]
        tokens = x.flatten(2).transpose(1, 2)
        if self.prefix:
            tokens = F.pad(tokens, (0, 0, 1, 0))
        size = ((rows, cols),) if self.pair else (rows, cols)
        out = self.module(tokens, *size)[:, int(self.prefix) :]
        return out.transpose(1, 2).unflatten(2, (rows, cols))


timm_se = partial(efficientnet.SqueezeExcite, rd_ratio=0.25 / 6)
narrow_se = partial(efficientnet.SqueezeExcite, rd_ratio=0.25)


def torchvision_mbconv(ratio):
    config = MBConvConfig(ratio, 3, 1, D, D, 1, width_mult=1.0, depth_mult=1.0)
    return MBConv(config, 0.0, nn.BatchNorm2d)


CASES = {
    "pvtv2 timm": ("pvtv2", "mix_ffn", {}, mix),
    "pvtv2 transformers": ("pvtv2", "mix_ffn", {}, lambda: OnTokens(
        PvtV2ConvFeedForwardNetwork(PvtV2Config(), D, H))),
    "segformer": ("segformer", "mix_ffn", {}, lambda: OnTokens(
        SegformerMixMLP(SegformerConfig(hidden_dropout_prob=0.0), D, H))),
    "van": ("van", "mix_ffn", {}, partial(mix, conv=True)),
    "litv2": ("litv2", "mix_ffn", {}, mix),
    "biformer": ("biformer", "mix_ffn", {}, biformer),
    "biformer position": ("biformer", "dpe", {}, lambda: with_input(pos_embed=dw(D))),
    "ceit": ("ceit", "leff", {}, ceit),
    "cmt": ("cmt", "irffn", {}, cmt),
    "cmt position": ("cmt", "lpu", {}, lambda: with_input(proj=dw(D))),
    **{f"localvit {act}": ("localvit", "localvit_ffn", {"act": act}, partial(localvit, act))
       for act in ("relu6", "hs", "hs+se", "hs+eca")},
    "uformer": ("uformer", "uformer_leff", {"eca": True}, uformer),
    "restormer": ("restormer", "gdfn", {}, restormer),
    "transnext": ("transnext", "conv_glu", {}, transnext),
    "shunted": ("shunted", "shunted_ffn", {}, partial(mix, residual=True)),
    "smt": ("smt", "shunted_ffn", {}, partial(mix, residual=True)),
    "rmt": ("rmt", "rmt_ffn", {"subln": True}, rmt),
    "rmt position": ("rmt", "dpe", {}, lambda: Net(
        lambda m, x: x + m.conv(x), conv=dw(D))),
    "conv2former": ("conv2former", "conv2former_mlp", {}, conv2former),
    "efficientformerv2": ("efficientformerv2", "efficientformerv2_ffn", {}, efficientformer),
    "efficientformerv2 timm": ("efficientformerv2", "efficientformerv2_ffn", {},
                               lambda: ConvMlpWithNorm(D, H, mid_conv=True)),
    "fastvit": ("fastvit", "fastvit_ffn", {}, lambda: fastvit.ConvMlp(D, H)),
    "fastvit position": ("fastvit", "rep_cpe", {}, lambda: fastvit.RepConditionalPosEnc(D)),
    "moganet": ("moganet", "moga_ffn", {}, moganet),
    "convmlp": ("convmlp", "conv_mlp", {}, convmlp),
    "replknet": ("replknet", "replknet_ffn", {}, replknet),
    "unireplknet": ("unireplknet", "unireplknet_ffn", {}, unireplknet),
    "mambaout": ("mambaout", "gated_cnn", {"conv_ratio": 0.5}, lambda: Net(
        lambda m, x: on_channels(m.block, x), block=mambaout.GatedConvBlock(D, conv_ratio=0.5))),
    "twins": ("twins", "peg", {}, lambda: OnTokens(twins.PosConv(D, D), pair=True)),
    "coat": ("coat", "cpe", {}, lambda: OnTokens(coat.ConvPosEnc(D), pair=True, prefix=True)),
    "xcit": ("xcit", "lpi", {}, lambda: OnTokens(xcit.LPI(D))),
    "uniformer": ("uniformer", "dpe", {}, lambda: with_input(pos_embed=dw(D))),
    "tinyvit": ("tinyvit", "tinyvit_conv", {}, lambda: TinyVitBlock(D, 2).local_conv),
    "convpass": ("convpass", "convpass", {}, convpass),
    "conv_adapter": ("conv_adapter", "conv_adapter", {}, conv_adapter),
    "conv_lora": ("conv_lora", "conv_lora", {}, conv_lora),
    "mona": ("mona", "mona", {}, mona),
    "repadapter": ("repadapter", "rep_adapter", {}, rep_adapter),
    "adaptformer": ("adaptformer", "adaptformer", {}, adaptformer),
    "mobilenetv1": ("mobilenetv1", "mobilenetv1", {"stride": 2, "out_dim": 20}, lambda:
        efficientnet.DepthwiseSeparableConv(D, 20, stride=2, noskip=True, pw_act=True)),
    "xception": ("xception", "xception", {}, lambda: XceptionBlock(D, D, 3)),
    "xception first": (
        "xception", "xception",
        {"stride": 2, "out_dim": 20, "repeats": 2, "start_with_act": False},
        lambda: XceptionBlock(D, 20, 2, 2, start_with_relu=False)),
    "mobilenetv2": ("mobilenetv2", "inverted_residual", {}, lambda:
        mobilenetv2.InvertedResidual(D, D, 1, 6)),
    "mobilenetv2 first": ("mobilenetv2", "inverted_residual", {"expand_ratio": 1}, lambda:
        mobilenetv2.InvertedResidual(D, D, 1, 1)),
    "mobilenetv2 timm": ("mobilenetv2", "inverted_residual", {}, lambda:
        efficientnet.InvertedResidual(D, D, exp_ratio=6, act_layer=nn.ReLU6)),
    "mobilenetv2 timm first": ("mobilenetv2", "inverted_residual", {"expand_ratio": 1}, lambda:
        efficientnet.DepthwiseSeparableConv(D, D, act_layer=nn.ReLU6)),
    "efficientnet": ("efficientnet", "mbconv", {}, partial(torchvision_mbconv, 6)),
    "efficientnet first": ("efficientnet", "mbconv", {"expand_ratio": 1},
                           partial(torchvision_mbconv, 1)),
    "efficientnet timm": ("efficientnet", "mbconv", {}, lambda: efficientnet.InvertedResidual(
        D, D, exp_ratio=6, act_layer=nn.SiLU, se_layer=timm_se)),
    "efficientnet timm first": ("efficientnet", "mbconv", {"expand_ratio": 1}, lambda:
        efficientnet.DepthwiseSeparableConv(D, D, act_layer=nn.SiLU, se_layer=narrow_se)),
    "shufflenetv1": ("shufflenetv1", "shufflenetv1", {"groups": 3, "dim": 24},
                     partial(shufflenetv1, 3)),
    "shufflenetv2": ("shufflenetv2", "shufflenetv2", {}, lambda:
        shufflenetv2.InvertedResidual(D, D, 1)),
    "shufflenetv2 stride": ("shufflenetv2", "shufflenetv2", {"stride": 2, "out_dim": 24}, lambda:
        shufflenetv2.InvertedResidual(D, 24, 2)),
    "espnet": ("espnet", "esp", {}, partial(esp, 1)),
    "espnet stride": ("espnet", "esp", {"stride": 2}, partial(esp, 2)),
    "bsconv_u": ("bsconv", "bsconv_u", {"with_bn": True}, lambda:
        BSConvU(D, D, 3, padding=1, with_bn=True)),
    "bsconv_s": ("bsconv", "bsconv_s", {}, lambda: BSConvS(D, D, 3, padding=1)),
    "resdsc": ("resdsc", "resdsc", {}, resdsc),
}  # fmt: skip


def official_state(name, theirs):
    """Its state dict without the name that the test's own shell gives it."""
    state = theirs.state_dict()
    shell = {"OnTokens": "module."}.get(type(theirs).__name__)
    if name in ("biformer", "mambaout"):
        shell = {"biformer": "mlp.", "mambaout": "block."}[name]
    if name in ("biformer position", "uniformer"):
        shell = "pos_embed."
    if name == "cmt position":
        shell = "proj."
    return {key.removeprefix(shell or ""): value for key, value in state.items()}


def draw(dim):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, dim, ROWS, COLS, generator=generator, dtype=torch.float64)


def run(block, fmap):
    """Any block of ours on a map."""
    if isinstance(block, tc.blocks.maps.MapBlock):
        return block(fmap)
    out = block(fmap.flatten(2).transpose(1, 2), *fmap.shape[2:])
    return out.transpose(1, 2).unflatten(2, fmap.shape[2:])


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_official_weights_give_the_official_output(name):
    source, block, kwargs, make = CASES[name]
    dim = kwargs.get("dim", D)
    theirs = randomize_(make().double()).eval()
    if name == "biformer":  # 4 as all others here
        kwargs = {"mlp_ratio": 4}
    ours = tc.create_block(block, **{"dim": dim, **kwargs}).double().eval()
    assert load_official(ours, official_state(name, theirs), source=source) is ours
    fmap = draw(dim)
    torch.testing.assert_close(run(ours, fmap), theirs(fmap), rtol=1e-9, atol=1e-9)


def test_three_scales_load_as_well():
    theirs = randomize_(Net(fc1=nn.Linear(D, 4), dwconv=Net(dwconv=dw(4)),
                            fc2=nn.Linear(4, D)))  # fmt: skip
    ours = tc.create_block("multi_scale_ffn", D)
    load_official(ours, theirs.state_dict(), source="vit_adapter")
    assert torch.equal(ours.dwconv.weight, theirs.dwconv.dwconv.weight)
    assert torch.equal(ours.fc2.bias, theirs.fc2.bias)


def test_every_source_is_tested_and_named_by_the_paper_that_it_is_of():
    tested = {(source, block) for source, block, _, _ in CASES.values()}
    tested.add(("vit_adapter", "multi_scale_ffn"))
    elsewhere = {name for name, i in tc.BLOCKS.items() if i.group in ("mixer", "attention", "stem")}
    known = {(source, block) for source, row in SOURCES.items() for block in row}
    assert tested == {row for row in known if row[1] not in elsewhere}  # the tests of these groups
    papers = {(paper.source, name) for name, i in tc.BLOCKS.items() for paper in i.papers}
    assert {row for row in papers if row[0]} == known


# --- whole models ---


def small_model():
    def layer():
        return nn.ModuleDict({"norm2": nn.LayerNorm(D), "leff": tc.create_block("leff", D)})

    return nn.ModuleDict({"blocks": nn.ModuleList([layer(), layer()]), "head": nn.Linear(D, 3)})


def official_model():
    layers = [nn.ModuleDict({"norm2": nn.LayerNorm(D), "leff": ceit()}) for _ in range(2)]
    return randomize_(nn.ModuleDict({"blocks": nn.ModuleList(layers), "head": nn.Linear(D, 3)}))


def test_a_model_loads_with_what_is_around_its_blocks():
    theirs, ours = official_model(), small_model()
    load_official(ours, theirs.state_dict(), source="ceit")
    assert torch.equal(ours["head"].weight, theirs["head"].weight)
    for a, b in zip(ours["blocks"], theirs["blocks"], strict=True):
        assert torch.equal(a["norm2"].bias, b["norm2"].bias)
        assert torch.equal(a["leff"].fc1.weight, b["leff"].conv1.weight[..., 0, 0])
        assert torch.equal(a["leff"].norm3.running_var, b["leff"].bn3.running_var)


def test_one_block_in_several_places_loads():
    """As CoaT, which has one encoding for a stage and stores it under the names of all blocks."""
    peg = tc.create_block("peg", D)
    model = nn.ModuleDict({"peg": peg, "blocks": nn.ModuleList([nn.ModuleDict({"peg": peg})])})
    weight, bias = torch.randn(D, 1, 3, 3), torch.randn(D)
    state = {
        f"{path}.proj.0.{name}": value
        for path in ("peg", "blocks.0.peg")
        for name, value in (("weight", weight), ("bias", bias))
    }
    load_official(model, state, source="twins")
    assert torch.equal(peg.proj.weight, weight)


def test_statistics_from_before_torch_counted_load():
    state = {k: v for k, v in randomize_(ceit()).state_dict().items() if "num_batches" not in k}
    block = load_official(tc.create_block("leff", D), state, source="ceit")
    assert block.norm1.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("conv2.weight"), "ceit has nothing for dwconv.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra is no key of ceit"),
        (lambda s: s.update({"conv1.weight": torch.zeros(H, D, 3, 3)}),
         r"conv1.weight is torch.float32 \(64, 16, 3, 3\), expected torch.float32 \(64, 16\)"),
        (lambda s: s.update({"conv1.weight": torch.zeros(D, H, 1, 1)}), r"float32 \(64, 16\)"),
        (lambda s: s.update({"conv2.weight": torch.zeros(1, H, 3, 3)}), r"float32 \(64, 1, 3, 3\)"),
        (lambda s: s.update({"conv1.bias": torch.zeros(H, dtype=torch.int)}), "is torch.int32"),
        (lambda s: s.update({"conv1.bias": torch.zeros(H, dtype=torch.cfloat)}), "real tensors"),
        (lambda s: s.update({"conv1.bias": torch.zeros(H, device="meta")}), "float32 on meta"),
        (lambda s: s.update({"conv1.bias": torch.zeros(H).numpy()}), "numpy.ndarray"),
        (lambda s: s.update({"module.conv1.bias": torch.zeros(H)}), "take 'module.' away first"),
        (lambda s: s.clear(), "nothing for fc1.weight; it has nothing at all"),
        (lambda s: s.update(model={}), r"got a dict under 'model': .*checkpoint\['model'\]"),
    ],
)  # fmt: skip
def test_nothing_is_loaded_where_something_does_not_fit(change, message):
    state = dict(randomize_(ceit()).state_dict())
    change(state)
    block = tc.create_block("leff", D)
    before = {key: value.clone() for key, value in block.state_dict().items()}
    with pytest.raises(tc.CheckpointError, match=message):
        load_official(block, state, source="ceit")
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())


def test_the_same_value_under_two_names_is_refused():
    state = {"fc1.weight": torch.zeros(H, D), "dense1.weight": torch.ones(H, D)}
    with pytest.raises(tc.CheckpointError, match=r"dense1\.weight comes a second time"):
        load_official(tc.create_block("mix_ffn", D), state, source="pvtv2")


def test_a_module_without_values_is_refused():
    with torch.device("meta"):
        block = tc.create_block("leff", D)
    with pytest.raises(tc.CheckpointError, match=r"is on the meta device: call module\.to_empty"):
        load_official(block, ceit().state_dict(), source="ceit")
    with pytest.raises(tc.CheckpointError, match="expected a state dict, got NoneType"):
        load_official(tc.create_block("leff", D), None, source="ceit")


def test_another_source_is_refused():
    with pytest.raises(tc.CheckpointError, match=r"cmt are for irffn and lpu.* this LeFF has"):
        load_official(tc.create_block("leff", D), cmt().state_dict(), source="cmt")
    with pytest.raises(tc.CheckpointError, match="no key of ceit"):
        load_official(tc.create_block("leff", D), cmt().state_dict(), source="ceit")
    with pytest.raises(tc.UnknownNameError, match="unknown source 'pvt_v2': did you mean pvtv2"):
        load_official(tc.create_block("mix_ffn", D), {}, source="pvt_v2")
    folded = fastvit.RepConditionalPosEnc(D, inference_mode=True)  # by its authors
    with pytest.raises(tc.CheckpointError, match="no key of fastvit"):
        load_official(tc.create_block("rep_cpe", D), folded.state_dict(), source="fastvit")
