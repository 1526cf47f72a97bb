"""Dense convolutions as pairs: exact where they must be, optimal elsewhere, undoable."""

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from torch import nn
from torch.nn.utils import prune
from torch.testing._internal.two_tensor import TwoTensor

import tokenconv as tc
from tokenconv.analysis import DecomposedConv, decompose, factorise, separability

ORDERS = ["dw_pw", "pw_dw"]
MODELS = {"resnet18": 64, "convnext_atto": 64, "test_vit": 160}


def conv_of(in_dim=6, out_dim=8, kernel_size=3, **options):
    return nn.Conv2d(in_dim, out_dim, kernel_size, **options).double()


@settings(deadline=None, max_examples=60)
@given(
    groups=st.sampled_from([1, 2]),
    widths=st.sampled_from([(4, 6), (6, 2), (2, 8)]),
    kernel=st.sampled_from([3, 5, (3, 1), (2, 4)]),
    stride=st.sampled_from([1, 2, (2, 1)]),
    padding=st.sampled_from([0, 1, (2, 1)]),
    dilation=st.sampled_from([1, 2]),
    bias=st.booleans(),
    order=st.sampled_from(ORDERS),
)
def test_all_pairs_together_are_the_convolution(
    groups, widths, kernel, stride, padding, dilation, bias, order
):
    conv = conv_of(*widths, kernel, stride=stride, padding=padding, dilation=dilation,
                   groups=groups, bias=bias)  # fmt: skip
    most = separability(conv.weight, groups=groups).spectra[order].values.shape[1]
    pair = decompose(conv, rank=most, order=order)
    x = torch.randn(2, widths[0], 11, 13, dtype=torch.float64)
    torch.testing.assert_close(pair(x), conv(x))
    assert pair.relative_error == 0
    for rank in range(1, most):
        part = decompose(conv, rank=rank, order=order)
        nearest = factorise(conv.weight, rank, order=order, groups=groups).expand()
        expected = copy.deepcopy(conv)
        expected.weight.data.copy_(nearest)
        torch.testing.assert_close(part(x), expected(x))
        lost = (nearest - conv.weight).norm() / conv.weight.norm()
        assert part.relative_error == pytest.approx(lost.item(), rel=1e-9)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular", "replicate"])
def test_paddings(order, padding, mode):
    conv = conv_of(3, 4, 3, padding=padding, padding_mode=mode)
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    rank = 4 if order == "dw_pw" else 3
    torch.testing.assert_close(decompose(conv, rank=rank, order=order)(x), conv(x))


def test_the_parts_are_plain_convolutions_in_the_order_asked_for():
    conv = conv_of(6, 8, stride=2)
    first = decompose(conv, rank=2)
    assert [name for name, _ in first.named_children()] == ["depthwise", "pointwise"]
    assert str(first.depthwise) == (
        "Conv2d(6, 12, kernel_size=(3, 3), stride=(2, 2), groups=6, bias=False)"
    )
    assert str(first.pointwise) == "Conv2d(12, 8, kernel_size=(1, 1), stride=(1, 1))"
    second = decompose(conv, rank=2, order="pw_dw")
    assert [name for name, _ in second.named_children()] == ["pointwise", "depthwise"]
    assert str(second.depthwise) == ("Conv2d(16, 8, kernel_size=(3, 3), stride=(2, 2), groups=8)")
    assert (first.rank, first.order, second.order) == (2, "dw_pw", "pw_dw")
    torch.testing.assert_close(first.factors().expand(), factorise(conv.weight, 2).expand())


def test_modes_and_frozen_weights_are_kept_and_no_random_number_is_drawn():
    conv = conv_of().eval().requires_grad_(False)
    state = torch.get_rng_state()
    pair = decompose(conv, rank=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not pair.training
    assert not any(p.requires_grad for p in pair.parameters())
    assert pair.pointwise.bias.data_ptr() != conv.bias.data_ptr()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("name", "size"), MODELS.items(), ids=MODELS)
def test_whole_models_are_equal_at_full_rank_and_come_back(name, size, order):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).double().eval()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    expected, keys = model(x), list(model.state_dict())
    done = [
        tc.decompose_(model, rank=rank, order=order, layers=[name])
        for name, rank in full_ranks(model, order).items()
    ]
    pairs = [module for module in model.modules() if isinstance(module, DecomposedConv)]
    assert len(pairs) == len(done) > 0
    assert all(pair.relative_error == 0 for pair in pairs)
    torch.testing.assert_close(model(x), expected)
    for each in reversed(done):
        each.undo_()
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), expected)


