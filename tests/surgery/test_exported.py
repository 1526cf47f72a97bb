"""A hybrid of every family leaves Python, for any size where the family takes any."""

from dataclasses import replace

import pytest
import torch

import tokenconv as tc

onnxruntime = pytest.importorskip("onnxruntime")

OPEN = {
    "vision_transformer": 14,
    "vision_transformer, gated": 14,
    "vision_transformer, post-norm": 16,
    "vision_transformer, parallel blocks": 16,
    "vision_transformer, one projection for both": 16,
    "vision_transformer, vitamin": 16,
    "deit": 16,
    "eva": 14,
    "qwen3_vit": 16,
    "deepseek_vit": 14,
    "naflexvit": 16,
    "twins, pcpvt": 32,
    "pvt_v2": 32,
}
"""Families whose models are exported for any size, and the steps of H and W."""
REFUSED = {"gemma4_vit": "topologically sorted"}
"""Families that torch does not write as ONNX, and what it says."""
ANY_SIZE = ("vision_transformer", "deit", "eva")


@pytest.mark.parametrize("name", ["vision_transformer", "beit"])
def test_two_hybrids_as_onnx(name, families, disturb_, tmp_path):
    check(name, families[name], disturb_, tmp_path)


@pytest.mark.slow
def test_a_hybrid_of_every_family_as_onnx(family, families, disturb_, tmp_path):
    name = next(name for name, case in families.items() if case is family)
    check(name, family, disturb_, tmp_path)


@torch.no_grad()
def check(name, case, disturb_, tmp_path):
    """Export a hybrid, and compare it at sizes that nobody told it."""
    step = OPEN.get(name)
    if step and name.partition(",")[0] in ANY_SIZE:
        case = replace(case, kwargs={**case.kwargs, "dynamic_img_size": True})
    model = case.build()
    blocks = ("mix_ffn", "peg", "separable_ffn")
    block = next(b for b in blocks if fits(model, b, case))
    hybrid = disturb_(tc.insert_(model, block, input_size=(3, *case.size)), std=0.05).eval()
    path = tmp_path / "hybrid.onnx"
    dynamic = ("batch", "hw") if step else ("batch",)
    if name in REFUSED:
        with pytest.raises(tc.ExportError, match=REFUSED[name]):
            tc.export(hybrid, path, input_size=(3, *case.size), dynamic=dynamic)
        assert not [*tmp_path.iterdir()]
        return
    report = tc.export(hybrid, path, input_size=(3, *case.size), dynamic=dynamic)
    assert report.multiple_of == ((step, step) if step else None)
    session = onnxruntime.InferenceSession(path)
    rows, cols = case.size
    sizes = [(rows, cols)]
    if step:
        sizes = [(r * step, c * step) for r, c in ((3, 7), (8, 2), (7, 6))]
        assert not {*sizes} & {report.traced[2:], *(one.shape[2:] for one in report.checked)}
    for size in sizes:
        for batch in (1, 3, 5):
            images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(9))
            expected = hybrid(images)
            first = expected[0] if isinstance(expected, tuple) else expected
            got = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
            assert (got - first).abs().max() < 1e-4 * first.abs().max(), (batch, size)


def fits(model, block, case):
    try:
        return bool(tc.plan(model, block, input_size=(3, *case.size)).edits)
    except tc.SurgeryError:
        return False


def test_a_family_of_one_size_says_so(families, tmp_path):
    case = families["beit"]
    with pytest.raises(tc.ExportError, match=r"Beit does not take images of .*Input height"):
        tc.export(case.build(), tmp_path / "a.onnx", input_size=(3, *case.size), dynamic=("hw",))
    assert not [*tmp_path.iterdir()]
