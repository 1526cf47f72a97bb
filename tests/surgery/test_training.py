"""What is trained, and with which learning rate and weight decay."""

import copy

import pytest
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

import tokenconv as tc
from tokenconv.surgery.edits import inserted_modules
from tokenconv.surgery.roles import is_norm
from tokenconv.surgery.training import PRESETS, param_groups, trainable_

LR = 1e-3

on = pytest.mark.parametrize
on_vit = on("case", ["vit"], indirect=True)


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def named(model, *parts):
    return {name for name, _ in model.named_parameters() if any(part in name for part in parts)}


def by_name(model, groups):
    """Learning rate and weight decay of every parameter; each must be in one group."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = [(names[id(p)], (g["lr"], g["weight_decay"])) for g in groups for p in g["params"]]
    assert len(found) == len(dict(found))
    return dict(found)


@on("preset", PRESETS)
@on_vit
def test_presets(case, preset):
    model = tc.insert_(case.build(), "mix_ffn")
    norms, inserted, head = named(model, "norm"), named(model, "act.before"), named(model, "head.")
    expected = {
        "inserted": inserted,
        "inserted+head": inserted | head,
        "depthwise+norm+head": inserted | norms | head,
        "all": named(model, ""),
    }[preset]
    assert trainable_(model, preset) is model
    assert trained(model) == expected
    trainable_(model, "all")  # what was frozen comes back
    assert trained(model) == named(model, "")


@on("case", ["pvt_v2"], indirect=True)
def test_own_depthwise_convolutions_belong_to_depthwise(case):
    model = tc.insert_(case.build(), "mix_ffn")
    trainable_(model, "depthwise+norm+head")
    assert trained(model) == named(model, "dwconv", "norm", "head.")
    trainable_(model, "inserted")
    assert trained(model) == named(model, ".added.")


@on("family", ["swin_transformer", "eva", "levit", "tiny_vit"], indirect=True)
def test_norms_and_depthwise_convolutions_of_other_families(family):
    """Told from what timm calls them: ``norm`` or ``bn``, and by ``groups``."""
    model = family.build()
    norms = named(model, "norm", ".bn")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
            norms |= {f"{name}.{key}" for key, _ in module.named_parameters()}
    heads = model.get_classifier()
    kept = {id(p) for p in heads.parameters()}
    norms |= {name for name, p in model.named_parameters() if id(p) in kept}
    tc.insert_(model, "mix_ffn", blocks=-1, input_size=(3, *family.size))
    trainable_(model, "depthwise+norm+head")
    assert trained(model) == norms | {
        f"{name}.{key}" for name, m in inserted_modules(model).items() for key in m.state_dict()
    }


@on("case", ["registers and LayerScale", "qk-norm"], indirect=True)
def test_layer_scale_is_no_norm(case):
    model = trainable_(tc.insert_(case.build(), "mix_ffn"), "depthwise+norm+head")
    assert trained(model) == named(model, "norm", "act.before", "head.")
    assert any("gamma" in name for name, _ in model.named_parameters())


@on("case", ["distilled"], indirect=True)
def test_a_distilled_model_has_two_heads(case):
    model = trainable_(tc.insert_(case.build(), "mix_ffn"), "inserted+head")
    assert trained(model) == named(model, "act.before", "head.", "head_dist.")


@on("family", ["crossvit", "vision_transformer_sam"], indirect=True)
def test_heads_in_a_list_and_in_a_module(family):
    model = trainable_(
        tc.insert_(family.build(), "mix_ffn", blocks=0, input_size=(3, *family.size)),
        "inserted+head",
    )
    heads = named(model, "head.")
    assert heads
    assert trained(model) == heads | named(model, "act.before")


@on_vit
def test_a_model_without_a_head(case):
    model = tc.insert_(case.build(), "mix_ffn")
    model.reset_classifier(0)
    assert trained(trainable_(model, "inserted+head")) == named(model, "act.before")


@on_vit
def test_other_convolutions_are_not_depthwise(case):
    """An embedding of grey images, and a convolution of a few groups."""
    model = tc.insert_(case.build(), "mix_ffn")
    model.patch_embed.proj = nn.Conv2d(1, 48, 16, 16)
    model.grouped = nn.Conv2d(4, 4, 3, groups=2)
    trainable_(model, "depthwise+norm+head")
    assert not named(model, "patch_embed", "grouped") & trained(model)


def test_a_kernel_that_could_not_learn_is_refused(vit, inserted_parameters):
    tc.insert_(vit, "separable_ffn")
    before = trained(vit)
    with pytest.raises(tc.SurgeryError, match=r"pointwise.weight is zero and would stay so"):
        trainable_(vit, "depthwise+norm+head")
    assert trained(vit) == before
    assert trained(trainable_(vit, "inserted")) == named(vit, ".beside.")
    for parameter in inserted_parameters(vit).values():
        nn.init.ones_(parameter)
    trainable_(vit, "depthwise+norm+head")
    assert trained(vit) == named(vit, "beside.depthwise", "norm", "head.")


def test_what_is_frozen_as_a_whole_may_be_zero(vit):
    """An adapter without a convolution: nothing in front of its zero is trained."""
    tc.insert_(vit, "adaptformer")
    trainable_(vit, "depthwise+norm+head")
    assert trained(vit) == named(vit, "norm", "head.")


def test_models_of_others_have_no_head():
    model = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    assert trained(trainable_(model, "depthwise+norm+head")) == named(model, "0.", "1.")


def test_wrong_presets_and_models(vit):
    with pytest.raises(tc.UnknownNameError, match=r"unknown preset 'heads?'.*inserted\+head"):
        trainable_(vit, "head")
    for preset in ("inserted", "inserted+head"):
        with pytest.raises(tc.SurgeryError, match="nothing is inserted"):
            trainable_(vit, preset)
    assert trained(trainable_(vit, "depthwise+norm+head")) == named(vit, "norm", "head.")
    vit.requires_grad_(False)
    assert trained(trainable_(vit, "all")) == named(vit, "")


# --- parameter groups ---


@on("layer_decay", [None, 0.7])
@on("weight_decay", [0.05, 0.0])
@on("case", ["vit", "pvt_v2"], indirect=True)
def test_groups_are_those_of_timm(case, layer_decay, weight_decay):
    """On a plain model: same rates, same decay, and nothing lost."""
    model = case.build()
    spared = model.no_weight_decay()
    kwargs = {"weight_decay": weight_decay, "no_weight_decay_list": spared}
    if layer_decay is None:
        expected = param_groups_weight_decay(model, **kwargs)
    else:
        expected = param_groups_layer_decay(model, layer_decay=layer_decay, **kwargs)
    for group in expected:
        group["lr"] = LR * group.pop("lr_scale", 1)
    groups = param_groups(model, lr=LR, weight_decay=weight_decay, layer_decay=layer_decay)
    assert by_name(model, groups) == by_name(model, expected)
    assert set(by_name(model, groups)) == named(model, "")


@on("layer_decay", [None, 0.7])
@on("case", ["vit", "pvt_v2"], indirect=True)
def test_inserted_parameters_have_their_own_rate(case, layer_decay, inserted_parameters):
    plain = case.build()
    model = tc.insert_(copy.deepcopy(plain), "mix_ffn")
    kwargs = {"lr": LR, "layer_decay": layer_decay}
    found = by_name(model, param_groups(model, inserted_lr_scale=10, **kwargs))
    own = by_name(plain, param_groups(plain, **kwargs))
    inserted = inserted_parameters(model)
    assert {name: found[name] for name in own} == own
    assert set(found) == set(own) | set(inserted)
    for name in inserted:
        container = name.partition(".mlp.")[0] + ".norm1.weight"
        rate, decay = found[name]
        assert rate == pytest.approx(10 * own[container][0])
        assert decay == (0 if name.endswith("bias") else 0.05)


@on_vit
def test_only_what_is_trained_is_in_a_group(case):
    model = trainable_(tc.insert_(case.build(), "mix_ffn"), "inserted+head")
    assert set(by_name(model, param_groups(model, lr=LR))) == trained(model)


@on_vit
def test_peg_kernels_have_no_weight_decay(case):
    model = tc.insert_(case.build(), "peg", blocks=0)
    found = by_name(model, param_groups(model, lr=LR))
    assert found["blocks.0.after.proj.weight"] == (LR, 0)
    assert found["blocks.0.mlp.fc1.weight"] == (LR, 0.05)


@on_vit
def test_learned_positions_have_no_weight_decay(case):
    model = tc.insert_(case.build(), "abs_pos_embed", blocks=0, size=(3, 5))
    (name,) = (f"{block}.pos_embed" for block in inserted_modules(model))
    assert by_name(model, param_groups(model, lr=LR))[name] == (LR, 0)


@on_vit
def test_further_names_without_weight_decay(case):
    model = tc.insert_(case.build(), "mix_ffn")
    groups = param_groups(model, lr=LR, no_weight_decay_list=["*.before.weight", "head.weight"])
    found = by_name(model, groups)
    spared = named(model, "before.weight") | {"head.weight"}
    assert {found[name][1] for name in spared} == {0}
    assert found["blocks.0.mlp.fc1.weight"][1] == 0.05
    assert found["pos_embed"][1] == 0  # still those of the model


@on("scheduler", ["none", "timm", "torch"])
@on_vit
def test_optimizers_and_schedulers_apply_each_rate_once(case, scheduler):
    model = tc.insert_(case.build(), "mix_ffn")
    groups = param_groups(model, lr=LR, layer_decay=0.5, inserted_lr_scale=3)
    expected = by_name(model, groups)
    if scheduler == "timm":
        optimizer = create_optimizer_v2(groups, "adamw", lr=1.0)
        halved = CosineLRScheduler(optimizer, t_initial=10)
        halved.step(5)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1.0)
    if scheduler == "torch":
        halved = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5)
    factor = 1 if scheduler == "none" else 0.5
    for name, (rate, _) in by_name(model, optimizer.param_groups).items():
        assert rate == pytest.approx(factor * expected[name][0]), name
    assert min(rate for rate, _ in expected.values()) < LR / 8


def test_a_step_moves_what_is_trained_and_nothing_else(vit):
    trainable_(tc.insert_(vit, "mix_ffn"), "inserted+head")
    before = copy.deepcopy(vit.state_dict())
    optimizer = torch.optim.AdamW(param_groups(vit, lr=LR, inserted_lr_scale=2))
    vit(torch.randn(2, 3, 48, 80)).square().sum().backward()
    optimizer.step()
    moved = {
        name for name, value in vit.state_dict().items() if not torch.equal(value, before[name])
    }
    assert moved
    assert moved <= trained(vit)
    step = (vit.blocks[0].mlp.act.before.weight - before["blocks.0.mlp.act.before.weight"]).abs()
    assert step.max().item() == pytest.approx(2 * LR, rel=1e-3)


def test_layer_decay_needs_a_model_that_knows_its_layers(vit):
    with pytest.raises(tc.SurgeryError, match="got a Sequential; pass the model inside it"):
        param_groups(nn.Sequential(vit), lr=LR, layer_decay=0.5)
    nested = nn.Sequential(vit)
    assert by_name(nested, param_groups(nested, lr=LR))["0.pos_embed"] == (LR, 0)


def test_norms_have_vectors_alone():
    """A class may be called a norm and be a layer with one."""

    class NormedLinear(nn.Linear):
        pass

    assert is_norm(nn.LayerNorm(4))
    assert is_norm(nn.LayerNorm(4, elementwise_affine=False))
    assert not is_norm(NormedLinear(4, 4))
    assert not is_norm(nn.Linear(4, 4))
