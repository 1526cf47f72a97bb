"""Attention: it is that of its paper, and what all attention has in common."""

import pytest
import torch

import tokenconv as tc

from .attention_oracles import CASES, DIM, HEADLESS, HEADS, Values, mvit, official
from .conftest import randomize_


def assert_same(block, run, rows, cols, prefix, training):
    """Results, gradients of the input and of every parameter, and statistics."""
    block = randomize_(block.double()).train(training)
    generator = torch.Generator().manual_seed(1)
    shape = (2, prefix + rows * cols, block.dim)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    values = Values(block, training)
    names, wanted = zip(*block.named_parameters(), strict=True)
    expected = run(x, rows, cols, values)
    assert expected.abs().max() > 0.1
    found = block(x, tc.TokenGrid((rows, cols), prefix))
    assert found.shape == x.shape
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    pairs = [torch.autograd.grad(out.sin().sum(), [x, *wanted]) for out in (found, expected)]
    for name, a, b in zip(("x", *names), *pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    for key, buffer in block.named_buffers():
        if buffer.is_floating_point():
            torch.testing.assert_close(buffer, values[key], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("size", [(5, 7), (6, 4)], ids=["odd", "even"])
@pytest.mark.parametrize(
    ("name", "kwargs", "run", "prefix"),
    [
        pytest.param(name, kwargs, run, p, id=f"{name}-{i}-{p} prefix")
        for i, (name, kwargs, run, counts) in enumerate(CASES)
        for p in counts
    ],
)
def test_attention_is_that_of_its_paper(name, kwargs, run, prefix, size, training):
    heads = {} if name in HEADLESS else {"num_heads": HEADS}
    assert_same(tc.create_block(name, DIM, **{**heads, **kwargs}), run, *size, prefix, training)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("side", [6, 7])
def test_pooling_attention_is_timms_on_a_square(side, prefix, training):
    block = tc.create_block("mvitv2_attn", DIM, num_heads=HEADS, size=(side, side))
    assert_same(block, official(mvit, "mvitv2", "mvitv2_attn"), side, side, prefix, training)


ROWS = {name: info for name, info in tc.BLOCKS.items() if info.group == "attention"}
TOKENS = [name for name, info in ROWS.items() if info.kind == "tokens"]


def drawn(rows, cols, prefix=0, dim=DIM, batch=2):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, prefix + rows * cols, dim, generator=generator)


@pytest.mark.parametrize("name", ROWS)
def test_neutral_is_zero_and_learns(name):
    (fragment, *_) = ROWS[name].sites.values()
    block = fragment(DIM)
    block.init_neutral_()
    out = block(drawn(4, 6, 2), tc.TokenGrid((4, 6), 2))
    assert torch.equal(out, torch.zeros_like(out))
    (out + drawn(4, 6, 2)).sin().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())


@pytest.mark.parametrize("name", [name for name in ROWS if name not in TOKENS])
def test_prefix_tokens_pass_blocks_on_maps(name):
    block = randomize_(tc.create_block(name, DIM)).eval()
    x = drawn(4, 6, 2)
    out = block(x, tc.TokenGrid((4, 6), 2))
    assert torch.equal(out[:, :2], x[:, :2])
    torch.testing.assert_close(out[:, 2:], block(x[:, 2:], 4, 6))
    branch = ROWS[name].sites["beside_attn"](DIM)
    assert torch.equal(branch(x, tc.TokenGrid((4, 6), 2))[:, :2], torch.zeros_like(x[:, :2]))


