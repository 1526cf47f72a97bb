"""What a program can be written as: each target writes a file, and reads it back to be checked."""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from tokenconv.choice import Choice
from tokenconv.deploy.extras import need
from tokenconv.deploy.graphs import name_axes, nodes_of
from tokenconv.deploy.programs import brief
from tokenconv.deploy.quantization import Calibration, QuantizationReport, quantize_onnx
from tokenconv.errors import ExportError

Run = Callable[[Tensor], Sequence[Tensor]]
"""Images to all outputs, in order."""
_ONNX_BYTES = 2**31 - 2**20
_LEAST_OPSET = 18


class Target(Choice):
    """What a model is exported to."""

    ONNX = "onnx"
    """An ONNX file, for ONNX Runtime and others."""
    PT2 = "pt2"
    """A ``torch.export`` program, for ``torch.export.load``."""
    AOTI = "aoti"
    """A package compiled by AOTInductor, for ``torch._inductor.aoti_load_package`` and C++."""
    EXECUTORCH = "executorch"
    """A program for phones, computed by XNNPACK where it can be; of one size."""

    @property
    def suffix(self) -> str:
        """How names of its files end."""
        own = {Target.ONNX: ".onnx", Target.EXECUTORCH: ".pte"}
        return own.get(self, ".pt2")


class Writer(Protocol):
    """Writes and reads files of a target."""

    def check(self) -> None:
        """Refuse what can be known to fail, before anything is traced."""
        ...

    def write(self, program: ExportedProgram, path: Path) -> QuantizationReport | None:
        """Write a file, and say what was quantised."""
        ...

    def load(self, path: Path) -> Run:
        """Read it as its users will."""
        ...


def writer(target: Target, opset: int | None, calibration: Calibration | None) -> Writer:
    """The writer of a target.

    Args:
        target: What is to be written.
        opset: Of an ONNX file; None takes torch's choice.
        calibration: Writes an ONNX file of eight bits.

    Raises:
        ExportError: If what it needs is missing, or there is no such opset.
    """
    if opset is not None and target != Target.ONNX:
        raise ExportError(f"an opset is of ONNX files, not of {target}: leave it out")
    writers: dict[Target, Callable[[], Writer]] = {
        Target.ONNX: lambda: OnnxWriter(opset, calibration),
        Target.PT2: Pt2Writer,
        Target.AOTI: AotiWriter,
        Target.EXECUTORCH: ExecutorchWriter,
    }
    found = writers[target]()
    found.check()
    return found


class OnnxWriter:
    """ONNX through torch's exporter, checked by ONNX Runtime."""

    def __init__(self, opset: int | None, calibration: Calibration | None):
        self.opset = opset
        self.calibration = calibration

    def check(self) -> None:
        """See ``Writer``."""
        for name in ("onnx", "onnxscript", "onnxruntime"):
            need(name, "ONNX files", "deploy")
        most = import_module("onnx").defs.onnx_opset_version()
        if self.opset is not None and not _LEAST_OPSET <= self.opset <= most:
            raise ExportError(
                f"opset {self.opset} cannot be written: torch and the installed onnx have "
                f"{_LEAST_OPSET} to {most}"
            )

    def write(self, program: ExportedProgram, path: Path) -> QuantizationReport | None:
        """See ``Writer``."""
        import onnx

        size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
        if size > _ONNX_BYTES:
            raise ExportError(
                f"an ONNX file holds 2 GiB at most, and the weights take {size / 2**30:.1f}"
            )
        try:
            program = _spelled_out(program)
            made: Any = torch.onnx.export(
                program, opset_version=self.opset, verbose=False, input_names=["images"]
            )
        except torch.onnx.errors.OnnxExporterError as error:  # what went wrong is in its cause
            why = brief(error.__cause__ or error)
            raise ExportError(f"torch cannot write this model as onnx: {why}") from error
        made.save(path, external_data=False)
        model = onnx.load(path)
        name_axes(model.graph)
        onnx.save(model, path)
        report = None
        if self.calibration is not None:
            report = quantize_onnx(path, self.calibration)
            model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        foreign = {n.domain for n in nodes_of(model.graph)} | {f.domain for f in model.functions}
        if foreign := foreign - {"", "ai.onnx"}:
            raise ExportError(f"operators of {', '.join(sorted(foreign))} are left in the graph")
        (version,) = (one.version for one in model.opset_import if one.domain in ("", "ai.onnx"))
        if self.opset is not None and version != self.opset:
            raise ExportError(
                f"torch cannot write this model in opset {self.opset}, only in {version}"
            )
        return report

    def load(self, path: Path) -> Run:
        """See ``Writer``."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # what goes wrong is raised as well
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> Sequence[Tensor]:
            outputs = session.run(None, {"images": images.cpu().numpy()})
            return [torch.from_numpy(output) for output in outputs]

        return run


def _spelled_out(program: ExportedProgram) -> ExportedProgram:
    """The program with attention as matrix products, if any is not on four axes.

    Windows have an axis more, which torch's translation to ONNX does not take.
    """
    attention = torch.ops.aten.scaled_dot_product_attention.default
    nodes = [node for node in program.graph.nodes if node.target == attention]
    if all(node.args[0].meta["val"].ndim == 4 for node in nodes):
        return program
    if any(True in node.args[5:] or node.kwargs.get("enable_gqa") for node in nodes):
        raise ExportError("causal and grouped attention on more than four axes is not written")
    return program.run_decompositions({attention: _attention})


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        allowed = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, float("-inf")) if allowed else scores + mask
    return scores.softmax(-1) @ value


class Pt2Writer:
    """``torch.export``'s own format."""

    def check(self) -> None:
        """See ``Writer``."""

    def write(self, program: ExportedProgram, path: Path) -> None:
        """See ``Writer``."""
        torch.export.save(program, path)

    def load(self, path: Path) -> Run:
        """See ``Writer``."""
        module = torch.export.load(path).module()
        return lambda images: flat(module(images))


class AotiWriter:
    """Machine code, for the kind of processor it was made on."""

    def check(self) -> None:
        """See ``Writer``."""

    def write(self, program: ExportedProgram, path: Path) -> None:
        """See ``Writer``."""
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))

    def load(self, path: Path) -> Run:
        """See ``Writer``."""
        module = torch._inductor.aoti_load_package(str(path))
        return lambda images: flat(module(images))


class ExecutorchWriter:
    """ExecuTorch's format, for phones and boards."""

    def check(self) -> None:
        """See ``Writer``."""
        need("executorch.exir", "programs for phones", "phone")

    def write(self, program: ExportedProgram, path: Path) -> None:
        """See ``Writer``."""
        xnnpack = import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
        lower = import_module("executorch.exir").to_edge_transform_and_lower
        lowered = lower(program, partitioner=[xnnpack.XnnpackPartitioner()])
        path.write_bytes(lowered.to_executorch().buffer)

    def load(self, path: Path) -> Run:
        """See ``Writer``."""
        runtime = import_module("executorch.runtime").Runtime.get()
        method = runtime.load_program(path).load_method("forward")
        return lambda images: flat(method.execute([images]))


def flat(output: Any) -> list[Tensor]:
    """All tensors in what a model returns."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
