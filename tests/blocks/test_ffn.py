import pytest
import torch
from timm.layers import Mlp
from timm.models.metaformer import StarReLU as TimmStarReLU
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import nn
from transformers import SegformerConfig
from transformers.models.segformer.modeling_segformer import SegformerMixMLP

import tokenconv as tc
from tokenconv.layers import StarReLU


def randomize_(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            draw = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            parameter.copy_(0.3 * draw)


def assert_same(ours, theirs, call_theirs, rows, cols):
    """Outputs and all gradients agree, on one input."""
    x = torch.randn(
        2, rows * cols, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    results = []
    for module, call in ((ours, lambda x: ours(x, rows, cols)), (theirs, call_theirs)):
        leaf = x.clone().requires_grad_()
        out = call(leaf)
        inputs = [leaf, *module.parameters()]
        grads = torch.autograd.grad(out.sin().sum(), inputs)
        results.append([out, *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("metaformer", [False, True])
def test_mlp_matches_timm(metaformer):
    of_both = {"bias": False} if metaformer else {}
    theirs = Mlp(10, 30, act_layer=TimmStarReLU if metaformer else nn.GELU, **of_both).double()
    randomize_(theirs)
    act_layer = StarReLU if metaformer else nn.GELU
    ours = tc.create_block("mlp", dim=10, mlp_ratio=3, act_layer=act_layer, **of_both).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same(ours, theirs, theirs, 5, 7)


def test_star_relu_starts_as_timms():
    theirs = TimmStarReLU().state_dict()
    ours = tc.create_block("mlp", dim=10, act_layer=StarReLU).act.state_dict()
    assert ours == theirs
    assert set(ours) == {"scale", "bias"}


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(5, 7), (1, 9), (8, 3)])
def test_mix_ffn_matches_timm(linear, rows, cols):
    theirs = MlpWithDepthwiseConv(10, 30, extra_relu=linear, dtype=torch.float64)
    randomize_(theirs)
    ours = tc.create_block("mix_ffn", dim=10, mlp_ratio=3, linear=linear).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same(ours, theirs, lambda x: theirs(x, [rows, cols]), rows, cols)


def test_mix_ffn_matches_transformers_segformer():
    config = SegformerConfig(hidden_dropout_prob=0.0)
    theirs = SegformerMixMLP(config, in_features=10, hidden_features=40).double()
    randomize_(theirs)
    ours = tc.MixFFN(10).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)  # has the official dwconv.dwconv
    assert_same(ours, theirs, lambda x: theirs(x, 5, 7), 5, 7)


def test_prefix_tokens_skip_the_convolution_and_take_the_rest():
    block = tc.MixFFN(10)
    x = torch.randn(2, 3 + 15, 10)
    out = block(x, tc.TokenGrid((3, 5), num_prefix_tokens=3))
    plain = block.fc2(block.act(block.fc1(x[:, :3])))
    torch.testing.assert_close(out[:, :3], plain)
    torch.testing.assert_close(out[:, 3:], block(x[:, 3:], 3, 5))


@pytest.mark.parametrize(("ratio", "kernel_size"), [(4, 3), (8, 5), (2.5, 7)])
def test_parameter_count_is_the_stated_formula(ratio, kernel_size):
    dim = 10
    block = tc.MixFFN(dim, mlp_ratio=ratio, kernel_size=kernel_size)
    h = int(dim * ratio)
    expected = 2 * dim * h + h + dim + (kernel_size**2 + 1) * h
    assert sum(p.numel() for p in block.parameters()) == expected


def test_starts_as_the_papers_code_does():
    torch.manual_seed(0)
    block = tc.MixFFN(64, mlp_ratio=16)
    assert block.dwconv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.02)
    assert block.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not block.fc1.bias.any()
    assert not block.fc2.bias.any()
    assert not block.dwconv.bias.any()


def test_dropout_acts_in_training_only():
    block = tc.MixFFN(10, drop=0.5)
    x = torch.randn(2, 15, 10)
    assert torch.equal(block.eval()(x, 3, 5), block(x, 3, 5))
    assert not torch.equal(block.train()(x, 3, 5), block(x, 3, 5))


def test_activation_can_be_chosen():
    assert isinstance(tc.MixFFN(10, act_layer=nn.SiLU).act, nn.SiLU)


@pytest.mark.parametrize("kwargs", [{"kernel_size": 2}, {"mlp_ratio": 0.01}])
def test_bad_arguments_are_refused(kwargs):
    with pytest.raises(ValueError, match="expected"):
        tc.MixFFN(10, **kwargs)


@pytest.mark.parametrize(("rows", "cols", "prefix"), [(5, 7, 0), (1, 9, 2), (8, 3, 1)])
def test_separable_ffn_is_its_formula(rows, cols, prefix):
    ours = tc.create_block("separable_ffn", dim=10, mlp_ratio=3, kernel_size=5).double()
    randomize_(ours)
    theirs = LiteralSeparableFFN(ours.state_dict(), rows, cols, prefix)
    grid = tc.TokenGrid((rows, cols), prefix)
    x = torch.randn(2, grid.num_tokens, 10, dtype=torch.float64)
    outputs = [ours(x, grid), theirs(x)]
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-11)
    grads = [
        torch.autograd.grad(out.sin().sum(), list(module.parameters()))
        for out, module in zip(outputs, (ours, theirs), strict=True)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape), rtol=1e-9, atol=1e-11)


class LiteralSeparableFFN(nn.Module):
    """The formula, with torch's own convolutions on maps."""

    def __init__(self, state, rows, cols, prefix):
        super().__init__()
        self.size, self.prefix = (rows, cols), prefix
        self.mlp = Mlp(10, 30, dtype=torch.float64)
        self.depthwise = nn.Conv2d(10, 10, 5, padding=2, groups=10, dtype=torch.float64)
        self.pointwise = nn.Conv2d(10, 10, 1, dtype=torch.float64)
        own = dict(zip(self.state_dict(), state.values(), strict=True))
        own["pointwise.weight"] = own["pointwise.weight"][..., None, None]
        self.load_state_dict(own)

    def forward(self, x):
        x = x.clone()
        fmap = x[:, self.prefix :].transpose(1, 2).unflatten(2, self.size)
        grid = self.pointwise(self.depthwise(fmap)).flatten(2).transpose(1, 2)
        prefix = x[:, : self.prefix] @ self.pointwise.weight[..., 0, 0].T + self.pointwise.bias
        return self.mlp(x) + torch.cat([prefix, grid], dim=1)
