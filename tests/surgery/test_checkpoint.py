"""A saved hybrid comes back as it was, onto the model that it belongs to, or not at all."""

import copy
import itertools
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tokenconv as tc
from tokenconv.errors import CheckpointError
from tokenconv.surgery import checkpoint, storage
from tokenconv.surgery.checkpoint import load_, save
from tokenconv.surgery.edits import inserted_modules, insertion_of

IMAGES = torch.randn(2, 3, 48, 80, generator=torch.Generator().manual_seed(3))


def fill_(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def freeze_all_but_inserted_and_head(model):
    model.requires_grad_(False)
    for block in inserted_modules(model).values():
        block.requires_grad_(True)
    model.get_classifier().requires_grad_(True)


def trained(model, block="mix_ffn", seed=5, **kwargs):
    """A frozen model with trained blocks and a trained head."""
    tc.insert_(model, block, **kwargs)
    freeze_all_but_inserted_and_head(model)
    fill_((p for p in model.parameters() if p.requires_grad), seed)
    return model


def logits(model, images=IMAGES):
    with torch.no_grad():
        return model(images)


def snapshot(model):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return str(model), {name: set(vars(m)) for name, m in model.named_modules()}, state


def assert_unchanged(model, before):
    layout, attributes, state = snapshot(model)
    assert layout == before[0]
    assert attributes == before[1]
    assert list(state) == list(before[2])
    assert all(torch.equal(value, before[2][key]) for key, value in state.items())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_pre_hooks")
    assert not any(getattr(m, hook) for m in model.modules() for hook in hooks)


def edited(folder, **changes):
    path = folder / "plan.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def base(vit):
    return vit


@pytest.fixture
def hybrid(base):
    return trained(copy.deepcopy(base))


@pytest.fixture
def folder(hybrid, tmp_path):
    save(hybrid, tmp_path / "hybrid")
    return tmp_path / "hybrid"


# --- what comes back ---


@pytest.mark.parametrize(
    ("architecture", "block", "kwargs"),
    [
        ("vit", "mix_ffn", {"kernel_size": 5, "blocks": [0, 2]}),
        ("vit", "separable_ffn", {"blocks": slice(1, None)}),
        ("vit", "peg", {"blocks": 0}),
        ("vit", "separable_ffn", {"site": "replace_attn", "allow_change": True}),
        ("pvt_v2", "mix_ffn", {"kernel_size": 5}),
        ("pvt_v2", "none", {"allow_change": True, "blocks": 1}),
    ],
    ids=str,
)
def test_a_hybrid_comes_back_bit_equal(request, tmp_path, architecture, block, kwargs):
    base = request.getfixturevalue("vit" if architecture == "vit" else "pvt")
    model = trained(copy.deepcopy(base), block, **kwargs)
    save(model, str(tmp_path / "new" / "hybrid"))
    loaded = load_(copy.deepcopy(base), tmp_path / "new" / "hybrid")
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(base))
    assert insertion_of(loaded).plan == insertion_of(model).plan
    tc.remove_(loaded)
    assert list(loaded.state_dict()) == list(base.state_dict())


def test_load_returns_the_same_model(base, folder):
    assert load_(base, folder) is base


def test_two_plans_in_one_and_a_model_inside_another(vit, tmp_path):
    base = nn.Sequential(vit, nn.Linear(7, 3))
    model = copy.deepcopy(base)
    tc.insert_(model, tc.plan(model, "mix_ffn", blocks=0) + tc.plan(model, "peg", blocks=1))
    fill_((p for m in inserted_modules(model).values() for p in m.parameters()), 1)
    save(model, tmp_path)
    assert torch.equal(logits(load_(copy.deepcopy(base), tmp_path)), logits(model))


def test_only_what_was_added_or_trained_is_written(hybrid, folder):
    names = {key for key, p in hybrid.named_parameters() if p.requires_grad}
    assert any(".act.before." in name for name in names)
    assert load_file(folder / "delta.safetensors").keys() == names
    assert sorted(path.name for path in folder.iterdir()) == ["delta.safetensors", "plan.json"]
    content = json.loads((folder / "plan.json").read_text())
    assert content["architecture"] == "vit_tiny_patch16_224"
    assert content["tensors"]["head.weight"] == "7x48 float32"
    assert content["base"].keys() == {k for k, _ in hybrid.named_parameters()} - names


