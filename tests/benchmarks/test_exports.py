"""Every block leaves Python, and ``EXPORTS.md`` is what the sweep found."""

import re
from pathlib import Path

import pytest
import torch

import tokenconv as tc
from tokenconv.deploy import Target
from tokenconv.deploy.graphs import nodes_of

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

PAGE = Path(__file__).parents[2] / "EXPORTS.md"
ALWAYS = {"mix_ffn", "conv_lora", "abs_pos_embed", "condconv"}
"""A kernel, experts, an interpolation, kernels of every image."""
UNSEEN = [(1, 16, 12, 40), (3, 16, 36, 16), (1, 16, 44, 52), (3, 16, 20, 8)]


@pytest.fixture
def exports(load_benchmark):
    return load_benchmark("exports")


def rows(page):
    return dict(re.findall(r"^\| `(\w+)` (\|.*\|)$", page, re.MULTILINE))


def some(name):
    return pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow)


@pytest.mark.parametrize("name", [some(name) for name in tc.BLOCKS])
def test_a_block_as_onnx_at_sizes_nobody_told_it(exports, tmp_path, name):
    report = exports.attempt(name, Target.ONNX, tmp_path)
    told = {report.traced, *(one.shape for one in report.checked)}
    assert not told & set(UNSEEN)
    onnx.checker.check_model(graph := onnx.load(report.path), full_check=True)
    assert {node.domain for node in nodes_of(graph.graph)} == {""}
    session, block = onnxruntime.InferenceSession(report.path), exports.make(name)
    for shape in UNSEEN:
        images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        (got,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            expected = block(images)
        off = (torch.from_numpy(got) - expected).abs().max() / expected.abs().max()
        assert off < 1e-4, shape


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ALWAYS))
def test_a_block_as_a_compiled_package(exports, tmp_path, name):
    assert exports.attempt(name, Target.AOTI, tmp_path).difference < 1e-4


@pytest.mark.parametrize("name", [some(name) for name in tc.BLOCKS])
def test_a_block_as_a_program(exports, tmp_path, name):
    assert exports.attempt(name, Target.PT2, tmp_path).difference < 1e-4


def test_what_is_swept_shows(exports):
    """Every block changes what it is given, and treats neighbours differently."""
    for name in ALWAYS:
        images = torch.randn(1, 16, 12, 16, generator=torch.Generator().manual_seed(1))
        block = exports.make(name)
        with torch.no_grad():
            first, second = block(images), block(images.flip(-1))
        assert not torch.allclose(first, second)


def test_the_page_has_every_block_and_is_made_by_the_sweep(exports):
    page = PAGE.read_text()
    assert [*rows(page)] == [*tc.BLOCKS]
    assert page == exports.table(exports.kept(PAGE))


def test_a_sweep_keeps_what_is_not_asked_for(exports, tmp_path, capsys):
    out = tmp_path / "EXPORTS.md"
    for words in (["--blocks", "peg"], ["--blocks", "l?u"]):
        assert exports.main([*words, "--targets", "pt2", "--out", str(out)]) == 0
    found = rows(out.read_text())
    assert found["peg"] == found["lpu"] == "| not tried | 0.0e+00 | not tried | not tried |"
    assert found["mix_ffn"] == "| not tried | not tried | not tried | not tried |"
    assert rows(capsys.readouterr().out)["lpu"] == found["lpu"]


def test_what_fails_has_a_reason(exports, monkeypatch, tmp_path):
    def refuse(*args):
        raise tc.ExportError("it is too dear")

    monkeypatch.setattr(exports, "attempt", refuse)
    out = tmp_path / "EXPORTS.md"
    assert exports.main(["--blocks", "peg", "--targets", "onnx", "--out", str(out)]) == 1
    assert rows(out.read_text())["peg"].startswith("| no (1) |")
    assert "1. `peg`, onnx: it is too dear" in out.read_text()
