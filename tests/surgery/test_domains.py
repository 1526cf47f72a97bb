"""Domains share linear layers and attention, and keep everything else to themselves."""

import copy
import json
import pickle

import pytest
import timm
import torch
from torch import nn

import tokenconv as tc
from tokenconv.errors import CheckpointError
from tokenconv.surgery import storage
from tokenconv.surgery.checkpoint import load_, save
from tokenconv.surgery.domains import (
    add_domain,
    domain_parameters,
    list_domains,
    load_domain,
    save_domain,
    set_domain,
)
from tokenconv.surgery.edits import inserted_modules

VIT_IMAGES = torch.randn(2, 3, 48, 80, generator=torch.Generator().manual_seed(3))
PVT_IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))


def logits(model, name=None, images=VIT_IMAGES):
    if name is not None:
        set_domain(model, name)
    with torch.no_grad():
        return model(images)


def train(model, steps=3, images=VIT_IMAGES):
    optimizer = torch.optim.SGD(domain_parameters(model).values(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        model.forward_head(model.forward_features(images)).sin().sum().backward()
        optimizer.step()
    return optimizer


@pytest.fixture
def hybrid(vit):
    return tc.insert_(vit, "mix_ffn")


@pytest.fixture
def banked(hybrid):
    """Domains of 7, 7 and 4 classes, each with its own values; "birds" is active."""
    add_domain(hybrid, "birds")
    add_domain(hybrid, "signs")
    torch.manual_seed(0)
    add_domain(hybrid, "cars", num_classes=4)
    for name in ("signs", "cars", "birds"):
        set_domain(hybrid, name)
        with torch.no_grad():
            for parameter in domain_parameters(hybrid).values():
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return hybrid


# --- adding and choosing ---


def test_the_first_domain_is_the_model_as_it_is(hybrid):
    expected, parameters = logits(hybrid), dict(hybrid.named_parameters())
    assert list_domains(hybrid) == []
    add_domain(hybrid, "birds")
    assert list_domains(hybrid) == ["birds"]
    assert all(p is parameters[key] for key, p in hybrid.named_parameters())
    set_domain(hybrid, "birds")
    assert torch.equal(logits(hybrid), expected)


def test_a_further_domain_starts_as_a_copy_and_waits(hybrid):
    add_domain(hybrid, "birds")
    train(hybrid)
    expected, parameters = logits(hybrid), dict(hybrid.named_parameters())
    add_domain(hybrid, "signs")
    assert list_domains(hybrid) == ["birds", "signs"]
    assert all(p is parameters[key] for key, p in hybrid.named_parameters())
    assert torch.equal(logits(hybrid, "signs"), expected)


def test_a_domain_owns_kernels_norms_and_head_and_nothing_else(banked):
    before = dict(banked.named_parameters())
    set_domain(banked, "signs")
    changed = {key for key, p in banked.named_parameters() if p is not before[key]}
    kinds = (".norm1.", ".norm2.", ".norm.", ".before.", ".head.")
    expected = {key for key in before if any(kind in f".{key}" for kind in kinds)}
    assert changed == expected == domain_parameters(banked).keys()
    assert any("before" in key for key in changed)
    assert any("norm" in key for key in changed)


def test_the_own_depthwise_convolutions_belong_to_the_domain(pvt):
    tc.insert_(pvt, "mix_ffn", kernel_size=5, blocks=[0, 1])
    names = set(domain_parameters(pvt))
    assert "stages.0.blocks.0.mlp.dwconv.weight" in names  # merged with the added kernel
    assert "stages.0.blocks.0.mlp.dwconv.added.weight" in names
    assert "stages.3.blocks.0.mlp.dwconv.bias" in names  # as timm made it
    assert not any("fc1" in name or "q." in name or "proj." in name for name in names)
    assert "stages.0.blocks.0.attn.sr.weight" not in names  # a full convolution


@pytest.mark.parametrize("trained", ["birds", "signs", "cars"])
def test_training_one_domain_leaves_the_others_bit_equal(banked, trained):
    before = {name: logits(banked, name) for name in list_domains(banked)}
    set_domain(banked, trained)
    train(banked)
    after = {name: logits(banked, name) for name in list_domains(banked)}
    for name in before:
        assert torch.equal(before[name], after[name]) == (name != trained), name


def test_domains_of_a_pyramid_leave_each_other_bit_equal(pvt):
    tc.insert_(pvt, "mix_ffn", kernel_size=5)
    add_domain(pvt, "birds")
    add_domain(pvt, "signs", num_classes=2)
    expected = logits(pvt, images=PVT_IMAGES)
    set_domain(pvt, "signs")
    train(pvt, images=PVT_IMAGES)
    assert logits(pvt, images=PVT_IMAGES).shape == (2, 2)
    assert torch.equal(logits(pvt, "birds", PVT_IMAGES), expected)


def test_adding_a_domain_leaves_the_others_bit_equal(banked):
    before = {name: logits(banked, name) for name in list_domains(banked)}
    set_domain(banked, "birds")
    add_domain(banked, "planes", num_classes=9)
    assert all(torch.equal(logits(banked, name), out) for name, out in before.items())


def test_optimizers_stay_valid_through_changes_of_domain(banked):
    """Two domains trained in turns end where each ends when trained alone."""
    alone = {}
    for name in ("birds", "signs"):
        model = copy.deepcopy(banked)
        set_domain(model, name)
        train(model, steps=4)
        alone[name] = logits(model)
    optimizers = {}
    for name in ("birds", "signs"):
        set_domain(banked, name)
        parameters = domain_parameters(banked).values()
        optimizers[name] = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for _ in range(4):
        for name, optimizer in optimizers.items():
            set_domain(banked, name)
            optimizer.zero_grad()
            banked.forward_head(banked.forward_features(VIT_IMAGES)).sin().sum().backward()
            optimizer.step()
    for name, expected in alone.items():
        assert torch.equal(logits(banked, name), expected)


def test_norm_statistics_belong_to_the_domain(vit):
    model = tc.insert_(nn.Sequential(nn.BatchNorm2d(3), vit), "mix_ffn").requires_grad_(False)
    add_domain(model, "birds")
    add_domain(model, "signs")
    model.eval()
    expected = logits(model)
    set_domain(model, "signs")
    model.train()
    logits(model)
    model.eval()
    assert model[0].num_batches_tracked == 1
    assert not torch.equal(logits(model), expected)
    assert torch.equal(logits(model, "birds"), expected)
    assert model[0].num_batches_tracked == 0
    assert set(dict(model[0].named_buffers())) == set(model[0].state_dict()) - {"weight", "bias"}


# --- the head ---


def test_every_domain_has_its_number_of_classes(banked):
    for name, classes in (("cars", 4), ("birds", 7), ("cars", 4), ("signs", 7)):
        assert logits(banked, name).shape == (2, classes)
        assert banked.num_classes == banked.head.out_features == classes
        assert banked.get_classifier().weight.shape == (classes, 48)


def test_a_fresh_head_is_one_also_for_as_many_classes(hybrid):
    add_domain(hybrid, "birds")
    add_domain(hybrid, "signs", num_classes=7)
    old = hybrid.head.weight
    set_domain(hybrid, "signs")
    assert not torch.equal(hybrid.head.weight, old)
    assert hybrid.head.weight.dtype == old.dtype
    assert hybrid.head.weight.requires_grad


def test_a_fresh_head_has_a_bias_where_the_old_one_has(vit):
    vit.head = nn.Linear(48, 7, bias=False)
    tc.insert_(vit.double(), "mix_ffn")
    add_domain(vit, "birds")
    add_domain(vit, "signs", num_classes=3)
    set_domain(vit, "signs")
    assert vit.head.bias is None
    assert vit(VIT_IMAGES.double()).shape == (2, 3)


@pytest.mark.parametrize("num_classes", [0, -1])
def test_a_head_has_classes(hybrid, num_classes):
    add_domain(hybrid, "birds")
    with pytest.raises(tc.SurgeryError, match=f"num_classes >= 1, got {num_classes}"):
        add_domain(hybrid, "signs", num_classes=num_classes)


def test_the_first_domain_takes_no_other_head(hybrid):
    with pytest.raises(tc.SurgeryError, match=r"call the model's reset_classifier\(4\) before"):
        add_domain(hybrid, "birds", num_classes=4)
    assert list_domains(hybrid) == []


def test_heads_of_several_layers_are_copied_only():
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", embed_dim=48, depth=1, num_heads=3, img_size=(48, 80)
    ).eval()
    tc.insert_(model, "mix_ffn")
    add_domain(model, "birds")
    with pytest.raises(tc.SurgeryError, match=r"single nn\.Linear, got Linear, Linear; leave"):
        add_domain(model, "signs", num_classes=4)
    assert list_domains(model) == ["birds"]
    add_domain(model, "signs")
    heads = [model.head.weight, model.head_dist.weight]
    expected = logits(model)
    set_domain(model, "signs")
    assert heads[0] is not model.head.weight
    assert heads[1] is not model.head_dist.weight
    assert torch.equal(logits(model), expected)


def test_a_model_inside_another(vit):
    model = tc.insert_(nn.Sequential(vit), "mix_ffn")
    add_domain(model, "birds")
    add_domain(model, "signs", num_classes=3)
    assert logits(model, "signs").shape == (2, 3)
    assert model[0].num_classes == 3
    assert logits(model, "birds").shape == (2, 7)


# --- what else happens to a model ---


def test_waiting_domains_follow_to_the_dtype(banked):
    before = {name: logits(banked, name) for name in list_domains(banked)}
    set_domain(banked, "signs")
    banked(VIT_IMAGES).sum().backward()
    waiting = {k: p for k, p in domain_parameters(banked).items() if k.startswith("head")}
    assert waiting["head.weight"].grad is not None
    set_domain(banked, "birds")
    banked.double()
    with torch.no_grad():
        for name, expected in before.items():
            set_domain(banked, name)
            assert all(p.dtype == torch.float64 for p in banked.parameters())
            assert all(p.grad is None or p.grad.dtype == p.dtype for p in banked.parameters())
            out = banked(VIT_IMAGES.double())
            torch.testing.assert_close(out.float(), expected, rtol=1e-4, atol=1e-5)
    set_domain(banked, "signs")
    assert all(domain_parameters(banked)[key] is p for key, p in waiting.items())


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_keep_all_domains(banked, twin):
    expected = {name: logits(banked, name) for name in list_domains(banked)}
    other = twin(banked)
    assert list_domains(other) == list_domains(banked)
    for name, out in expected.items():
        assert torch.equal(logits(other, name), out)
        train(other)
        assert torch.equal(logits(banked, name), out)
        assert not torch.equal(logits(other), out)


def test_state_dict_shows_the_active_domain_under_the_same_keys(banked):
    keys = list(tc.insert_(tc.remove_(copy.deepcopy(banked)), "mix_ffn").state_dict())
    states = {}
    for name in list_domains(banked):
        set_domain(banked, name)
        states[name] = copy.deepcopy(banked.state_dict())
        assert list(states[name]) == keys
        assert list(dict(banked.named_parameters())) == keys
    set_domain(banked, "signs")
    outputs = logits(banked, "birds"), logits(banked, "signs")
    banked.load_state_dict(states["birds"])
    assert torch.equal(logits(banked), outputs[0])
    banked.load_state_dict(states["signs"], assign=True)
    set_domain(banked, "birds")
    assert torch.equal(logits(banked, "signs"), outputs[1])


def test_remove_keeps_the_active_domain_in_the_own_modules(banked):
    set_domain(banked, "cars")
    own = {k: v.clone() for k, v in banked.state_dict().items() if ".before." not in k}
    tc.remove_(banked)
    state = banked.state_dict()
    assert list(state) == list(own)
    assert all(torch.equal(state[key], value) for key, value in own.items())
    assert banked.num_classes == 4
    assert logits(banked).shape == (2, 4)
    with pytest.raises(tc.SurgeryError, match="nothing is inserted"):
        list_domains(banked)
    tc.insert_(banked, "mix_ffn")
    assert list_domains(banked) == []


def test_remove_gives_a_pyramid_the_active_kernels(pvt):
    tc.insert_(pvt, "mix_ffn", kernel_size=5, blocks=0)
    name = "stages.0.blocks.0.mlp.dwconv.weight"
    original = pvt.get_parameter(name).detach().clone()
    add_domain(pvt, "birds")
    add_domain(pvt, "signs")
    set_domain(pvt, "signs")
    nn.init.ones_(pvt.get_parameter(name))
    twin = copy.deepcopy(pvt)
    set_domain(twin, "birds")
    assert (tc.remove_(pvt).get_parameter(name) == 1).all()
    assert torch.equal(tc.remove_(twin).get_parameter(name), original)


def test_flags_travel_with_the_domain(hybrid):
    hybrid.requires_grad_(False)
    hybrid.head.requires_grad_(True)
    add_domain(hybrid, "birds")
    add_domain(hybrid, "signs")
    hybrid.head.requires_grad_(False)
    set_domain(hybrid, "signs")
    assert [key for key, p in hybrid.named_parameters() if p.requires_grad] == [
        "head.weight",
        "head.bias",
    ]
    set_domain(hybrid, "birds")
    assert not any(p.requires_grad for p in hybrid.parameters())


def test_domains_made_under_inference_mode_can_be_trained(hybrid):
    add_domain(hybrid, "birds")
    with torch.inference_mode():
        add_domain(hybrid, "signs", num_classes=3)
        set_domain(hybrid, "signs")
    before = logits(hybrid)
    train(hybrid)
    assert not torch.equal(logits(hybrid), before)


# --- what is refused ---


def test_a_plain_model_has_no_domains(vit, tmp_path):
    for call in (
        lambda: add_domain(vit, "birds"),
        lambda: set_domain(vit, "birds"),
        lambda: list_domains(vit),
        lambda: domain_parameters(vit),
        lambda: save_domain(vit, "birds", tmp_path),
        lambda: load_domain(vit, "birds", tmp_path),
    ):
        with pytest.raises(tc.SurgeryError, match="nothing is inserted"):
            call()


def test_names_are_checked(banked, tmp_path):
    with pytest.raises(tc.UnknownNameError, match="unknown domain 'sign': did you mean signs"):
        set_domain(banked, "sign")
    with pytest.raises(tc.UnknownNameError, match="unknown domain 'sign': did you mean signs"):
        save_domain(banked, "sign", tmp_path)
    with pytest.raises(tc.SurgeryError, match="has a domain 'signs' already"):
        add_domain(banked, "signs")
    save_domain(banked, "signs", tmp_path)
    with pytest.raises(tc.SurgeryError, match="has a domain 'signs' already"):
        load_domain(banked, "signs", tmp_path)
    for name in ("", "a/b", "../a", ".hidden", "a b", "a\n"):
        with pytest.raises(tc.SurgeryError, match="since files bear it, got"):
            add_domain(banked, name)
    assert list_domains(banked) == ["birds", "signs", "cars"]


def test_a_model_without_domains_cannot_choose_one(hybrid, tmp_path):
    with pytest.raises(tc.SurgeryError, match=r"no domains yet; add_domain\(model, name\)"):
        set_domain(hybrid, "birds")
    with pytest.raises(tc.SurgeryError, match="no domains yet"):
        save_domain(hybrid, "birds", tmp_path)


def test_a_folded_model_has_no_domains(banked, tmp_path):
    tc.fold_(banked.eval())
    for call in (
        lambda: add_domain(banked, "planes"),
        lambda: set_domain(banked, "signs"),
        lambda: save_domain(banked, "signs", tmp_path),
        lambda: domain_parameters(banked),
    ):
        with pytest.raises(tc.SurgeryError, match="folded into the weights"):
            call()


def test_merged_kernels_are_those_of_one_domain(pvt):
    tc.insert_(pvt, "mix_ffn")
    add_domain(pvt, "birds")
    tc.fold_(pvt.eval())
    with pytest.raises(tc.SurgeryError, match=r"model\.train\(\) takes them apart"):
        add_domain(pvt, "signs")
    pvt.train()
    add_domain(pvt, "signs")
    assert list_domains(pvt) == ["birds", "signs"]


def test_a_model_with_other_modules_than_before_is_refused(banked):
    expected = logits(banked, "birds")
    head, banked.head = banked.head, nn.Identity()
    with pytest.raises(tc.SurgeryError, match=r"head\.bias is only in the domain"):
        set_domain(banked, "signs")
    banked.head = head
    assert torch.equal(logits(banked), expected)


# --- saved domains ---


def plain(banked):
    """The model that the domains share, with other values where a domain has its own."""
    model = tc.remove_(copy.deepcopy(banked))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key in domain_parameters(banked):
                parameter.fill_(0.5)
    return model


@pytest.mark.parametrize("active", ["birds", "cars"])
def test_saved_domains_come_back_bit_equal(banked, tmp_path, active):
    expected = {name: logits(banked, name) for name in list_domains(banked)}
    fresh = tc.insert_(plain(banked), "mix_ffn")
    set_domain(banked, active)
    for name in expected:
        save_domain(banked, name, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(
        f"domain-{name}.{ext}" for name in expected for ext in ("json", "safetensors")
    )
    load_domain(fresh, "cars", tmp_path)
    assert torch.equal(logits(fresh), expected["cars"])  # the first one is active
    load_domain(fresh, "birds", str(tmp_path))
    load_domain(fresh, "signs", tmp_path)
    assert list_domains(fresh) == ["cars", "birds", "signs"]
    assert torch.equal(logits(fresh), expected["cars"])
    for name, out in expected.items():
        assert torch.equal(logits(fresh, name), out)
    train(fresh)
    assert all(torch.equal(logits(banked, name), out) for name, out in expected.items())


def test_domains_of_a_pruned_hybrid_come_back(banked, tmp_path):
    base = tc.remove_(banked)
    twins = [tc.insert_(copy.deepcopy(base), "mix_ffn") for _ in range(2)]
    for twin in twins:
        twin.prune_intermediate_layers([0])
    add_domain(twins[0], "birds")
    train(twins[0])
    save_domain(twins[0], "birds", tmp_path)
    load_domain(twins[1], "birds", tmp_path)
    assert torch.equal(logits(twins[1]), logits(twins[0]))


def test_a_hybrid_and_its_domains_share_a_folder(banked, tmp_path):
    set_domain(banked, "birds")
    base = plain(banked)
    expected = {name: logits(banked, name) for name in list_domains(banked)}
    set_domain(banked, "birds")
    save(banked, tmp_path)
    for name in ("signs", "cars"):
        save_domain(banked, name, tmp_path)
    model = load_(base, tmp_path)
    add_domain(model, "birds")
    load_domain(model, "signs", tmp_path)
    load_domain(model, "cars", tmp_path)
    assert all(torch.equal(logits(model, name), out) for name, out in expected.items())


@pytest.mark.parametrize("first", [False, True])
def test_a_loaded_domain_takes_dtype_and_flags_of_the_active_one(banked, tmp_path, first):
    save_domain(banked, "cars", tmp_path)
    model = tc.insert_(plain(banked).to(torch.bfloat16), "mix_ffn").requires_grad_(False)
    model.head.requires_grad_(True)
    if not first:
        add_domain(model, "birds")
    load_domain(model, "cars", tmp_path)
    set_domain(model, "cars")
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    flags = [key for key, p in model.named_parameters() if p.requires_grad]
    assert flags == ["head.weight", "head.bias"]
    set_domain(banked, "cars")
    assert torch.equal(model.head.weight, banked.head.weight.bfloat16())


def test_what_belongs_to_no_domain_is_not_written(banked, tmp_path):
    save_domain(banked, "cars", tmp_path)
    content = json.loads((tmp_path / "domain-cars.json").read_text())
    assert content["domain"] == "cars"
    assert content["tensors"].keys() == domain_parameters(banked).keys()
    assert content["tensors"]["head.weight"] == "4x48 float32"
    shared = {key for key, _ in banked.named_parameters()} - domain_parameters(banked).keys()
    assert content["base"].keys() == shared


def test_an_interrupted_save_keeps_the_old_domain(banked, tmp_path, monkeypatch):
    save_domain(banked, "signs", tmp_path)
    expected = logits(banked, "signs")
    train(banked)
    for stop in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(storage.os, stop, lambda *args: pytest.fail("planted"))
            with pytest.raises(pytest.fail.Exception, match="planted"):
                save_domain(banked, "signs", tmp_path)
        fresh = tc.insert_(plain(banked), "mix_ffn")
        load_domain(fresh, "signs", tmp_path)
        assert torch.equal(logits(fresh), expected)


def other_plan(model):
    return tc.insert_(model, "mix_ffn", blocks=[0, 1])


def other_kernel(model):
    return tc.insert_(model, "mix_ffn", kernel_size=5)


def other_shared_values(model):
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.mul_(1.1)
    return tc.insert_(model, "mix_ffn")


def other_architecture(model):
    model.pretrained_cfg = {**model.pretrained_cfg, "architecture": "deit_tiny_patch16_224"}
    return tc.insert_(model, "mix_ffn")


def other_head(model):
    model.head = nn.Identity()
    return tc.insert_(model, "mix_ffn")


class Affine(nn.Module):
    """Has a LayerNorm's parameters, and is none."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x):
        return x * self.weight + self.bias


def other_norm(model):
    model.blocks[0].norm1 = Affine(model.blocks[0].norm1)
    return tc.insert_(model, "mix_ffn")


def on_meta(model):
    return tc.insert_(model.to("meta"), "mix_ffn")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (other_plan, "from a model with other blocks inserted; insert the same ones"),
        (other_kernel, "from a model with other blocks inserted"),
        (other_shared_values, r"qkv\.weight is not saved and has other values"),
        (other_architecture, "for a vit_tiny_patch16_224, got a deit_tiny_patch16_224"),
        (other_head, r"head\.bias, is only in the checkpoint"),
        (other_norm, r"owns other modules: blocks\.0\.norm1\.bias is only in the file"),
        (on_meta, "on the meta device"),
    ],
)
@pytest.mark.parametrize("first", [False, True])
def test_domains_of_other_models_are_refused(banked, tmp_path, build, message, first):
    save_domain(banked, "cars", tmp_path)
    model = build(plain(banked))
    if not first:
        add_domain(model, "birds")
    before = {key: (id(value), value._version) for key, value in model.named_parameters()}
    with pytest.raises(CheckpointError, match=message):
        load_domain(model, "cars", tmp_path)
    assert list_domains(model) == ([] if first else ["birds"])
    after = {key: (id(value), value._version) for key, value in model.named_parameters()}
    assert after == before


def test_other_shared_values_are_taken_when_asked(banked, tmp_path):
    save_domain(banked, "cars", tmp_path)
    model = other_shared_values(plain(banked))
    load_domain(model, "cars", tmp_path, check_base=False)
    assert list_domains(model) == ["cars"]


def test_a_renamed_or_missing_file_is_refused(banked, tmp_path):
    model = tc.insert_(plain(banked), "mix_ffn")
    with pytest.raises(CheckpointError, match=r"cannot read .*domain-cars\.json"):
        load_domain(model, "cars", tmp_path)
    save_domain(banked, "cars", tmp_path)
    for ext in ("json", "safetensors"):
        (tmp_path / f"domain-cars.{ext}").rename(tmp_path / f"domain-signs.{ext}")
    with pytest.raises(CheckpointError, match="expected the domain 'signs', the file holds 'cars'"):
        load_domain(model, "signs", tmp_path)
    assert list_domains(model) == []


def test_only_the_head_may_have_another_size(banked, tmp_path):
    save_domain(banked, "cars", tmp_path)
    model = plain(banked)
    tc.insert_(model, "mix_ffn")
    model.norm.weight = nn.Parameter(torch.ones(47))
    with pytest.raises(CheckpointError, match=r"norm\.weight: expected shape 48, the model has 47"):
        load_domain(model, "cars", tmp_path)
    model.norm.weight = nn.Parameter(torch.ones(48))
    model.head.weight = nn.Parameter(torch.ones(7, 47))
    with pytest.raises(CheckpointError, match=r"head\.weight: expected shape 4x48, .* has 7x47"):
        load_domain(model, "cars", tmp_path)


def test_inserted_layers_that_are_not_depthwise_belong_to_the_domain_too(vit):
    tc.insert_(vit, "separable_ffn", blocks=[0])
    (name,) = inserted_modules(vit)
    expected = {f"{name}.{key}" for key, _ in vit.get_submodule(name).named_parameters()}
    assert any("pointwise" in key for key in expected)
    assert expected <= domain_parameters(vit).keys()
