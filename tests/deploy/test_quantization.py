"""Eight bits: which layers get them, how well they agree, and what is refused."""

import copy
import sys

import numpy as np
import pytest
import timm
import torch
from torch import nn

import tokenconv as tc
from tokenconv.deploy import KeepFloat, QuantizationReport
from tokenconv.deploy.quantization import Calibration, _quantize_added_biases
from tokenconv.surgery import inserted_modules

from .conftest import shaken

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("torchao")

IMAGES = torch.randn(5, 3, 64, 48, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def folded():
    """A ViT of two blocks, with a convolution in and beside every MLP."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", depth=2, dynamic_img_size=True, num_classes=7)
    model = shaken(tc.insert_(model, tc.plan(model, "mix_ffn") + tc.plan(model, "separable_ffn")))
    tc.fold_(model)
    return model


def off(got, expected):
    return ((torch.as_tensor(got) - expected).abs().max() / expected.abs().max()).item()


def layers(path):
    """Nodes with weights by kind: the scales of those of eight bits, and how many others."""
    graph = onnx.load(path).graph
    makers = {name: node for node in graph.node for name in node.output}
    constants = {one.name: one for one in graph.initializer}
    eight: dict[str, list[tuple[int, ...]]] = {}
    others: dict[str, int] = {}
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        weight, maker = node.input[1], makers.get(node.input[1])
        if (
            maker is not None
            and maker.op_type == "DequantizeLinear"
            and maker.input[0] in constants
        ):
            assert constants[maker.input[0]].data_type == onnx.TensorProto.INT8
            assert makers[node.input[0]].op_type == "DequantizeLinear"  # its input as well
            eight.setdefault(node.op_type, []).append((*constants[maker.input[1]].dims,))
        elif weight in constants:
            others[node.op_type] = others.get(node.op_type, 0) + 1
    return eight, others


@pytest.fixture(scope="module")
def exported(folded, tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / "hybrid.onnx"
    report = tc.export(
        folded, path, input_size=(3, 64, 48), dynamic=("batch", "hw"), calibration=IMAGES
    )
    return path, report


def test_every_layer_of_a_file_has_eight_bits_per_channel(folded, exported):
    path, report = exported
    eight, others = layers(path)
    wide = [m for m in folded.modules() if isinstance(m, nn.Linear)]
    convolutions = [m for m in folded.modules() if isinstance(m, nn.Conv2d)]
    convolutions += [m for m in inserted_modules(folded).values() if hasattr(m, "weight")]
    assert not others
    assert sum(map(len, eight.values())) == len(report.quantization.layers)
    assert len(eight["MatMul"]) + len(eight["Gemm"]) >= len(wide)
    assert all(len(scales) == 1 and scales[0] > 1 for own in eight.values() for scales in own)
    assert not report.quantization.kept_float
    assert {"patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.mlp.act.before"} <= {
        *report.quantization.layers
    }


def test_matrix_products_give_floats(exported):
    graph = onnx.load(exported[0]).graph
    products = {n.output[0] for n in graph.node if n.op_type in ("Gemm", "MatMul")}
    rounded = {n.input[0] for n in graph.node if n.op_type == "QuantizeLinear"}
    assert products
    assert not products & rounded


@pytest.mark.parametrize("dynamic", [(), ("batch", "hw")], ids=["fixed", "open"])
def test_onnx_runtime_computes_every_layer_in_integers(folded, tmp_path, dynamic):
    options = {"input_size": (3, 64, 48), "dynamic": dynamic, "calibration": IMAGES}
    report = tc.export(folded, tmp_path / "a.onnx", **options)
    chosen = onnxruntime.SessionOptions()
    chosen.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    chosen.log_severity_level = 3  # the optimized file is for this machine: so it warns
    onnxruntime.InferenceSession(tmp_path / "a.onnx", chosen, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    kinds = [node.op_type for node in graph.node]
    integers = [k for k in kinds if k in ("QLinearConv", "QGemm", "MatMulIntegerToFloat")]
    assert len(integers) == len(report.quantization.layers)
    weights = {one.name for one in graph.initializer if len(one.dims) > 1}
    unpacked = [n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in weights]
    assert not unpacked


class Projection(nn.Module):
    """Three channels to four, at every position."""

    def __init__(self, weight, bias):
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.fc.weight.data.copy_(weight)
        self.fc.bias.data.copy_(bias)

    def forward(self, images):
        return self.fc(images.permute(0, 2, 3, 1))


def added(path):
    """What is added to the one matrix product of a file: steps and their size, or floats."""
    model = onnx.load(path)
    makers = {name: node for node in model.graph.node for name in node.output}
    constants = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    (add,) = [node for node in model.graph.node if node.op_type == "Add"]
    (bias,) = [name for name in add.input if makers.get(name, add).op_type != "MatMul"]
    assert {*constants} <= {name for node in model.graph.node for name in node.input}
    if bias in constants:
        return constants[bias], None
    (product,) = [node for node in model.graph.node if node.op_type == "MatMul"]
    steps = [constants[makers[name].input[1]] for name in product.input]
    values, scales = (constants[name] for name in makers[bias].input)
    torch.testing.assert_close(torch.tensor(scales), torch.tensor(steps[0] * steps[1]))
    return values, scales


def test_biases_are_integers_in_steps_of_their_products(tmp_path):
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    weight[2] = 0  # a channel that is its bias alone
    bias = torch.tensor([0.3, -2.0, 1.5, 0.0])
    model = Projection(weight, bias)
    options = {"input_size": (3, 8, 12), "calibration": IMAGES[:, :, :8, :12]}
    report = tc.export(model, tmp_path / "a.onnx", **options)
    values, scales = added(tmp_path / "a.onnx")
    assert values.dtype == "int32"
    assert (abs(values * scales - bias.numpy()) <= scales / 2 + 1e-7).all()
    assert values[3] == 0
    assert report.difference < 0.02


def test_a_bias_of_too_many_steps_stays_a_float(tmp_path):
    model = Projection(1e-9 * torch.eye(4, 3), torch.tensor([0.3, -2.0, 1.5, 0.0]))
    options = {"input_size": (3, 8, 12), "calibration": IMAGES[:, :, :8, :12]}
    report = tc.export(model, tmp_path / "a.onnx", **options)
    values, scales = added(tmp_path / "a.onnx")
    assert scales is None
    assert values.tolist() == model.fc.bias.tolist()
    assert report.difference < 1e-6


def eight_bit_graph():
    """Two layers with one bias, of which one adds in the other order; a layer of floats with one;
    a product that a row is added to as by broadcasting; and a bias that a branch reads as well."""
    make, tensor = onnx.helper.make_node, onnx.numpy_helper.from_array
    arrays = {
        "weight": np.arange(-6, 6, dtype=np.int8).reshape(3, 4),
        "scale": np.array([0.1, 0.2, 0.3, 0.4], np.float32),
        "step": np.float32(0.5),
        "zero": np.uint8(7),
        "bias": np.array([1, -2, 3, 4], np.float32),
        "read twice": np.array([5, 6, 7, 8], np.float32),
        "floats": np.ones((3, 4), np.float32),
        "row": np.ones((1, 4), np.float32),
        "yes": np.array(True),
    }
    inner = onnx.helper.make_graph(
        [make("Identity", ["read twice"], ["inner"])], "branch", [],
        [onnx.helper.make_tensor_value_info("inner", onnx.TensorProto.FLOAT, (4,))],
    )  # fmt: skip
    nodes = [
        make("QuantizeLinear", ["x", "step", "zero"], ["rounded"]),
        make("DequantizeLinear", ["rounded", "step", "zero"], ["input"]),
        make("DequantizeLinear", ["weight", "scale"], ["kernel"], axis=1),
        *(make("MatMul", ["input", "kernel"], [f"product{i}"]) for i in range(4)),
        make("MatMul", ["input", "floats"], ["product4"]),
        make("Add", ["product0", "bias"], ["out0"], name="add0"),
        make("Add", ["bias", "product1"], ["out1"], name="add1"),
        make("Add", ["product2", "row"], ["out2"], name="add2"),
        make("Add", ["product3", "read twice"], ["out3"], name="add3"),
        make("Add", ["product4", "bias"], ["out4"], name="add4"),
        make("If", ["yes"], ["out5"], then_branch=inner, else_branch=inner),
    ]
    value = onnx.helper.make_tensor_value_info
    return onnx.helper.make_graph(
        nodes, "layers", [value("x", onnx.TensorProto.FLOAT, (2, 3))],
        [value(f"out{i}", onnx.TensorProto.FLOAT, (2, 4) if i < 5 else (4,)) for i in range(6)],
        [tensor(np.asarray(array), name) for name, array in arrays.items()],
    )  # fmt: skip


def test_only_biases_of_layers_of_integers_become_integers():
    def run(graph):
        model = onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
        )
        onnx.checker.check_model(model)
        session = onnxruntime.InferenceSession(model.SerializeToString())
        return session.run(None, {"x": np.float32([[1, 2, 3], [-1, 0.5, 0]])})

    graph = eight_bit_graph()
    expected = run(graph)
    _quantize_added_biases(graph)
    for got, own in zip(run(graph), expected, strict=True):
        np.testing.assert_allclose(got, own, atol=0.1)  # half a step of the coarsest channel
    adds = {node.name: [*node.input] for node in graph.node if node.op_type == "Add"}
    assert adds == {
        "add0": ["product0", "add0_bias"], "add1": ["add1_bias", "product1"],
        "add2": ["product2", "row"], "add3": ["product3", "add3_bias"],
        "add4": ["product4", "bias"],
    }  # fmt: skip
    names = {one.name for one in graph.initializer}
    assert {"bias", "read twice"} <= names  # still read
    again = eight_bit_graph()
    for node in [node for node in again.node if node.name in ("add3", "add4")]:
        again.node.remove(node)
    _quantize_added_biases(again)
    assert "bias" not in {one.name for one in again.initializer}


class Stacked(nn.Module):
    """A matrix for each of two groups of channels, and one for all."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(2, 4, 5, generator=generator))
        self.bias = nn.Parameter(torch.randn(2, 1, 5, generator=generator))
        self.fc = nn.Linear(5, 3)

    def forward(self, images):
        x = images.flatten(2).reshape(len(images), 2, -1, 4) @ self.weight + self.bias
        return self.fc(x)


def test_stacked_matrices_stay_in_float(tmp_path):
    images = torch.rand(4, 2, 6, 2, generator=torch.Generator().manual_seed(0))
    report = tc.export(
        Stacked(), tmp_path / "a.onnx", input_size=(2, 6, 2), dynamic=(), calibration=images
    )
    assert report.difference < 0.02
    (why,) = report.quantization.kept_float.values()
    assert why == "stacked matrices, which ONNX Runtime multiplies as floats"
    assert layers(tmp_path / "a.onnx") == ({"MatMul": [(3,)]}, {"MatMul": 1})


def test_what_was_quantised_is_what_is_checked(small, tmp_path, monkeypatch):
    def spoil(path, calibration):
        model = onnx.load(path)
        gelu = onnx.helper.make_node("Gelu", ["images"], ["unused"], domain="com.microsoft")
        model.graph.node.append(gelu)
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
        onnx.save(model, path)

    monkeypatch.setattr("tokenconv.deploy.targets.quantize_onnx", spoil)
    with pytest.raises(tc.ExportError, match=r"operators of com\.microsoft are left"):
        tc.export(
            small, tmp_path / "a.onnx", input_size=(3, 8, 12), calibration=IMAGES[:, :, :8, :12]
        )


def test_a_file_of_eight_bits_is_standard_and_open(folded, exported):
    path, report = exported
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert [axis.dim_param for axis in model.graph.input[0].type.tensor_type.shape.dim] == [
        "batch", "", "16*rows", "16*cols",
    ]  # fmt: skip
    session = onnxruntime.InferenceSession(path)
    images = torch.randn(3, 3, 96, 112, generator=torch.Generator().manual_seed(8))
    (got,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        assert 1e-4 < off(got, folded(images)) < 0.2
    assert 1e-4 < report.difference < report.tolerance == 0.2
    assert "onnx, float32 and int8, " in str(report)
    assert f"{len(report.quantization.layers)} of" in str(report)


def test_layers_that_stay_in_float(folded, tmp_path):
    path = tmp_path / "a.onnx"
    options = {"input_size": (3, 64, 48), "calibration": IMAGES}
    report = tc.export(folded, path, keep_float=["depthwise", "ends"], **options).quantization
    ends = [name for name, why in report.kept_float.items() if why == "first and last layer"]
    depthwise = [name for name, why in report.kept_float.items() if why == "depthwise"]
    assert ends == ["patch_embed.proj", "head"]
    assert set(depthwise) == {
        name
        for name, module in folded.named_modules()
        if getattr(module, "weight", torch.empty(0)).shape[1:2] == (1,)
    }
    eight, others = layers(path)
    assert "Conv" not in eight
    assert others == {"Conv": 1 + len(depthwise), "Gemm": 1}
    assert "  float, depthwise: " in str(report)


def test_depthwise_is_one_kernel_per_channel(tmp_path):
    """Neither groups of several channels nor a single channel for all."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 8, 3, groups=8)
    )
    report = tc.export(
        model, tmp_path / "a.onnx", input_size=(1, 12, 12), calibration=torch.rand(2, 1, 12, 12),
        keep_float="depthwise",
    )  # fmt: skip
    assert report.quantization == QuantizationReport(("0", "1"), {"2": "depthwise"})


def test_each_channel_of_a_depthwise_kernel_has_its_own_scale(tmp_path):
    """One for all of them would round most away."""
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Flatten())
    sizes = torch.logspace(-4, 0, 8)[:, None, None, None]
    kernels = torch.randn(8, 1, 3, 3, generator=torch.Generator().manual_seed(3)) * sizes
    with torch.no_grad():
        model[0].weight.copy_(kernels)
    tc.export(model, tmp_path / "a.onnx", input_size=(8, 6, 6), calibration=torch.rand(4, 8, 6, 6))
    arrays = [
        onnx.numpy_helper.to_array(one) for one in onnx.load(tmp_path / "a.onnx").graph.initializer
    ]
    (rounded,) = [torch.tensor(a) for a in arrays if a.shape == kernels.shape]
    largest = kernels.abs().amax((1, 2, 3), keepdim=True)
    assert rounded.dtype == torch.int8
    assert ((rounded * largest / 127 - kernels).abs() <= largest / 127).all()


def test_ranges_are_those_of_all_images(tmp_path):
    """The last image alone has large values: without it they would be cut off."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten())
    images = torch.rand(11, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images[10] *= 50
    tc.export(model, tmp_path / "a.onnx", input_size=(3, 4, 4), calibration=images)
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    (got,) = session.run(None, {"images": images[10:].numpy()})
    assert off(got, model(images[10:]).detach()) < 0.05


@pytest.mark.parametrize("batch_size", [2, 8])
def test_a_fixed_batch(tmp_path, small, batch_size):
    """Five images fill no batch: the last one begins again."""
    images = IMAGES[:, :, :8, :12]
    report = tc.export(
        small, tmp_path / "a.onnx", input_size=(3, 8, 12), dynamic=(), batch_size=batch_size,
        calibration=images,
    )  # fmt: skip
    assert [one.shape[0] for one in report.checked] == [batch_size]


def test_batches_hold_every_image():
    calibration = Calibration(torch.arange(5.0)[:, None, None, None])
    assert [b.flatten().tolist() for b in calibration.batches(2)] == [[0, 1], [2, 3], [4, 0]]
    assert torch.cat([*calibration.batches(None)]).flatten().tolist() == [0, 1, 2, 3, 4]
    like = torch.empty(0)
    assert calibration.resized((7, 1, 1, 1), like).flatten().tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert calibration.resized((1, 1, 4, 6), like).shape == (1, 1, 4, 6)
    assert calibration.resized((1, 1, 4, 6), like.to("meta")).is_meta  # where the model is


class ComputedKernel(nn.Module):
    """A kernel that is the sum of two, and too large to be summed when the file is written."""

    def __init__(self):
        super().__init__()
        self.kernels = nn.ParameterList(torch.randn(1024, 3, 16, 16) for _ in range(2))
        self.head = nn.Linear(1024, 4)

    def forward(self, x):
        x = nn.functional.conv2d(x, self.kernels[0] + self.kernels[1], stride=16)
        return self.head(x.mean((2, 3)))


def test_a_kernel_that_is_computed_stays_in_float(tmp_path):
    report = tc.export(
        ComputedKernel(), tmp_path / "a.onnx", input_size=(3, 16, 32),
        calibration=torch.randn(2, 3, 16, 32),
    )  # fmt: skip
    assert report.quantization.layers == ("head",)
    (why,) = report.quantization.kept_float.values()
    assert why == "its kernel is computed: fold_ the model first"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "pt2"}, "calibration is for ONNX files, not for pt2: use quantize_ on the model"),
        ({"calibration": IMAGES[:0]}, r"one or more, got \(0, 3, 64, 48\)"),
        ({"calibration": IMAGES[0]}, r"expected images \(N, C, H, W\) to calibrate with"),
        ({"calibration": None, "keep_float": ["ends"]}, "pass calibration as well"),
        ({"keep_float": "heads"}, "unknown keep_float 'heads': did you mean ends"),
        ({"calibration": IMAGES[..., :32]}, "expected images of 3 channels and 64x48 pixels"),
        ({"calibration": IMAGES[:, :1]}, "got 1 channels and 64x48"),
        ({"calibration": IMAGES.double()}, "got float32 and float64"),
        ({"dtype": torch.float16}, "models and images in float32, got float16 and float32"),
        (
            {"calibration": IMAGES[..., :40], "dynamic": ("hw",)},
            r"multiples of 16x16 \(two or more\) pixels to calibrate with, got 3 channels and 64x4",
        ),
        (
            {"calibration": IMAGES[..., :16, :], "dynamic": ("hw",)},
            r"16x16 \(two or more\) pixels to calibrate with, got 3 channels and 16x48",
        ),
        ({"tolerance": 1e-6}, "the onnx file does not agree with the model on images of 1x3x64x48"),
    ],
)
def test_what_is_refused(folded, tmp_path, options, message):
    path = tmp_path / ("a.pt2" if options.get("to") == "pt2" else "a.onnx")
    path.write_bytes(b"an older file")
    with pytest.raises(tc.TokenConvError, match=message):
        tc.export(folded, path, **{"input_size": (3, 64, 48), "calibration": IMAGES, **options})
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"an older file"]


