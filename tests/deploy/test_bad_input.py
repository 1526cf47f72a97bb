"""What cannot be exported is refused in one line, and leaves nothing behind."""

import sys

import pytest
import timm
import torch
from torch import nn

import tokenconv as tc
from tokenconv.deploy.exporting import largest_difference
from tokenconv.deploy.programs import brief


class Noisy(nn.Module):
    """Never returns the same twice."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return x.mean((2, 3)) + self.scale * torch.randn_like(x.mean((2, 3)))


class NoNumber(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) / 0 * 0


class OneNumber(nn.Module):
    """Two outputs, and the second is none."""

    def forward(self, x):
        return x.mean((2, 3)), x.mean((2, 3)) / 0 * 0


class ReadsValues(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x


class NotInOnnx(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvalsh(x.flatten(2) @ x.flatten(2).mT)


class OwnOperator(nn.Module):
    def forward(self, x):
        return torch.ops.tokenconv_test.twice(x)


@pytest.fixture
def refused(tmp_path):
    """Exports, and expects an error that leaves the folder as it was."""

    def run(model, message, name="a.pt2", error=tc.ExportError, **options):
        to = options.pop("to", "onnx" if name.endswith("onnx") else "pt2")
        kept = tmp_path / name
        kept.write_bytes(b"an older file")
        with pytest.raises(error, match=message) as caught:
            tc.export(model, kept, to=to, **{"input_size": (3, 8, 12), **options})
        assert "\n" not in str(caught.value)
        assert kept.read_bytes() == b"an older file"
        kept.unlink()
        with pytest.raises(error, match=message):
            tc.export(model, kept, to=to, **{"input_size": (3, 8, 12), **options})
        assert not [*tmp_path.iterdir()]

    return run


def test_a_file_that_does_not_agree(refused):
    refused(Noisy(), r"the pt2 file does not agree with the model on images of 1x3x8x12: it is off")
    refused(Noisy(1e-3), "does not agree", tolerance=1e-6)
    refused(OneNumber(), "off by nan")
    refused(NoNumber(), "off by nan of the largest output, and 1e-04 is allowed")


def test_a_file_that_does_not_run(refused, small, monkeypatch):
    def load(self, path):
        return torch.export.load(path).module().to("meta")

    monkeypatch.setattr("tokenconv.deploy.targets.Pt2Writer.load", load)
    refused(small, "the file does not take images of 1x3x8x12: ")


def test_differences_are_those_of_every_output():
    ones, twos = torch.ones(2, 3), torch.full((2, 3), 2.0)
    assert largest_difference([twos, ones], [twos, twos]) == 0.5
    assert largest_difference([ones], [ones, ones]) == float("inf")
    assert largest_difference([ones[:, :2]], [ones]) == float("inf")
    assert largest_difference([ones[:0]], [ones[:0]]) == 0


def test_a_tolerance_of_ones_own(tmp_path):
    report = tc.export(
        Noisy(1e-3), tmp_path / "a.pt2", to="pt2", input_size=(3, 8, 12), tolerance=1
    )
    assert 1e-4 < report.difference < 1


def test_a_model_of_one_size(refused):
    vit = timm.create_model("test_vit", img_size=(32, 48), dynamic_img_size=False).eval()
    message = (
        r"this VisionTransformer does not take images of 2x3x48x80; to leave sizes open, make it "
        r"so that it takes others \(timm: dynamic_img_size=True or strict_img_size=False\)"
    )
    refused(vit, message, input_size=(3, 32, 48), dynamic=("batch", "hw"))
    refused(vit, "does not take images of 2x3x64x48: Input height", input_size=(3, 64, 48))


class Remembers(nn.Module):
    """Keeps what it has computed, as LeViT's biases are kept."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 1, 1))
        self.kept = {}

    def forward(self, x):
        self.kept["twice"] = 2 * self.weight
        return x * self.kept["twice"]


def test_a_model_that_cannot_be_copied(refused, tmp_path):
    model = Remembers()
    model(torch.ones(1, 3, 8, 12))
    refused(model, r"this Remembers cannot be copied; run it once under torch\.no_grad\(\)")
    with torch.no_grad():
        model(torch.ones(1, 3, 8, 12))
    tc.export(model, tmp_path / "a.pt2", to="pt2", input_size=(3, 8, 12))


def test_dtypes_that_are_no_floats(refused, small):
    refused(small, r"expected a dtype of floats to export in, got torch\.int8", dtype=torch.int8)


