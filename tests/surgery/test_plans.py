import copy
import json
from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn

import tokenconv as tc
from tokenconv.layers import QuickGELU
from tokenconv.surgery.edits import inserted_modules, insertion_of


def test_a_plan_shows_every_site_and_changes_nothing(case, inserted_parameters):
    model = case.build()
    state, layout = copy.deepcopy(model.state_dict()), str(model)
    plan = tc.plan(model, "mix_ffn")
    assert str(model) == layout
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    text = str(plan)
    for edit in plan.edits:
        assert f"{edit.inserted} " in text
        assert f"{edit.added_params:+,}" in text
    assert "output unchanged" in text


def test_added_parameters_and_macs_are_those_of_the_changed_model(case, inserted_parameters):
    model = case.build()
    plan = tc.plan(model, "mix_ffn", kernel_size=5)
    before = tc.cost(model, plan.input_size)
    tc.insert_(model, plan)
    after = tc.cost(model, plan.input_size)
    assert plan.added_params == sum(p.numel() for p in inserted_parameters(model).values())
    assert plan.added_params == after.params - before.params
    assert plan.added_macs == after.macs - before.macs


def test_added_macs_of_a_vit_are_the_closed_formula(vit):
    plan = tc.plan(vit, "mix_ffn", kernel_size=5, blocks=[0, 2])
    rows, cols, hidden = 3, 5, 4 * 48
    assert plan.input_size == (3, 48, 80)
    assert [edit.added_macs for edit in plan.edits] == [rows * cols * hidden * 25] * 2
    assert [edit.added_params for edit in plan.edits] == [hidden * 26] * 2


@pytest.mark.parametrize(
    ("blocks", "chosen"),
    [(None, [0, 1, 2]), (1, [1]), (-1, [2]), (slice(1, None), [1, 2]), ([2, 0, -3], [0, 2]),
     (range(2), [0, 1])],
    ids=str,
)  # fmt: skip
def test_blocks_are_chosen_by_index_and_slice(vit, blocks, chosen):
    plan = tc.plan(vit, "mix_ffn", blocks=blocks)
    assert [edit.place.host for edit in plan.edits] == [f"blocks.{i}.mlp.act" for i in chosen]


def test_blocks_are_chosen_by_a_function(vit):
    plan = tc.plan(vit, "mix_ffn", filter_fn=lambda module, name: module is vit.blocks[1])
    assert [edit.place.host for edit in plan.edits] == ["blocks.1.mlp.act"]
    named = tc.plan(vit, "mix_ffn", blocks=slice(1, None), filter_fn=lambda m, name: "2" in name)
    assert [edit.place.host for edit in named.edits] == ["blocks.2.mlp.act"]
    with pytest.raises(tc.SurgeryError, match="filter_fn selects none of the 3 blocks"):
        tc.plan(vit, "mix_ffn", filter_fn=lambda module, name: name == "blocks")


def test_blocks_of_a_pyramid_are_counted_through_its_stages(pvt):
    plan = tc.plan(pvt, "mix_ffn", blocks=slice(2, 4))
    names = ["stages.1.blocks.1.mlp.dwconv", "stages.2.blocks.0.mlp.dwconv"]
    assert [edit.place.host for edit in plan.edits] == names


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            {"block": "mix_fnn"},
            tc.UnknownNameError,
            "unknown block 'mix_fnn': did you mean mix_ffn",
        ),
        ({"block": "none"}, tc.SurgeryError, r"blocks\.0 has no convolution"),
        ({"kernel_size": 4}, ValueError, "odd kernel_size, got 4"),
        ({"residual": False}, tc.SurgeryError, "does not take these arguments.*residual"),
        ({"impl": "fastest"}, tc.UnknownNameError, "unknown impl 'fastest'"),
        ({"blocks": "all"}, tc.SurgeryError, "blocks='all' selects none of the 3 blocks"),
        ({"blocks": 1.5}, tc.SurgeryError, "got 1.5"),
        ({"kernelsize": 3}, tc.SurgeryError, "does not take these arguments.*kernelsize"),
        ({"blocks": 3}, tc.SurgeryError, r"blocks 0 to 2, asked for \[3\]"),
        ({"blocks": slice(5, None)}, tc.SurgeryError, "selects none of the 3 blocks"),
        ({"blocks": []}, tc.SurgeryError, "selects none"),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_refused_and_leaves_the_model(vit, call, error, message):
    layout, state = str(vit), copy.deepcopy(vit.state_dict())
    for verb in (tc.plan, tc.insert_):
        with pytest.raises(error, match=message):
            verb(vit, **{"block": "mix_ffn", **call})
    assert str(vit) == layout
    assert list(vit.state_dict()) == list(state)
    assert "_tokenconv" not in vars(vit)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: timm.create_model("resnet18"), "ResNet is not a model that tokenconv can change"),
        (lambda: nn.Linear(3, 3), "Linear is not a model.*`tokenconv list --families`"),
        (lambda: timm.create_model("nest_tiny"), "Nest.*separate square blocks"),
        (lambda: timm.create_model("test_vit", act_layer=nn.PReLU), "PReLU.*has parameters"),
        (lambda: nn.ModuleList([timm.create_model("test_vit") for _ in range(2)]),
         r"ModuleList holds several timm models \(0, 1\)"),
    ],
)  # fmt: skip
def test_models_that_cannot_take_a_block_say_why(model, message):
    with pytest.raises(tc.SurgeryError, match=message):
        tc.plan(model(), "mix_ffn")