def test_nothing_to_quantise(tmp_path, small):
    options = {"input_size": (3, 8, 12), "calibration": IMAGES[:, :, :8, :12]}
    with pytest.raises(tc.ExportError, match="no layer of this model can be quantised: 0 of 2"):
        tc.export(small, tmp_path / "a.onnx", keep_float="ends", **options)
    with pytest.raises(tc.ExportError, match="no layer of this model can be quantised: 0 of 0"):
        tc.export(nn.Flatten(), tmp_path / "a.onnx", **options)
    assert not [*tmp_path.iterdir()]


# --- torchao ---


@pytest.mark.parametrize("how", ["int8_weight_only", "int8_dynamic"])
def test_linear_layers_in_pytorch(folded, how):
    model = copy.deepcopy(folded)
    images = IMAGES[:2]
    report = tc.quantize_(model, how)
    linear = {name for name, m in folded.named_modules() if isinstance(m, nn.Linear)}
    assert {*report.layers} == linear
    for name, module in model.named_modules():
        is_plain = type(getattr(module, "weight", torch.empty(0)).data) is torch.Tensor
        assert is_plain == (name not in linear)
    assert report.kept_float["patch_embed.proj"] == "torchao quantises linear layers alone"
    assert str(report).startswith(f"{len(linear)} of {len(linear) + len(report.kept_float)} layers")
    with torch.no_grad():
        assert 1e-4 < off(model(images), folded(images)) < 0.1