class Causal(nn.Module):
    """Attention on five axes, of the kind that is not spelled out."""

    def forward(self, x):
        x = x.reshape(len(x), 3, 2, -1, 4)
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


def test_what_onnx_files_do_not_hold(refused, small, monkeypatch):
    message = "causal and grouped attention on more than four axes"
    refused(Causal(), message, name="a.onnx", dynamic=())
    monkeypatch.setattr("tokenconv.deploy.targets._ONNX_BYTES", 8)
    refused(small, "an ONNX file holds 2 GiB at most, and the weights take", name="a.onnx")


def test_a_model_that_cannot_be_traced(refused):
    refused(ReadsValues(), "torch.export cannot trace this ReadsValues with 'batch' open: ")


def test_sizes_that_do_not_fit(refused, small):
    vit = timm.create_model("test_vit", dynamic_img_size=True).eval()
    both = {"dynamic": ("batch", "hw")}
    refused(small, "a Sequential does not say which image sizes it takes", **both)
    refused(vit, "steps of 16x16, and W=40 is no multiple of 16", input_size=(3, 32, 40), **both)
    refused(vit, "H=16 is too small", input_size=(3, 16, 32), **both)
    refused(small, "expected multiple_of of 1 or more, got 0", multiple_of=0, **both)
    refused(small, "multiple_of is about open image sizes", multiple_of=4)
    refused(small, r"dynamic takes 'batch' and 'hw', got 'height'", dynamic=("height",))
    refused(small, r"expected an input size \(C, H, W\), got \(8, 12\)", input_size=(8, 12))
    refused(small, "a batch of one image or more, got 0", dynamic=(), batch_size=0)
    refused(small, "does not take images of 2x5x8x12", input_size=(5, 8, 12))


def test_targets_and_opsets_that_do_not_exist(refused, small):
    refused(small, "unknown target 'onyx': did you mean onnx", to="onyx", error=tc.UnknownNameError)
    refused(
        small, "opset 9 cannot be written: torch and the installed onnx have 18", "a.onnx", opset=9
    )
    refused(small, "opset 99 cannot be written", "a.onnx", opset=99)
    refused(small, "an opset is of ONNX files, not of pt2", opset=20)


def test_paths_that_cannot_be_files(small, tmp_path):
    for path, message in (
        (tmp_path / "a.onnx", r"pt2 is written to a file ending in .pt2, got .*a.onnx"),
        (tmp_path / "nowhere" / "a.pt2", "its folder is missing"),
    ):
        with pytest.raises(tc.ExportError, match=message):
            tc.export(small, path, to="pt2", input_size=(3, 8, 12))
    assert not [*tmp_path.iterdir()]


def test_models_without_weights_or_of_eight_bits(refused, small):
    refused(small.to("meta"), "on the meta device")
    refused(nn.Linear(3, 3).to(torch.float8_e4m3fn), "expected a model in float32 or like it")


def test_operators_of_other_libraries(refused):
    with torch.library._scoped_library("tokenconv_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")
        refused(OwnOperator(), "only exist where their library is imported: tokenconv_test::twice")


def test_a_missing_extra(refused, small, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refused(small, r"ONNX files need onnxscript.*pip install 'tokenconv\[deploy\]'", "a.onnx")


def test_programs_for_phones(refused, small, monkeypatch):
    options = {"name": "a.pte", "to": "executorch"}
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    message = r"programs for phones need executorch.*pip install 'tokenconv\[phone\]'"
    refused(small, message, dynamic=(), **options)
    monkeypatch.setitem(sys.modules, "executorch.exir", sys)
    refused(small, r"plans its memory for one shape of images: pass dynamic=\(\)", **options)


def test_errors_of_torch_in_one_line():
    error = RuntimeError('\x1b[31mno view\x1b[0m\n\nOriginal traceback:\nFile "/home/me/model.py"')
    assert brief(error) == "no view"
    assert brief(ValueError()) == "ValueError"
    assert brief(ValueError("a" * 500)) == "a" * 400 + "..."


def test_a_dtype_that_the_runtime_does_not_compute(refused, small):
    message = "cannot be written as onnx: .*Could not find an implementation for Conv"
    refused(small, message, "a.onnx", dtype=torch.float64)
    refused(small, "onnx|file", "a.onnx", dtype=torch.bfloat16)


def test_an_operator_that_onnx_does_not_have(refused):
    message = r"torch cannot write this model as onnx: .*aten.*eigh"
    refused(NotInOnnx(), message, "a.onnx")