class Laid(nn.Module):
    """An MLP that lays out what it is given in another way while it runs."""

    def __init__(self, mlp, lay_out):
        super().__init__()
        self.fc1, self.act, self.fc2, self.lay_out = mlp.fc1, mlp.act, mlp.fc2, lay_out

    def forward(self, x):
        return self.fc2(self.act(self.fc1(self.lay_out(x)))).flatten()[: x.numel()].view(x.shape)


@pytest.mark.parametrize(
    ("name", "block", "lay_out", "message"),
    [
        ("beit", "blocks.0", lambda x: x.flatten(0, 1), r"2 axes, here \(B, 192\); .*\(B, N, C\)"),
        ("beit", "blocks.0", lambda x: x.repeat(1, 2, 1), r"32 tokens, .* not the 3\*5 of"),
        ("hiera", "blocks.0", lambda x: x.repeat(1, 2, 1), r"768 tokens, which are not 16\*24"),
        ("volo", "network.0.0", lambda x: x.flatten(1, 2), "not known where their grid is made"),
    ],
)  # fmt: skip
def test_tokens_that_lie_otherwise_are_refused(families, name, block, lay_out, message):
    case = families[name]
    model = case.build()
    host = model.get_submodule(block)
    host.mlp = Laid(host.mlp, lay_out)
    with pytest.raises(tc.SurgeryError, match=message):
        tc.plan(model, "mix_ffn", site="before_act", blocks=0, input_size=(3, *case.size))


def by_keyword(vit):
    """A block that names the argument of its MLP."""

    class Mine(type(vit.blocks[0])):
        def forward(self, x, **kwargs):
            return x + self.mlp(x=self.norm2(x))

    vit.blocks[0].__class__ = Mine


def in_a_row(vit):
    mlp = vit.blocks[0].mlp
    vit.blocks[0].mlp = nn.Sequential(OrderedDict(fc1=mlp.fc1, act=mlp.act, fc2=mlp.fc2))


@pytest.mark.parametrize(
    ("change", "block", "message"),
    [
        (by_keyword, "separable_ffn", r"blocks\.0\.mlp is not given tokens as its first argument"),
        (in_a_row, "separable_ffn", r"blocks\.0\.mlp is a Sequential, to which nothing can be"),
        (lambda vit: setattr(vit.blocks[0].mlp, "act", QuickGELU()), "mix_ffn",
         r"blocks\.0\.mlp\.act is a QuickGELU of tokenconv"),
        (lambda vit: setattr(vit.blocks[0].attn, "before", len), "dpe",
         r"does not run on this model: blocks\.0\.attn has an attribute 'before' already"),
        (lambda vit: setattr(vit, "kept", [2 * vit.pos_embed]), "mix_ffn",
         "the model cannot be copied: Only Tensors created explicitly"),
        (lambda vit: setattr(vit, "blocks", nn.Sequential()), "mix_ffn",
         "this VisionTransformer .* has no Transformer block with an MLP over tokens"),
    ],
)  # fmt: skip
def test_models_of_which_a_part_was_changed_say_why(vit, change, block, message):
    change(vit)
    with pytest.raises(tc.SurgeryError, match=message):
        tc.plan(vit, block, blocks=0, site="before_attn" if block == "dpe" else None)
    assert not inserted_modules(vit)


