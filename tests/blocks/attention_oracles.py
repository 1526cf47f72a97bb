"""What attention is compared with: timm's, transformers', and references from the published facts.

An oracle is ``run(x, rows, cols, p)`` on the parameters of our block, so that gradients are
compared as well. Tokens are prefix tokens and then the grid.
"""

from functools import partial
from unittest import mock

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
from torch.func import functional_call
from transformers import SegformerConfig
from transformers.models.cvt.modeling_cvt import CvtAttention
from transformers.models.segformer.modeling_segformer import SegformerAttention

from tokenconv.blocks.official import SOURCES

DIM, HEADS = 24, 4


class Values:
    """Parameters of a block and copies of its buffers, by their keys; and torch's functions."""

    def __init__(self, block, training):
        self.block, self.training = block, training
        self.values = dict(block.named_parameters())
        self.values |= {key: value.clone() for key, value in block.named_buffers()}

    def __getitem__(self, key):
        return self.values[key]

    def lin(self, x, key):
        out = x @ self[f"{key}.weight"].T
        return out + self[f"{key}.bias"] if f"{key}.bias" in self.values else out

    def ln(self, x, key, eps=1e-5):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
        return (x - mean) / (var + eps).sqrt() * self[f"{key}.weight"] + self[f"{key}.bias"]

    def conv(self, fmap, key, **kwargs):
        return F.conv2d(fmap, self[f"{key}.weight"], self.values.get(f"{key}.bias"), **kwargs)

    def dw(self, fmap, key, **kwargs):
        side = self[f"{key}.weight"].shape[-1]
        return self.conv(fmap, key, **{"padding": side // 2, "groups": fmap.shape[1], **kwargs})

    def bn(self, fmap, key):
        buffers = [self[f"{key}.running_{name}"] for name in ("mean", "var")]
        values = [self[f"{key}.{name}"] for name in ("weight", "bias")]
        return F.batch_norm(fmap, *buffers, *values, training=self.training, eps=1e-5)


def spread(x, rows, cols):
    """Prefix tokens, and a map of the others."""
    prefix = x.shape[1] - rows * cols
    return x[:, :prefix], x[:, prefix:].transpose(1, 2).reshape(len(x), -1, rows, cols)


def line(fmap):
    return fmap.reshape(*fmap.shape[:2], -1).transpose(1, 2)


def heads(x, n):
    return x.reshape(*x.shape[:2], n, x.shape[2] // n).permute(0, 2, 1, 3)


def softmax_attention(q, k, v, n=HEADS, scale=None, bias=0.0):
    q, k, v = heads(q, n), heads(k, n), heads(v, n)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weights = (torch.einsum("bhic,bhjc->bhij", q, k) * scale + bias).softmax(-1)
    out = torch.einsum("bhij,bhjc->bhic", weights, v)
    return out.permute(0, 2, 1, 3).flatten(2)


def ours_by_theirs(theirs, source, name, block):
    """Our key for every one of theirs."""
    row = SOURCES[source][name]
    names = row if not callable(row) else row(block)
    found = {}
    for key in theirs.state_dict():
        first = next(n for n in names if key == n or key.startswith(f"{n}."))
        found[key] = names[first] + key.removeprefix(first)
    return found


def official(make, source, name, call=lambda size: (size,), keys=None, maps=False):
    """A module of timm or transformers on our values; some work on maps."""

    def run(x, rows, cols, p):
        theirs = make(rows, cols, x.shape[1] - rows * cols).double().train(p.training)
        names = ours_by_theirs(theirs, source, name, p.block) if keys is None else {
            key: next(our + key.removeprefix(n) for n, our in keys.items() if key.startswith(n))
            for key in theirs.state_dict()
        }  # fmt: skip
        values = {}
        for key, like in theirs.state_dict().items():  # linear layers may be 1x1 convolutions
            ours = p[names[key]]
            values[key] = ours if ours.ndim == like.ndim else ours.reshape(like.shape)
        if maps:
            return line(functional_call(theirs, values, (spread(x, rows, cols)[1],)))
        out = functional_call(theirs, values, (x, *call((rows, cols))))
        return out[0] if isinstance(out, tuple) else out

    return run


def sra(linear, ratio):
    return official(
        lambda *_: pvt_v2.Attention(DIM, HEADS, sr_ratio=ratio, linear_attn=linear), "pvtv2", "sra"
    )


def sra_with_prefix(x, rows, cols, p):
    first, fmap = spread(x, rows, cols)
    y = p.ln(line(p.conv(fmap, "sr", stride=2)), "norm")
    k, v = p.lin(torch.cat([first, y], 1), "kv").chunk(2, -1)
    return p.lin(softmax_attention(p.lin(x, "q"), k, v), "proj")


def segformer(x, rows, cols, p):
    config = SegformerConfig(attention_probs_dropout_prob=0.0)
    config._attn_implementation = "sdpa"  # the other one has a softmax in float32
    theirs = SegformerAttention(config, DIM, HEADS, 2).double().train(p.training)
    keys = {"q_proj": "q", "o_proj": "proj", "sequence_reduction.sequence_reduction": "sr",
            "sequence_reduction.layer_norm": "norm"}  # fmt: skip
    values = {}
    for part in ("weight", "bias"):
        values[f"k_proj.{part}"], values[f"v_proj.{part}"] = p[f"kv.{part}"].chunk(2)
        values |= {f"{theirs}.{part}": p[f"{ours}.{part}"] for theirs, ours in keys.items()}
    return functional_call(theirs, values, (x, rows, cols))[0]


CVT_KEYS = {
    **{f"attention.convolution_projection_{full}.convolution_projection.{theirs}":
       f"conv_proj_{n}.{i}"
       for full, n in (("query", "q"), ("key", "k"), ("value", "v"))
       for theirs, i in (("convolution", 0), ("normalization", 1))},
    **{f"attention.projection_{full}": f"proj_{n}"
       for full, n in (("query", "q"), ("key", "k"), ("value", "v"))},
    "output.dense": "proj",
}  # fmt: skip


def cvt(rows, cols, prefix):
    return CvtAttention(HEADS, DIM, 3, 1, 1, 1, 2, "dw_bn", True, 0.0, 0.0, prefix == 1)


def cmt(x, rows, cols, p):
    first, fmap = spread(x, rows, cols)
    y = p.bn(p.dw(fmap, "sr.0", stride=2, padding=0), "sr.1")
    y = torch.cat([first, line(y)], 1)
    table = p["relative_pos"]
    if rows * cols != table.shape[1]:
        wanted = (rows * cols, (rows // 2) * (cols // 2))
        table = F.interpolate(table[None], size=wanted, mode="bicubic", align_corners=False)[0]
    bias = x.new_zeros(HEADS, x.shape[1], y.shape[1])
    bias[:, first.shape[1] :, first.shape[1] :] = table
    q, k, v = (p.lin(part, key) for part, key in ((x, "q"), (y, "k"), (y, "v")))
    return p.lin(softmax_attention(q, k, v, bias=bias), "proj")


def restormer(x, rows, cols, p):
    first, fmap = spread(p.lin(x, "qkv"), rows, cols)
    q, k, v = torch.cat([first, line(p.dw(fmap, "dwconv"))], 1).chunk(3, -1)
    q, k, v = (heads(part, HEADS).transpose(2, 3) for part in (q, k, v))
    q, k = (part / part.square().sum(-1, keepdim=True).sqrt() for part in (q, k))
    out = (q @ k.transpose(2, 3) * p["temperature"]).softmax(-1) @ v
    return p.lin(out.permute(0, 3, 1, 2).reshape(x.shape), "proj")


def coat_attention(rows, cols, prefix):
    crpe = coat.ConvRelPosEnc(DIM // 8, 8, {3: 2, 5: 3, 7: 3})
    return coat.FactorAttnConvRelPosEnc(DIM, 8, shared_crpe=crpe)


def coat_by_hand(splits):
    """With any number of prefix tokens."""

    def run(x, rows, cols, p):
        n, width = sum(splits), DIM // sum(splits)
        q, k, v = p.lin(x, "qkv").chunk(3, -1)
        first, fmap = spread(v, rows, cols)
        maps = fmap.split([count * width for count in splits if count], 1)
        local = torch.cat([p.dw(m, f"crpe.{i}.conv") for i, m in enumerate(maps)], 1)
        local = torch.cat([torch.zeros_like(first), line(local)], 1)
        summed = torch.einsum("bhjc,bhjd->bhcd", heads(k, n).softmax(2), heads(v, n))
        factor = torch.einsum("bhic,bhcd->bhid", heads(q, n), summed) * width**-0.5
        return p.lin(factor.permute(0, 2, 1, 3).reshape(x.shape) + q * local, "proj")

    return run


def mvit(rows, cols, prefix):
    norm = lambda dim, **kwargs: torch.nn.LayerNorm(dim, eps=1e-6, **kwargs)  # noqa: E731
    return mvitv2.MultiScaleAttention(
        DIM, DIM, (rows, cols), HEADS, kernel_q=(3, 3), kernel_kv=(3, 3), stride_q=(1, 1),
        stride_kv=(2, 2), has_cls_token=prefix == 1, norm_layer=norm,
    )  # fmt: skip


def mvit_by_hand(x, rows, cols, p):
    """Positions pair by pair, resized where the grid is another one."""
    prefix, batch = x.shape[1] - rows * cols, len(x)

    def pooled(part, name, stride):
        out = []
        for head in part.chunk(HEADS, -1):
            first, fmap = spread(head, rows, cols)
            y = p.dw(fmap, f"pool_{name}", stride=stride)
            out.append(p.ln(torch.cat([first, line(y)], 1), f"norm_{name}", 1e-6))
        return torch.cat(out, -1), y.shape[2:]

    q, k, v = p.lin(x, "qkv").chunk(3, -1)
    (q, _), (k, small), (v, _) = pooled(q, "q", 1), pooled(k, "k", 2), pooled(v, "v", 2)
    tables = []
    for name, length in (("rel_pos_h", rows), ("rel_pos_w", cols)):
        table = p[name]
        if len(table) != 2 * length - 1:
            table = F.interpolate(table.T[None], size=2 * length - 1, mode="linear")[0].T
        tables.append(table)
    split = heads(q, HEADS)[:, :, prefix:]
    bias = x.new_zeros(batch, HEADS, x.shape[1], k.shape[1])
    for i in range(rows * cols):
        for j in range(small[0] * small[1]):
            down = i // cols - j // small[1] * (rows / small[0]) + (small[0] - 1) * rows / small[0]
            right = i % cols - j % small[1] * (cols / small[1]) + (small[1] - 1) * cols / small[1]
            at = tables[0][int(down + 1e-9)] + tables[1][int(right + 1e-9)]
            bias[:, :, prefix + i, prefix + j] = (split[:, :, i] * at).sum(-1)
    return p.lin(softmax_attention(q, k, v, bias=bias) + q, "proj")


def cswin(split, last=False):
    """Stripe by stripe, cut out of the map; the last one may be narrower."""

    def run(x, rows, cols, p):
        q, k, v = p.lin(x, "qkv").chunk(3, -1)
        halves = 1 if last else 2
        outs = []
        for i, parts in enumerate(
            zip(*(part.chunk(halves, -1) for part in (q, k, v)), strict=True)
        ):
            firsts, maps = zip(*(spread(part, rows, cols) for part in parts), strict=True)
            out = torch.zeros_like(maps[0])
            high, wide = (rows, cols) if last else [(rows, split), (split, cols)][i]
            for top in range(0, rows, high):
                for left in range(0, cols, wide):
                    window = [m[:, :, top : top + high, left : left + wide] for m in maps]
                    a, b, c = (line(m) for m in window)
                    b, c = torch.cat([firsts[1], b], 1), torch.cat([firsts[2], c], 1)
                    y = softmax_attention(a, b, c, HEADS // halves) + line(
                        p.dw(window[2], f"lepe.{i}")
                    )
                    y = y.transpose(1, 2).reshape(window[0].shape)
                    out[:, :, top : top + high, left : left + wide] = y
            first = softmax_attention(firsts[0], parts[1], parts[2], HEADS // halves)
            outs.append(torch.cat([first, line(out)], 1))
        return p.lin(torch.cat(outs, -1), "proj")

    return run


def shunted(ratio):
    def run(x, rows, cols, p):
        first, fmap = spread(x, rows, cols)
        outs = []
        for name, side, q in zip(
            ("large", "small"), (ratio, ratio // 2), p.lin(x, "q").chunk(2, -1), strict=True
        ):
            y = p.conv(fmap, f"{name}.sr", stride=side)
            size = y.shape[2:]
            y = torch.cat([first, F.gelu(p.ln(line(y), f"{name}.norm"))], 1)
            k, v = p.lin(y, f"{name}.kv").chunk(2, -1)
            own, vmap = spread(v, *size)
            v = torch.cat([own, line(vmap + p.dw(vmap, f"{name}.local_conv"))], 1)
            outs.append(softmax_attention(q, k, v, HEADS // 2))
        return p.lin(torch.cat(outs, -1), "proj")

    return run


def lepe(of_input=False):
    def run(x, rows, cols, p):
        k, v = p.lin(x, "kv").chunk(2, -1)
        first, fmap = spread(x if of_input else v, rows, cols)
        local = torch.cat([torch.zeros_like(first), line(p.dw(fmap, "lepe.conv"))], 1)
        return p.lin(softmax_attention(p.lin(x, "q"), k, v) + local, "proj")

    return run


def hilo(side, low):
    """Window by window, cut out of the map; the last ones may be smaller."""

    def run(x, rows, cols, p):
        outs = []
        if low < HEADS:
            q, k, v = p.lin(x, "h_qkv").chunk(3, -1)
            firsts, maps = zip(*(spread(part, rows, cols) for part in (q, k, v)), strict=True)
            out = torch.zeros_like(maps[0])
            for top in range(0, rows, side):
                for left in range(0, cols, side):
                    window = [m[:, :, top : top + side, left : left + side] for m in maps]
                    a, b, c = (line(m) for m in window)
                    b, c = torch.cat([firsts[1], b], 1), torch.cat([firsts[2], c], 1)
                    y = softmax_attention(a, b, c, HEADS - low).transpose(1, 2)
                    out[:, :, top : top + side, left : left + side] = y.reshape(window[0].shape)
            first = softmax_attention(firsts[0], k, v, HEADS - low)
            outs.append(p.lin(torch.cat([first, line(out)], 1), "h_proj"))
        if low:
            first, fmap = spread(x, rows, cols)
            squares = [
                fmap[:, :, top : top + side, left : left + side].mean((2, 3))
                for top in range(0, rows, side)
                for left in range(0, cols, side)
            ]
            k, v = p.lin(torch.cat([first, torch.stack(squares, 1)], 1), "l_kv").chunk(2, -1)
            outs.append(p.lin(softmax_attention(p.lin(x, "l_q"), k, v, low), "l_proj"))
        return torch.cat(outs, -1)

    return run


def in_doubles(run):
    """timm's linear attention takes 32 bits, whatever it is given."""

    def run_so(*args):
        with mock.patch.object(torch.Tensor, "float", lambda x: x):
            return run(*args)

    return run_so


def lite_mla(*_):
    return efficientvit_mit.LiteMLA(DIM, DIM, heads=HEADS, dim=DIM // HEADS)


def lite_mla_by_hand(sides):
    """Head by head; q, k and v of a head are neighbours."""

    def run(x, rows, cols, p):
        scales = [p.lin(x, "qkv")]
        for i in range(len(sides)):
            first, fmap = spread(scales[0], rows, cols)
            y = torch.cat([first, line(p.dw(fmap, f"aggreg.{i}.conv"))], 1).transpose(1, 2)
            y = F.conv1d(y, p[f"aggreg.{i}.linear.weight"], groups=3 * HEADS)
            scales.append(y.transpose(1, 2))
        outs = []
        for head in torch.cat(scales, -1).split(3 * DIM // HEADS, -1):
            q, k, v = head.chunk(3, -1)
            pairs = q.relu() @ k.relu().transpose(1, 2)
            outs.append(pairs @ v / (pairs.sum(-1, keepdim=True) + 1e-5))
        y = torch.cat(outs, -1) @ p["proj.0.weight"].T
        return p.bn(y.transpose(1, 2), "proj.1").transpose(1, 2)

    return run


def swiftformer_by_hand(x, rows, cols, p):
    def unit(part, axis):
        return part / part.square().sum(axis, keepdim=True).sqrt()

    q, k = (unit(p.lin(x, name), -1) for name in ("to_query", "to_key"))
    total = (unit(q @ p["w_g"], 1) * q).sum(1, keepdim=True)
    return p.lin(p.lin(total * k, "linear") + q, "proj")


def nextvit_attention(*_):
    return nextvit.EfficientAttention(DIM, head_dim=DIM // HEADS, sr_ratio=2)


def nextvit_by_hand(x, rows, cols, p):
    prefix = x.shape[1] - rows * cols
    runs = [run.mean(1) for run in x[:, prefix:].split(4, 1) if run.shape[1] == 4]
    y = p.bn(torch.stack(runs, 2), "norm").transpose(1, 2)
    y = torch.cat([x[:, :prefix], y], 1)
    return p.lin(softmax_attention(p.lin(x, "q"), p.lin(y, "k"), p.lin(y, "v")), "proj")


SILU = LayerFn(conv_norm_act=partial(ConvNormAct, act_layer=torch.nn.SiLU), act=torch.nn.SiLU)


def mobilevitv2(patch, depth=2):
    """timm's leaves what was resized at that size."""
    run = official(
        lambda *_: mobilevit.MobileVitV2Block(
            DIM, patch_size=patch, transformer_depth=depth, layers=SILU
        ),
        "mobilevitv2", "mobilevitv2", maps=True,
    )  # fmt: skip

    def resized(x, rows, cols, p):
        out = run(x, rows, cols, p)
        size = [-(-side // patch) * patch for side in (rows, cols)]
        fmap = out.transpose(1, 2).reshape(len(x), DIM, *size)
        return line(F.interpolate(fmap, (rows, cols), mode="bilinear", align_corners=True))

    return resized


def sdta(scales, position=True):
    return official(
        lambda *_: edgenext.SplitTransposeBlock(
            DIM, num_scales=scales, num_heads=HEADS, use_pos_emb=position
        ),
        "edgenext", "sdta", maps=True,
    )  # fmt: skip


def iformer(attending, pool):
    """The averages one by one, the last ones of what is left."""

    def run(x, rows, cols, p):
        low = attending * DIM // HEADS
        half = (DIM - low) // 2
        mix = "body.mix.branches"
        a, b, c = spread(x, rows, cols)[1].split([half, half, low], 1)
        a = F.gelu(p.dw(p.conv(a, f"{mix}.0.0"), f"{mix}.0.1"))
        b = F.gelu(p.conv(F.max_pool2d(b, 3, stride=1, padding=1), f"{mix}.1.1"))
        out = torch.zeros_like(c)
        squares = [
            (..., slice(i, i + pool), slice(j, j + pool))
            for i in range(0, rows, pool)
            for j in range(0, cols, pool)
        ]
        means = torch.stack([c[square].mean((2, 3)) for square in squares], 1)
        q, k, v = p.lin(means, f"{mix}.2.qkv").chunk(3, -1)
        attended = softmax_attention(q, k, v, attending)
        for i, square in enumerate(squares):
            out[square] = attended[:, i, :, None, None]
        y = torch.cat([a, b, out], 1)
        return line(p.conv(y + p.dw(y, "body.fuse.0"), "body.proj"))

    return run


ANY, NONE, CLS = (0, 1, 3), (0,), (1,)
HEADLESS = ("nextvit_conv", "mobilevitv2")
CASES = [
    ("sra", {}, sra(False, 2), NONE),
    ("sra", {"sr_ratio": 3, "qkv_bias": True}, sra(False, 3), NONE),
    ("sra", {"sr_ratio": 1}, sra(False, 1), ANY),
    ("sra", {"linear": True}, sra(True, 1), NONE),
    ("sra", {}, segformer, NONE),
    ("sra", {}, sra_with_prefix, ANY),
    ("cvt_attn", {}, official(cvt, "cvt", "cvt_attn", lambda size: size, CVT_KEYS), (0, 1)),
    ("lmhsa", {}, cmt, ANY),
    ("lmhsa", {"size": (5, 7)}, cmt, ANY),
    ("mdta", {}, restormer, ANY),
    ("mdta", {"qkv_bias": True}, restormer, ANY),
    ("coat_attn", {"num_heads": 8}, official(coat_attention, "coat", "coat_attn"), CLS),
    ("coat_attn", {"num_heads": 8}, coat_by_hand((2, 3, 3)), ANY),
    ("coat_attn", {"windows": {3: 3, 5: 1}}, coat_by_hand((3, 1)), ANY),
    ("mvitv2_attn", {}, mvit_by_hand, ANY),
    ("mvitv2_attn", {"size": (5, 7)}, mvit_by_hand, ANY),
    ("cswin_attn", {}, cswin(7), ANY),
    ("cswin_attn", {"split_size": 1, "qkv_bias": True}, cswin(1), ANY),
    ("cswin_attn", {"split_size": 3}, cswin(3), ANY),
    ("cswin_attn", {"last_stage": True}, cswin(0, last=True), ANY),
    ("shunted_attn", {}, shunted(2), ANY),
    ("shunted_attn", {"sr_ratio": 4, "qkv_bias": False}, shunted(4), ANY),
    ("xca", {}, official(lambda *_: xcit.XCA(DIM, HEADS), "xcit", "xca", lambda size: ()), ANY),
    ("hilo", {}, hilo(2, 2), ANY),
    ("hilo", {"window_size": 3, "alpha": 0.3}, hilo(3, 1), ANY),
    ("hilo", {"alpha": 0.0}, hilo(2, 0), ANY),
    ("hilo", {"alpha": 1.0}, hilo(2, 4), ANY),
    ("hilo", {"window_size": 1}, hilo(1, 4), ANY),
    ("lepe_attn", {}, lepe(), ANY),
    ("lepe_attn", {"kernel_size": 5, "of_input": True, "qkv_bias": True}, lepe(True), ANY),
    ("lite_mla", {}, in_doubles(
        official(lite_mla, "efficientvit_mit", "lite_mla", maps=True)), NONE),
    ("lite_mla", {}, lite_mla_by_hand((5,)), ANY),
    ("lite_mla", {"scales": (3, 5)}, lite_mla_by_hand((3, 5)), ANY),
    ("additive_attn", {"num_heads": 1}, official(
        lambda *_: swiftformer.EfficientAdditiveAttention(DIM, DIM), "swiftformer", "additive_attn",
        maps=True), NONE),
    ("additive_attn", {"num_heads": 2}, swiftformer_by_hand, ANY),
    ("nextvit_attn", {}, official(
        nextvit_attention, "nextvit", "nextvit_attn", lambda size: ()), NONE),
    ("nextvit_attn", {}, nextvit_by_hand, ANY),
    ("nextvit_conv", {"head_dim": 8}, official(
        lambda *_: nextvit.ConvAttention(DIM, 8), "nextvit", "nextvit_conv", maps=True), NONE),
    ("mobilevit", {}, official(
        lambda *_: mobilevit.MobileVitBlock(DIM, patch_size=2, layers=SILU), "mobilevit",
        "mobilevit", maps=True), NONE),
    ("mobilevit", {"patch_size": 3, "transformer_depth": 1, "transformer_dim": 32}, official(
        lambda *_: mobilevit.MobileVitBlock(
            DIM, patch_size=3, layers=SILU, transformer_depth=1, transformer_dim=32),
        "mobilevit", "mobilevit", maps=True), NONE),
    ("mobilevitv2", {}, mobilevitv2(2), NONE),
    ("mobilevitv2", {"patch_size": 3, "transformer_depth": 1}, mobilevitv2(3, 1), NONE),
    ("sdta", {}, sdta(2), NONE),
    ("sdta", {"num_scales": 4, "use_pos_emb": False}, sdta(4, False), NONE),
    ("inception_mixer", {}, iformer(1, 2), NONE),
    ("inception_mixer", {"attention_heads": 2, "pool_size": 1, "qkv_bias": True}, iformer(2, 1),
     NONE),
]  # fmt: skip
