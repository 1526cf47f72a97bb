"""What a second pair of eyes found."""

import copy
import json

import pytest
import torch
from torch import nn

import tokenconv as tc
from tokenconv.surgery.edits import inserted_modules


@pytest.fixture
def images():
    return torch.randn(2, 3, 48, 80, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("site", ["before_act", "after_block", "replace_attn", "beside_mlp"])
def test_none_goes_to_a_convolution_only(vit, site):
    with pytest.raises(tc.SurgeryError, match=f"'none' has no form for {site}"):
        tc.plan(vit, "none", site=site)


def test_two_plans_for_the_own_convolution_are_a_conflict(pvt):
    first, second = tc.plan(pvt, "mix_ffn"), tc.plan(pvt, "none", allow_change=True)
    for joined in ((first, second), (second, first)):
        with pytest.raises(
            tc.SurgeryError, match=r"cannot both go to stages.0.blocks.0.mlp.dwconv"
        ):
            _ = joined[0] + joined[1]


def test_the_order_of_plans_does_not_matter(vit, images):
    replaced = tc.plan(vit, "separable_ffn", site="replace_attn", allow_change=True)
    before = tc.plan(vit, "peg", site="before_attn")
    for plan in (replaced + before, before + replaced):
        model = tc.insert_(copy.deepcopy(vit), plan)
        assert "blocks.0.attn.before" in inserted_modules(model)
        assert "blocks.0.attn.instead" in inserted_modules(model)
        with torch.no_grad():
            assert model(images).isfinite().all()
            assert torch.equal(tc.remove_(model)(images), vit(images))


@pytest.mark.parametrize(
    "change",
    [
        {"edits": []},
        {"allow_change": "false"},
        {"input_size": [3, 64]},
        {"input_size": "364"},
        {"skipped": [1]},
        {"model_class": None},
    ],
    ids=str,
)
def test_plans_of_other_types_are_refused(vit, change):
    content = json.loads(tc.plan(vit, "mix_ffn").to_json())
    with pytest.raises(tc.SurgeryError, match="this is no plan of tokenconv"):
        tc.Plan.from_json(json.dumps({**content, **change}))


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("site", "before_act_", tc.UnknownNameError),
        ("block", "mix_fnn", tc.UnknownNameError),
        ("block", 5, tc.SurgeryError),
        ("kwargs", None, tc.SurgeryError),
        ("exact", "no", tc.SurgeryError),
        ("added_params", "x", tc.SurgeryError),
    ],
)
def test_edits_of_other_types_are_refused(vit, key, value, error):
    content = json.loads(tc.plan(vit, "mix_ffn").to_json())
    content["edits"][0][key] = value
    with pytest.raises(error):
        tc.Plan.from_json(json.dumps(content))


def test_a_compiled_wrapper_can_be_changed_and_changed_back(vit, images):
    with torch.no_grad():
        before = vit(images)
        wrapper = torch.compile(vit, backend="eager")
        tc.insert_(wrapper, "mix_ffn")
        tc.remove_(wrapper)
        assert "_tokenconv" not in vars(wrapper)
        assert torch.equal(vit(images), before)
        tc.insert_(vit, "mix_ffn")


def test_slices_of_a_list_are_named_as_torch_names_them(families):
    model = families["eva"].build()
    plain = list(model.blocks[1:]._modules)
    tc.insert_(model, "mix_ffn")
    part = model.blocks[1:]
    assert list(part._modules) == plain == ["0"]
    part.append(nn.Identity())
    assert len(part) == 2


def test_attributes_set_on_bound_blocks_reach_the_blocks(vit, images):
    tc.insert_(vit, "mix_ffn")
    vit.patch_embed(images)
    for block in vit.blocks:
        block.mark = 1
        block.drop_path1 = nn.Dropout(0.5)
    assert all(b.mark == 1 and isinstance(b.drop_path1, nn.Dropout) for b in vit.blocks)


def test_a_child_that_somebody_deleted_does_not_stop_removal(vit, images):
    with torch.no_grad():
        before = vit(images)
        tc.insert_(vit, "separable_ffn")
        del vit.blocks[0].mlp.beside
        tc.remove_(vit)
        assert torch.equal(vit(images), before)
    assert not inserted_modules(vit)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vit.modules())