def full_ranks(model, order):
    """The full rank of every dense convolution."""
    return {
        name: min(m.weight.shape[0 if order == "dw_pw" else 1], m.weight[0, 0].numel())
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d) and m.groups == 1 and m.kernel_size != (1, 1)
    }


class Net(nn.Module):
    """One of each kind, and one convolution under two names."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.tied = self.again
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)

    def forward(self, x):
        return self.up(self.point(self.depthwise(self.tied(self.again(self.stem(x))))))


def test_what_is_passed_over_is_listed_with_its_reason():
    done = tc.decompose_(Net(), rank=2)
    assert list(done.layers) == ["stem", "again"]
    assert done.passed_over == {
        "depthwise": "depthwise already",
        "point": "1x1: it looks at one position",
        "up": "transposed",
    }
    line = tc.decompose_(nn.Sequential(nn.Conv1d(3, 4, 3), nn.Conv2d(3, 4, 3)), rank=1)
    assert line.passed_over == {"0": "Conv1d: only two dimensions are taken apart"}
    text = str(done)
    assert text.startswith("2 convolutions as dw_pw pairs, their parameters 808 -> ")
    assert "stem       rank 2 of 8, error 0." in text
    assert "up         kept: transposed" in text


def test_a_convolution_under_two_names_stays_one():
    model = Net()
    done = tc.decompose_(model, rank=1)
    assert model.again is model.tied
    assert isinstance(model.tied, DecomposedConv)
    dense = done.undo_()
    assert dense.again is dense.tied
    assert isinstance(dense.tied, nn.Conv2d)


def test_only_what_saves_is_changed_where_the_rank_is_chosen():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.again.weight.copy_(factorise(model.again.weight, 1, order="pw_dw").expand())
    x = torch.randn(1, 3, 16, 16)
    expected = model(x)
    done = tc.decompose_(model, energy=0.999, order="pw_dw")
    assert {name: layer.rank for name, layer in done.layers.items()} == {"again": 1}
    assert done.layers["again"].macs == (8 * 8 * 9, 8 * 8 + 8 * 9)
    assert done.layers["again"].params == (8 * 8 * 9 + 8, 8 * 8 + 8 * 9 + 8)
    assert done.passed_over["stem"] == "3 of 3 pairs would take 2.33x the MACs"
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_arithmetic_agrees_with_what_is_counted(order):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2))
    before = tc.cost(model, (4, 8, 12))
    layer = tc.decompose_(model, rank=2, order=order).layers["0"]
    after = tc.cost(model, (4, 8, 12))
    positions = 4 * 6
    assert (before.macs, after.macs) == (layer.macs[0] * positions, layer.macs[1] * positions)
    assert (before.params, after.params) == layer.params


def test_hooks_of_a_place_stay_at_it():
    model = Net()
    seen = []
    hook = model.stem.register_forward_hook(lambda module, args, out: seen.append(type(module)))
    done = tc.decompose_(model, rank=1, images=torch.randn(4, 3, 16, 16))
    seen.clear()
    model(torch.randn(1, 3, 16, 16))
    done.undo_()
    model(torch.randn(1, 3, 16, 16))
    assert seen == [DecomposedConv, nn.Conv2d]
    hook.remove()
    model(torch.randn(1, 3, 16, 16))
    assert len(seen) == 2


@pytest.mark.parametrize("order", ORDERS)
def test_images_bring_the_outputs_nearer(order):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2)
    )
    images, unseen = nn.functional.avg_pool2d(torch.randn(16, 3, 40, 40), 9, 1).chunk(2)
    dense = copy.deepcopy(model).eval()
    plain, fitted = copy.deepcopy(model).eval(), model.eval()
    tc.decompose_(plain, rank=1, order=order)
    fitted[1].train()
    done = tc.decompose_(fitted, rank=1, order=order, images=images)
    assert fitted[1].training
    for layer in done.layers.values():
        assert layer.fit.after < layer.fit.before
    fitted.eval()
    with torch.no_grad():
        wanted = dense(unseen)
        errors = [(each(unseen) - wanted).norm() / wanted.norm() for each in (plain, fitted)]
    assert errors[1] < errors[0]
    assert torch.equal(done.undo_()(unseen), wanted)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_the_fit_is_the_least_squares_solution(order, bias):
    torch.manual_seed(0)
    conv = conv_of(4, 5, padding=1, bias=bias)
    model = nn.Sequential(conv)
    x = torch.randn(6, 4, 9, 8, dtype=torch.float64)
    wanted = conv(x).detach()
    fit = tc.decompose_(model, rank=1, order=order, images=x).layers["0"].fit
    pair = model[0]
    loss = (pair(x) - wanted).square().sum()
    gradients = torch.autograd.grad(loss, list(pair[1].parameters()))
    assert len(gradients) == 1 + bias
    assert str(fit) == f"{fit.before:.3f} -> {(loss / wanted.square().sum()).item() ** 0.5:.3f}"
    scale = wanted.square().sum()
    assert all(gradient.abs().max() < 1e-4 * scale for gradient in gradients)


def test_too_few_images_do_not_fit_a_layer():
    model = Net()
    done = tc.decompose_(model, rank=2, images=torch.randn(1, 3, 4, 4))
    assert all(layer.fit is None for layer in done.layers.values())


def test_a_failed_fit_leaves_the_dense_model():
    model = Net()
    before = {name: type(m) for name, m in model.named_modules()}
    with pytest.raises(tc.AnalysisError, match=r"the model refuses images \(1, 5, 8, 8\)"):
        tc.decompose_(model, rank=1, images=torch.randn(1, 5, 8, 8))
    assert {name: type(m) for name, m in model.named_modules()} == before


def test_undo_refuses_a_model_that_was_changed_meanwhile():
    model = Net()
    done = tc.decompose_(model, rank=1)
    model.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    with pytest.raises(tc.AnalysisError, match="stem is no longer what decompose_ put there"):
        done.undo_()
    assert isinstance(model.again, DecomposedConv)
    del model.stem
    with pytest.raises(tc.AnalysisError, match="stem is no longer what decompose_ put there"):
        done.undo_()


def test_it_trains_and_compiles_and_exports():
    model = Net()
    tc.decompose_(model, rank=2)
    x = torch.randn(2, 3, 16, 16)
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.stem.parameters())
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


def computed(kind):
    conv = nn.Conv2d(3, 8, 3)
    if kind == "parametrisation":
        return nn.utils.parametrizations.spectral_norm(conv)
    prune.random_unstructured(conv, "weight", 0.5)  # a hook writes the weight before each pass
    return conv


@pytest.mark.parametrize("kind", ["parametrisation", "hook"])
def test_a_weight_that_is_computed_stays_so(kind):
    model = nn.Sequential(computed(kind), nn.Conv2d(8, 4, 3))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    done = tc.decompose_(model, rank=1)
    assert list(done.layers) == ["1"]
    assert done.passed_over["0"].startswith("its weight is computed")
    model(torch.randn(1, 3, 8, 8))
    done.undo_()
    assert torch.equal(model[1].weight, state["1.weight"])
    with pytest.raises(tc.AnalysisError, match=r"no dense convolution, but 0: its weight is"):
        tc.decompose_(nn.Sequential(model[0]), rank=1)


def test_looking_at_a_spectral_norm_does_not_iterate_it():
    model = nn.Sequential(computed("parametrisation"))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    tc.analysis.analyze(model, (3, 8, 8))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_weight_that_two_convolutions_share_stays_one():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, dilation=2), nn.Conv2d(4, 4, 3))
    model[1].weight = model[0].weight
    done = tc.decompose_(model, rank=1)
    assert list(done.layers) == ["2"]
    assert set(done.passed_over) == {"0", "1"}
    assert "shares its weight" in done.passed_over["0"]


@pytest.mark.parametrize("order", ORDERS)
def test_pairs_are_not_taken_apart_again(order):
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    tc.decompose_(model, rank=3, order=order)
    with pytest.raises(tc.AnalysisError, match=r"0\.depthwise: depthwise already"):
        tc.decompose_(model, rank=1, order=order)


def test_a_stem_for_grey_images_is_dense():
    done = tc.decompose_(nn.Sequential(nn.Conv2d(1, 32, 3)), rank=2)
    assert done.layers["0"].full_rank == 9
    assert done.layers["0"].macs == (32 * 9, 2 * (9 + 32))


class OfItsOwn(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(2 * input, weight, bias)


@pytest.mark.parametrize(
    "conv",
    [Conv2dSame(3, 8, 3, stride=2), OfItsOwn(3, 8, 3), nn.ConvTranspose2d(3, 8, 3),
     nn.Conv1d(3, 8, 3), nn.Linear(3, 8)],
)  # fmt: skip
def test_what_does_not_compute_as_a_convolution_is_not_taken_for_one(conv):
    with pytest.raises(tc.AnalysisError, match=f"expected an nn.Conv2d .* {type(conv).__name__}"):
        decompose(conv, rank=1)


def test_a_forward_that_was_replaced_is_kept():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    model[0].forward = lambda x: torch.zeros(len(x), 4, 8, 8)
    done = tc.decompose_(model, rank=1)
    assert done.passed_over == {"0": "Conv2d computes its convolution in a way of its own"}


def test_what_saves_nothing_is_kept():
    conv = nn.Conv2d(2, 18, 3)
    error = separability(conv.weight).spectra["dw_pw"].errors[5]
    model = nn.Sequential(conv)
    done = tc.decompose_(model, max_error=error)  # 6 * (9 + 18) == 9 * 18
    assert done.passed_over == {"0": "6 of 9 pairs would take 1.00x the MACs"}
    assert model[0] is conv


def test_backward_hooks_of_a_place_stay_at_it_too():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    seen = []
    model[0].register_full_backward_hook(lambda module, *gradients: seen.append(type(module)))
    tc.decompose_(model, rank=1)
    model(torch.randn(1, 3, 8, 8, requires_grad=True)).sum().backward()
    assert seen == [DecomposedConv]


class Again(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.conv(x), self.conv(5 + x.flip(1))


def test_what_runs_twice_is_fitted_to_what_it_sees_first():
    model = Again()
    once = nn.Sequential(copy.deepcopy(model.conv))
    images = torch.randn(4, 3, 9, 9)
    for each in (model, once):
        tc.decompose_(each, rank=1, images=images)
    assert torch.equal(model.conv.pointwise.weight, once[0].pointwise.weight)


def test_as_many_positions_as_unknowns_are_enough():
    images = torch.randn(1, 3, 4, 4)  # 2x2 positions; 3 weights and a bias
    layer = tc.decompose_(nn.Sequential(nn.Conv2d(3, 8, 3)), rank=1, images=images).layers["0"]
    assert layer.fit.after < 0.01 < layer.fit.before


@pytest.mark.parametrize(
    ("order", "rank", "dtype"), [("dw_pw", 9, torch.bfloat16), ("pw_dw", 3, torch.float16)]
)
def test_a_fit_makes_nothing_worse(order, rank, dtype):
    """Exact but for rounding, on smooth images, whose features are nearly collinear."""
    for seed in range(8):
        torch.manual_seed(seed)
        images = nn.functional.avg_pool2d(torch.randn(4, 3, 30, 30), 15, 1).to(dtype)
        model = nn.Sequential(nn.Conv2d(3, 9, 3)).to(dtype)
        fit = tc.decompose_(model, rank=rank, order=order, images=images).layers["0"].fit
        assert fit.after <= fit.before


def test_undo_follows_what_became_of_the_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    done = tc.decompose_(model, rank=1)
    model.double().eval()
    done.undo_()
    assert model(torch.randn(1, 3, 8, 8, dtype=torch.float64)).dtype == torch.float64
    assert not model[0].training


def test_a_bias_may_learn_by_itself():
    conv = nn.Conv2d(3, 4, 3)
    conv.weight.requires_grad_(False)
    learns = {n: p.requires_grad for n, p in decompose(conv, rank=1).named_parameters()}
    assert learns == {
        "depthwise.weight": False, "pointwise.weight": False, "pointwise.bias": True,
    }  # fmt: skip


def test_code_that_asks_a_stem_for_its_dtype():
    conv = nn.Conv2d(3, 4, 3).bfloat16()
    pair = decompose(conv, rank=4)
    assert pair.weight.dtype == torch.bfloat16
    torch.testing.assert_close(pair.weight, conv.weight, rtol=0.02, atol=0.01)
    assert "weight" not in pair.state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_fitted_without_overflow(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3)).to(dtype)
    images = nn.functional.avg_pool2d(torch.randn(8, 3, 30, 30), 5, 1)
    fit = tc.decompose_(model, rank=1, images=(2000 * images).to(dtype)).layers["0"].fit
    assert 0 < fit.after < fit.before < 1
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_kernel_without_energy_has_no_error():
    model = nn.Sequential(nn.Conv2d(3, 8, 3)).half()
    nn.init.zeros_(model[0].weight)
    layer = tc.decompose_(model, rank=1, images=torch.randn(8, 3, 20, 20).half()).layers["0"]
    assert (layer.relative_error, layer.fit.after) == (0, 0)


def test_images_that_are_not_finite_leave_the_dense_model():
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    images = torch.randn(8, 3, 20, 20)
    images[0, 0, 0, 0] = float("nan")
    with pytest.raises(tc.AnalysisError, match="they lead to values that are not finite"):
        tc.decompose_(model, rank=1, images=images)
    assert isinstance(model[0], nn.Conv2d)


class OfTwo(nn.Module):
    """Takes more than images."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x, y):
        return self.conv(x) + y