def test_frozen_blocks_are_written_too(base, tmp_path):
    model = trained(copy.deepcopy(base))
    model.requires_grad_(False)
    save(model, tmp_path)
    expected = {k for k in model.state_dict() if ".act.before." in k}
    assert load_file(tmp_path / "delta.safetensors").keys() == expected


def test_norm_statistics_come_back(vit, tmp_path):
    base = nn.Sequential(nn.BatchNorm2d(3), vit)
    model = tc.insert_(copy.deepcopy(base), "mix_ffn").requires_grad_(False)
    model.train()(IMAGES)
    model.eval()
    assert not torch.equal(logits(model), logits(base.eval()))
    save(model, tmp_path)
    loaded = load_(base, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded[0].num_batches_tracked == 1


def test_dtype_and_flags_of_the_model_stay(base, folder):
    hybrid = load_(copy.deepcopy(base), folder)
    model = copy.deepcopy(base).double().requires_grad_(False)
    load_(model, folder)
    assert all(p.dtype == torch.float64 for p in model.parameters())
    inserted = {id(p) for m in inserted_modules(model).values() for p in m.parameters()}
    assert all(p.requires_grad == (id(p) in inserted) for p in model.parameters())
    assert torch.equal(model.head.weight.float(), hybrid.head.weight)


def test_tied_and_strided_and_overlapping_values(base, tmp_path):
    def prepare(model):
        model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
        model.blocks[1].mlp.fc2.weight = nn.Parameter(model.blocks[0].mlp.fc2.weight.detach())
        model.head.weight = nn.Parameter(model.head.weight.detach().t().contiguous().t())
        return model

    model = tc.insert_(prepare(copy.deepcopy(base)), "mix_ffn")
    assert not model.head.weight.is_contiguous()
    fill_(model.parameters(), 9)
    save(model, tmp_path)
    loaded = load_(prepare(copy.deepcopy(base)), tmp_path)
    assert loaded.blocks[1].mlp.fc1.weight is loaded.blocks[0].mlp.fc1.weight
    assert torch.equal(logits(loaded), logits(model))
    untied = load_(copy.deepcopy(base), tmp_path).state_dict()
    assert all(torch.equal(untied[key], value) for key, value in model.state_dict().items())


def test_a_loaded_hybrid_can_be_saved_again(base, folder, hybrid, tmp_path):
    model = load_(copy.deepcopy(base), folder)
    save(model, folder)
    assert torch.equal(logits(load_(base, folder)), logits(hybrid))


# --- the base that a checkpoint belongs to ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("first", [False, True], ids=["cast before load", "cast before save"])
def test_a_cast_of_the_same_weights_is_accepted(base, tmp_path, dtype, first):
    with torch.no_grad():
        base.blocks[0].norm1.bias.fill_(1e-6)  # below the normal numbers of float16
        base.blocks[1].norm1.bias.copy_(torch.logspace(-9, 2, 48))
    model = trained(copy.deepcopy(base).to(dtype) if first else copy.deepcopy(base))
    save(model, tmp_path)
    loaded = load_(base if first else base.to(dtype), tmp_path)
    assert torch.equal(loaded.head.weight, model.head.weight.to(loaded.head.weight.dtype))


def test_casts_of_random_values_are_never_refused():
    values = torch.randn(500, 8, dtype=torch.float64) * torch.logspace(-6, 3, 500)[:, None]
    for to in (torch.float16, torch.bfloat16):
        for value in values:
            rounded = checkpoint._sample(value.to(to).to(torch.bfloat16))
            for a, b in zip(checkpoint._sample(value), rounded, strict=True):
                assert abs(a - b) <= checkpoint._RTOL * abs(a) + checkpoint._ATOL


def another_initialisation():
    torch.manual_seed(99)
    return timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=7,
        embed_dim=48,
        depth=3,
        num_heads=3,
        img_size=(48, 80),
    )


def test_another_initialisation_is_refused(tmp_path):
    torch.manual_seed(1)
    save(trained(another_initialisation()), tmp_path)
    torch.manual_seed(2)
    assert load_(another_initialisation(), tmp_path) is not None  # the seed is its own
    other = another_initialisation()
    other.init_weights()
    before = snapshot(other)
    with pytest.raises(CheckpointError, match=r"not saved and has other values.*check_base=False"):
        load_(other, tmp_path)
    assert_unchanged(other, before)
    load_(other, tmp_path, check_base=False)


