"""Weights and activations of eight bits: torchao in PyTorch, ONNX Runtime in files.

Depthwise layers have few weights per channel, of very different sizes: one scale for all of them
would leave most with a few steps of the 256. Every weight has a scale per output channel here.
"""

import ast
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenconv.choice import Choice
from tokenconv.deploy.extras import need
from tokenconv.deploy.graphs import nodes_of
from tokenconv.errors import ExportError

_MOST_AT_ONCE = 8


class Quantization(Choice):
    """What ``quantize_`` makes of linear layers."""

    INT8_WEIGHT_ONLY = "int8_weight_only"
    """Weights are kept in eight bits, and multiplied as floats."""
    INT8_DYNAMIC = "int8_dynamic"
    """Activations are rounded as they come, a scale per token, and multiplied as integers."""


class KeepFloat(Choice):
    """Layers that can be left as they are."""

    DEPTHWISE = "depthwise"
    """Convolutions with one kernel per channel."""
    ENDS = "ends"
    """The first and the last layer, such as patch embedding and head."""


@dataclass(frozen=True)
class QuantizationReport:
    """Which layers have eight bits; print it to read it."""

    layers: tuple[str, ...]
    """By the name of their module."""
    kept_float: dict[str, str]
    """The others with weights, and why."""

    def __str__(self) -> str:
        every = len(self.layers) + len(self.kept_float)
        lines = [f"{len(self.layers)} of {every} layers with weights in int8"]
        for why in dict.fromkeys(self.kept_float.values()):
            names = [name for name, own in self.kept_float.items() if own == why]
            shown = ", ".join(names[:4]) + (f", ... ({len(names)})" if len(names) > 4 else "")
            lines.append(f"  float, {why}: {shown}")
        return "\n".join(lines)


def keep_float_of(names: Sequence[str]) -> tuple[KeepFloat, ...]:
    """What is to be kept.

    Raises:
        UnknownNameError: If there is no such name.
    """
    return tuple(KeepFloat.of(name) for name in ([names] if isinstance(names, str) else names))


def quantize_(
    model: nn.Module,
    how: Quantization | str = Quantization.INT8_DYNAMIC,
    *,
    keep_float: Sequence[str] = (),
) -> QuantizationReport:
    """Quantise a model's linear layers to eight bits, in place, with torchao.

    For inference, as the last step: what was inserted is folded and saved before, and not taken out
    any more. Compile the model to make it faster than it was; it exports as ``pt2`` and ``aoti``.
    Convolutions stay in float, since torchao has no kernels for them: ``export`` with
    ``calibration`` quantises those as well, for ONNX Runtime.

    Args:
        model: With ``nn.Linear`` layers of floats.
        how: ``int8_weight_only`` or ``int8_dynamic``.
        keep_float: Layers to be left as they are: ``ends``.

    Returns:
        Which layers were quantised.

    Raises:
        ExportError: If torchao is missing, or there is nothing to quantise.
        UnknownNameError: If there is no such way, or no such layers to keep.
    """
    how, kept = Quantization.of(how), keep_float_of(keep_float)
    ao = need("torchao.quantization", "layers of eight bits", "deploy")
    weighted = [name for name, module in model.named_modules() if _has_weights(module)]
    ends = {weighted[0], weighted[-1]} if weighted and KeepFloat.ENDS in kept else set[str]()
    layers: list[str] = []
    left: dict[str, str] = {}
    for name in weighted:
        module = model.get_submodule(name)
        if not isinstance(module, nn.Linear):
            left[name] = "torchao quantises linear layers alone"
        elif name in ends:
            left[name] = "first and last layer"
        elif type(module.weight.data) is not Tensor:
            left[name] = "quantised before"
        else:
            layers.append(name)
    if not layers:
        raise ExportError(
            f"this {type(model).__name__} has no linear layer of floats to quantise: "
            f"{'; '.join(sorted({*left.values()})) or 'it has no layers with weights'}"
        )
    configs = {
        Quantization.INT8_WEIGHT_ONLY: ao.Int8WeightOnlyConfig,
        Quantization.INT8_DYNAMIC: ao.Int8DynamicActivationInt8WeightConfig,
    }
    chosen = {*layers}
    ao.quantize_(model, configs[how](), filter_fn=lambda _, name: name in chosen)
    return QuantizationReport(tuple(layers), left)


def _has_weights(module: nn.Module) -> bool:
    """Whether it is a linear layer, or has a kernel as convolutions have."""
    weight: Any = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) or (isinstance(weight, Tensor) and weight.ndim > 2)


def unwrapped(model: nn.Module) -> nn.Module:
    """A model whose quantised weights are plain tensors, as exporters want it; in place."""
    if any(type(p.data) is not Tensor for p in model.parameters()):
        ao = need("torchao.utils", "layers of eight bits", "deploy")
        return ao.unwrap_tensor_subclass(model)
    return model


