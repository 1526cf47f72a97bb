"""Damaged files and arbitrary words: a clear error, nothing half done, nothing left behind.

A few hundred inputs each in the fast suite, 10,000 in the slow one; the same ones every time.
"""

import contextlib
import copy
import hashlib
import io
import json
import struct
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import tokenconv as tc
from tokenconv.cli import analysis, commands, exporting, main
from tokenconv.cli.inputs import load_images
from tokenconv.errors import MeasurementError

BLOCKS = {
    "mix_ffn": "before_act", "peg": "after_block", "conv_glu": "beside_mlp", "leff": "beside_mlp",
    "lka": "beside_attn", "mona": "after_block", "conv_lora": "beside_attn",
    "localvit_ffn": "beside_mlp", "cvt_attn": "replace_attn", "additive_attn": "replace_attn",
    "mixconv": "beside_mlp", "early_conv": "replace_patch_embed",
}  # fmt: skip
ARGUMENTS = [
    "kernel_size", "dilation", "bias", "impl", "act_layer", "mlp_ratio", "width", "scale",
    "out_dim", "num_heads", "stride", "drop", "size", "in_chans", "qkv_bias", "residual", "x",
]  # fmt: skip
JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 1000, 0.5, 1.0, -0.0, 1e308, float("nan"), float("inf"),
    2**31, -(2**63), 2**64, 10**30, "", "x", "blocks.0", "../../x", "relu", "__class__", "\0",
    "\ud800", "7x64 float32", "-1x-1 float32", "99999999999x9 float32", "x: nan", [], {}, [1],
    [3, 5], [[[]]], {"x": 1},
]  # fmt: skip


def inputs(few: int) -> Any:
    """How many are tried: few, or 10,000."""
    return pytest.mark.parametrize("count", [few, pytest.param(10_000, marks=pytest.mark.slow)])