@pytest.mark.parametrize("change", [0.03, 0.3])
def test_fine_tuned_weights_are_another_base(base, folder, change):
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(change * parameter.std() * torch.randn(parameter.shape))
    with pytest.raises(CheckpointError, match="other values"):
        load_(base, folder)


def test_weights_of_another_scale_are_another_base(base, folder):
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1.02)
    with pytest.raises(CheckpointError, match="other values"):
        load_(base, folder)


def test_one_other_tensor_is_another_base(base, folder):
    with torch.no_grad():
        base.blocks[2].mlp.fc2.weight.copy_(base.blocks[2].mlp.fc2.weight.flip(0))
    with pytest.raises(CheckpointError, match=r"blocks\.2\.mlp\.fc2\.weight is not saved"):
        load_(base, folder)


def test_not_a_number_is_never_alike(base, tmp_path):
    model = trained(copy.deepcopy(base))
    save(model, tmp_path)
    with torch.no_grad():
        base.cls_token.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="cls_token"):
        load_(base, tmp_path)


# --- what is refused ---


def test_a_plain_model_is_not_saved(base, tmp_path):
    with pytest.raises(tc.SurgeryError, match="nothing is inserted"):
        save(base, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_folded_model_is_not_saved(hybrid, tmp_path):
    tc.fold_(hybrid.eval())
    with pytest.raises(CheckpointError, match="save before folding"):
        save(hybrid, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_the_meta_device_has_no_values(hybrid, base, folder):
    with pytest.raises(CheckpointError, match="is on the meta device"):
        save(copy.deepcopy(hybrid).to("meta"), folder)
    with pytest.raises(CheckpointError, match="is on the meta device"):
        load_(copy.deepcopy(base).to("meta"), folder)
    load_(base, folder)


def test_a_changed_model_is_refused(hybrid, folder):
    expected = logits(hybrid)
    with pytest.raises(tc.SurgeryError, match="already holds blocks"):
        load_(hybrid, folder)
    assert torch.equal(logits(hybrid), expected)


def test_other_modules_are_refused(folder):
    with pytest.raises(tc.SurgeryError, match="not a model that tokenconv can change"):
        load_(nn.Linear(3, 3), folder)


def remove_folder(folder):
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def truncate(path, count):
    path.write_bytes(path.read_bytes()[:count])


def foreign(folder):
    save_file({"head.weight": torch.zeros(7, 48)}, folder / "delta.safetensors")


def foreign_with_its_checksum(folder):
    foreign(folder)
    data = (folder / "delta.safetensors").read_bytes()
    edited(folder, sha256=storage._checksum(data))


def no_safetensors(folder):
    (folder / "delta.safetensors").write_bytes(b"nothing")
    edited(folder, sha256=storage._checksum(b"nothing"))


def unknown_block(folder):
    plan = json.loads((folder / "plan.json").read_text())["plan"]
    plan["edits"][0]["block"] = "mixffn"
    edited(folder, plan=plan)


DAMAGES = {
    "no folder": (remove_folder, "cannot read .*plan.json.*a folder that tokenconv has saved"),
    "no plan": (lambda f: (f / "plan.json").unlink(), "cannot read .*plan.json"),
    "a folder as plan": (
        lambda f: (f / "plan.json").unlink() or (f / "plan.json").mkdir(),
        r"cannot read .*plan\.json: .*Is a directory.*a folder that tokenconv has saved",
    ),
    "no delta": (lambda f: (f / "delta.safetensors").unlink(), "cannot read .*delta.safetensors"),
    "truncated delta": (
        lambda f: truncate(f / "delta.safetensors", -1),
        "delta.safetensors is truncated.*expected the checksum [0-9a-f]{12}, got",
    ),
    "empty delta": (lambda f: truncate(f / "delta.safetensors", 0), "is truncated"),
    "foreign delta": (foreign, "not the file that plan.json describes"),
    "foreign delta, edited plan": (foreign_with_its_checksum, "other keys or shapes than .*plan"),
    "no safetensors": (no_safetensors, "no file of safetensors"),
    "truncated plan": (lambda f: truncate(f / "plan.json", -9), "no checkpoint of tokenconv"),
    "empty plan": (lambda f: truncate(f / "plan.json", 0), "no checkpoint of tokenconv"),
    "no text": (lambda f: (f / "plan.json").write_bytes(b"\xff\xfe"), r"plan\.json.*can't decode"),
    "deep nesting": (lambda f: (f / "plan.json").write_text("[" * 200_000), "no checkpoint of"),
    "newer": (
        lambda f: edited(f, format=2, tokenconv="9.0"),
        r"plan\.json: written in format 2 by tokenconv 9\.0, .* reads format 1; update tokenconv",
    ),
    "no format": (lambda f: edited(f, format=None), "no checkpoint of tokenconv"),
    "another architecture": (
        lambda f: edited(f, architecture="deit_tiny_patch16_224"),
        r"for a deit_tiny_patch16_224, got a vit_tiny_patch16_224; build the model with timm",
    ),
    "unknown block": (unknown_block, "cannot be read: unknown block 'mixffn': did you"),
}


def test_bases_are_told_apart_by_the_values_that_format_1_has_noted():
    """Files of earlier versions have them; other samples would refuse the right base."""
    note = checkpoint._note(torch.arange(1000.0).reshape(10, 100))
    assert note == "10x100: 618 236 854 472 90 708 326 944"


def test_files_are_on_the_disk_before_they_have_their_names(hybrid, folder, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def named(*names):
        done.append("name")
        replace(*names)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", named)
    save(hybrid, folder)
    assert done == ["file", "file", "folder", "name", "folder", "name", "folder"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(base, folder, damage):
    damages, message = DAMAGES[damage]
    damages(folder)
    before = snapshot(base)
    with pytest.raises(CheckpointError, match=message):
        load_(base, folder)
    assert_unchanged(base, before)


@pytest.mark.parametrize(
    "entry", ["format", "tokenconv", "architecture", "plan", "tensors", "base", "sha256"]
)
def test_no_entry_can_be_anything_else(base, folder, entry):
    before, text = snapshot(base), (folder / "plan.json").read_text()
    for junk in (None, 3, "x", [], {}, {"x": None}, {"head.weight": "7x48 x"}, 0.5, [[]]):
        (folder / "plan.json").write_text(text)
        edited(folder, **{entry: junk})
        if entry != "tokenconv":  # who wrote it is told, not checked
            with pytest.raises(CheckpointError):
                load_(base, folder)
    content = json.loads(text)
    del content[entry]
    (folder / "plan.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError):
        load_(base, folder)
    assert_unchanged(base, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 5}, r"head\.\w+: expected shape 7.*, the model has 5.*num_classes"),
        ({"depth": 4}, r"names are not the same; the first, blocks\.3\.\S+ is only in the model"),
        ({"depth": 2}, r"does not fit this model: the plan changes blocks\.2"),
        ({"embed_dim": 96}, "does not fit this model: the plan expects 192 channels"),
        ({"img_size": (48, 96)}, r"pos_embed: expected shape 1x16x48, the model has 1x19x48"),
        ({"qk_norm": True}, r"blocks\.0\.attn\.k_norm\.bias, is only in the model"),
    ],
    ids=str,
)
def test_models_of_another_shape_are_refused(folder, change, message):
    kwargs = {"num_classes": 7, "embed_dim": 48, "depth": 3, "num_heads": 3, "img_size": (48, 80)}
    other = timm.create_model("vit_tiny_patch16_224", **{**kwargs, **change})
    before = snapshot(other)
    with pytest.raises(CheckpointError, match=message):
        load_(other, folder, check_base=False)
    assert_unchanged(other, before)


def test_a_failure_while_values_are_copied_leaves_the_model_as_it_was(base, tmp_path, monkeypatch):
    hybrid = tc.insert_(copy.deepcopy(base), "mix_ffn")  # everything is trained
    fill_(hybrid.parameters(), 4)
    save(hybrid, tmp_path)
    before, copied, calls = snapshot(base), torch.Tensor.copy_, itertools.count()

    def fail_later(self, *args):
        if next(calls) == 20:
            raise MemoryError("planted")
        return copied(self, *args)

    real = checkpoint._fill

    def fill(model, tensors):
        monkeypatch.setattr(torch.Tensor, "copy_", fail_later)
        real(model, tensors)

    monkeypatch.setattr(checkpoint, "_fill", fill)
    with pytest.raises(MemoryError, match="planted"):
        load_(base, tmp_path)
    monkeypatch.undo()
    assert next(calls) > 35  # twenty were made, and taken back
    assert_unchanged(base, before)


# --- written whole or not at all ---


class KilledError(BaseException):
    """Stands for the end of the process."""


def steps(monkeypatch, kill_at=None):
    """Count what ``save`` does to the disk; end it in front of one step, or half way in it."""
    done = []
    replace, fsync, write, mkdir = (
        os.replace,
        os.fsync,
        storage._write_through,
        storage.Path.mkdir,
    )

    def step(name, action, half=None):
        done.append(name)
        if len(done) - 1 == kill_at:
            if half is not None:
                half()
            raise KilledError(name)
        return action()

    def wrapped_write(path, data):
        for part in (0, len(data) // 2, len(data)):
            step(f"write {part}", lambda: None, lambda n=part: path.write_bytes(data[:n]))
        write(path, data)

    monkeypatch.setattr(os, "replace", lambda a, b: step("replace", lambda: replace(a, b)))
    monkeypatch.setattr(os, "fsync", lambda fd: step("fsync", lambda: fsync(fd)))
    monkeypatch.setattr(storage, "_write_through", wrapped_write)
    monkeypatch.setattr(
        storage.Path, "mkdir", lambda *a, **k: step("mkdir", lambda: mkdir(*a, **k))
    )
    return done


FOUND = {}


def is_which(base, folder, twins):
    """Index of the hybrid that is in a folder; -1 for none."""
    if not (folder / "plan.json").exists():
        with pytest.raises(CheckpointError, match="cannot read"):
            load_(base, folder)
        return -1
    manifest, _ = storage.read(checkpoint._files(folder))
    key = manifest.to_json()
    if key not in FOUND:  # ``load_`` knows nothing else of the folder, so once is enough
        out = logits(load_(copy.deepcopy(base), folder))
        (FOUND[key],) = [i for i, twin in enumerate(twins) if torch.equal(out, logits(twin))]
    return FOUND[key]


def killed_saves(monkeypatch, model, folder, before):
    """Run ``save`` again and again, ended one step later each time; nothing is kept between."""
    for kill_at in itertools.count():
        before()
        with monkeypatch.context() as patch:
            done = steps(patch, kill_at)
            try:
                save(model, folder)
            except KilledError:
                yield done[-1]
            else:
                assert kill_at >= 10
                return


def reset(folder, files):
    for path in folder.iterdir() if folder.exists() else ():
        path.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)


@pytest.fixture
def twins(base):
    """Three hybrids of one base: another plan, and other values."""
    return [
        trained(copy.deepcopy(base)),
        trained(copy.deepcopy(base), "separable_ffn", seed=6, blocks=[1]),
        trained(copy.deepcopy(base), seed=7),
    ]


def test_a_kill_leaves_the_old_hybrid_or_the_new_one(base, twins, tmp_path, monkeypatch):
    folder = tmp_path / "hybrid"
    save(twins[0], folder)
    (folder / "notes.txt").write_text("mine")
    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    seen = []
    for _ in killed_saves(monkeypatch, twins[1], folder, lambda: reset(folder, old)):
        seen.append(is_which(base, folder, twins))
        # and the next save, whole, takes its place and leaves nothing behind
        save(twins[2], folder)
        assert is_which(base, folder, twins) == 2
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["delta.safetensors", "notes.txt", "plan.json"]
    assert seen == sorted(seen)  # old, then new, with one step between
    assert set(seen) == {0, 1}
    assert is_which(base, folder, twins) == 1
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_kill_after_a_kill(base, twins, tmp_path, monkeypatch):
    """An interrupted hybrid whose values still wait under their other name is not lost either."""
    folder = tmp_path / "hybrid"
    save(twins[0], folder)
    interrupted = None
    for _ in killed_saves(monkeypatch, twins[1], folder, lambda: None):
        plan = json.loads((folder / "plan.json").read_text())
        data = (folder / "delta.safetensors").read_bytes()
        if plan["sha256"] != storage._checksum(data):
            interrupted = {path.name: path.read_bytes() for path in folder.iterdir()}
            break
    assert interrupted is not None
    seen = []
    for _ in killed_saves(monkeypatch, twins[2], folder, lambda: reset(folder, interrupted)):
        seen.append(is_which(base, folder, twins))
    assert seen == sorted(seen)
    assert set(seen) == {1, 2}


def test_a_kill_of_the_first_save_leaves_nothing_or_the_whole(base, twins, tmp_path, monkeypatch):
    folder = tmp_path / "hybrid"
    seen = []
    for _ in killed_saves(monkeypatch, twins[0], folder, lambda: reset(folder, {})):
        seen.append(is_which(base, folder, twins))
        save(twins[2], folder)
        assert is_which(base, folder, twins) == 2
    assert set(seen) == {-1, 0}


def test_an_error_of_the_disk_keeps_the_old_hybrid(base, twins, folder, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save(twins[1], folder)
    assert is_which(base, folder, twins) == 0


def write_often(files, writer, rounds):
    for count in range(rounds):
        tensors = {"x": torch.full((1000,), writer + count / 100)}
        form = {"x": "1000 float32"}
        storage.write(
            files, storage.Manifest(architecture=None, plan={}, tensors=form, base={}), tensors
        )


def test_those_who_save_at_the_same_time_never_mix(tmp_path):
    files = checkpoint._files(tmp_path)
    write_often(files, 9, 1)
    with ThreadPoolExecutor(3) as pool:
        writers = [pool.submit(write_often, files, writer, 15) for writer in range(3)]
        read = 0
        while not all(writer.done() for writer in writers):
            _, tensors = storage.read(files)  # fails on values that are another one's
            assert tensors["x"].unique().numel() == 1
            read += 1
        for writer in writers:
            writer.result()
    assert read > 1
    assert storage.read(files)[1]["x"][0] % 1 == pytest.approx(0.14)  # the last of one of them
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["delta.safetensors", "plan.json"]


@pytest.mark.parametrize("name", ["plan.json.new", "delta.safetensors.new", ".plan.json.lock"])
def test_a_link_that_came_with_a_folder_is_not_written_through(hybrid, folder, tmp_path, name):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (folder / name).symlink_to(mine)
    with suppress(OSError):  # the lock is no file: nothing is saved then
        save(hybrid, folder)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("name", ["plan.json", "delta.safetensors"])
def test_files_of_others_are_not_overwritten(hybrid, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(CheckpointError, match=r"cannot be replaced safely.*Take another folder"):
        save(hybrid, tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_everyone_may_read_what_the_umask_allows(folder):
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_source_tree_that_is_not_installed_can_save(base, hybrid, tmp_path, monkeypatch):
    def missing(package):
        raise storage.PackageNotFoundError(package)

    monkeypatch.setattr(storage, "version", missing)
    save(hybrid, tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text())["tokenconv"] == "not installed"
    load_(base, tmp_path)


SAVES_FOR_EVER = """
import sys, torch, tokenconv as tc
sys.path.insert(0, sys.argv[2])
from conftest import CASES
from tokenconv.surgery.checkpoint import save
model = tc.insert_(CASES["vit"].build(), "mix_ffn", kernel_size=int(sys.argv[3]))
count = 0
while True:
    count += 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(count / 1000)
    save(model, sys.argv[1])
    print(count, flush=True)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_a_whole_hybrid(base, tmp_path):
    tests, chance, last = str(storage.Path(__file__).parent), random.Random(0), 0
    for number in range(20):
        command = [sys.executable, "-c", SAVES_FOR_EVER, str(tmp_path / "h"), tests, "3"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            first = int(process.stdout.readline())
            time.sleep(chance.uniform(0, 0.2))
            process.send_signal(signal.SIGKILL)
            last = int(([first, *process.stdout.read().split()])[-1])
        model = load_(copy.deepcopy(base), tmp_path / "h")
        values = {p.unique().item() for p in model.parameters()}  # fails on a mix
        assert len(values) == 1, number
        (value,) = values
        assert value == pytest.approx(last / 1000) or value == pytest.approx((last + 1) / 1000)


@pytest.mark.slow
def test_processes_that_save_to_one_folder_leave_a_whole_hybrid_at_any_moment(base, tmp_path):
    tests, folder = str(storage.Path(__file__).parent), tmp_path / "h"
    command = [sys.executable, "-c", SAVES_FOR_EVER, str(folder), tests]
    writers = [
        subprocess.Popen([*command, side], stdout=subprocess.PIPE, text=True) for side in "35"
    ]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline()
        seen = set()
        for _ in range(30):
            model = load_(copy.deepcopy(base), folder)
            assert len({p.unique().item() for p in model.parameters()}) == 1  # of one writer
            seen.add(insertion_of(model).plan.edits[0].kwargs["kernel_size"])
        assert seen == {3, 5}
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    load_(base, folder)
