"""Feed-forwards against their papers, written here from the published facts, on maps (B, C, H, W).

Parameters are those of our block, so gradients are compared as well.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.models.efficientformer_v2 import ConvMlpWithNorm
from timm.models.fastvit import ConvMlp
from timm.models.mambaout import GatedConvBlock
from torch import nn

import tokenconv as tc

from .conftest import randomize_

DIM = 10


class Literal:
    """torch's own functions on the parameters of a block, by their keys."""

    def __init__(self, block, training):
        self.values = dict(block.named_parameters())
        self.buffers = {key: value.clone() for key, value in block.named_buffers()}
        self.training = training

    def pw(self, x, key):
        weight = self.values[f"{key}.weight"]
        return F.conv2d(x, weight[..., None, None], self.values.get(f"{key}.bias"))

    def dw(self, x, key):
        weight = self.values[f"{key}.weight"]
        side = weight.shape[-1]
        bias = self.values.get(f"{key}.bias")
        return F.conv2d(x, weight, bias, padding=side // 2, groups=x.shape[1])

    def bn(self, x, key):
        buffers = [self.buffers[f"{key}.running_{name}"] for name in ("mean", "var")]
        values = [self.values[f"{key}.{name}"] for name in ("weight", "bias")]
        return F.batch_norm(x, *buffers, *values, training=self.training, momentum=0.1, eps=1e-5)

    def ln(self, x, key, eps):
        mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
        weight, bias = (self.values[f"{key}.{name}"][:, None, None] for name in ("weight", "bias"))
        return (x - mean) / (var + eps).sqrt() * weight + bias


def shunted(x, p):
    x = p.pw(x, "fc1")
    return p.pw(F.gelu(x + p.dw(x, "dwconv")), "fc2")


def rmt(x, p):
    x = F.gelu(p.pw(x, "fc1"))
    return p.pw(x + p.dw(x, "local.dwconv"), "fc2")


def rmt_subln(x, p):
    x = F.gelu(p.pw(x, "fc1"))
    return p.pw(x + p.ln(p.dw(x, "local.dwconv"), "local.norm", 1e-6), "fc2")


def uformer(x, p):
    return p.pw(F.gelu(p.dw(F.gelu(p.pw(x, "fc1")), "dwconv")), "fc2")


def uformer_eca(x, p):
    x = uformer(x, p)
    gate = F.conv1d(x.mean((2, 3))[:, None], p.values["eca.conv.weight"], padding=1)
    return x * gate.sigmoid().reshape(len(x), -1, 1, 1)


def ceit(x, p):
    x = F.gelu(p.bn(p.pw(x, "fc1"), "norm1"))
    x = F.gelu(p.bn(p.dw(x, "dwconv"), "norm2"))
    return p.bn(p.pw(x, "fc2"), "norm3")


def ceit_without_norms(x, p):
    return p.pw(F.gelu(p.dw(F.gelu(p.pw(x, "fc1")), "dwconv")), "fc2")


def cmt(x, p):
    x = p.bn(F.gelu(p.pw(x, "fc1")), "norm1")
    x = p.bn(F.gelu(x + p.dw(x, "dwconv")), "norm2")
    return p.bn(p.pw(x, "fc2"), "norm3")


def localvit(gate, act=lambda x: x * F.relu6(x + 3) / 6):
    def run(x, p):
        y = act(p.bn(p.pw(x, "branch.fc1"), "branch.norm1"))
        y = act(p.bn(p.dw(y, "branch.dwconv"), "branch.norm2"))
        y = y * gate(y.mean((2, 3)), p).reshape(len(y), -1, 1, 1)
        return x + p.bn(p.pw(y, "branch.fc2"), "branch.norm3")

    return run


def h_sigmoid(x):
    """torch's own, since its gradient has 1/6 in float32: 3e-8 from that of the formula."""
    torch.testing.assert_close(F.hardsigmoid(x), F.relu6(x + 3) / 6, rtol=1e-12, atol=1e-12)
    return F.hardsigmoid(x)


def no_gate(mean, p):
    return torch.ones_like(mean)


def se(mean, p):
    keys = [f"branch.gate.{name}" for name in ("reduce", "expand")]
    weights = [(p.values[f"{key}.weight"], p.values[f"{key}.bias"]) for key in keys]
    return h_sigmoid(F.linear(F.relu(F.linear(mean, *weights[0])), *weights[1]))


def eca(sigmoid):
    def gate(mean, p):
        weight = p.values["branch.gate.conv.weight"]
        assert weight.shape == (1, 1, 3)  # 40 hidden channels: t = int((5.32 + 1) / 2) = 3
        return sigmoid(F.conv1d(mean[:, None], weight, padding=1)[:, 0])

    return gate


def restormer(x, p):
    a, b = p.dw(p.pw(x, "fc1"), "dwconv").chunk(2, dim=1)
    return p.pw(F.gelu(a) * b, "fc2")


def transnext(x, p):
    gate, value = p.pw(x, "fc1").chunk(2, dim=1)
    return p.pw(F.gelu(p.dw(gate, "gate.gate.dwconv")) * value, "fc2")


def conv2former(x, p):
    x = F.gelu(p.pw(p.ln(x, "norm", 1e-6), "fc1"))
    return p.pw(x + F.gelu(p.dw(x, "local.dwconv")), "fc2")


def efficientformer(x, p):
    return ceit(x, p)


def fastvit(x, p):
    x = p.bn(p.dw(x, "dwconv"), "norm")
    return p.pw(F.gelu(p.pw(x, "fc1")), "fc2")


def moganet(x, p):
    x = F.gelu(p.dw(p.pw(x, "fc1"), "dwconv"))
    scale = p.values["aggregate.scale"][:, None, None]
    return p.pw(x + scale * (x - F.gelu(p.pw(x, "aggregate.fc"))), "fc2")


def replknet(x, p):
    y = p.bn(p.pw(p.bn(x, "branch.norm"), "branch.fc1"), "branch.norm1")
    return x + p.bn(p.pw(F.gelu(y), "branch.fc2"), "branch.norm2")


def unireplknet(x, p):
    x = F.gelu(p.pw(x, "fc1"))
    norm = x.norm(dim=(2, 3), keepdim=True)
    share = norm / (norm.mean(1, keepdim=True) + 1e-6)
    weight, bias = (p.values[f"grn.{name}"][:, None, None] for name in ("weight", "bias"))
    return p.bn(p.pw(weight * x * share + bias + x, "fc2"), "norm")


def convmlp(x, p):
    def mlp(x, key):
        y = p.pw(p.ln(x, f"{key}.norm", 1e-5), f"{key}.fc1")
        return x + p.pw(F.gelu(y), f"{key}.fc2")

    x = mlp(x, "mlp1")
    return mlp(p.dw(p.ln(x, "norm", 1e-5), "dwconv"), "mlp2")


def mambaout(x, p):
    h = int(8 / 3 * DIM)
    y = p.pw(p.ln(x, "branch.norm", 1e-6), "branch.fc1")
    g, i, c = y.split([h, h - DIM, DIM], dim=1)
    value = torch.cat([i, p.dw(c, "branch.gate.value.conv")], dim=1)
    return x + p.pw(F.gelu(g) * value, "branch.fc2")


PAPERS = {
    "shunted_ffn": ("shunted_ffn", {}, shunted),
    "rmt_ffn": ("rmt_ffn", {}, rmt),
    "rmt_ffn subln": ("rmt_ffn", {"subln": True}, rmt_subln),
    "uformer_leff": ("uformer_leff", {}, uformer),
    "uformer_leff eca": ("uformer_leff", {"eca": True}, uformer_eca),
    "leff": ("leff", {}, ceit),
    "leff without norms": ("leff", {"with_bn": False}, ceit_without_norms),
    "irffn": ("irffn", {"mlp_ratio": 3.77}, cmt),
    "localvit_ffn relu6": ("localvit_ffn", {"act": "relu6"}, localvit(no_gate, F.relu6)),
    "localvit_ffn hs": ("localvit_ffn", {"act": "hs"}, localvit(no_gate)),
    "localvit_ffn hs+se": ("localvit_ffn", {"act": "hs+se", "reduction": 8}, localvit(se)),
    "localvit_ffn hs+eca": ("localvit_ffn", {"act": "hs+eca"}, localvit(eca(torch.sigmoid))),
    "localvit_ffn hs+ecah": ("localvit_ffn", {"act": "hs+ecah"}, localvit(eca(h_sigmoid))),
    "gdfn": ("gdfn", {}, restormer),
    "gdfn with biases": ("gdfn", {"bias": True}, restormer),
    "conv_glu": ("conv_glu", {}, transnext),
    "conv2former_mlp": ("conv2former_mlp", {}, conv2former),
    "efficientformerv2_ffn": ("efficientformerv2_ffn", {}, efficientformer),
    "fastvit_ffn": ("fastvit_ffn", {}, fastvit),
    "moga_ffn": ("moga_ffn", {}, moganet),
    "replknet_ffn": ("replknet_ffn", {}, replknet),
    "unireplknet_ffn": ("unireplknet_ffn", {}, unireplknet),
    "conv_mlp": ("conv_mlp", {}, convmlp),
    "gated_cnn": ("gated_cnn", {}, mambaout),
}


def build(name, **kwargs):
    return randomize_(tc.create_block(name, dim=DIM, **kwargs).double())


def to_map(x, rows, cols):
    return x.transpose(1, 2).reshape(len(x), -1, rows, cols)


def tokens(rows, cols, scale=1.0, prefix=0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, prefix + rows * cols, DIM)
    return scale * torch.randn(shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["", "small variance"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("rows", "cols"), [(5, 7), (9, 2)])
@pytest.mark.parametrize(("name", "kwargs", "paper"), PAPERS.values(), ids=PAPERS.keys())
def test_block_is_that_of_its_paper(name, kwargs, paper, rows, cols, training, scale):
    block = build(name, **kwargs).train(training)
    literal = Literal(block, training)
    for step in range(2):  # running statistics after two steps
        x = tokens(rows, cols, scale, seed=step).requires_grad_()
        ours = block(x, rows, cols)
        theirs = paper(to_map(x, rows, cols), literal).flatten(2).transpose(1, 2)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
        inputs = [x, *block.parameters()]
        gradients = [torch.autograd.grad(out.sin().sum(), inputs) for out in (ours, theirs)]
        largest = max(float(gradient.abs().max()) for gradient in gradients[1])
        for a, b in zip(*gradients, strict=True):  # what BN takes away has a gradient of zero
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * largest)
    for key, value in block.named_buffers():
        if "running" in key:
            torch.testing.assert_close(value, literal.buffers[key], rtol=1e-9, atol=1e-12)


# --- code that we did not write ---


def keys_like(theirs, ours):
    """State of a module under our keys, in which order and shape of the parts agree."""
    pairs = zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True)
    return {key: value.reshape(mine.shape) for (key, mine), value in pairs}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("name", "oracle", "channels_last"),
    [
        ("efficientformerv2_ffn", lambda: ConvMlpWithNorm(DIM, 4 * DIM, mid_conv=True), False),
        ("fastvit_ffn", lambda: ConvMlp(DIM, 4 * DIM), False),
        ("gated_cnn", lambda: GatedConvBlock(DIM), True),
    ],
)
def test_block_is_that_of_timm(name, oracle, channels_last, training):
    theirs = randomize_(oracle().double()).train(training)
    ours = build(name).train(training)
    ours.load_state_dict(keys_like(theirs, ours))
    x = tokens(5, 7).requires_grad_()
    given = x.unflatten(1, (5, 7)) if channels_last else to_map(x, 5, 7)
    expected = theirs(given)
    expected = expected.flatten(1, 2) if channels_last else expected.flatten(2).transpose(1, 2)
    results = []
    for out, module in ((ours(x, 5, 7), ours), (expected, theirs)):
        results.append([out, *torch.autograd.grad(out.sin().sum(), [x, *module.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape), rtol=1e-9, atol=1e-11)
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


# --- prefix tokens, counts, starts ---


class Same(nn.Module):
    def forward(self, x, *grid):
        return x


def without_convolutions(block):
    """A copy that does what prefix tokens do: no convolution, and no shortcut around one."""
    copied = copy.deepcopy(block)
    for module in copied.modules():
        if isinstance(module, tc.DWConv):
            module.residual = True
            module.init_neutral_()
    if hasattr(copied, "local"):
        copied.local = Same()
    return copied


NAMES = [name for name, info in tc.BLOCKS.items() if info.group == "ffn" and info.kind == "tokens"]


@pytest.mark.parametrize("name", NAMES)
def test_prefix_tokens_do_what_the_row_says(name):
    block, policy = build(name).eval(), tc.BLOCKS[name].prefix_policy
    grid = tc.TokenGrid((3, 5), num_prefix_tokens=2)
    x = tokens(3, 5, prefix=2)
    out = block(x, grid)
    torch.testing.assert_close(out[:, 2:], block(x[:, 2:], 3, 5), rtol=1e-10, atol=1e-12)
    if policy == "pass unchanged":
        assert torch.equal(out[:, :2], x[:, :2])
    elif policy == "skip the convolution":
        alone = without_convolutions(block)(x[:, :2], 1, 2)
        torch.testing.assert_close(out[:, :2], alone, rtol=1e-10, atol=1e-12)
    else:
        assert policy in ("take part", "skip the depthwise part")
        assert not torch.equal(out[:, :2], x[:, :2])


C, K = DIM, 3


@pytest.mark.parametrize(
    ("name", "kwargs", "count"),
    [
        ("shunted_ffn", {}, lambda h: 2 * C * h + h + C + 10 * h),
        ("rmt_ffn", {"subln": True}, lambda h: 2 * C * h + h + C + 10 * h + 2 * h),
        ("uformer_leff", {"eca": True}, lambda h: 2 * C * h + h + C + 10 * h + 3),
        ("leff", {}, lambda h: 2 * C * h + 2 * h + C + 9 * h + 2 * (2 * h + C)),
        ("leff", {"with_bn": False}, lambda h: 2 * C * h + h + C + 10 * h),
        ("irffn", {}, lambda h: 2 * C * h + 2 * h + C + 9 * h + 2 * (2 * h + C)),
        ("localvit_ffn", {"act": "hs"}, lambda h: 2 * C * h + 9 * h + 2 * (2 * h + C)),
        ("localvit_ffn", {"act": "hs+se"},
         lambda h: 2 * C * h + 9 * h + 2 * (2 * h + C) + 2 * h * (h // 4) + h // 4 + h),
        ("gdfn", {"mlp_ratio": 2.66}, lambda h: 2 * C * h + 18 * h + C * h),
        ("conv_glu", {"mlp_ratio": 4},
         lambda h: (lambda g: 2 * C * g + 2 * g + 10 * g + g * C + C)(int(2 * h / 3))),
        ("multi_scale_ffn", {"mlp_ratio": 0.25}, lambda h: 2 * C * h + h + C + 10 * h),
        ("conv2former_mlp", {}, lambda h: 2 * C * h + h + C + 10 * h + 2 * C),
        ("fastvit_ffn", {}, lambda h: 49 * C + 2 * C + 2 * C * h + h + C),
        ("moga_ffn", {}, lambda h: 2 * C * h + h + C + 10 * h + (h + 1) + h),
        ("replknet_ffn", {}, lambda h: 2 * C * h + 4 * C + 2 * h),
        ("unireplknet_ffn", {}, lambda h: 2 * C * h + 3 * h + 2 * C),
        ("conv_mlp", {"mlp_ratio": 2}, lambda h: 2 * (2 * C * h + h + C) + 9 * C + 6 * C),
        ("gated_cnn", {"mlp_ratio": 8 / 3}, lambda h: 3 * C * h + 2 * h + C + 50 * C + 2 * C),
    ],
)  # fmt: skip
def test_parameter_counts_are_the_published_formulas(name, kwargs, count):
    block = tc.create_block(name, dim=C, **kwargs)
    h = int(C * kwargs.get("mlp_ratio", 4))
    assert sum(p.numel() for p in block.parameters()) == count(h)


@pytest.mark.parametrize(
    ("name", "linear", "conv"),
    [
        ("shunted_ffn", 0.02, (2 / 9) ** 0.5),
        ("conv_glu", 0.02, (2 / 9) ** 0.5),
        ("moga_ffn", (2 / 1024) ** 0.5, (2 / 9) ** 0.5),
        ("efficientformerv2_ffn", 0.02, 1 / 3 / 3**0.5),
        ("mlp", 0.02, None),
        ("conv2former_mlp", 0.02, 0.02),
        ("fastvit_ffn", 0.02, 0.02),
        ("uformer_leff", 0.02, 1 / 3 / 3**0.5),
        ("leff", (3 * 64) ** -0.5, 1 / 3 / 3**0.5),
        ("irffn", (2 / 1024) ** 0.5, (2 / 9 / 1024) ** 0.5),
    ],
)
def test_starts_as_the_papers_code_does(name, linear, conv):
    torch.manual_seed(0)
    block = tc.create_block(name, dim=64, mlp_ratio=24 if name == "conv_glu" else 16)
    first = next(m for m in block.modules() if isinstance(m, nn.Linear))
    assert first.weight.std().item() == pytest.approx(linear, rel=0.05)
    if conv is None:
        return
    kernel = next(m for m in block.modules() if isinstance(m, tc.DWConv))
    assert kernel.weight.std().item() == pytest.approx(conv, rel=0.05)


def test_the_attention_of_uformer_has_width_three_at_any_width():
    assert tc.create_block("uformer_leff", dim=128, eca=True).eca.conv.weight.shape == (1, 1, 3)
    locality = tc.create_block("localvit_ffn", dim=128, act="hs+eca")
    assert locality.branch.gate.conv.weight.shape == (1, 1, 5)


def test_the_aggregation_of_moganet_starts_wide():
    torch.manual_seed(0)
    block = tc.create_block("moga_ffn", dim=64, mlp_ratio=16)
    assert block.aggregate.fc.weight.std().item() == pytest.approx(2**0.5, rel=0.1)


def test_channel_aggregation_starts_near_the_identity():
    assert torch.equal(tc.create_block("moga_ffn", 8).aggregate.scale, torch.full((32,), 1e-5))


# --- three maps in one sequence ---


def test_a_multi_scale_feed_forward_convolves_every_map_by_itself():
    block = build("multi_scale_ffn", mlp_ratio=3).eval()
    sizes = [(8, 12), (4, 6), (2, 3)]
    x = tokens(21, 6).requires_grad_()  # 21 * 4 * 6 / 4
    literal = Literal(block, training=False)
    parts = []
    for part, (rows, cols) in zip(
        literal.pw(x.transpose(1, 2)[..., None], "fc1").split([96, 24, 6], dim=2),
        sizes,
        strict=True,
    ):
        fmap = part.reshape(2, -1, rows, cols)
        parts.append(literal.dw(fmap, "dwconv").flatten(2)[..., None])
    expected = literal.pw(F.gelu(torch.cat(parts, dim=2)), "fc2")[..., 0].transpose(1, 2)
    results = []
    for out in (block(x, 4, 6), expected):
        results.append([out, *torch.autograd.grad(out.sin().sum(), [x, *block.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    with_prefix = torch.cat([tokens(1, 2), x], dim=1)
    out = block(with_prefix, tc.TokenGrid((4, 6), 2))
    torch.testing.assert_close(out[:, 2:], results[0][0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "count", "message"),
    [((3, 6), 21, r"even size .* got \(3, 6\)"), ((4, 6), 125, r"expected \(B, 126, C\).*8\*12")],
)
def test_a_multi_scale_feed_forward_refuses_other_sequences(size, count, message):
    with pytest.raises(tc.GridError, match=message):
        build("multi_scale_ffn")(tokens(1, count), size)


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "message"),
    [
        ("localvit_ffn", {"act": "hs+sse"}, tc.UnknownNameError, r"hs\+se"),
        ("localvit_ffn", {"reduction": 99}, ValueError, "reduction <= 40, got 99"),
        ("gated_cnn", {"conv_ratio": 3.0}, ValueError, "1 to 26 convolved channels, got 30"),
        ("leff", {"kernel_size": 4}, ValueError, "odd"),
        ("gdfn", {"mlp_ratio": 0.01}, ValueError, "hidden_dim=0"),
        ("irffn", {"gate": 1}, TypeError, "gate"),
    ],
)
def test_bad_arguments(name, kwargs, error, message):
    with pytest.raises(error, match=message):
        tc.create_block(name, dim=DIM, **kwargs)


@pytest.mark.parametrize("name", ["localvit_ffn", "unireplknet_ffn"])
def test_blocks_that_take_means_refuse_missing_tokens(name):
    grid = tc.SparseGrid(torch.tensor([[[0, 0], [1, 1]]]))
    with pytest.raises(tc.GridError, match="fill one grid, got a SparseGrid"):
        build(name)(tokens(1, 2)[:1], grid)


# --- folding ---

WITH_NORMS = {
    "leff": {"fc1", "dwconv", "fc2"},
    "irffn": {"fc2"},
    "localvit_ffn": {"fc1", "dwconv", "fc2"},
    "efficientformerv2_ffn": {"fc1", "fc2"},
    "fastvit_ffn": {"fc1"},
    "replknet_ffn": {"fc1", "fc2"},
    "unireplknet_ffn": {"fc2"},
}
"""Layers that take a norm; a convolution does not where prefix tokens skip it alone."""


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("name", WITH_NORMS)
def test_folded_is_equal(name, dtype, tolerance, prefix):
    block = build(name).to(dtype).eval()
    grid = tc.TokenGrid((3, 5), prefix)
    x = tokens(3, 5, prefix=prefix).to(dtype)
    before, values = block(x, grid), {k: v.clone() for k, v in block.state_dict().items()}
    norms = sum(isinstance(m, nn.BatchNorm1d) for m in block.modules())
    assert block.fold_()
    after = block(x, grid)
    assert (after - before).abs().max() <= tolerance * before.abs().max()
    changed = {
        key.rpartition(".")[0].rpartition(".")[2]
        for key, value in block.state_dict().items()
        if key.endswith("weight") and not torch.equal(value, values[key])
    }
    assert WITH_NORMS[name] <= changed
    assert sum(isinstance(m, nn.BatchNorm1d) for m in block.modules()) < norms
    assert not block.fold_()


def test_a_block_without_norms_has_nothing_to_fold():
    assert not build("uformer_leff").eval().fold_()
    assert build("shunted_ffn").eval().fold_()  # its convolution takes the shortcut


@pytest.mark.parametrize(
    ("prepare", "message"),
    [(lambda b: b.train(), "call eval"), (lambda b: b.eval().half(), "fewer than 32 bits")],
)
def test_folding_is_refused_where_it_is_not_exact(prepare, message):
    block = prepare(build("leff"))
    before = {key: value.clone() for key, value in block.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        block.fold_()
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())
    assert block.state_dict().keys() == before.keys()
