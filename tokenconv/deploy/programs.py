"""From a model to a ``torch.export`` program of standard operators."""

import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from tokenconv.deploy.sizes import Sizes
from tokenconv.errors import ExportError
from tokenconv.ops.depthwise_conv import triton

_STANDARD = {"aten", "prim", "prims", "higher_order"}
"""Namespaces of operators that every PyTorch has."""
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
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
        with torch.no_grad(), warnings.catch_warnings():
            # LeViT and its kin keep what they compute; what is traced is a copy that nobody keeps.
            warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)
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
    """An error in one line; torch's are pages long, and end in where the model stands."""
    text = " ".join(_COLOUR.sub("", str(error)).partition("Original traceback")[0].split())
    text = text or type(error).__name__
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
    """The program with our operators, and others' that consist of ATen's, written in ATen."""
    known: dict[Any, Callable[..., Any]] = {}
    for operator in _operators(program):
        if operator in triton.decompositions():
            known[operator] = triton.decompositions()[operator]
        elif operator.namespace not in _STANDARD and _is_composite(operator):
            # ``decompose`` would find itself in the table, and ask itself.
            known[operator] = partial(operator._op_dk, _COMPOSITE)
    return program.run_decompositions(known) if known else program


def _is_composite(operator: torch._ops.OpOverload) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), _COMPOSITE)


def _foreign(program: ExportedProgram) -> set[str]:
    return {op.name() for op in _operators(program) if op.namespace not in _STANDARD}


def _operators(program: ExportedProgram) -> set[torch._ops.OpOverload]:
    targets = {
        node.target
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_function"
    }
    return {target for target in targets if isinstance(target, torch._ops.OpOverload)}
