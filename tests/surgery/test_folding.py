"""What ``fold_`` makes simpler, and what it leaves as it was."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tokenconv as tc
from tokenconv.surgery.edits import inserted_modules, insertion_of
from tokenconv.surgery.folding import FoldReport, fold_

SITES = [
    ("vit", "mix_ffn", "before_act"),
    ("vit", "mix_ffn", "after_act"),
    ("distilled", "peg", "after_block"),
    ("no class token", "peg", "before_attn"),
    ("pvt_v2", "mix_ffn", "before_act"),
    ("pvt_v2", "mix_ffn", "merge_conv"),
    ("pvt_v2", "peg", "before_block"),
]


def sites(*wanted):
    return pytest.mark.parametrize(("case", "block", "site"), wanted, indirect=["case"])


on_vit = pytest.mark.parametrize("case", ["vit"], indirect=True)
on_pvt = pytest.mark.parametrize("case", ["pvt_v2"], indirect=True)
every_site = sites(*SITES)
both_ways = sites(("vit", "mix_ffn", None), ("pvt_v2", "mix_ffn", None))


@pytest.fixture
def hybrid(case, disturb_):
    """Makes a hybrid whose inserted kernels are far from zero."""

    def build(block, site=None, dtype=torch.float64, **kwargs):
        model = tc.insert_(case.build().to(dtype), block, site=site, **kwargs)
        disturb_(model)
        return model, case.images(dtype=dtype)

    return build


def relative(a, b):
    return (a - b).abs().max() / b.abs().max()


@pytest.mark.parametrize(
    ("dtype", "tolerance", "kernel_size"), [(torch.float64, 1e-10, 3), (torch.float32, 1e-5, 5)]
)
@every_site
@torch.no_grad()
def test_the_output_stays(hybrid, block, site, kernel_size, dtype, tolerance):
    model, images = hybrid(block, site, dtype, kernel_size=kernel_size)
    before = model(images)
    keys = list(model.state_dict())
    report = fold_(model)
    assert set(report.folded) == set(inserted_modules(model))
    assert report.kept == {}
    assert relative(model(images), before) <= tolerance
    assert list(model.state_dict()) == keys
    assert insertion_of(model).folded is (site != "merge_conv")  # that changes no value


@on_vit
def test_the_residual_goes_into_the_kernel(hybrid):
    model, _ = hybrid("peg")
    before = copy.deepcopy(model.blocks[1].after.proj)
    fold_(model)
    folded = model.blocks[1].after.proj
    assert not folded.residual
    tap = torch.zeros_like(before.weight)
    tap[:, :, 1, 1] = 1
    assert torch.equal(folded.weight, before.weight + tap)
    assert torch.equal(folded.bias, before.bias)


@on_pvt
@torch.no_grad()
def test_merged_kernels_are_added_once(hybrid, monkeypatch):
    model, images = hybrid("mix_ffn", kernel_size=5)
    fold_(model)
    monkeypatch.setattr(F, "pad", None)
    model(images)
    model.train()
    with pytest.raises(TypeError):
        model(images)


@every_site
@torch.no_grad()
def test_remove_gives_the_model_back(hybrid, case, block, site):
    original = case.build().double()
    model, images = hybrid(block, site)
    fold_(model)
    tc.remove_(model)
    state = model.state_dict()
    assert list(state) == list(original.state_dict())
    assert all(torch.equal(state[key], value) for key, value in original.state_dict().items())
    assert torch.equal(model(images), original(images))


@both_ways
@torch.no_grad()
def test_folding_twice_changes_nothing(hybrid, block, site):
    model, images = hybrid(block, site)
    fold_(model)
    before = model(images)
    assert fold_(model) == FoldReport((), {})
    assert torch.equal(model(images), before)


@on_vit
@pytest.mark.parametrize(
    ("site", "reason"),
    [
        ("beside_mlp", "runs beside blocks.0.mlp, and has no simpler form"),
        ("replace_attn", "stands in place of blocks.0.attn"),
    ],
)
@torch.no_grad()
def test_what_cannot_be_folded_says_why(hybrid, site, reason):
    model, images = hybrid("separable_ffn", site, allow_change=True)
    before = model(images)
    report = fold_(model)
    assert report.folded == ()
    assert set(report.kept) == set(inserted_modules(model))
    assert reason in next(iter(report.kept.values()))
    assert reason in str(report)
    assert str(report).startswith("0 of 3 inserted modules folded")
    assert fold_(model) == report
    assert torch.equal(model(images), before)
    assert not insertion_of(model).folded


@on_vit
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_kernels_stay(hybrid, dtype):
    model, _ = hybrid("mix_ffn", dtype=dtype)
    state = copy.deepcopy(model.state_dict())
    report = fold_(model)
    assert report.folded == ()
    assert all("loses most of a small w" in reason for reason in report.kept.values())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert len(fold_(model.float()).folded) == 3


@both_ways
@torch.no_grad()
def test_copies_of_a_folded_model_work(hybrid, block, site):
    model, images = hybrid(block, site)
    fold_(model)
    expected = model(images)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images), expected)
        assert fold_(twin).folded == ()
        tc.remove_(twin)


@pytest.mark.compile
@both_ways
@torch.no_grad()
def test_a_folded_model_compiles(hybrid, block, site):
    torch.compiler.reset()
    model, images = hybrid(block, site)
    fold_(model)
    expected = model(images)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative(compiled(images), expected) <= 1e-10


@on_vit
@torch.no_grad()
def test_folded_and_unfolded_kernels_are_not_mixed(hybrid, case):
    model, images = hybrid("mix_ffn")
    unfolded = copy.deepcopy(model)
    fold_(model)
    with pytest.raises(RuntimeError, match=r"before.weight is folded, and this model is not"):
        unfolded.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r"before.weight is not folded, and this model is"):
        model.load_state_dict(unfolded.state_dict())
    other, _ = hybrid("mix_ffn")
    nn.init.zeros_(other.blocks[0].mlp.act.before.bias)
    fold_(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images), model(images))
    model.load_state_dict(case.build().state_dict())  # no inserted kernels: these stay
    assert torch.equal(other(images), model(images))


@on_pvt
@torch.no_grad()
def test_loading_brings_merged_kernels_up_to_date(hybrid):
    model, images = hybrid("mix_ffn")
    changed = copy.deepcopy(model)
    for parameter in changed.parameters():
        parameter.mul_(1.1)
    fold_(model)
    model.load_state_dict(changed.state_dict())
    assert relative(model(images), changed(images)) <= 1e-10
    assert fold_(model).folded == ()


@on_pvt
def test_merged_kernels_learn_again_in_training_mode(hybrid, inserted_parameters):
    model, images = hybrid("mix_ffn")
    fold_(model)
    model.train()(images).sum().backward()
    assert all(p.grad is not None for p in inserted_parameters(model).values())
    assert len(fold_(model.eval()).folded) == 5


@on_pvt
@torch.no_grad()
def test_merged_kernels_are_saved_as_they_are(hybrid, case, tmp_path):
    model, images = hybrid("mix_ffn")
    before = model(images)
    fold_(model)
    tc.save(model, tmp_path)
    base = tc.remove_(copy.deepcopy(model))
    assert relative(tc.load_(base, tmp_path)(images), before) <= 1e-10


@on_vit
@torch.no_grad()
def test_new_starting_values_are_neutral_after_folding_too(hybrid):
    model, images = hybrid("mix_ffn")
    fold_(model)
    for module in inserted_modules(model).values():
        module.init_neutral_()
    expected = tc.remove_(copy.deepcopy(model))(images)
    assert relative(model(images), expected) <= 1e-10


@on_vit
def test_other_blocks_take_part_by_having_a_method(hybrid, monkeypatch):
    model, _ = hybrid("peg")
    inserted = list(inserted_modules(model).values())
    done = []

    def once(self):
        done.append(self)
        return done.count(self) == 1

    monkeypatch.setattr(type(inserted[0]), "fold_", once, raising=False)
    assert fold_(model).folded == tuple(inserted_modules(model))
    assert done == inserted
    assert all(block.proj.residual for block in inserted)  # it decides for what is inside
    assert fold_(model) == FoldReport((), {})


def test_folding_is_refused_in_training_mode_and_without_an_insertion(vit):
    with pytest.raises(tc.SurgeryError, match="nothing is inserted"):
        fold_(vit)
    tc.insert_(vit, "mix_ffn")
    with pytest.raises(tc.SurgeryError, match=r"call model.eval\(\) first"):
        fold_(vit.train())


@pytest.mark.parametrize("case", ["vit"], indirect=True)
@pytest.mark.parametrize("site", ["beside_attn", "beside_mlp", "replace_attn"])
@pytest.mark.parametrize(
    "block", ["rep_mixer", "repvit_mixer", "dilated_reparam", "replknet_block", "unireplknet_block"]
)
@torch.no_grad()
def test_branches_of_mixers_become_one_kernel_and_come_out_again(case, block, site, disturb_):
    plain = case.build().double().eval()
    images = case.images(dtype=torch.float64)
    original = plain(images)
    model = tc.insert_(plain, block, site=site, allow_change=True)
    disturb_(model).train()(images)  # norms see something
    before = model.eval()(images)
    report = fold_(model)
    assert not report.kept
    assert set(report.folded) == set(inserted_modules(model))
    assert relative(model(images), before) < 1e-12
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), model(images))
    assert not fold_(model).folded
    torch.testing.assert_close(tc.remove_(model)(images), original, rtol=0, atol=0)
