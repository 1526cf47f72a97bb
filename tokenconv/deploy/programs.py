"""From a model to a ``torch.export`` program of standard operators."""

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from tokenconv.deploy.sizes import Sizes
from tokenconv.errors import ExportError
from tokenconv.ops.depthwise_conv import triton

_STANDARD = {"aten", "prim", "prims", "higher_order"}
"""Namespaces of operators that every PyTorch has."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def program_of(model: nn.Module, images: Tensor, sizes: Sizes) -> ExportedProgram:
    """Trace a model.

    Args:
        model: In evaluation mode.
        images: Of the size to trace.
        sizes: Says which axes stay open.

    Returns:
        A program without operators of tokenconv or of other libraries.

    Raises:
        ExportError: If the model cannot be traced, or not with these axes open.
    """
    try:
        with torch.no_grad():
            program = torch.export.export(model, (images,), dynamic_shapes=(_open(sizes),))
            program = _in_aten(program)
    except Exception as error:  # whatever the model or torch raises
        axes = " and ".join(map(repr, sizes.dynamic)) or "nothing"
        hint = ""
        if "hw" in sizes.dynamic:
            hint = "; take a larger multiple_of, or leave 'hw' out of dynamic"
        raise ExportError(
            f"torch.export cannot trace this {type(model).__name__} with {axes} open{hint}: "
            f"{brief(error)}"
        ) from error
    if foreign := sorted(_foreign(program)):
        raise ExportError(
            f"the program would need operators that only exist where their library is imported: "
            f"{', '.join(foreign)}"
        )
    return program


def brief(error: BaseException, most: int = 400) -> str:
    """An error in one line; torch's are pages long."""
    text = " ".join(_COLOUR.sub("", str(error)).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[:most]}..."


def _open(sizes: Sizes) -> dict[int, Any]:
    axes: dict[int, Any] = {}
    if "batch" in sizes.dynamic:
        axes[0] = Dim("batch", min=1)
    if sizes.multiple_of is not None:
        for axis, name, step in zip((2, 3), ("rows", "cols"), sizes.multiple_of, strict=True):
            units = Dim(name, min=2)
            axes[axis] = step * units if step > 1 else units
    return axes


def _in_aten(program: ExportedProgram) -> ExportedProgram:
    """The program with our operators written in ATen, if there are any."""
    if not any(name.startswith("tokenconv::") for name in _foreign(program)):
        return program
    return program.run_decompositions(triton.decompositions())


def _foreign(program: ExportedProgram) -> set[str]:
    targets = {
        node.target
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_function"
    }
    operators = [t for t in targets if isinstance(t, torch._ops.OpOverload)]
    return {op.name() for op in operators if op.namespace not in _STANDARD}
