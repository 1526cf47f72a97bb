"""``accelerate_``: what it finds, that nothing but speed changes, and that it is taken back."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import GELUTanh, get_act_layer
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    PvtV2Config,
    PvtV2ForImageClassification,
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
)
from transformers.activations import ACT2FN

import tokenconv as tc
from tokenconv.blocks.chain import Chain
from tokenconv.blocks.gated import Gate
from tokenconv.surgery.accelerate import FusedActivation
from tokenconv.surgery.fusing import activation_of

from .conftest import FAMILIES, randomize_

ACCELERATED = {
    "vision_transformer, vitamin": (4, "gelu"),
    "pvt_v2": (5, "gelu"),
    "xcit": (4, "gelu"),
    "twins": (4, ""),
    "twins, pcpvt": (4, ""),
    "coat": (16, ""),
    "coat, lite": (16, ""),
    "davit": (16, ""),
    "metaformer": (3, ""),
    "csatv2": (5, ""),
    "gcvit": (11, "gelu"),
    "convnext": (9, ""),
    "edgenext": (8, ""),
}
"""Families with depthwise convolutions over tokens: how many, and what is fused with the first."""


def outputs(model, images):
    out = model(images)
    if isinstance(out, tuple):
        return torch.cat(out)
    return out if isinstance(out, torch.Tensor) else out.logits


def assert_tokens(conv, args, kwargs):
    (x,) = (*args, *kwargs.values())
    assert x.stride(1) == 1


def check(model, images, *, pickles=True, tolerance=1e-12):
    """Outputs, gradients, keys, copies, and the way back; in float64 if nothing else is said."""
    model, images = model.double().eval(), images.double()
    classes = {name: type(module) for name, module in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = outputs(model, images)
    before.square().mean().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    report = tc.accelerate_(model, tuple(images.shape[1:]))
    assert not any(module.training for module in model.modules())
    for name in report.changed:  # what was seen without weights holds with them
        conv = model.get_submodule(name)
        if isinstance(conv, nn.Conv2d):
            conv.register_forward_pre_hook(assert_tokens, with_kwargs=True)
    twins = [model, copy.deepcopy(model)]
    if pickles:  # which transformers' models do not once they have run: they have local hooks
        twins.append(pickle.loads(pickle.dumps(model)))
    for twin in twins:
        assert list(twin.state_dict()) == list(state)
        after = outputs(twin, images)
        scale = before.abs().max()
        torch.testing.assert_close(after / scale, before / scale, rtol=0, atol=tolerance)
        after.square().mean().backward()
        found = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
        assert found.keys() == wanted.keys()
        for name, grad in found.items():
            scale = wanted[name].abs().max().clamp(min=1e-9)
            torch.testing.assert_close(grad / scale, wanted[name] / scale, rtol=0, atol=1e-8)
        tc.decelerate_(twin)
        assert {name: type(module) for name, module in twin.named_modules()} == classes
        assert torch.equal(outputs(twin, images), before)
        twin.load_state_dict(state)
    return report


@pytest.mark.parametrize("name", ACCELERATED)
def test_families_with_convolutions_over_tokens(name):
    case = FAMILIES[name]
    report = check(case.build(), case.images())
    count, activation = ACCELERATED[name]
    assert len(report.changed) == count
    assert (
        next(iter(report.changed.values())) == f"on tokens{f' and {activation}' * bool(activation)}"
    )


def test_families_without_one_say_why():
    """And no other family is accelerated without a test of its own above."""
    for name, case in FAMILIES.items():
        if name not in ACCELERATED:
            with pytest.raises(tc.SurgeryError, match="has no depthwise convolution over tokens"):
                tc.accelerate_(case.build(), (3, *case.size))
    with pytest.raises(
        tc.SurgeryError, match=r"\(\S+ and \d+ more: its input is a map in NCHW mem"
    ):
        tc.accelerate_(FAMILIES["tiny_vit"].build(), (3, 64, 96))


SEGFORMER = SegformerConfig(
    depths=[1, 1, 2, 1], hidden_sizes=[16, 32, 40, 64], num_attention_heads=[1, 2, 5, 8],
    num_labels=5, decoder_hidden_size=32, image_size=64,
)  # fmt: skip
PVT_V2 = PvtV2Config(
    depths=[1, 1, 2, 1], hidden_sizes=[16, 32, 40, 64], num_attention_heads=[1, 2, 5, 8],
    image_size=64, num_labels=5,
)  # fmt: skip


@pytest.mark.parametrize(
    "build",
    [
        lambda: SegformerForImageClassification(SEGFORMER),
        lambda: SegformerForSemanticSegmentation(SEGFORMER),
        lambda: PvtV2ForImageClassification(PVT_V2),
    ],
    ids=["SegFormer", "SegFormer, segmentation", "PVTv2"],
)
def test_models_of_transformers(build):
    torch.manual_seed(0)
    model = build()
    randomize_(model)
    report = check(model, torch.randn(2, 3, 64, 64), pickles=False)
    assert len(report.changed) == 5
    assert set(report.changed.values()) == {"on tokens and gelu"}
    assert tc.accelerate_(model).changed == report.changed  # the size is that of its config


@pytest.mark.parametrize(
    ("block", "options", "expected"),
    [
        ("mix_ffn", {}, "on tokens and gelu"),
        ("mix_ffn", {"site": "after_act", "kernel_size": 5}, "on tokens"),
        ("conv_glu", {}, "on tokens and gelu and gate"),
        ("gdfn", {}, "on tokens"),
        ("mbconv", {}, "on tokens"),
        ("peg", {}, "on tokens"),
    ],
    ids=str,
)
def test_hybrids(vit, disturb_, block, options, expected):
    model = disturb_(tc.insert_(vit, block, **options))
    report = check(model, torch.randn(2, 3, 48, 80))
    assert set(report.changed.values()) == {expected}
    assert len(report.changed) == 3


@pytest.mark.parametrize(
    "options", [{"kernel_size": 5}, {"dilation": 2, "allow_change": True}], ids=["5x5", "dilation"]
)
@pytest.mark.parametrize("folded", [False, True], ids=["as inserted", "folded"])
def test_kernels_merged_into_those_of_the_model(pvt, disturb_, folded, options):
    model = disturb_(tc.insert_(pvt, "mix_ffn", **options))
    if folded:
        tc.fold_(model.double())
    report = check(model, torch.randn(2, 3, 64, 96))
    assert list(report.changed.values()) == ["on tokens and gelu"] * 5
    assert not report.kept


def test_a_block_by_itself_is_a_model_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = tc.create_block("conv_glu", 3)

        def forward(self, x):
            return self.block(x.flatten(2).mT, *x.shape[2:]).sum((1, 2))

    report = tc.accelerate_(Net(), (3, 5, 6))
    assert report.changed == {"block.gate.gate.dwconv": "on tokens and gelu and gate"}


# --- what is fused is what nothing else uses ---


class Tokens(nn.Module):
    """A convolution over tokens, an activation, and what a case makes of them."""

    def __init__(self, run, **changes):
        super().__init__()
        known = {"kernel_size": 3, "padding": 1, "groups": 6, **changes}
        self.embed = nn.Conv2d(3, 6, 1)
        self.conv = nn.Conv2d(6, 6, **known)
        self.act = nn.GELU()
        self.other = nn.SiLU()
        self.run = run

    def forward(self, images):
        x = self.embed(images)
        tokens = x.flatten(2).transpose(1, 2).contiguous()
        fmap = tokens.transpose(1, 2).reshape(x.shape)
        return self.run(self, fmap)


def through(self, x):
    return self.act(self.conv(x))


def by_keyword(self, x):
    return self.act(self.conv(input=x))


def not_for_training(self, x):
    return self.act(self.conv(x)) if not self.training else None.loss


def through_views(self, x):
    return self.act(self.conv(x).flatten(2).transpose(1, 2)[:, :, None]).sum(2)


def of_a_part(self, x):
    return self.act(self.conv(x)[:, :3])


def used_twice(self, x):
    y = self.conv(x)
    return self.act(y) + y


def used_before(self, x):
    y = self.conv(x)
    return y.mean() + self.act(y)


def used_in_training(self, x):
    y = self.conv(x)
    return self.act(y) + y if self.training else self.act(y)


def dropped_before(self, x):
    return self.act(F.dropout(self.conv(x), 0.5, self.training))


def returned_too(self, x):
    y = self.conv(x)
    return self.act(y), y


def convolved_again(self, x):
    return self.act(self.conv(x)) + self.conv(input=x)


def activated_by_keyword(self, x):
    return self.act(input=self.conv(x))


def activated_in_two_ways(self, x):
    y = self.conv(x)
    return self.act(y) + self.other(y)


def activated_instead(self, x):
    self.conv(x)
    return self.act(self.conv(2 * x)) + self.act(x)


def with_something_between(self, x):
    return self.act(2 * self.conv(x))


def activated_elsewhere_too(self, x):
    return self.act(self.conv(self.act(x)))


def activated_elsewhere_in_training(self, x):
    y = self.act(self.conv(x))
    return y + self.act(x) if self.training else y


def activated_again(self, x):
    return self.act(2 * self.act(self.conv(x)))


def twice_the_same(self, x):
    return self.act(self.conv(self.act(self.conv(x))))


@pytest.mark.parametrize(
    "run", [through, by_keyword, not_for_training, through_views, of_a_part, twice_the_same]
)
def test_an_activation_that_is_the_only_use_is_fused(run):
    report = check(Tokens(run), torch.randn(2, 3, 5, 6))
    assert report.changed == {"conv": "on tokens and gelu"}


@pytest.mark.parametrize(
    "run",
    [
        used_twice,
        used_before,
        used_in_training,
        dropped_before,
        returned_too,
        convolved_again,
        activated_by_keyword,
        activated_in_two_ways,
        activated_instead,
        with_something_between,
        activated_elsewhere_too,
        activated_elsewhere_in_training,
        activated_again,
    ],
)
def test_another_use_keeps_the_activation(run):
    report = check(Tokens(run), torch.randn(2, 3, 5, 6))
    assert report.changed == {"conv": "on tokens"}


def test_a_gate_is_multiplied_before_the_activation():
    def run(self, x):
        tokens = x.flatten(2).mT
        return self.act(self.conv(tokens, *x.shape[2:], gate=tokens))

    model = Tokens(run)
    model.conv = tc.DWConv(6)
    report = check(model, torch.randn(2, 3, 5, 6), pickles=False)
    assert report.changed == {"conv": "on tokens"}


def test_a_hook_sees_what_the_convolution_returned():
    model = Tokens(through)
    model.conv.register_forward_hook(lambda conv, args, out: 2 * out)
    report = check(model, torch.randn(2, 3, 5, 6), pickles=False)
    assert report.changed == {"conv": "on tokens"}


@pytest.mark.parametrize("changes", [{"padding": "same"}, {"dilation": 2, "padding": 2}], ids=str)
def test_other_ways_to_keep_the_size(changes):
    report = check(Tokens(through, **changes), torch.randn(2, 3, 5, 6))
    assert report.changed == {"conv": "on tokens and gelu"}


def test_one_activation_of_two_names():
    model = Tokens(lambda self, x: self.act(self.conv(self.other(self.conv(x)))))
    model.other = model.act
    report = check(model, torch.randn(2, 3, 5, 6), pickles=False)
    assert report.changed == {"conv": "on tokens and gelu"}


def test_a_layer_that_has_an_activation_takes_no_other():
    model = Tokens(lambda self, x: self.act(self.conv(x.flatten(2).mT, *x.shape[2:])))
    model.conv = tc.DWConv(6, activation="silu")
    report = check(model, torch.randn(2, 3, 5, 6), pickles=False)
    assert report.changed == {"conv": "on tokens"}


def test_a_gate_whose_value_is_computed_is_not_fused():
    gate = Gate(Chain(dwconv=tc.DWConv(3), act=nn.GELU()), nn.Tanh())
    model = Tokens(lambda self, x: self.gate(x.flatten(2).mT, *x.shape[2:]))
    model.gate = gate
    report = check(model, torch.randn(2, 3, 5, 6), pickles=False)
    assert report.changed == {"gate.gate.dwconv": "on tokens and gelu"}


def test_an_activation_may_be_several_operators():
    class Swish(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(x)

    model = Tokens(through)
    model.act = Swish()
    assert check(model, torch.randn(2, 3, 5, 6), pickles=False).changed["conv"].endswith("silu")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"stride": 2}, r"it has a stride of \(2, 2\)"),
        ({"dilation": (1, 2)}, r"it has a dilation of \(1, 2\)"),
        ({"kernel_size": 4}, r"its kernel of \(4, 4\) is not odd and square"),
        ({"kernel_size": (3, 5), "padding": (1, 2)}, r"its kernel of \(3, 5\) is not odd"),
        ({"padding": 0}, "its padding does not keep the size with zeros"),
        ({"padding_mode": "circular"}, "its padding does not keep the size with zeros"),
    ],
    ids=str,
)
def test_other_convolutions_are_kept_and_it_says_why(changes, why):
    model = Tokens(through, **changes)
    model.fine = tc.DWConv(6)
    model.run = lambda self, x: (through(self, x), self.fine(x.flatten(2).mT, *x.shape[2:]))
    report = tc.accelerate_(model, (3, 5, 6))
    assert report.changed == {"fine": "on tokens"}
    with pytest.raises(tc.SurgeryError, match=f"conv: {why}"):
        tc.accelerate_(Tokens(through, **changes), (3, 5, 6))
    assert "1 of 2 depthwise convolutions accelerated\n  fine  on tokens\n  conv  kept: " in str(
        report
    )


def test_a_convolution_that_does_not_run_is_kept():
    with pytest.raises(tc.SurgeryError, match="conv: it does not run"):
        tc.accelerate_(Tokens(lambda self, x: self.act(x)), (3, 5, 6))


def test_a_forward_that_is_not_that_of_the_class_is_kept(vit):
    model = Tokens(through)
    model.conv.forward = model.conv.forward  # as those do that move weights between devices
    with pytest.raises(tc.SurgeryError, match="conv: it has a forward of its own"):
        tc.accelerate_(model, (3, 5, 6))
    frozen = tc.freeze_grid_(tc.insert_(vit, "mix_ffn"), (48, 80))
    with pytest.raises(tc.SurgeryError, match="it has a forward of its own"):
        tc.accelerate_(frozen)


class ClipsWhenItPredicts(nn.Module):
    def forward(self, x):
        return x.relu() if self.training else x.clamp(0, 6)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.SiLU(inplace=True), "silu"),
        (nn.ReLU(), "relu"),
        (GELUTanh(), "gelu_tanh"),
        (get_act_layer("swish")(), "silu"),
        (ACT2FN["gelu"], "gelu"),
        (ACT2FN["gelu_pytorch_tanh"], "gelu_tanh"),
        (nn.PReLU(init=0.0), None),
        (nn.Hardswish(), None),
        (nn.ReLU6(), None),
        (nn.Hardtanh(0, 20), None),
        (nn.Threshold(1e-3, 0), None),
        (ACT2FN["gelu_10"], None),
        (ClipsWhenItPredicts(), None),
        (nn.Dropout(0.5), None),
        (nn.RReLU(-0.5, 0.5), None),
        (nn.Softmax(-1), None),
        (nn.Identity(), None),
        (nn.Linear(257, 257), None),
        (nn.Bilinear(2, 2, 2), None),
        (nn.Flatten(), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_activations_are_known_by_what_they_do(module, expected):
    state = torch.get_rng_state()
    assert activation_of(module) == expected
    assert torch.equal(torch.get_rng_state(), state)


# --- how it runs ---


def operators(model, images):
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as seen:
        model(images)
    return {event.key: event.count for event in seen.key_averages()}


def test_the_activation_has_become_part_of_the_convolution(pvt):
    images = torch.randn(2, 3, 64, 96)
    before = operators(pvt, images)
    tc.accelerate_(pvt, (3, 64, 96))
    after = operators(pvt, images)
    assert before["aten::gelu"] == after["mkldnn::_convolution_pointwise"] == 5
    assert "aten::gelu" not in after
    assert isinstance(pvt.stages[0].blocks[0].mlp.act, FusedActivation)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_a_forced_implementation_is_the_one_that_runs(device):
    if device.type == "cpu":
        pytest.importorskip("triton")
    model = Tokens(through).to(device)
    images = torch.randn(1, 3, 3, 4, device=device)
    expected = model(images)
    tc.accelerate_(model, (3, 3, 4), impl="triton")
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert operators(model, images)["tokenconv::depthwise_conv"] == 1
    tc.decelerate_(model)
    assert "tokenconv::depthwise_conv" not in operators(model, images)


def test_the_one_asked_for_before_comes_back(vit):
    model = tc.insert_(vit, "mix_ffn", impl="conv2d")
    convs = [m for m in model.modules() if isinstance(m, tc.DWConv)]
    tc.accelerate_(model)
    assert {(m.impl, m.activation) for m in convs} == {("conv2d", "gelu")}
    tc.accelerate_(tc.decelerate_(model), impl="naive")
    assert {(m.impl, m.activation) for m in convs} == {("naive", "gelu")}
    tc.decelerate_(model)
    assert {(m.impl, m.activation) for m in convs} == {("conv2d", None)}


@pytest.mark.compile
@pytest.mark.parametrize("name", ["pvt_v2", "xcit"])
def test_it_compiles_as_before(name):
    case = FAMILIES[name]
    model, images = case.build(), case.images()
    with torch.no_grad():
        before = model(images)
        tc.accelerate_(model, (3, *case.size))
        torch._dynamo.reset()
        after = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_checkpoints_features_and_other_sizes(pvt):
    images = torch.randn(2, 3, 96, 64)
    before = pvt(images)
    maps = pvt.forward_intermediates(images, intermediates_only=True)
    tc.accelerate_(pvt, (3, 64, 96))
    pvt.set_grad_checkpointing()
    after = pvt.train()(images)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    after.sum().backward()
    again = pvt.eval().forward_intermediates(images, intermediates_only=True)
    torch.testing.assert_close(again, maps, rtol=1e-4, atol=1e-4)


def test_checkpoints_of_hybrids_do_not_know_of_it(vit, disturb_, tmp_path):
    plain = copy.deepcopy(vit)
    model = disturb_(tc.insert_(vit, "mix_ffn"))
    images = torch.randn(2, 3, 48, 80)
    with torch.no_grad():
        before = model(images)
        tc.accelerate_(model)
        tc.save(model, tmp_path / "hybrid")
        assert torch.equal(tc.load_(plain, tmp_path / "hybrid")(images), before)


# --- what is refused ---


def test_bad_calls(vit, pvt):
    with pytest.raises(tc.SurgeryError, match="is not accelerated"):
        tc.decelerate_(pvt)
    with pytest.raises(tc.SurgeryError, match="has no depthwise convolution over tokens to accel"):
        tc.accelerate_(vit)
    with pytest.raises(tc.UnknownNameError, match="unknown impl 'tritn': did you mean triton"):
        tc.accelerate_(pvt, impl="tritn")
    with pytest.raises(
        tc.SurgeryError, match=r"refuses an image of 5x64x96.*input_size=\(C, H, W\)"
    ):
        tc.accelerate_(pvt, (5, 64, 96))
    tc.accelerate_(pvt, (3, 64, 96))
    with pytest.raises(tc.SurgeryError, match="accelerated already; call decelerate_ first"):
        tc.accelerate_(pvt)
    with pytest.raises(tc.SurgeryError, match="is accelerated; call decelerate_ first"):
        tc.insert_(pvt, "mix_ffn")
    hybrid = tc.insert_(vit, "mix_ffn")
    tc.accelerate_(hybrid)
    for refused in (tc.remove_, lambda model: tc.freeze_grid_(model, (48, 80))):
        with pytest.raises(tc.SurgeryError, match="is accelerated; call decelerate_ first"):
            refused(hybrid)
    tc.remove_(tc.decelerate_(hybrid))


def test_nothing_is_changed_where_it_is_refused():
    model = timm.create_model("test_vit")
    classes = [type(module) for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(tc.SurgeryError):
        tc.accelerate_(model)
    assert [type(module) for module in model.modules()] == classes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