@dataclass(frozen=True)
class Calibration:
    """From what the ranges of activations are taken, and which layers do without."""

    images: Tensor
    """``(N, C, H, W)``, prepared as for the model."""
    keep_float: tuple[KeepFloat, ...] = ()

    def resized(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """The first images, as many and as large as asked for, on the device of a tensor."""
        images = self.images[torch.arange(shape[0]) % len(self.images)]
        if images.shape[2:] != shape[2:]:
            images = nn.functional.interpolate(images, shape[2:], mode="bilinear", antialias=True)
        return images.to(like.device)

    def batches(self, size: int | None) -> Iterator[Tensor]:
        """All images, in batches of one size, the last of which begins again; None: of any."""
        if size is None:
            yield from self.images.split(_MOST_AT_ONCE)
            return
        for start in range(0, len(self.images), size):
            yield self.images[torch.arange(start, start + size) % len(self.images)]


def quantize_onnx(path: Path, calibration: Calibration) -> QuantizationReport:
    """Give the layers of an ONNX file weights and inputs of eight bits, in place.

    Scales of weights are per output channel, those of activations are taken from the smallest and
    the largest value that the images of the calibration bring forth. What has no weights (attention
    itself, norms, activations) stays in float, and so does what is computed from weights. Matrix
    products return floats, as what follows them does not compute in integers; convolutions have to
    return integers to be run on them. Biases are integers of 32 bits.

    Args:
        path: A file with one input ``images``.
        calibration: Images that fit it.

    Raises:
        ExportError: If there is nothing to quantise.
    """
    import onnx
    from onnxruntime import quantization as ort

    graph = onnx.load(path).graph
    layers, left = _layers(graph, calibration.keep_float)
    if not layers:
        raise ExportError(
            f"no layer of this model can be quantised: {QuantizationReport((), left)}"
        )
    batch = graph.input[0].type.tensor_type.shape.dim[0]
    batches = calibration.batches(None if batch.dim_param else batch.dim_value)

    class Reader(ort.CalibrationDataReader):
        def get_next(self) -> Any:
            images = next(batches, None)
            return None if images is None else {"images": images.numpy()}

    with _quiet():
        ort.quantize_static(
            path,
            path,
            Reader(),
            per_channel=True,
            nodes_to_quantize=[*layers],
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
        )
    quantized = onnx.load(path)
    _quantize_added_biases(quantized.graph)
    onnx.save(quantized, path)
    return QuantizationReport(tuple(layers.values()), left)


def _layers(graph: Any, kept: Sequence[KeepFloat]) -> tuple[dict[str, str], dict[str, str]]:
    """Nodes to be quantised with the names of their modules; modules that are left, and why."""
    constants = {one.name: one for one in graph.initializer}
    nodes = [n for n in graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    weighted = [n for n in nodes if n.input[1] in constants]
    left = {
        _module_of(n): "its kernel is computed: fold_ the model first"
        for n in nodes
        if n.op_type == "Conv" and n.input[1] not in constants
    }
    layers: dict[str, str] = {}
    for node in weighted:
        name = _module_of(node)
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        is_depthwise = groups > 1 and constants[node.input[1]].dims[1] == 1
        if node.op_type == "MatMul" and len(constants[node.input[1]].dims) != 2:
            left[name] = "stacked matrices, which ONNX Runtime multiplies as floats"
        elif KeepFloat.DEPTHWISE in kept and is_depthwise:
            left[name] = "depthwise"
        elif KeepFloat.ENDS in kept and (node is weighted[0] or node is weighted[-1]):
            left[name] = "first and last layer"
        else:
            layers[node.name] = name
    return layers, left


def _quantize_added_biases(graph: Any) -> None:
    """Make integers of what is added to matrix products, as has been done in all other layers.

    ONNX Runtime makes one node of a product and its bias before it looks for what can be computed
    in integers, and runs that on floats where the bias is one.
    """
    from onnx import helper, numpy_helper

    constants = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    replaced: set[str] = set()
    for add in [node for node in graph.node if node.op_type == "Add"]:
        product, name = makers.get(add.input[0]), add.input[1]
        if name not in constants:
            product, name = makers.get(name), add.input[0]
        if name not in constants or product is None or product.op_type != "MatMul":
            continue
        factors = [makers[one] for one in product.input if one in makers]
        if [one.op_type for one in factors] != ["DequantizeLinear"] * 2:
            continue
        left, right = (constants[one.input[1]] for one in factors)
        bias, step = constants[name], left * right
        if bias.shape != step.shape or not (abs(steps := (bias / step).round()) < 2**31).all():
            continue
        values, scale, own = (f"{add.name}_bias{end}" for end in ("_quantized", "_scale", ""))
        graph.initializer.append(numpy_helper.from_array(steps.astype("int32"), values))
        graph.initializer.append(numpy_helper.from_array(step, scale))
        add.input[[*add.input].index(name)] = own
        node = helper.make_node("DequantizeLinear", [values, scale], [own], axis=0)
        graph.node.insert([*graph.node].index(add), node)
        replaced.add(name)
    used = {name for node in nodes_of(graph) for name in node.input}
    used |= {output.name for output in graph.output}
    for one in [one for one in graph.initializer if one.name in replaced - used]:
        graph.initializer.remove(one)


def _module_of(node: Any) -> str:
    """The name of the module that a node was traced from, or its own."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            return (ast.literal_eval(entry.value)[-2:-1] or [node.name])[0] or node.name
    return node.name


@contextmanager
def _quiet() -> Iterator[None]:
    """Without advice of ONNX Runtime to run what torch's exporter has run."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)