def test_a_model_of_more_than_images_is_told():
    model = OfTwo()
    with pytest.raises(tc.AnalysisError, match=r"refuses images .* required positional argument"):
        tc.decompose_(model, rank=1, images=torch.randn(4, 3, 8, 8))
    assert isinstance(model.conv, nn.Conv2d)
    with pytest.raises(tc.MeasurementError, match="required positional argument"):
        tc.analysis.analyze(model, (3, 8, 8))


def test_an_interrupted_fit_leaves_the_dense_model_and_its_modes():
    model = Net()
    model.point.eval()
    modes = [m.training for m in model.modules()]

    def interrupt(module, args):
        raise KeyboardInterrupt

    with model.up.register_forward_pre_hook(interrupt), pytest.raises(KeyboardInterrupt):
        tc.decompose_(model, rank=1, images=torch.randn(4, 3, 16, 16))
    assert isinstance(model.stem, nn.Conv2d)
    assert [m.training for m in model.modules()] == modes
    assert not model.stem._forward_pre_hooks


def test_nothing_new_lands_on_a_default_device():
    """As on a GPU: what is made along the way has to be where the model is."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8))
    images = torch.randn(8, 3, 20, 20)
    analysis = tc.analysis
    with torch.device("meta"):
        assert 0 < analysis.separability(model[0].weight).of_random["dw_pw"] < 1
        kernels = analysis.depthwise_kernels(model)[0]
        assert len(kernels.to_dict()["off_centre"]) == 3
        assert tc.decompose_(model, rank=1, images=images).layers["0"].fit
        assert analysis.radius(analysis.effective_receptive_field(model, images)) > 0


def broken(change):
    model = Net()
    change(model)
    return model


def set_nan(model):
    model.again.weight.data[0, 0, 0, 0] = float("nan")


def quantise(model):
    kind = torch.ao.nn.quantized.Conv2d
    model.stem = kind.__new__(kind)  # PyTorch warns of its own quantised tensors
    nn.Module.__init__(model.stem)
    model.stem.kernel_size = (3, 3)


def round_off(model):
    model.stem.weight = nn.Parameter(model.stem.weight.round().int(), requires_grad=False)


def wrap(model):
    """As torchao's and FSDP's weights are."""
    model.stem.weight = nn.Parameter(TwoTensor(model.stem.weight, model.stem.weight))


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (Net, {"rank": 9}, "cannot take stem apart: expected a rank from 1 to 8, got 9"),
        (Net, {"rank": 0}, "cannot take stem apart: expected a rank from 1 to 8, got 0"),
        (Net, {"energy": 1.5}, "cannot take stem apart: expected 0 < energy <= 1, got 1.5"),
        (Net, {}, "expected one of rank, energy and max_error"),
        (Net, {"rank": 1, "energy": 0.9}, "expected one of rank, energy and max_error"),
        (Net, {"rank": 1, "order": "both"}, "unknown order 'both': expected one of dw_pw, pw_dw"),
        (Net, {"rank": 1, "layers": "head"}, "unknown dense convolution 'head': .* again, stem"),
        (Net, {"rank": 1, "layers": ["stom"]}, "unknown dense convolution 'stom': .* stem"),
        (Net, {"rank": 1, "layers": "("}, "is no regular expression"),
        (lambda: broken(set_nan), {"rank": 1}, "the weight of again holds 1 values that are not"),
        (lambda: broken(quantise), {"rank": 1}, "stem is a quantised Conv2d"),
        (lambda: broken(round_off), {"rank": 1}, r"stem has a weight of torch\.int32; expected fl"),
        (lambda: broken(wrap), {"rank": 1}, "the weight of stem is a TwoTensor; expected a plain"),
        (lambda: nn.Sequential(nn.LazyConv2d(8, 3)), {"rank": 1}, "0 has no values: it was never"),
        (lambda: nn.Conv2d(3, 8, 3), {"rank": 1}, "a convolution itself; use decompose"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 1)), {"rank": 1}, "has no dense convolution"),
        (lambda: Net().to("meta"), {"rank": 1}, "stem has no values: it is on the meta device"),
    ],
)  # fmt: skip
def test_bad_requests_leave_the_model_as_it_was(model, arguments, message):
    model = model()
    before = {name: type(m) for name, m in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        tc.decompose_(model, **arguments)
    assert {name: type(m) for name, m in model.named_modules()} == before
