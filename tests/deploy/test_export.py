"""An exported file computes what the model computes, or there is none."""

import copy
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import timm
import torch
from torch import nn

import tokenconv as tc
from tokenconv.deploy import Target
from tokenconv.deploy.graphs import nodes_of

from .conftest import shaken

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

UNSEEN = [(1, 3, 96, 48), (3, 3, 48, 112), (1, 3, 176, 80), (3, 3, 128, 144)]
"""Neither the size asked for, nor that of the trace, nor any that the export itself checks."""


def images_of(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def off(got, expected):
    """The largest difference, relative to the largest output."""
    return ((torch.as_tensor(got) - expected).abs().max() / expected.abs().max()).item()


def integers(model):
    """All integers that are written in an ONNX graph."""
    tensors = [*model.graph.initializer]
    tensors += [a.t for n in nodes_of(model.graph) for a in n.attribute if n.op_type == "Constant"]
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in tensors]
    return {int(v) for a in arrays if np.issubdtype(a.dtype, np.integer) for v in a.flat}


resized_positions = pytest.mark.needs(
    "torch", "2.14", "resizes position embeddings otherwise, or to one size, in files of open sizes"
)


@pytest.fixture(scope="module")
def exported(hybrid, tmp_path_factory):
    """The hybrid as an ONNX file, with batch and size open, in steps of 16."""
    path = tmp_path_factory.mktemp("onnx") / "hybrid.onnx"
    report = tc.export(hybrid, path, input_size=(3, 160, 176), dynamic=("batch", "hw"))
    return path, report


