"""A model under surgery goes through the tools that people use, as the unmodified one does."""

import copy
import os

import pytest
import torch
import torch.multiprocessing as multiprocessing
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import tokenconv as tc

SIZES = [(64, 96), (96, 64), (64, 64), (48, 128), (128, 80), (112, 112)]


def images_of(size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(3))


def with_every_kind(model, *, behind_blocks=True):
    """A block inside the MLP, one beside it, one before attention and one behind a block."""
    plan = tc.plan(model, "mix_ffn", site="before_act") + tc.plan(model, "separable_ffn")
    plan = plan + tc.plan(model, "peg", site="before_attn")
    if behind_blocks:
        plan = plan + tc.plan(model, "peg", blocks=0)
    return tc.insert_(model, plan)


@pytest.fixture
def hybrid(dynamic_vit, disturb_):
    return disturb_(with_every_kind(dynamic_vit), std=0.2)


@pytest.fixture(params=["dynamic_vit", "pvt"])
def any_size(request, disturb_):
    """A hybrid that takes every image size: one that carries one grid, one with four."""
    return disturb_(with_every_kind(request.getfixturevalue(request.param)), std=0.2)


def compilations(model, sizes, compile_, *, train=False):
    """How often a model is compiled for some sizes, and the largest relative difference."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = compile_(copy.deepcopy(model).train(train), counter)
    with torch.set_grad_enabled(train):
        for size in sizes:
            expected, got = model.train(train)(images_of(size)), compiled(images_of(size))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
    return counter.frame_count


def whole(model, backend):
    return torch.compile(model, backend=backend, fullgraph=True)


def block_by_block(model, backend):
    for name, module in model.named_modules():
        if name.rpartition(".")[0].endswith("blocks"):
            module.compile(backend=backend, fullgraph=True)
    return model


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_no_more_compilations_than_the_unmodified_model(any_size, train, checkpointing):
    plain = tc.remove_(copy.deepcopy(any_size))
    for model in (plain, any_size):
        model.set_grad_checkpointing(checkpointing)
    counts = [compilations(m, SIZES, whole, train=train) for m in (plain, any_size)]
    assert counts[1] <= counts[0]


@pytest.mark.compile
def test_blocks_compiled_one_by_one_take_one_compilation_more_at_most(dynamic_vit, disturb_):
    """A hook of the compiled block itself is another matter: torch compiles it by itself."""
    plain = copy.deepcopy(dynamic_vit)
    hybrid = disturb_(with_every_kind(dynamic_vit, behind_blocks=False), std=0.2)
    counts = [compilations(m, SIZES[:4], block_by_block) for m in (plain, hybrid)]
    assert counts[1] <= counts[0] + 1


@pytest.mark.compile
@pytest.mark.slow
def test_export_with_every_kind_of_block(any_size):
    """Every size that the exported unmodified model takes: PVTv2's own attention adds a guard."""
    auto = torch.export.Dim.AUTO
    plain = tc.remove_(copy.deepcopy(any_size))
    for dynamic, sizes in ((None, SIZES[:1]), ({"x": {2: auto, 3: auto}}, SIZES)):
        args = (images_of(SIZES[0]),)
        program, theirs = (
            torch.export.export(model, args, dynamic_shapes=dynamic).module()
            for model in (any_size, plain)
        )
        taken = [size for size in sizes if takes(theirs, images_of(size))]
        assert taken[:3] == sizes[:3]
        with torch.no_grad():
            for size in taken:
                torch.testing.assert_close(
                    program(images_of(size)), any_size(images_of(size)), rtol=1e-4, atol=1e-4
                )


def takes(program, images):
    try:
        program(images)
    except AssertionError as error:
        return "Guard failed" not in str(error)
    return True


@pytest.mark.slow
def test_a_thousand_forwards_in_two_threads(any_size, in_two_threads):
    in_two_threads(any_size, *(images_of(size) for size in SIZES[:2]), count=500)


