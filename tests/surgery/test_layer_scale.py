"""Blocks beside a module whose output timm scales: the scale is for the model's own output."""

import copy
import pickle

import pytest
import timm
import torch
from timm.layers import LayerScale
from timm.models import create_feature_extractor

import tokenconv as tc

ARCHITECTURES = {
    "dinov2": ("vit_small_patch14_reg4_dinov2", {"patch_size": 16, "img_size": (48, 80)}, 5),
    "deit3": ("deit3_small_patch16_224", {"img_size": (48, 80)}, 1),
}


@pytest.fixture(params=ARCHITECTURES)
def plain(request):
    name, kwargs, prefix = ARCHITECTURES[request.param]
    torch.manual_seed(0)
    model = timm.create_model(
        name, embed_dim=48, num_heads=3, depth=2, num_classes=5, **kwargs
    ).double()
    for module in model.modules():
        if isinstance(module, LayerScale):
            module.gamma.data.uniform_(0.1, 0.5)
    model.grid = tc.TokenGrid((3, 5), prefix)
    return model.eval()


@pytest.fixture
def hybrid(plain, disturb_):
    plan = tc.plan(plain, "convpass", site="beside_attn") + tc.plan(plain, "separable_ffn")
    assert [edit.place.layer_scale for edit in plan.edits] == [
        "blocks.0.ls1", "blocks.1.ls1", "blocks.0.ls2", "blocks.1.ls2",
    ]  # fmt: skip
    assert tc.Plan.from_json(plan.to_json()) == plan
    return disturb_(tc.insert_(copy.deepcopy(plain), plan))


def images():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 3, 48, 80, generator=generator, dtype=torch.float64)


def literal(plain, hybrid, x):
    """timm's block, with the branches outside LayerScale, as the adapters' papers have them."""
    x = plain.norm_pre(plain._pos_embed(plain.patch_embed(x)))
    for block, ours in zip(plain.blocks, hybrid.blocks, strict=True):
        normed = block.norm1(x)
        x = x + block.ls1.gamma * block.attn(normed) + ours.attn.beside(normed, plain.grid)
        normed = block.norm2(x)
        x = x + block.ls2.gamma * block.mlp(normed) + ours.mlp.beside(normed, plain.grid)
    return plain.forward_head(plain.norm(x))


def test_the_branch_is_spared(plain, hybrid):
    hybrid.load_state_dict(plain.state_dict(), strict=True)
    branches = [p for n, p in hybrid.named_parameters() if ".beside." in n]
    results = []
    for out in (hybrid(images()), literal(plain, hybrid, images())):
        results.append([out, *torch.autograd.grad(out.sin().sum(), branches)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_insertion_is_exact_and_undone(plain):
    keys = list(plain.state_dict())
    with torch.no_grad():
        before = plain(images())
        tc.insert_(plain, "separable_ffn", site="beside_attn")
        assert torch.equal(plain(images()), before)
        assert [key for key in plain.state_dict() if ".beside." not in key] == keys
        tc.remove_(plain)
        assert torch.equal(plain(images()), before)
    scales = [m for m in plain.modules() if isinstance(m, LayerScale)]
    assert {type(scale) for scale in scales} == {LayerScale}
    assert not any("_binding" in vars(scale) for scale in scales)


def test_checkpointed_gradients_copies_and_pickles(hybrid):
    expected = hybrid(images())
    for twin in (copy.deepcopy(hybrid), pickle.loads(pickle.dumps(hybrid))):
        assert torch.equal(twin(images()), expected)
    gradients = []
    for checkpointing in (False, True):
        hybrid.train().set_grad_checkpointing(checkpointing)
        hybrid.zero_grad()
        torch.manual_seed(5)  # adapters have dropout
        hybrid(images()).sin().sum().backward()
        gradients.append([p.grad.clone() for p in hybrid.parameters() if p.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_compiled_exported_and_traced_by_fx(hybrid):
    torch._dynamo.reset()
    with torch.no_grad():
        expected = hybrid(images())
        compiled = torch.compile(hybrid, fullgraph=True, backend="aot_eager")(images())
        exported = torch.export.export(hybrid, (images(),)).module()(images())
        for ours in (compiled, exported):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
        extractor = create_feature_extractor(hybrid, ["norm"])
        torch.testing.assert_close(
            extractor(images())["norm"], hybrid.forward_features(images()), rtol=1e-9, atol=1e-11
        )
    torch._dynamo.reset()


def test_a_saved_hybrid_comes_back(plain, hybrid, tmp_path):
    tc.save(hybrid, tmp_path)
    with torch.no_grad():
        assert torch.equal(tc.load_(plain, tmp_path)(images()), hybrid(images()))


def test_it_cannot_be_scripted(plain):
    tc.insert_(plain, "separable_ffn")
    with pytest.raises(tc.SurgeryError, match="spared by the LayerScale"):
        tc.freeze_grid_(plain, (48, 80))


@pytest.mark.parametrize("family", ["beit", "cait", "xcit"])
def test_scales_that_are_no_module_stay_around_both(families, family):
    case = families[family]
    plan = tc.plan(case.build(), "separable_ffn", input_size=(3, *case.size))
    assert {edit.place.layer_scale for edit in plan.edits} == {None}