def try_all(count: int, check: Any, **strategies: Any) -> None:
    told = settings(
        max_examples=count, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    told(given(**strategies)(check))()


def paths(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a document."""
    children = (
        document.items()
        if isinstance(document, dict)
        else enumerate(document)
        if isinstance(document, list)
        else ()
    )
    return [path, *(found for key, child in children for found in paths(child, (*path, key)))]


@st.composite
def damaged(draw: Any, document: Any) -> Any:
    """A JSON document in which a few values are others, gone, or there twice."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        *above, key = draw(st.sampled_from(paths(document)[1:] or [("x",)]))
        place = document
        for step in above:
            place = place[step]
        if not isinstance(place, dict | list) or (isinstance(place, list) and key == "x"):
            return place
        how = draw(st.sampled_from(["junk", "junk", "delete", "repeat"]))
        if how == "junk" or key == "x":
            place[key] = copy.deepcopy(draw(st.sampled_from(JUNK)))
        elif how == "delete":
            del place[key]
        elif isinstance(place, list):
            place.append(copy.deepcopy(place[key]))
        else:
            place[draw(st.sampled_from(["x", f"{key}x"]))] = copy.deepcopy(place[key])
    return document


@st.composite
def cut(draw: Any, data: bytes) -> bytes:
    """A file with a few bytes changed, put in or lost, often at its beginning."""
    made = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        within = draw(st.sampled_from([24, 200, len(made)]))
        at = draw(st.integers(0, max(0, min(within, len(made)) - 1)))
        how = draw(st.sampled_from(["change", "change", "put", "end", "lose"]))
        some = draw(st.binary(min_size=1, max_size=4) | st.just(b"\xff" * 4) | st.just(b"\0" * 4))
        if how == "change":
            made[at : at + len(some)] = some
        elif how == "put":
            made[at:at] = some
        elif how == "end":
            del made[at:]
        else:
            del made[at : at + 20]
    return bytes(made)


@pytest.fixture(scope="module")
def vit() -> Any:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=48, patch_size=16, embed_dim=16, depth=1, num_heads=2,
        num_classes=3,
    )  # fmt: skip


def state(model: Any) -> tuple[str, dict[str, torch.Tensor]]:
    assert not any("_tokenconv" in vars(module) for module in model.modules())
    return str(model), {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(model: Any, before: tuple[str, dict[str, torch.Tensor]]) -> None:
    layout, values = state(model)
    assert layout == before[0]
    assert list(values) == list(before[1])
    assert all(torch.equal(value, before[1][key]) for key, value in values.items())


# --- plans ---


@st.composite
def plans(draw: Any, known: list[dict[str, Any]]) -> str:
    made = copy.deepcopy(draw(st.sampled_from(known)))
    if draw(st.booleans()):
        made = draw(damaged(made))
    else:
        for name in draw(st.lists(st.sampled_from(ARGUMENTS), min_size=1, max_size=3)):
            made["edits"][0]["kwargs"][name] = copy.deepcopy(draw(st.sampled_from(JUNK)))
    text = json.dumps(made)
    return (
        draw(cut(text.encode())).decode(errors="replace") if draw(st.integers(0, 9)) == 0 else text
    )


@inputs(100)
def test_plans(vit: Any, count: int):
    before = state(vit)
    known = [
        json.loads(tc.plan(vit, block, site=site, allow_change=True).to_json())
        for block, site in BLOCKS.items()
    ]

    def check(text: str) -> None:
        try:
            made = tc.Plan.from_json(text)
            assert str(made)
            tc.insert_(vit, made, allow_change=True)
        except (tc.TokenConvError, ValueError):
            pass
        else:
            tc.remove_(vit)
        assert_same(vit, before)

    try_all(count, check, text=plans(known))


@pytest.mark.parametrize("text", ["[" * 200_000, '{"format":' * 200_000, "9" * 5000, "1e999", ""])
def test_text_that_is_too_deep_or_too_long_is_no_plan(text: str):
    with pytest.raises(tc.SurgeryError, match="this is no plan of tokenconv"):
        tc.Plan.from_json(text)


# --- saved hybrids ---


@st.composite
def checkpoints(draw: Any, plan: bytes, delta: bytes) -> tuple[bytes, bytes]:
    """A plan and a delta, one of them damaged; the delta often with the checksum that it has."""
    content, length = json.loads(plan), struct.unpack("<Q", delta[:8])[0]
    which = draw(st.sampled_from(["entries", "entries", "text", "header", "delta", "both"]))
    if which == "text":
        return draw(cut(plan)), delta
    if which != "entries":
        header = json.loads(delta[8 : 8 + length])
        if which == "delta":
            delta = draw(cut(delta))
        else:
            made = json.dumps(draw(damaged(header))).encode()
            delta = struct.pack("<Q", len(made)) + made + delta[8 + length :]
        if draw(st.integers(0, 9)):
            content["sha256"] = hashlib.sha256(delta).hexdigest()
    if which in ("entries", "both"):
        content = draw(damaged(content))
    return json.dumps(content).encode(), delta


@inputs(60)
def test_checkpoints(vit: Any, tmp_path: Path, count: int):
    before = state(vit)
    hybrid = tc.insert_(copy.deepcopy(vit), "mix_ffn")
    tc.trainable_(hybrid, "inserted+head")
    tc.save(hybrid, tmp_path)
    files = [tmp_path / name for name in ("plan.json", "delta.safetensors")]

    def check(pair: tuple[bytes, bytes]) -> None:
        for path, data in zip(files, pair, strict=True):
            path.write_bytes(data)
        try:
            tc.load_(vit, tmp_path)
        except tc.CheckpointError:
            pass
        else:
            tc.remove_(vit)
            vit.load_state_dict(before[1])
        assert_same(vit, before)
        assert sorted(tmp_path.iterdir()) == sorted(files)

    try_all(count, check, pair=checkpoints(*(path.read_bytes() for path in files)))


# --- folders of images ---

PIXELS = np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8)
PICTURES = [
    ("PNG", "RGB"), ("PNG", "P"), ("PNG", "1"), ("PNG", "LA"), ("JPEG", "RGB"), ("JPEG", "CMYK"),
    ("BMP", "RGB"), ("BMP", "P"), ("WEBP", "RGBA"), ("GIF", "P"), ("TIFF", "F"), ("ICO", "RGBA"),
    ("EPS", "RGB"), ("DDS", "RGBA"), ("PDF", "RGB"), ("SPIDER", "F"), ("BLP", "P"),
]  # fmt: skip


def picture(kind: str, mode: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(file, kind)
    return file.getvalue()


@inputs(100)
def test_folders_of_images(tmp_path: Path, count: int):
    model = timm.create_model("test_vit")
    names = st.sampled_from(["a.png", "b.JPG", "c.webp", "d.bmp", "e.txt", "\udcff.png", "f"])
    content = st.sampled_from([picture(*one) for one in PICTURES]).flatmap(
        lambda data: st.just(data) | cut(data)
    )

    def check(files: dict[str, bytes]) -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about what it mends
            for name, data in files.items():
                (Path(folder) / name).write_bytes(data)
            with contextlib.suppress(MeasurementError):
                images = load_images(model, Path(folder), 2)
                assert images.shape == (2, 3, 160, 160)
                assert images.isfinite().all()

    try_all(count, check, files=st.dictionaries(names, content, max_size=3))


# --- words ---

WORDS = [
    "", "0", "1", "-1", "3", "5", "4", "32", "160", "99999999999", "1" * 5000, "1.5", "nan", "inf",
    "٣", "²", "mix_ffn", "peg", "conv_glu", "none", "before_act", "beside_mlp", "replace_attn",
    "replace_patch_embed", "nowhere", ":", "0:", "1:-1", "0:99999999999999999999999", "(", "[",
    "a{99999999999}", "(" * 5000, "(?P<x", "\\", "*", "[!", "cpu", "cuda", "meta", "cuda:999",
    "x:0", "float32", "int8", "on", "both", "infer", "ratio>1.05", "ratio>nan", "memory>1e999",
    "x>y", "kernel-size=3,5", "img-size=32,32x64", "batch-size=1,1", "dtype=", "=", "batch",
    "hw,batch", ",", "onnx", "aoti", "x.onnx", "no/such/x.onnx", "out.pt2", "empty", "deep.json",
    "bin.json", "weights.pth", "\0", "a\nb", "\udcff", "é", "--", "-x", "../..", "a" * 3000,
]  # fmt: skip
MODELS = ["test_vit", "test_vit", "test_resnet", "mix_ffn", "no.model", "hf-hub:x/y", "local-dir:."]
PLACES = ["--block", "--kernel-size", "--site", "--blocks", "--img-size"]
OPTIONS = {
    "list": ["--json", "--markdown", "--families"],
    "plan": [*PLACES, "--json"],
    "cost": [*PLACES, "--dim", "--sites", "--json"],
    "analyze": [
        "--checkpoint", "--hybrid", "--num-classes", "--img-size", "--energy", "--layers",
        "--fields", "--images", "--batch-size", "--out",
    ],
    "export": [
        *PLACES, "--plan", "--hybrid", "--num-classes", "--to", "--out", "--dynamic",
        "--multiple-of", "--batch-size", "--dtype", "--opset", "--fold",
    ],
    "compare": [
        *PLACES, "--out", "--trace", "--trace-diff", "--against", "--fail-if", "--device",
        "--dtype", "--repeats", "--batch-size", "--mode", "--compile", "--budget", "--precision",
        "--sweep", "--beside", "--images", "--memory-format",
    ],
}  # fmt: skip
FLAGS = {"--json", "--markdown", "--families", "--fields", "--fold", "--trace", "--trace-diff"}


@st.composite
def command_lines(draw: Any) -> list[str]:
    word = st.sampled_from(WORDS)
    command = draw(st.sampled_from([*OPTIONS, *OPTIONS, "measure"]))
    words = [command, draw(word if command == "list" else st.sampled_from(MODELS))]
    if command in ("plan", "compare"):
        words += ["--block", draw(st.sampled_from(["mix_ffn", "conv_glu", "none"]))]
    if command == "export":
        words += ["--out", "x.onnx"]
    for option in draw(st.lists(st.sampled_from(OPTIONS.get(command, PLACES)), max_size=3)):
        words += [option] if option in FLAGS else [option, draw(word)]
    return draw(st.permutations(words)) if draw(st.integers(0, 9)) == 0 else words


@inputs(60)
def test_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int):
    def far_enough(*args: Any, **kwargs: Any) -> Any:
        raise MeasurementError("it came this far")

    for room, name in ((commands, "compare"), (exporting, "export"), (analysis, "analyze")):
        monkeypatch.setattr(room, name, far_enough)
    monkeypatch.setattr(commands, "steady_allocator", lambda: "not touched")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "bin.json").write_bytes(b"\xff\xfe\0")
    (tmp_path / "weights.pth").write_bytes(b"\x80\x04junk")
    present = {*tmp_path.rglob("*")}

    def check(words: list[str]) -> None:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main(words)
            except SystemExit as stopped:
                status = stopped.code
        told = err.getvalue()
        assert status in (0, 1, 2), told
        assert "Traceback" not in told
        if status == 1:
            assert told.startswith("tokenconv: error: ")
            assert told.count("\n") == (2 if "--sweep" in words else 1), told  # a point, and all
            assert out.getvalue() == "" or "--sweep" in words
        left = sorted({*tmp_path.rglob("*")} - present, reverse=True)
        for path in left:  # or the next words would be blamed
            path.rmdir() if path.is_dir() else path.unlink()
        assert not left

    try_all(count, check, words=command_lines())