@pytest.mark.parametrize(("how", "is_exact"), [("int8_weight_only", True), ("int8_dynamic", False)])
def test_what_is_rounded(how, is_exact):
    """These weights are integers of eight bits, and stay what they are; the inputs are none."""
    layer = nn.Linear(64, 8)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(-127, 129).repeat(2).reshape(8, 64).clamp(max=127))
        layer.weight[:, 0] = 127.5  # of every channel the largest, which makes its scale 1
    model = nn.Sequential(copy.deepcopy(layer))
    tc.quantize_(model, how)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    x[:, 0] = 0
    with torch.no_grad():
        assert (off(model(x), layer(x)) < 1e-5) == is_exact


def test_ends_stay_in_float_in_pytorch():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    report = tc.quantize_(model, keep_float=KeepFloat.ENDS)
    assert report == QuantizationReport(("1",), dict.fromkeys("02", "first and last layer"))
    with pytest.raises(tc.ExportError, match=r"no linear layer of floats.*quantised before"):
        tc.quantize_(model, keep_float="ends")


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 4, stride=4), nn.Flatten(2), nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 5)
    ).eval()


@pytest.mark.parametrize("how", ["int8_weight_only", "int8_dynamic"])
@pytest.mark.parametrize(
    "which", ["linear", pytest.param("folded", marks=pytest.mark.slow)], ids=["linear", "vit"]
)
def test_quantised_models_are_exported(request, tmp_path, how, which):
    """The file equals the quantised model, and holds its integers."""
    model = copy.deepcopy(request.getfixturevalue(which))
    size = (3, 64, 48) if which == "folded" else (3, 8, 12)
    layers = tc.quantize_(model, how).layers
    report = tc.export(model, tmp_path / "a.pt2", to="pt2", input_size=size)
    assert report.difference < 1e-4
    tensors = torch.export.load(tmp_path / "a.pt2").state_dict.values()
    weights = [t for t in tensors if t.dtype == torch.int8 and t.ndim == 2 and min(t.shape) > 1]
    assert len(weights) == len(layers)


def test_integers_that_onnx_does_not_multiply(linear, tmp_path):
    tc.quantize_(linear, "int8_dynamic")
    with pytest.raises(tc.ExportError, match=r"torch cannot write this model as onnx: .*_int_mm"):
        tc.export(linear, tmp_path / "a.onnx", input_size=(3, 8, 12))
    assert not [*tmp_path.iterdir()]


def test_torchao_that_is_refused(monkeypatch, small):
    with pytest.raises(tc.UnknownNameError, match="unknown quantization 'int4'"):
        tc.quantize_(small, "int4")
    with pytest.raises(
        tc.ExportError, match="no linear layer of floats to quantise: it has no lay"
    ):
        tc.quantize_(nn.Flatten())
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(tc.ExportError, match=r"need torchao.*pip install 'tokenconv\[deploy\]'"):
        tc.quantize_(small)
