"""What holds after an insertion, on every kind of model."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models._features_fx import create_feature_extractor
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import nn

import tokenconv as tc


def blocks_of(model):
    return [m for n, m in model.named_modules() if n.rpartition(".")[0].endswith("blocks")]


def outputs_of_blocks(model, images):
    outputs = []
    handles = [
        block.register_forward_hook(lambda m, a, out: outputs.append(out))
        for block in blocks_of(model)
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_logits_are_bit_equal(case, dtype, batch):
    model = case.build().to(dtype)
    images = case.images(batch, dtype)
    with torch.no_grad():
        before = model(images)
        assert tc.insert_(model, "mix_ffn") is model
        assert torch.equal(model(images), before)


def test_training_output_and_gradients_are_bit_equal(case):
    plain = case.build().train()
    hybrid = tc.insert_(copy.deepcopy(plain), "mix_ffn")
    results = []
    for model in (plain, hybrid):
        out = model(case.images())
        out.square().sum().backward()
        own = {n: p.grad for n, p in model.named_parameters()}
        results.append((out, own))
    assert torch.equal(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, rtol=1e-5, atol=1e-6)


def test_a_random_kernel_acts_from_its_block_on(case, disturb_):
    model = case.build()
    images = case.images()
    before = outputs_of_blocks(model, images)
    chosen = 1
    tc.insert_(model, "mix_ffn", blocks=chosen)
    disturb_(model, std=0.5)
    after = outputs_of_blocks(model, images)
    assert all(torch.equal(a, b) for a, b in zip(before[:chosen], after[:chosen], strict=True))
    for a, b in zip(before[chosen:], after[chosen:], strict=True):
        assert (a - b).abs().max() > 1e-2
    prefix = slice(0, case.num_prefix_tokens)
    assert torch.equal(before[chosen][:, prefix], after[chosen][:, prefix])


def test_the_inserted_mlp_computes_the_formula(case, disturb_):
    """Every MLP against a literal one, on its own input: row-major grid, H != W, prefix tokens."""
    model = case.build().double()
    tc.insert_(model, "mix_ffn", kernel_size=5)
    disturb_(model, std=0.5)
    seen = []
    mlps = [m for m in model.modules() if isinstance(m, Mlp | MlpWithDepthwiseConv)]
    for mlp in mlps:
        mlp.register_forward_hook(lambda m, args, out: seen.append((m, args, out)))
    with torch.no_grad():
        model(case.images(dtype=torch.float64))
        assert len(seen) == len(mlps) > 0
        for mlp, (x, *feat_size), out in seen:
            if isinstance(mlp, Mlp):
                patch = model.patch_embed.patch_size[0]
                rows, cols = case.size[0] // patch, case.size[1] // patch
                conv, own, own_bias = mlp.act.before, 0, 0
                act = mlp.act.act
                start = mlp.fc1(x)
            else:
                ((rows, cols),) = feat_size
                conv = mlp.dwconv.added
                own, own_bias = F.pad(mlp.dwconv.weight, [1] * 4), mlp.dwconv.bias
                act, start = mlp.act, mlp.relu(mlp.fc1(x))
            prefix, grid = start.split([start.shape[1] - rows * cols, rows * cols], dim=1)
            fmap = grid.reshape(len(x), rows, cols, -1).permute(0, 3, 1, 2).contiguous()
            convolved = F.conv2d(
                fmap, conv.weight + own, conv.bias + own_bias, padding=2, groups=fmap.shape[1]
            )
            if isinstance(mlp, Mlp):
                convolved = convolved + fmap
            hidden = torch.cat([prefix, convolved.flatten(2).transpose(1, 2)], dim=1)
            torch.testing.assert_close(mlp.fc2(act(hidden)), out, rtol=1e-9, atol=1e-9)


def test_gradients_reach_every_inserted_parameter(case, inserted_parameters):
    model = tc.insert_(case.build(), "mix_ffn")
    # Features, because with class-token pooling no logit depends on the last block's grid tokens.
    model.forward_features(case.images()).sin().sum().backward()
    found = inserted_parameters(model)
    assert len(found) == 2 * len(blocks_of(model))
    for name, parameter in found.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        assert parameter.requires_grad, name


def test_original_checkpoints_load_strictly(case, inserted_parameters):
    source = case.build()
    checkpoint = {k: v + 0.1 for k, v in source.state_dict().items()}
    model = tc.insert_(case.build(), "mix_ffn", kernel_size=5)
    for parameter in inserted_parameters(model).values():
        nn.init.constant_(parameter, 0.25)
    result = model.load_state_dict(checkpoint, strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    state = model.state_dict()
    for key, value in checkpoint.items():
        assert torch.equal(state[key], value), key
    assert all((p == 0.25).all() for p in inserted_parameters(model).values())


def test_incomplete_checkpoints_are_still_refused(vit):
    model = tc.insert_(vit, "mix_ffn")
    state = model.state_dict()
    own = {k: v for k, v in state.items() if ".act.before." not in k}
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.1\.mlp\.act\.before\.bias"):
        model.load_state_dict(
            {k: v for k, v in state.items() if k != "blocks.1.mlp.act.before.bias"}
        )
    with pytest.raises(RuntimeError, match=r"Missing key.*: \"head\.bias\"\. *$"):
        model.load_state_dict({k: v for k, v in own.items() if k != "head.bias"})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**state, "blocks.1.mlp.act.before.scale": torch.ones(1)})


def test_hybrid_checkpoints_load_strictly(case, disturb_):
    trained = tc.insert_(case.build(), "mix_ffn")
    disturb_(trained, std=1.0)
    fresh = tc.insert_(case.build(), "mix_ffn")
    fresh.load_state_dict(trained.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(fresh(case.images()), trained(case.images()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_remove_restores_everything(case, dtype, disturb_):
    model = case.build().to(dtype)
    images = case.images(dtype=dtype)
    with torch.no_grad():
        before = model(images)
    state = copy.deepcopy(model.state_dict())
    layout, attributes = str(model), set(vars(model))
    tc.insert_(model, "mix_ffn", kernel_size=5)
    disturb_(model, std=1.0)
    assert tc.remove_(model) is model
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[k], v) for k, v in state.items())
    with torch.no_grad():
        assert torch.equal(model(images), before)
    assert str(model) == layout
    assert set(vars(model)) == attributes
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_post_hooks")
    assert not any(getattr(m, hook) for m in model.modules() for hook in hooks)


def test_copies_and_pickles_are_whole_and_independent(case, disturb_):
    model = tc.insert_(case.build(), "mix_ffn")
    disturb_(model, std=0.5)
    images = case.images()
    with torch.no_grad():
        expected = model(images)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(images), expected)
            tc.remove_(twin)
            assert torch.equal(model(images), expected)
            assert not torch.equal(twin(images), expected)


def test_modules_follow_the_model_to_its_dtype_mode_and_device(case):
    model = case.build().double()
    tc.insert_(model, "mix_ffn")
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert not any(m.training for m in model.modules())
    training = tc.insert_(case.build().train(), "mix_ffn")
    assert all(m.training for m in training.modules())
    on_meta = tc.insert_(case.build().to("meta"), "mix_ffn")
    assert all(p.is_meta for p in on_meta.parameters())


def test_insertion_draws_no_random_numbers(case):
    model = case.build()
    state = torch.get_rng_state()
    tc.insert_(model, "mix_ffn")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.needs("timm", "1.0.24", "has a ViT whose init_weights() refuses to run")
def test_init_weights_leaves_inserted_kernels_at_identity(vit, inserted_parameters, disturb_):
    tc.insert_(vit, "mix_ffn")
    disturb_(vit, std=1.0)
    for mode in ("jax", "moco", "reset"):
        vit.init_weights(mode)
        assert not any(p.any() for p in inserted_parameters(vit).values()), mode


# Every kind compiles in `make test-all`; the first three stand for them in `make test`.
COMPILED = ["vit", "qk-norm", "pvt_v2"] + [
    pytest.param(name, marks=pytest.mark.slow)
    for name in (
        "no class token",
        "distilled",
        "registers and LayerScale",
        "dynamic size",
        "pvt_v2 linear",
    )
]


@pytest.mark.compile
@pytest.mark.parametrize("case", COMPILED, indirect=True)
def test_compiled_logits_are_equal(case):
    plain = case.build()
    images = case.images()
    with torch.no_grad():
        expected = torch.compile(plain, fullgraph=True)(images)
        torch._dynamo.reset()
        hybrid = torch.compile(tc.insert_(plain, "mix_ffn"), fullgraph=True)(images)
    torch._dynamo.reset()
    scale = expected.abs().max()
    torch.testing.assert_close(hybrid / scale, expected / scale, rtol=0, atol=1e-6)


def test_feature_extractors_see_the_same(case, disturb_):
    model = tc.insert_(case.build(), "mix_ffn", kernel_size=5)
    disturb_(model, std=0.5)
    images = case.images()
    with torch.no_grad():
        (out,) = create_feature_extractor(model, ["head"])(images).values()
        expected = model.forward_head(model.forward_features(images))
    if case.architecture.startswith("deit"):
        return  # its logits are the mean of two heads
    assert torch.equal(out, expected)


def test_traced_model_computes_the_same(vit, disturb_):
    tc.insert_(vit, "mix_ffn")
    disturb_(vit, std=0.5)
    images = torch.randn(2, 3, 48, 80)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates tracing, and warns of shapes in it
        traced = torch.jit.trace(vit, images)
        torch.testing.assert_close(traced(images), vit(images), rtol=1e-4, atol=1e-5)


def test_insertion_under_inference_mode_can_be_trained(case, inserted_parameters):
    model = case.build()
    with torch.inference_mode():
        plan = tc.plan(model, "mix_ffn")
        tc.insert_(model, plan)
    assert plan.added_macs > 0 or case.architecture.startswith("pvt")
    model.forward_features(case.images()).sin().sum().backward()
    assert all(p.grad is not None for p in inserted_parameters(model).values())


def test_hooks_of_the_user_stay_and_see_real_forwards_only(case):
    model = case.build()
    seen = []
    act = next(m for n, m in model.named_modules() if n.endswith("mlp.act"))
    for module in (model.patch_embed, model, act):
        module.register_forward_hook(lambda m, a, out: seen.append(out.mean().item()))
    tc.cost(model, (3, *case.size))
    tc.insert_(model, "mix_ffn")
    assert not seen
    with torch.no_grad():
        model(case.images())
        assert len(seen) == 3
        tc.remove_(model)
        model(case.images())
    assert len(seen) == 6


def test_a_failure_half_way_leaves_the_model_as_it_was(case, monkeypatch):
    model = case.build()
    layout, attributes = str(model), set(vars(model))
    place, calls = nn.Module.set_submodule, []

    def fail_once(self, target, module, *args):
        if self is model:
            calls.append(target)
            if len(calls) == 2:
                raise MemoryError("planted")
        return place(self, target, module, *args)

    monkeypatch.setattr(nn.Module, "set_submodule", fail_once)
    with pytest.raises(MemoryError, match="planted"):
        tc.insert_(model, "mix_ffn")
    assert str(model) == layout
    assert set(vars(model)) == attributes


def test_plain_checkpoint_of_a_model_inside_another(vit, pvt):
    parent = nn.ModuleDict({"teacher": vit, "student": copy.deepcopy(vit), "other": pvt})
    checkpoint = copy.deepcopy(parent.state_dict())
    tc.insert_(parent["student"], "mix_ffn")
    tc.insert_(parent["teacher"], "mix_ffn", blocks=[1, 2])
    parent.load_state_dict(checkpoint, strict=True)
    state = parent.state_dict()
    # A hybrid checkpoint of the teacher that lacks a whole site is no plain one.
    broken = {k: v for k, v in state.items() if not k.startswith("teacher.blocks.1.mlp.act.before")}
    with pytest.raises(RuntimeError, match=r"Missing key.*teacher\.blocks\.1\.mlp\.act\.before"):
        parent.load_state_dict(broken, strict=True)