def test_waiting_attention_takes_checkpoints_as_torch_does(vit):
    state = {k: v.double() + 0.1 for k, v in vit.state_dict().items()}
    tc.insert_(vit, "separable_ffn", site="replace_attn", blocks=0, allow_change=True)
    vit.load_state_dict(state, strict=True, assign=True)
    partly = {k: v for k, v in state.items() if k != "blocks.0.attn.qkv.bias"}
    result = vit.load_state_dict(partly, strict=False)
    assert result.missing_keys == ["blocks.0.attn.qkv.bias"]
    tc.remove_(vit)
    assert all(torch.equal(value, state[key]) for key, value in vit.state_dict().items())
    assert vit.blocks[0].attn.qkv.weight.dtype == torch.float64


def test_waiting_attention_refuses_checkpoints_of_another_size(vit):
    other = {k: v[:5] if k == "blocks.0.attn.proj.bias" else v for k, v in vit.state_dict().items()}
    tc.insert_(vit, "separable_ffn", site="replace_attn", blocks=0, allow_change=True)
    with pytest.raises(RuntimeError, match=r"(?s)blocks\.0\.attn\.: .*mismatch for proj\.bias"):
        vit.load_state_dict(other, strict=False)


@pytest.mark.parametrize(
    "change",
    [
        {"groups": 1},
        {"kernel_size": (3, 5), "padding": (1, 2)},
        {"padding_mode": "reflect"},
    ],
    ids=str,
)
def test_an_own_convolution_of_another_kind_is_refused(pvt, change):
    mlp = pvt.stages[0].blocks[0].mlp
    dim = mlp.dwconv.in_channels
    usual = {"kernel_size": 3, "padding": 1, "groups": dim}
    mlp.dwconv = nn.Conv2d(dim, dim, **{**usual, **change})
    with pytest.raises(tc.SurgeryError, match=r"mlp\.dwconv is Conv2d.*expected a depthwise"):
        tc.plan(pvt, "mix_ffn", blocks=0)


@pytest.mark.compile
def test_a_graph_compiled_before_sees_the_insertion(families):
    """Where no grid is carried, a hook is all that changes in a block."""
    case = families["volo"]
    model, images = case.build(), case.images()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = compiled(images)
        tc.insert_(model, "separable_ffn")
        for module in inserted_modules(model).values():
            nn.init.normal_(module.pointwise.weight)
        assert not torch.equal(compiled(images), before)
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["vision_transformer", "hiera", "pvt_v2", "swin_transformer"])
def test_a_compiled_slice_of_the_blocks(families, name):
    model = tc.insert_(families[name].build(), "mix_ffn", input_size=(3, *families[name].size))
    images = families[name].images()

    def first(x):
        return model.forward_intermediates(
            x, indices=[0], stop_early=True, intermediates_only=True
        )[0]

    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(first, fullgraph=True, backend="aot_eager")(images)
        torch.testing.assert_close(compiled, first(images), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_modes_inside_a_replaced_attention_come_back(vit):
    vit.train()
    frozen = [block.attn.proj_drop.eval() for block in vit.blocks]
    tc.insert_(vit, "separable_ffn", site="replace_attn", allow_change=True)
    tc.remove_(vit)
    assert not any(module.training for module in frozen)
    tc.insert_(vit, "separable_ffn", site="replace_attn", allow_change=True)
    tc.remove_(vit.eval())
    assert not any(module.training for module in vit.modules())


def test_a_pruned_hybrid_can_be_saved(vit, images, disturb_, tmp_path):
    base = copy.deepcopy(vit)
    disturb_(tc.insert_(vit, "mix_ffn"))
    for model in (vit, base):
        model.prune_intermediate_layers([0])
    tc.save(vit, tmp_path)
    loaded = tc.load_(base, tmp_path)
    assert torch.equal(loaded.forward_features(images), vit.forward_features(images))
    vit.blocks = nn.Sequential()
    with pytest.raises(tc.CheckpointError, match="none of the inserted blocks"):
        tc.save(vit, tmp_path)