def test_moving_average(hybrid):
    ema = ModelEmaV3(hybrid, decay=0.5)
    with torch.no_grad():
        for parameter in hybrid.parameters():
            parameter.add_(0.1)
        before = dict(ema.module.named_parameters())["blocks.0.after.proj.weight"].clone()
        ema.update(hybrid)
        after = dict(ema.module.named_parameters())["blocks.0.after.proj.weight"]
        torch.testing.assert_close(after, before + 0.05)
        for size in SIZES[:2]:
            assert ema.module(images_of(size)).isfinite().all()


def test_one_process_and_two_compute_the_same(hybrid, tmp_path):
    """Data parallel over two processes: the gradients of the whole batch."""
    images = images_of(SIZES[0], batch=4)
    hybrid.train()(images).square().mean().backward()
    expected = {n: p.grad for n, p in hybrid.named_parameters()}
    hybrid.zero_grad()
    multiprocessing.spawn(_worker, (hybrid, images, tmp_path), nprocs=2)
    got = torch.load(tmp_path / "grads.pt", weights_only=True)
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-6)


def _worker(rank, model, images, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    parallel = DistributedDataParallel(model, find_unused_parameters=False)
    parallel(images[2 * rank : 2 * rank + 2]).square().mean().backward()
    if rank == 0:
        grads = {n: p.grad.clone() for n, p in model.named_parameters()}
        torch.save(grads, os.fspath(folder / "grads.pt"))
    torch.distributed.destroy_process_group()


def test_functional_calls(hybrid):
    images = images_of(SIZES[1])
    doubled = {n: 2 * p for n, p in hybrid.named_parameters()}
    with torch.no_grad():
        got = torch.func.functional_call(hybrid, doubled, (images,))
        for parameter in hybrid.parameters():
            parameter.mul_(2)
        torch.testing.assert_close(got, hybrid(images))


def test_a_wrapper_around_the_model(dynamic_vit):
    """The model inside is found, changed in place and named as its wrapper names it."""
    wrapper = nn.ModuleDict({"encoder": dynamic_vit, "decoder": nn.Linear(3, 3)})
    plan = tc.plan(wrapper, "peg", blocks="encoder.blocks.[01]$")
    assert [e.place.host for e in plan.edits] == ["encoder.blocks.0", "encoder.blocks.1"]
    images = images_of(SIZES[0])
    with torch.no_grad():
        before = dynamic_vit(images)
        tc.insert_(wrapper, plan)
        assert torch.equal(dynamic_vit(images), before)
        nn.init.normal_(dynamic_vit.blocks[0].after.proj.weight)
        assert not torch.equal(dynamic_vit(images), before)
        tc.remove_(wrapper)
        assert torch.equal(dynamic_vit(images), before)


def test_layers_replaced_by_adapters_stay_usable(vit):
    """A projection that somebody wrapped keeps its width, which is all that matters here."""
    vit.blocks[1].mlp.fc1 = nn.Sequential(vit.blocks[1].mlp.fc1)
    images = torch.randn(2, 3, 48, 80)
    with torch.no_grad():
        before = vit(images)
        tc.insert_(vit, "mix_ffn")
        assert torch.equal(vit(images), before)


def test_attention_that_is_replaced_waits_outside(vit):
    images = torch.randn(2, 3, 48, 80)
    with torch.no_grad():
        before = vit(images)
    changed = {k: v + 0.1 if ".attn." in k else v for k, v in vit.state_dict().items()}
    expected = copy.deepcopy(vit)
    expected.load_state_dict(changed)
    tc.insert_(vit, "separable_ffn", site="replace_attn", allow_change=True)
    assert not any(".attn.qkv." in key for key in vit.state_dict())
    with torch.no_grad():
        assert (vit(images) - before).abs().max() > 1e-3
        vit.load_state_dict(changed, strict=True)
        tc.remove_(vit)
        assert torch.equal(vit(images), expected(images))