def test_an_mlp_that_pools_tokens_is_no_block():
    model = timm.create_model("test_vit", global_pool="map", class_token=False)
    assert isinstance(model.attn_pool.mlp.act, nn.Module)
    plan = tc.plan(model, "mix_ffn")
    assert [edit.place.host for edit in plan.edits] == [f"blocks.{i}.mlp.act" for i in range(6)]
    assert not plan.skipped


def test_double_insertion_and_removal_of_nothing_are_refused(vit):
    with pytest.raises(tc.SurgeryError, match="nothing is inserted"):
        tc.remove_(vit)
    plan = tc.plan(vit, "mix_ffn")
    tc.insert_(vit, plan)
    for again in ("mix_ffn", plan):
        with pytest.raises(tc.SurgeryError, match="already holds blocks of tokenconv"):
            tc.insert_(vit, again)
    tc.remove_(vit)
    tc.insert_(vit, plan)


def test_a_plan_for_another_model_is_refused(vit, pvt):
    plan = tc.plan(vit, "mix_ffn")
    with pytest.raises(tc.SurgeryError, match="made for a VisionTransformer, got a Pyramid"):
        tc.insert_(pvt, plan)
    shallow = timm.create_model("vit_tiny_patch16_224", embed_dim=48, depth=2, num_heads=3)
    with pytest.raises(tc.SurgeryError, match=r"changes blocks\.2\.mlp\.act.*does not have"):
        tc.insert_(shallow, plan)
    wide = timm.create_model("vit_tiny_patch16_224", embed_dim=96, depth=3, num_heads=3)
    with pytest.raises(tc.SurgeryError, match=r"192 channels.*at blocks\.0\.mlp\.act.*has 384"):
        tc.insert_(wide, plan)
    with pytest.raises(tc.SurgeryError, match="a plan is complete: cannot add kernel_size"):
        tc.insert_(vit, plan, kernel_size=5)
    assert "_tokenconv" not in vars(shallow)


def test_a_plan_that_would_change_another_model_is_refused(pvt):
    """Kernels of two dilations do not add up to one."""
    plan = tc.plan(pvt, "mix_ffn", blocks=0)
    assert plan.exact
    mlp = pvt.stages[0].blocks[0].mlp
    dim = mlp.dwconv.in_channels
    mlp.dwconv = nn.Conv2d(dim, dim, 3, padding=2, dilation=2, groups=dim)
    with pytest.raises(tc.SurgeryError, match=r"mix_ffn at .*dwconv would change the output here"):
        tc.insert_(pvt, plan)


def test_the_edit_that_changes_the_output_is_named(vit):
    plan = tc.plan(vit, "peg", blocks=0) + tc.plan(
        vit, "lka", site="replace_attn", blocks=[1, 2], allow_change=False
    )
    with pytest.raises(tc.SurgeryError, match=r"^lka at blocks\.1\.attn changes the output"):
        tc.insert_(vit, plan)


def test_a_plan_may_fit_another_model_better(pvt):
    plan = tc.plan(pvt, "mix_ffn", blocks=0, dilation=2)
    assert not plan.exact
    mlp = pvt.stages[0].blocks[0].mlp
    dim = mlp.dwconv.in_channels
    mlp.dwconv = nn.Conv2d(dim, dim, 3, padding=2, dilation=2, groups=dim)
    tc.insert_(pvt, plan)  # without allow_change
    assert insertion_of(pvt).plan.exact


def test_plans_of_two_models_are_not_joined(vit, pvt):
    plan, other = tc.plan(vit, "peg", blocks=0), tc.plan(pvt, "peg", blocks=0)
    message = r"plans for VisionTransformer \(3, 48, 80\) and Pyramid.* cannot be joined"
    with pytest.raises(tc.SurgeryError, match=message):
        _ = plan + other
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = plan + "mix_ffn"


def test_an_argument_without_a_json_form_is_told(vit):
    plan = tc.plan(vit, "lpi", blocks=0, act_layer=nn.ReLU)
    with pytest.raises(tc.SurgeryError, match=r"argument of a block has no JSON form: .*type"):
        plan.to_json()


