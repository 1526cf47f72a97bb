"""Whatever is asked for in vain: one clear line, an exit status, and nothing left behind."""

import os
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from tokenconv.cli import commands, main
from tokenconv.locks import locked


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch: pytest.MonkeyPatch):
    """Every one of these mistakes is told before anything is measured."""

    def measured(*args: Any, **kwargs: Any):
        raise AssertionError("it came to measuring")

    monkeypatch.setattr(commands, "compare", measured)
    monkeypatch.setattr(commands, "steady_allocator", lambda: "not touched")


class CommandLine:
    """Runs a command that must fail with one line, and gives that line."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        self.folder = folder
        self.capsys = capsys

    def error(self, *words: str) -> str:
        before = sorted(self.folder.rglob("*"))
        assert main(words) == 1
        out, err = self.capsys.readouterr()
        assert out == ""
        assert err.endswith("\n")
        (line,) = err.splitlines()
        assert line.startswith("tokenconv: error: ")
        assert sorted(self.folder.rglob("*")) == before, "something was left behind"
        return line.removeprefix("tokenconv: error: ")

    def compare(self, *words: str, out: Path | None = None) -> str:
        return self.error("compare", *words, "--out", str(out or self.folder / "report"))


@pytest.fixture
def line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(tmp_path, capsys)


MIX = ("--block", "mix_ffn")


@pytest.mark.parametrize("command", ["plan", "compare"])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ("vit_tiny_patch16_22", *MIX),
            "unknown model 'vit_tiny_patch16_22': did you mean vit_tiny_patch16_224 or ",
        ),
        (("no such model", *MIX), "unknown model 'no such model': expected one of "),
        (("test_vit.nonsense", *MIX), "cannot build test_vit.nonsense: "),
        (
            ("test_vit", "--block", "mixffn"),
            "unknown block 'mixffn': did you mean mix_ffn or ",
        ),
        (
            ("resnet18", *MIX),
            "ResNet is not a model that tokenconv can change: expected a timm model with"
            " Transformer blocks (`tokenconv list --families` lists them)",
        ),
        (("test_vit", *MIX, "--kernel-size", "4"), "expected an odd kernel_size, got 4"),
        (
            ("test_vit", *MIX, "--img-size", "100"),
            "the model refuses an image of 3x100x100: Input height (100) should be divisible",
        ),
        (
            ("pvt_v2_b0", *MIX, "--img-size", "8"),
            "the model refuses an image of 3x8x8: Calculated padded input size",
        ),
        (("test_vit", *MIX, "--img-size", "1", "2", "3"), "--img-size takes H or H W, got 3"),
        (("pvt_v2_b0", *MIX, "--kernel-size", "1"), "take kernel_size >= 3"),
        (("test_vit", "--block", "none"), "so there is nothing to take out"),
    ],
    ids=[
        "model", "far model", "weights", "block", "no token model", "even kernel", "size of a ViT",
        "size of a PVT", "three sizes", "small kernel", "no convolution",
    ],
)  # fmt: skip
def test_wrong_names_and_numbers(
    line: CommandLine, command: str, words: tuple[str, ...], expected: str
):
    run = line.compare if command == "compare" else line.error
    message = run(*words) if command == "compare" else run("plan", *words)
    assert expected in message


@pytest.mark.parametrize("kind", [RuntimeError, OSError])
def test_trouble_while_measuring(
    line: CommandLine, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
):
    def exhausted(*args: Any, trace_dir: Path, **kwargs: Any):
        trace_dir.mkdir()
        raise kind("no memory\nis left")

    monkeypatch.setattr(commands, "compare", exhausted)
    assert line.compare("test_vit", *MIX, "--trace").endswith("no memory is left")


def test_an_old_report_is_left_as_it_was(line: CommandLine):
    report = line.folder / "report"
    report.mkdir()
    (report / "compare.json").write_text("old")
    line.compare("resnet18", *MIX)
    assert (report / "compare.json").read_text() == "old"


def test_pretrained_weights_that_cannot_be_had(line: CommandLine, monkeypatch: pytest.MonkeyPatch):
    def offline(*args: Any, **kwargs: Any):
        raise ConnectionError("the hub\ncannot be reached")

    monkeypatch.setattr("timm.create_model", offline)
    message = line.compare("test_vit", *MIX, "--pretrained")
    expected = "cannot build test_vit with pretrained weights: the hub cannot be reached"
    assert message == expected


# --- usage ---


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("compare", "test_vit", *MIX, "--batch-size", "0"), "expected a positive integer, got 0"),
        (("compare", "test_vit", *MIX, "--repeats", "-1"), "expected a positive integer, got -1"),
        (("compare", "test_vit", *MIX, "--batch-size", "x"), "expected a positive integer, got x"),
        (("plan", "test_vit", *MIX, "--img-size", "0"), "expected a positive integer, got 0"),
        (("compare", "test_vit", *MIX, "--batch-size", "9" * 10), "at most nine digits, got 9999"),
        (("cost", "test_vit", "--sites", "a{99999999999}"), "repetition number is too large"),
        (("cost", "test_vit", "--sites", "(" * 5000), "is no regular expression"),
        (("compare", "test_vit", *MIX, "--dtype", "int8"), "invalid choice: 'int8'"),
        (("compare", "test_vit", *MIX, "--mode", "sleep"), "invalid choice: 'sleep'"),
        (("compare", "test_vit"), "the following arguments are required: --block"),
        (("compare", *MIX), "the following arguments are required: MODEL"),
        (("measure",), "invalid choice: 'measure'"),
        ((), "the following arguments are required: command"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, tuple) else "",
)
def test_wrong_usage_exits_with_two(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    expected: str,
):
    monkeypatch.chdir(tmp_path)  # where the default --out would be
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    last = err.splitlines()[-1]
    assert last.startswith("tokenconv")
    assert ": error: " in last
    assert expected in last
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


# --- devices ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nonsense", "unknown device 'nonsense'; expected cpu, cuda or cuda:N"),
        ("cuda:x", "unknown device 'cuda:x'; expected cpu, cuda or cuda:N"),
        ("meta", "cannot measure on 'meta'; expected cpu, cuda or cuda:N"),
        ("cuda", "cuda was asked for, but 0 CUDA devices are available"),
        ("cuda:3", "cuda:3 was asked for, but 0 CUDA devices are available"),
    ],
)
def test_devices_that_are_not_there(
    line: CommandLine, monkeypatch: pytest.MonkeyPatch, name: str, expected: str
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert line.compare("test_vit", *MIX, "--device", name) == expected


def test_a_device_beyond_the_last(line: CommandLine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    message = line.compare("test_vit", *MIX, "--device", "cuda:2")
    assert message == "cuda:2 was asked for, but 2 CUDA devices are available"


# --- output ---


@pytest.mark.parametrize("where", ["file", "file/report", "file/deep/report"])
def test_output_that_cannot_be_written_is_told_before_a_model_is_made(
    line: CommandLine, monkeypatch: pytest.MonkeyPatch, where: str
):
    def made(*args: Any, **kwargs: Any):
        raise AssertionError("it came to making a model")

    monkeypatch.setattr(commands, "build_model", made)
    (line.folder / "file").write_text("mine")
    message = line.compare("test_vit", *MIX, out=line.folder / where)
    assert message.startswith(f"cannot write a report to {line.folder / where}: ")
    assert (line.folder / "file").read_text() == "mine"


@pytest.mark.parametrize("words", [("compare", "test_vit", *MIX), ("analyze", "test_vit")])
def test_a_folder_that_another_run_writes_to(line: CommandLine, words: tuple[str, ...]):
    report = line.folder / "report"
    report.mkdir()
    with locked(report / ".lock"):
        message = line.error(*words, "--out", str(report))
    assert message == f"another run is writing to {report}: wait for it, or take another --out"
    line.error(words[0], "resnet18", *words[2:], "--img-size", "1", "2", "3", "--out", str(report))


# --- images ---


def refused_images(line: CommandLine, images: Path) -> str:
    return line.compare("test_vit", *MIX, "--images", str(images))


def test_a_folder_of_images_that_is_missing(line: CommandLine):
    images = line.folder / "images"
    assert refused_images(line, images) == f"{images} is not a folder of photographs"


def test_a_file_in_place_of_a_folder_of_images(line: CommandLine):
    images = line.folder / "photograph.png"
    Image.new("RGB", (32, 32)).save(images)
    assert refused_images(line, images) == f"{images} is not a folder of photographs"


@pytest.mark.parametrize("names", [[], ["notes.txt", "photograph.gif"]])
def test_a_folder_without_images(line: CommandLine, names: list[str]):
    images = line.folder / "images"
    images.mkdir()
    for name in names:
        (images / name).write_bytes(b"")
    message = refused_images(line, images)
    assert message.startswith(f"{images} holds no photographs (.bmp, .jpeg, .jpg, .png")


def test_a_pipe_is_not_waited_for(line: CommandLine):
    images = line.folder / "images"
    images.mkdir()
    os.mkfifo(images / "photograph.png")
    assert f"{images} holds no photographs" in refused_images(line, images)


def test_other_programs_are_not_run_for_a_picture(
    line: CommandLine, monkeypatch: pytest.MonkeyPatch
):
    """Pillow hands PostScript to Ghostscript, whatever its name ends in."""

    def run(*args: Any, **kwargs: Any):
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    images = line.folder / "images"
    images.mkdir()
    Image.new("RGB", (32, 32)).save(images / "photograph.png", "EPS")
    assert "cannot identify image file" in refused_images(line, images)


def test_more_images_than_there_is_memory_for_are_told_at_once(line: CommandLine):
    assert "allocate" in line.compare("test_vit", *MIX, "--batch-size", "999999999")


def png() -> bytes:
    """A picture whose data come in several chunks."""
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    header = struct.pack(">IIBBBBB", 32, 32, 8, 2, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))
    pieces = [data[:1000], data[1000:2000], data[2000:]]
    chunks = [(b"IHDR", header), *((b"IDAT", piece) for piece in pieces), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("b.jpg", b"this is no photograph"),
        ("b.png", b""),
        ("b.png", png()[: len(png()) // 2]),
        ("b.png", b"\xffDAT".join(png().rsplit(b"IDAT", 1))),
        ("b.png", png().replace(b"IHDR", b"IHD\xff")),
    ],
    ids=["text", "empty", "truncated", "garbled data", "garbled header"],
)
def test_a_corrupt_image_is_named(line: CommandLine, name: str, content: bytes):
    images = line.folder / "images"
    images.mkdir()
    (images / "a.png").write_bytes(png())
    (images / name).write_bytes(content)
    message = refused_images(line, images)
    assert message.startswith(f"cannot read the image {images / name}: ")


def test_missing_scikit_learn(line: CommandLine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    message = line.compare("test_vit", *MIX)
    assert "scikit-learn, which is not installed" in message
    assert "pip install 'tokenconv[demo]'" in message
    assert "--images DIR" in message