@resized_positions
def test_an_onnx_file_equals_the_model_at_sizes_nobody_told_it(hybrid, exported):
    path, report = exported
    told = {report.traced, *(one.shape for one in report.checked)}
    assert not told & set(UNSEEN)
    session = onnxruntime.InferenceSession(path)
    for shape in UNSEEN:
        images = images_of(shape)
        (got,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            assert off(got, hybrid(images)) < 1e-4, shape


@resized_positions
def test_an_onnx_file_holds_standard_operators_and_no_size(exported):
    path, report = exported
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert not model.functions
    assert {node.domain for node in nodes_of(model.graph)} == {""}
    assert [one.domain for one in model.opset_import] == [""]
    (batch, channels, rows, cols) = model.graph.input[0].type.tensor_type.shape.dim
    assert [axis.dim_param for axis in (batch, rows, cols)] == ["batch", "16*rows", "16*cols"]
    assert channels.dim_value == 3
    rows, cols = (side // 16 for side in report.traced[2:])
    assert (rows, cols) == (11, 13)  # numbers that nothing else in the model is
    assert not integers(model) & {rows, cols, rows * cols, 16 * rows, 16 * cols}


@resized_positions
def test_sizes_are_found_where_they_are_written(hybrid, tmp_path):
    """The check above would see them: a file with a fixed size has them."""
    path = tmp_path / "fixed.onnx"
    tc.export(hybrid, path, input_size=(3, 176, 208), dynamic=())
    assert integers(onnx.load(path)) & {11, 13, 11 * 13}


@resized_positions
def test_the_report_says_what_was_checked(exported):
    path, report = exported
    shapes = [one.shape for one in report.checked]
    assert (report.target, report.dtype, report.multiple_of) == ("onnx", torch.float32, (16, 16))
    assert {shape[0] for shape in shapes} == {1, 3}
    others = {shape[2:] for shape in shapes} - {(160, 176), report.traced[2:]}
    assert len(others) == 3
    assert all(h != w for h, w in others)
    assert report.difference == max(one.difference for one in report.checked) < 1e-4
    lines = str(report).splitlines()
    assert lines[0].startswith(f"{path}: onnx, float32, ")
    assert lines[1] == "  open: batch and hw; sizes from 32x32 on, in steps of 16x16"
    assert len(lines) == 3 + len(shapes)


@resized_positions
def test_a_pt2_file_runs_without_tokenconv_and_timm(hybrid, tmp_path):
    path = tmp_path / "hybrid.pt2"
    tc.export(hybrid, path, to="pt2", input_size=(3, 160, 160), dynamic=("batch", "hw"))
    shapes = [(1, 3, 48, 112), (3, 3, 176, 80)]
    inputs = [images_of(shape) for shape in shapes]
    with torch.no_grad():
        torch.save([inputs, [hybrid(images) for images in inputs]], tmp_path / "pairs.pt")
    code = f"""
import sys, torch
module = torch.export.load({str(path)!r}).module()
for images, expected in zip(*torch.load({str(tmp_path / "pairs.pt")!r})):
    torch.testing.assert_close(module(images), expected, rtol=1e-4, atol=1e-5)
assert not {{"tokenconv", "timm"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.compile
@pytest.mark.slow
def test_a_compiled_package_equals_the_model(hybrid, tmp_path):
    path = tmp_path / "hybrid.pt2"
    tc.export(hybrid, path, to=Target.AOTI, input_size=(3, 96, 64), dynamic=("batch", "hw"))
    run = torch._inductor.aoti_load_package(str(path))
    with torch.no_grad():
        for shape in UNSEEN:
            assert off(run(images_of(shape)), hybrid(images_of(shape))) < 1e-4, shape


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of executorch, about itself
def test_a_program_for_phones_equals_the_model(tmp_path):
    pytest.importorskip("executorch", reason="the extra phone is not part of dev: it is large")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=(96, 64), dynamic_img_size=False, num_classes=7)
    plan = tc.plan(model, "mix_ffn") + tc.plan(model, "separable_ffn")
    model = shaken(tc.insert_(model, plan))
    path = tmp_path / "hybrid.pte"
    options = {"to": "executorch", "input_size": (3, 96, 64), "dynamic": (), "batch_size": 2}
    report = tc.export(model, path, **options)
    assert [one.shape for one in report.checked] == [(2, 3, 96, 64)]
    runtime = import_module("executorch.runtime").Runtime.get()
    method = runtime.load_program(path).load_method("forward")
    images = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert off(method.execute([images])[0], model(images)) < 1e-4


def test_the_model_is_left_alone(small, tmp_path):
    small.train()
    before = copy.deepcopy(small.state_dict())
    tc.export(small, tmp_path / "a.pt2", to="pt2", input_size=(3, 8, 12), dtype=torch.float64)
    assert all(module.training for module in small.modules())
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())
    assert all(value.dtype == torch.float32 for value in small.state_dict().values())


@pytest.mark.parametrize(
    ("dtype", "to"), [(torch.float16, "onnx"), (torch.bfloat16, "pt2"), (torch.float64, "pt2")]
)
def test_other_dtypes(small, tmp_path, dtype, to):
    path = tmp_path / f"a.{to}"
    assert tc.export(small, path, to=to, input_size=(3, 8, 12), dtype=dtype).dtype == dtype
    if to == "onnx":
        kind = onnx.load(path).graph.input[0].type.tensor_type.elem_type
        assert kind == onnx.TensorProto.FLOAT16
    else:
        assert {t.dtype for t in torch.export.load(path).state_dict.values()} == {dtype}


def test_a_fixed_batch(small, tmp_path):
    report = tc.export(small, tmp_path / "a.onnx", input_size=(3, 8, 12), dynamic=(), batch_size=4)
    assert [one.shape for one in report.checked] == [(4, 3, 8, 12)]
    shape = onnx.load(tmp_path / "a.onnx").graph.input[0].type.tensor_type.shape
    assert [axis.dim_value for axis in shape.dim] == [4, 3, 8, 12]


def test_an_opset_of_ones_choice(small, tmp_path):
    tc.export(small, tmp_path / "a.onnx", input_size=(3, 8, 12), opset=18)
    (one,) = onnx.load(tmp_path / "a.onnx").opset_import
    assert (one.domain, one.version) == ("", 18)


class Several(nn.Module):
    """All that models return."""

    def forward(self, x):
        mean = x.mean((2, 3))
        return {"mean": mean, "pair": (mean + 1, x.flatten(1).amax(1))}


@pytest.mark.parametrize("name", ["a.onnx", "a.pt2"])
def test_every_output_is_compared(tmp_path, name):
    report = tc.export(Several(), tmp_path / name, to=name[2:], input_size=(3, 8, 12))
    assert report.difference < 1e-6


class MadeForOneSize(nn.Module):
    """Resizes what it learned for one size, unless images have it."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 3, 8, 12))

    def forward(self, x):
        position = self.position
        if x.shape[2:] != position.shape[2:]:
            position = nn.functional.interpolate(position, x.shape[2:], mode="bilinear")
        return (x * position).mean((2, 3))


def test_the_size_a_model_was_made_for_stays_open(tmp_path):
    report = tc.export(
        MadeForOneSize(), tmp_path / "a.onnx", input_size=(3, 8, 12), dynamic=("batch", "hw"),
        multiple_of=4,
    )  # fmt: skip
    assert (1, 3, 8, 12) in [one.shape for one in report.checked]


class Triton(nn.Module):
    """Calls the custom operator, as a hybrid with ``impl="triton"`` does."""

    def __init__(self):
        super().__init__()
        self.conv = tc.DWConv(3, residual=True, activation="gelu")
        nn.init.normal_(self.conv.weight)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens[:, :1], tokens], dim=1)
        if torch.compiler.is_exporting():  # a CPU has no kernel of it
            tokens = torch.ops.tokenconv.depthwise_conv(
                tokens, self.conv.weight, self.conv.bias, None, [*x.shape[2:]], 1, True, "gelu",
                "act",
            )  # fmt: skip
        else:
            tokens = self.conv(tokens, tc.TokenGrid(tuple(x.shape[2:]), 1))
        return tokens.mean(1)


@pytest.mark.parametrize("name", ["a.onnx", "a.pt2"])
def test_our_operator_becomes_standard_ones(tmp_path, name):
    model, path = Triton().eval(), tmp_path / name
    images = (torch.randn(2, 3, 8, 12),)
    assert "tokenconv.depthwise_conv" in str(torch.export.export(model, images).graph)
    dynamic = ("batch", "hw")
    tc.export(model, path, to=name[2:], input_size=(3, 8, 12), dynamic=dynamic, multiple_of=1)
    if name == "a.pt2":
        assert "tokenconv" not in str(torch.export.load(path).graph)
    else:
        domains = {node.domain for node in nodes_of(onnx.load(path).graph)}
        assert domains == {""}