def test_a_plan_serves_the_same_model_at_another_size(vit):
    plan = tc.plan(vit, "mix_ffn")
    other = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=48, depth=3, num_heads=3, img_size=64
    )
    tc.insert_(other, plan)
    assert other(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_models_that_were_changed_before_say_what_was_expected(vit, pvt):
    class Mine(nn.Sequential):
        pass

    vit.blocks.__class__ = Mine
    with pytest.raises(tc.SurgeryError, match=r"blocks is a Mine; expected a plain nn\.Sequential"):
        tc.insert_(vit, "mix_ffn")
    vit.blocks.__class__ = nn.Sequential
    pvt.stages[0].blocks[0].mlp.dwconv = nn.Identity()
    why = "stages.0.blocks.0.mlp.dwconv is a Identity; expected the nn.Conv2d that timm has there"
    plan = tc.plan(pvt, "mix_ffn")
    assert plan.skipped == (why,)
    assert f"left out: {why}" in str(plan)
    with pytest.raises(tc.SurgeryError, match=f"{why}, so mix_ffn cannot go there"):
        tc.plan(pvt, "mix_ffn", blocks=0)


def test_a_convolution_that_would_be_bypassed_is_refused(vit, monkeypatch):
    def skip_activation(self, x):
        return self.fc2(torch.nn.functional.gelu(self.fc1(x)))

    mlp = vit.blocks[1].mlp
    monkeypatch.setattr(type(mlp), "forward", skip_activation)
    with pytest.raises(tc.SurgeryError, match=r"blocks\.0\.mlp\.act runs 0 times"):
        tc.insert_(vit, "mix_ffn")
    assert "_tokenconv" not in vars(vit)


def test_a_convolution_that_would_not_be_called_is_refused(vit):
    class Mine(type(vit.blocks[1].mlp)):
        def forward(self, x):
            x = self.fc1(x)
            return self.fc2(self.act(x) if type(self.act) is nn.GELU else x.relu())

    vit.blocks[1].mlp.__class__ = Mine
    with pytest.raises(tc.SurgeryError, match=r"blocks\.1\.mlp\.act\.before would run 0 times"):
        tc.insert_(vit, "mix_ffn")
    assert not inserted_modules(vit)


def test_planning_allocates_no_weights(monkeypatch):
    with torch.device("meta"):
        model = timm.create_model("vit_large_patch16_224")
    plan = tc.plan(model, "mix_ffn", blocks=slice(20, None))
    assert len(plan.edits) == 4
    assert plan.added_params == 4 * 4096 * 10


def test_maps_of_which_any_side_may_be_the_channels_are_refused():
    model = timm.create_model("test_convnext").eval()  # 24 channels, first map 24x24 at this size
    with pytest.raises(tc.SurgeryError, match=r"24x24x24, of which .* another input_size"):
        tc.plan(model, "peg", blocks=0, input_size=(3, 96, 96))
    inside = tc.plan(model, "mix_ffn", blocks=0, input_size=(3, 96, 96))  # linear layers tell
    assert inside.edits[0].place == tc.plan(model, "mix_ffn", blocks=0).edits[0].place


def test_the_reason_is_that_of_the_same_block(vit):
    plan = tc.plan(vit, "mix_ffn", blocks=1)
    twelve = timm.create_model("vit_tiny_patch16_224", depth=12, embed_dim=48, num_heads=3)
    text = plan.to_json().replace("blocks.1.mlp", "blocks.10.mlp")
    twelve.blocks[1].mlp.act = nn.PReLU()
    twelve.blocks[10] = nn.Identity()
    with pytest.raises(tc.SurgeryError) as raised:
        tc.insert_(twelve, tc.Plan.from_json(text))
    assert "blocks.10.mlp.act (before_act): which this model does not have" in str(raised.value)


def test_numbers_of_another_kind_do_not_come_into_the_model(vit):
    content = json.loads(tc.plan(vit, "peg", blocks=0).to_json())
    content["edits"][0]["place"].update(num_prefix_tokens=1.0, halvings=False)
    tc.insert_(vit, tc.Plan.from_json(json.dumps(content)))
    place = insertion_of(vit).plan.edits[0].place
    assert (type(place.num_prefix_tokens), type(place.halvings)) == (int, int)


@pytest.mark.parametrize(
    ("block", "arguments"),
    [("conv_glu", {"mlp_ratio": float("inf")}), ("mona", {"width": 2**31})],
)
def test_arguments_beyond_all_measure_are_refused(vit, block, arguments):
    with pytest.raises(tc.SurgeryError, match=f"{block} at .* does not take these arguments"):
        tc.plan(vit, block, **arguments)


@pytest.mark.parametrize("blocks", ["(", "a{99999999999}", "(" * 5000 + ")" * 5000])
def test_what_is_no_regular_expression_is_told(vit, blocks):
    with pytest.raises(tc.SurgeryError, match="is no regular expression"):
        tc.plan(vit, "mix_ffn", blocks=blocks)
