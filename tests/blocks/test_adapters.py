"""Adapters against references written here from the published facts, image by image on maps."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import tokenconv as tc
from tokenconv.layers import GridConv

DIM, ROWS, COLS, PREFIX = 16, 3, 5, 2


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def apart(x, on_map):
    """``on_map`` on the grid, and on every prefix token as an image of one pixel."""
    grid = x[:, PREFIX:].transpose(1, 2).unflatten(2, (ROWS, COLS))
    points = x[:, :PREFIX].flatten(0, 1)[..., None, None]
    prefix = on_map(points)[..., 0, 0].unflatten(0, (-1, PREFIX))
    return torch.cat([prefix, on_map(grid).flatten(2).transpose(1, 2)], dim=1)


def linear(x, p, key):
    return F.linear(x, p[f"{key}.weight"], p[f"{key}.bias"])


def convpass(x, p, scale=1.0):
    def on_map(x):
        return F.conv2d(x, p["conv.weight"], p["conv.bias"], padding=1)

    y = apart(quick_gelu(linear(x, p, "down")), on_map)
    return scale * linear(quick_gelu(y), p, "up")


def conv_adapter(x, p):
    def on_map(x):
        groups, padding = len(p["conv.weight"]), p["conv.weight"].shape[-1] // 2
        return F.conv2d(x, p["conv.weight"], p["conv.bias"], padding=padding, groups=groups)

    return p["channel_scale.weight"] * linear(F.relu(apart(x, on_map)), p, "up")


def mona(x, p):
    normed = F.layer_norm(x, (DIM,), p["norm.norm.weight"], p["norm.norm.bias"], 1e-5)
    y = linear(normed * p["norm.gamma"] + x * p["norm.gammax"], p, "down")
    fmap = y[:, PREFIX:].transpose(1, 2).unflatten(2, (ROWS, COLS))
    convolved = sum(
        F.conv2d(fmap, p[f"local.convs.convs.{i}.weight"], p[f"local.convs.convs.{i}.bias"],
                 padding=i + 1, groups=fmap.shape[1])
        for i in range(3)
    )  # fmt: skip
    y = torch.cat([y[:, :PREFIX], (convolved / 3 + fmap).flatten(2).transpose(1, 2)], dim=1)
    y = y + linear(y, p, "mix.linear")
    return x + linear(F.gelu(y), p, "up")


def rep_adapter(x, p, scale=1.0):
    y = linear(x, p, "down")
    weight = p["up.weight"][..., None]
    up = F.conv1d(y.transpose(1, 2), weight, p["up.bias"], groups=2).transpose(1, 2)
    return x + scale * up


def adaptformer(x, p, scale=0.1):
    return scale * linear(F.relu(linear(x, p, "down")), p, "up")


def conv_lora(x, p):
    y = F.linear(x, p["down.weight"])
    fmap = y[:, PREFIX:].transpose(1, 2).unflatten(2, (ROWS, COLS))
    key = "local.experts.body.mixture"
    chosen = (fmap.mean((2, 3)) @ p[f"{key}.w_gate"]).argmax(1)
    assert len(chosen.unique()) > 1
    rows = []
    for image, i in zip(fmap, chosen.tolist(), strict=True):
        large = image[None]
        if i:
            large = F.interpolate(large, scale_factor=i + 1, mode="bicubic", align_corners=False)
        weights = [p[f"{key}.experts.{i}.0.{name}"] for name in ("weight", "bias")]
        out = F.gelu(F.conv2d(large, *weights, padding=1))
        if i:
            out = F.interpolate(out, size=(ROWS, COLS), mode="bicubic", align_corners=False)
        rows.append((image + out[0]).flatten(1).T)
    y = torch.cat([y[:, :PREFIX], torch.stack(rows)], dim=1)
    return 32 / 3 * F.linear(y, p["up.weight"])


PAPERS = {
    "convpass": ("convpass", {}, convpass),
    "convpass scaled": ("convpass", {"scale": 10.0, "width": 4},
                        lambda x, p: convpass(x, p, scale=10.0)),
    "conv_adapter": ("conv_adapter", {}, conv_adapter),
    "conv_adapter 7x7": ("conv_adapter", {"kernel_size": 7, "width": 4}, conv_adapter),
    "conv_lora": ("conv_lora", {}, conv_lora),
    "conv_lora wide": ("conv_lora", {"width": 4, "scale": 32 / 3, "num_experts": 6,
                                     "out_dim": 2 * DIM}, conv_lora),
    "mona": ("mona", {"width": 6}, mona),
    "rep_adapter": ("rep_adapter", {}, rep_adapter),
    "rep_adapter scaled": ("rep_adapter", {"scale": 3.0},
                           lambda x, p: rep_adapter(x, p, scale=3.0)),
    "adaptformer": ("adaptformer", {}, adaptformer),
}  # fmt: skip


def build(name, **kwargs):
    block = tc.create_block(name, dim=DIM, drop=0.0, **kwargs).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        parameter.data.normal_(std=0.5, generator=generator)
    return block


@pytest.mark.parametrize(("name", "kwargs", "paper"), PAPERS.values(), ids=PAPERS.keys())
def test_adapter_is_that_of_its_paper(name, kwargs, paper):
    block = build(name, **kwargs).eval()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, PREFIX + ROWS * COLS, DIM, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    results = []
    for out in (
        block(x, tc.TokenGrid((ROWS, COLS), PREFIX)),
        paper(x, dict(block.named_parameters())),
    ):
        inputs = [x, *block.parameters()]
        grads = torch.autograd.grad(out.sin().sum(), inputs, materialize_grads=True)
        results.append([out, *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "kwargs", "count"),
    [
        ("convpass", {}, 13_648),
        ("conv_adapter", {}, 768 * 9 + 96 + 96 * 768 + 768 + 768),
        ("conv_lora", {}, 5_328),
        ("conv_lora", {"out_dim": 3 * 768}, 9_936),
        ("mona", {}, 2 * 768 * 64 + 64 + 768 + 4 * 768 + 86 * 64 + 64 * 64 + 64),
        ("rep_adapter", {}, 768 * 8 + 8 + 768 * 4 + 768),
        ("adaptformer", {}, 2 * 768 * 64 + 64 + 768),
    ],
)
def test_parameter_counts_are_the_published_ones(name, kwargs, count):
    block = tc.create_block(name, dim=768, **kwargs)
    assert sum(p.numel() for p in block.parameters()) == count


def test_convpass_in_a_vit_has_the_published_count():
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224")
    attention = tc.plan(vit, "convpass", site="beside_attn")
    assert attention.added_params == 163_776
    assert (attention + tc.plan(vit, "convpass", site="beside_mlp")).added_params == 327_552


@pytest.mark.parametrize("name", ["convpass", "conv_lora", "rep_adapter", "adaptformer"])
def test_starts_as_the_identity_where_the_paper_does(name):
    block = tc.create_block(name, dim=DIM).eval()
    x = torch.randn(2, ROWS * COLS, DIM)
    expected = x if name == "rep_adapter" else torch.zeros_like(x)
    assert torch.equal(block(x, ROWS, COLS), expected)
    assert block.down.weight.abs().sum() > 0


@pytest.mark.parametrize("name", ["conv_adapter", "mona"])
def test_starts_as_no_identity_where_the_paper_does_not(name):
    block = tc.create_block(name, dim=DIM).eval()
    x = torch.randn(2, ROWS * COLS, DIM)
    assert (block(x, ROWS, COLS) - x).abs().max() > 0.01


def test_the_convolution_of_convpass_starts_from_the_centre_or_from_xavier():
    kernel = tc.create_block("convpass", dim=DIM).conv.weight
    centre = torch.zeros(8, 8, 3, 3)
    centre[range(8), range(8), 1, 1] = 1
    assert torch.equal(kernel, centre)
    torch.manual_seed(0)
    kernel = tc.create_block("convpass", dim=DIM, width=64, xavier_init=True).conv.weight
    assert kernel.std().item() == pytest.approx((2 / (2 * 64 * 9)) ** 0.5, rel=0.02)


def test_mona_starts_its_gates_as_the_paper():
    norm = tc.create_block("mona", dim=DIM).norm
    assert torch.equal(norm.gamma, torch.full((DIM,), 1e-6))
    assert torch.equal(norm.gammax, torch.ones(DIM))


# --- the mixture of Conv-LoRA ---


def literal_loss(means, w_gate, w_noise, noise):
    """The balance loss of noisy top-1 gating, image by image, from the published facts."""
    clean = means @ w_gate
    std = F.softplus(means @ w_noise) + 0.01
    noisy = clean + noise * std
    count = w_gate.shape[1]
    load, importance = torch.zeros(count).double(), torch.zeros(count).double()
    for c, n, s in zip(clean, noisy, std, strict=True):
        first, second = n.sort(descending=True).values[:2]
        importance[n.argmax()] += 1
        for i in range(count):
            threshold = second if n[i] > second else first
            share = 0.5 * (1 + torch.erf((c[i] - threshold) / s[i] / 2**0.5))
            load = load + F.one_hot(torch.tensor(i), count) * share

    def variation(x):
        return ((x - x.mean()) ** 2).sum() / (count - 1) / (x.mean() ** 2 + 1e-10)

    return 0.01 * (variation(importance) + variation(load)), noisy.argmax(1)


def test_the_balance_loss_of_the_paper_is_added_in_the_backward_pass():
    block = build("conv_lora", num_experts=4, balance=0.5).train()
    mixture = block.local.experts.body.mixture
    x = torch.randn(6, ROWS * COLS, DIM, dtype=torch.float64)
    means = block.down(x).mean(1)
    torch.manual_seed(3)
    noise = torch.randn(6, 4, dtype=torch.float64)
    expected, chosen = literal_loss(means, mixture.w_gate, mixture.w_noise, noise)
    gates = [mixture.w_gate, mixture.w_noise]
    wanted = torch.autograd.grad(50 * expected, [*gates, block.down.weight], retain_graph=True)

    def run(balance):
        mixture.balance = balance
        torch.manual_seed(3)
        return block(x, ROWS, COLS)

    out = run(0.5)
    grads = torch.autograd.grad(out.sum(), gates, retain_graph=True)
    for a, b in zip(grads, wanted, strict=False):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    without = run(0.0)
    assert torch.equal(out, without)
    (with_loss,) = torch.autograd.grad(out.sum(), block.down.weight, retain_graph=True)
    (plain,) = torch.autograd.grad(without.sum(), block.down.weight)
    torch.testing.assert_close(with_loss - plain, wanted[2], rtol=1e-6, atol=1e-9)
    # the expert of each image is the one that the noisy gates chose
    kernels = [expert[0].weight for expert in mixture.experts]
    taken = torch.autograd.grad(out.sum(), kernels, materialize_grads=True)
    assert {i for i, grad in enumerate(taken) if grad.any()} == set(chosen.tolist())


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_balance_loss_survives_checkpoints(reentrant):
    block = build("conv_lora", num_experts=4).train()
    x = torch.randn(6, ROWS * COLS, DIM, dtype=torch.float64, requires_grad=True)
    gate = block.local.experts.body.mixture.w_gate
    grads = []
    for run in (block, lambda *args: checkpoint(block, *args, use_reentrant=reentrant)):
        torch.manual_seed(3)
        gate.grad = None
        run(x, ROWS, COLS).sum().backward()
        grads.append(gate.grad)
    assert grads[0].any()
    torch.testing.assert_close(*grads)


@pytest.mark.compile
def test_a_mixture_compiles_once_for_all_sizes_also_under_a_checkpoint():
    torch.compiler.reset()
    block = tc.create_block("conv_lora", dim=DIM).train()
    frames = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=frames, fullgraph=True, dynamic=True)
    def run(x, rows, cols):
        return checkpoint(block, x, rows, cols, use_reentrant=False)

    for batch, rows, cols in ((2, 3, 5), (3, 4, 6), (5, 7, 8)):
        run(torch.randn(batch, rows * cols, DIM), rows, cols).sum().backward()
    assert frames.frame_count <= 2
    assert block.local.experts.body.mixture.w_noise.grad is not None


def test_one_expert_needs_no_balance():
    block = tc.create_block("conv_lora", dim=DIM, num_experts=1).train()
    block(torch.randn(2, ROWS * COLS, DIM), ROWS, COLS).sum().backward()
    assert not block.local.experts.body.mixture.w_gate.grad.any()


def test_the_experts_start_without_offsets_and_the_scale_follows_the_width():
    block = tc.create_block("conv_lora", dim=DIM, width=4)
    block.init_neutral_()
    for expert in block.local.experts.body.mixture.experts:
        assert not expert[0].bias.any()
        assert expert[0].weight.any()
    assert (block.width, block.scale) == (4, 8.0)
    assert tc.create_block("conv_lora", dim=DIM, alpha=6.0).scale == 2.0
    assert tc.create_block("conv_lora", dim=DIM, scale=5.0).scale == 5.0


def test_dropout_acts_in_training_only():
    block = tc.create_block("convpass", dim=DIM, drop=0.5)
    for parameter in block.parameters():
        parameter.data.normal_()
    x = torch.randn(2, ROWS * COLS, DIM)
    assert torch.equal(block.eval()(x, ROWS, COLS), block(x, ROWS, COLS))
    assert not torch.equal(block.train()(x, ROWS, COLS), block(x, ROWS, COLS))


@pytest.mark.parametrize(("groups", "bias"), [(1, True), (4, True), (2, False)])
def test_a_convolution_on_tokens_is_that_on_maps(groups, bias):
    conv = GridConv(8, 12, 5, groups=groups, bias=bias)
    assert str(conv) == f"GridConv(8, 12, kernel_size=5, groups={groups}, bias={bias})"
    x = torch.randn(2, PREFIX + ROWS * COLS, 8)

    def on_map(x):
        return F.conv2d(x, conv.weight, conv.bias, padding=2, groups=groups)

    out = conv(x, tc.TokenGrid((ROWS, COLS), PREFIX))
    torch.testing.assert_close(out, apart(x, on_map), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        conv(x[:, PREFIX:], ROWS, COLS), out[:, PREFIX:], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "message"),
    [
        ("convpass", {"width": 0}, ValueError, "width=0"),
        ("conv_adapter", {"width": 3}, ValueError, "groups to divide dim=16 and out_dim=3, got"),
        ("conv_adapter", {"kernel_size": 2}, ValueError, "odd kernel_size, got 2"),
        ("conv_lora", {"num_experts": 0}, ValueError, "num_experts=0"),
        ("rep_adapter", {"groups": 3}, ValueError, "groups to divide dim=8 and out_dim=16"),
        ("mona", {"kernel_size": 5}, TypeError, "kernel_size"),
    ],
)
def test_bad_arguments(name, kwargs, error, message):
    with pytest.raises(error, match=message):
        tc.create_block(name, dim=DIM, **kwargs)