@pytest.mark.parametrize("name", TOKENS)
def test_attention_sees_all_frames_and_convolution_one(name):
    """With the same frame twice: what is seen twice is weighted as if it were seen once."""
    block = randomize_(tc.create_block(name, DIM).double()).eval()
    one = drawn(4, 6).double()
    out = block(torch.cat([one, one], 1), tc.TokenGrid((2, 4, 6)))
    assert out.shape == (2, 48, DIM)
    torch.testing.assert_close(out[:, :24], out[:, 24:], rtol=1e-9, atol=1e-9)
    if name not in ("lite_mla", "additive_attn"):  # a constant beside sums, a sum that is no mean
        torch.testing.assert_close(out[:, :24], block(one, 4, 6), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", TOKENS)
def test_attention_is_traced_takes_no_image_and_bfloat16(name):
    block = tc.create_block(name, DIM).eval()
    grid = tc.TokenGrid((4, 6), 1)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, x):
            return self.block(x, grid)

    x = drawn(4, 6, 1)
    torch.testing.assert_close(torch.fx.symbolic_trace(Model())(x), block(x, grid))
    assert block(x[:0], grid).shape == (0, 25, DIM)
    assert block.bfloat16()(x.bfloat16(), grid).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert block.float()(x, grid).isfinite().all()


@pytest.mark.compile
@pytest.mark.parametrize("name", ROWS)
@torch.no_grad()
def test_exported_for_any_batch_and_size(name):
    """Windows and patches divide all of them."""
    block = randomize_(tc.create_block(name, DIM)).eval()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, fmap):
            return self.block(fmap.flatten(2).transpose(1, 2), *fmap.shape[2:])

    def draw(*size):
        return drawn(size[1], size[2], batch=size[0]).transpose(1, 2).unflatten(2, size[1:])

    auto = torch.export.Dim.AUTO
    shapes = {"fmap": {0: auto, 2: auto, 3: auto}}
    program = torch.export.export(Model(), (draw(3, 14, 28),), dynamic_shapes=shapes).module()
    for size in ((2, 28, 42), (5, 28, 14)):
        fmap = draw(*size)
        torch.testing.assert_close(program(fmap), Model()(fmap), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("sra", {"num_heads": 5}, "expected num_heads that divides dim, got dim=24, num_heads=5"),
        ("xca", {"num_heads": 0}, "num_heads=0"),
        ("cswin_attn", {"num_heads": 3}, "num_heads, a multiple of 2, that divides dim"),
        ("sra", {"sr_ratio": 0}, "expected sr_ratio >= 1, got 0"),
        ("shunted_attn", {"sr_ratio": 3}, "expected an even sr_ratio, got 3"),
        ("lmhsa", {"size": (1, 4)}, "expected a size of sr_ratio=2 at least"),
        ("cvt_attn", {"kernel_size": 2}, "expected an odd kernel_size, got 2"),
        ("cvt_attn", {"stride_kv": 0}, "expected stride_kv >= 1, got 0"),
        ("cswin_attn", {"split_size": 0}, "expected split_size >= 1, got 0"),
        ("hilo", {"alpha": 1.5}, "0 <= alpha <= 1, got window_size=2, alpha=1.5"),
        ("coat_attn", {"num_heads": 4, "windows": {3: 3}}, "windows for 4 heads in all, got"),
        ("additive_attn", {"num_heads": -1}, "expected positive dim and num_heads"),
        ("mobilevit", {"out_dim": 8}, "out_dim == dim and stride 1"),
        ("mobilevit", {"residual": True}, "expected residual=False"),
        ("mobilevitv2", {"patch_size": 0}, "expected patch_size >= 1, got 0"),
        ("sdta", {"num_scales": 1}, "expected num_scales >= 2 that cut dim=24, got 1"),
        ("sdta", {"stride": 2}, "out_dim == dim and stride 1"),
        ("inception_mixer", {"attention_heads": 2}, "attention_heads=2 of 2"),
        ("nextvit_conv", {"head_dim": 7}, "expected head_dim that divides dim=24, got 7"),
    ],
)
def test_bad_arguments(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        tc.create_block(name, DIM, **kwargs)


def test_heads_are_of_64_channels_if_nothing_is_said():
    assert [tc.create_block("xca", d).num_heads for d in (24, 192, 200, 384)] == [1, 3, 2, 6]
    assert [tc.create_block("hilo", d).num_heads for d in (24, 192, 384)] == [2, 2, 6]


@pytest.mark.parametrize("name", TOKENS)
def test_bad_tokens(name):
    block = tc.create_block(name, DIM)
    with pytest.raises(tc.GridError, match="expected 24 tokens"):
        block(torch.zeros(1, 25, DIM), 4, 6)
    with pytest.raises(tc.GridError, match=r"expected tokens \(B, N, 24\), got .*\(1, 24, 8\)"):
        block(torch.zeros(1, 24, 8), 4, 6)
    with pytest.raises(tc.GridError, match="fill one grid, got a SparseGrid"):
        block(torch.zeros(1, 1, DIM), tc.SparseGrid(torch.zeros(1, 1, 2, dtype=torch.long)))


@pytest.mark.parametrize("name", ["sra", "lmhsa", "shunted_attn", "nextvit_attn"])
def test_a_grid_without_a_key_is_refused(name):
    with pytest.raises(tc.GridError, match=r"got \(1, 3\): take a smaller sr_ratio"):
        tc.create_block(name, DIM)(torch.zeros(1, 3, DIM), 1, 3)


def test_attention_without_positions_is_that_with_positions_of_zero():
    plain, placed = (
        tc.create_block("lmhsa", DIM, size=size).double().eval() for size in (None, (4, 6))
    )
    placed.load_state_dict({**plain.state_dict(), "relative_pos": placed.relative_pos * 0})
    x = drawn(4, 6).double()
    torch.testing.assert_close(plain(x, 4, 6), placed(x, 4, 6), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["cvt_attn", "lmhsa", "nextvit_conv", "mobilevit", "mobilevitv2"])
def test_norms_are_folded(name):
    block = randomize_(tc.create_block(name, DIM).double()).eval()
    x = drawn(5, 7).double()
    before = block(x, 5, 7)
    assert block.fold_()
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in block.modules())
    torch.testing.assert_close(block(x, 5, 7), before, rtol=1e-9, atol=1e-9)
    assert not block.fold_()


def test_dropout_is_that_of_training():
    for name in TOKENS:
        block = tc.create_block(name, DIM, attn_drop=0.5, proj_drop=0.5)
        x = drawn(4, 6)
        assert not torch.equal(block(x, 4, 6), block(x, 4, 6))
        assert torch.equal(block.eval()(x, 4, 6), block(x, 4, 6))


@pytest.mark.parametrize(
    ("name", "key", "std"),
    [
        ("sra", "q.weight", 0.02),
        ("sra", "sr.weight", (2 / 4 / 64) ** 0.5),
        ("shunted_attn", "large.local_conv.weight", (2 / 9) ** 0.5),
        ("lmhsa", "sr.0.weight", (2 / 4 / 64) ** 0.5),
        ("lmhsa", "relative_pos", 1.0),
        ("mvitv2_attn", "rel_pos_h", 0.02),
        ("cvt_attn", "conv_proj_q.0.weight", 1 / 3 / 3**0.5),
        ("mdta", "qkv.weight", 1 / 8 / 3**0.5),
        ("additive_attn", "w_g", 1.0),
        ("nextvit_conv", "body.conv.weight", 0.02),
    ],
)
def test_starts_as_the_papers_code_does(name, key, std):
    torch.manual_seed(0)
    weight = tc.create_block(name, 64).state_dict()[key]
    assert weight.std().item() == pytest.approx(std, rel=0.15)


def test_temperatures_and_scales_start_from_the_papers_values():
    for name in ("xca", "mdta"):
        temperature = tc.create_block(name, 64, num_heads=4).temperature
        assert torch.equal(temperature, torch.ones(4, 1, 1))
    assert tc.create_block("xca", 64).no_weight_decay() == {"temperature"}
    assert tc.create_block("sdta", 8).body.gamma.gamma.tolist() == [pytest.approx(1e-6)] * 8
