"""Fused Triton kernels: convolution, bias, activation and gate in one pass over the tokens.

Only the inputs are kept for the backward pass, which computes anew what was activated. The kernels
are a ``torch.library`` operator, ``torch.ops.tokenconv.depthwise_conv``, so compilers, checkpoints
and parallel wrappers see one opaque call on ordinary tensors.

Shape letters: B batch, N tokens = P prefix + T*H*W grid, C channels, K kernel side.
"""

import importlib.util
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenconv.grid import PrefixTokens, TokenGrid
from tokenconv.ops.depthwise_conv.conv2d import depthwise_conv_conv2d
from tokenconv.ops.depthwise_conv.epilogue import Activation, finish

KERNELS = (3, 5, 7)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Tiling:
    """How the work is cut: rows and columns and channels of a program, and its warps."""

    rows: int
    cols: int
    channels: int
    warps: int


_FORWARD = {
    (3, 2): Tiling(7, 8, 64, 4),
    (3, 4): Tiling(7, 8, 32, 4),
    (5, 2): Tiling(7, 8, 64, 8),
    (5, 4): Tiling(7, 8, 32, 4),
    (7, 2): Tiling(7, 8, 32, 4),
    (7, 4): Tiling(7, 8, 32, 4),
}
"""By kernel side and bytes of an element. Chosen by registers and instructions of what the compiler
makes for compute capability 9.0; not yet by time."""
_BACKWARD = {
    (3, 2): Tiling(1, 8, 64, 4),
    (3, 4): Tiling(1, 8, 32, 4),
    (5, 2): Tiling(1, 8, 32, 4),
    (5, 4): Tiling(1, 8, 32, 4),
    (7, 2): Tiling(1, 4, 64, 4),
    (7, 4): Tiling(1, 4, 64, 4),
}
_PROGRAMS_PER_PROCESSOR = 4
"""Of the kernel that sums the gradient of the weights."""
_IS_THERE = importlib.util.find_spec("triton") is not None
_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
"""Triton's own switch, to run kernels on a CPU: slowly, to try them."""


def refusal(x: Tensor, weight: Tensor, dilation: int) -> str | None:
    """Why the kernels cannot take a call; None if they can."""
    if not _IS_THERE:
        return "Triton is not installed"
    side = weight.shape[-1]
    if side not in KERNELS:
        return f"the kernels have sides of 3, 5 and 7, not {side}"
    if dilation != 1:
        return f"the kernels have no dilation, here {dilation}"
    dtype = _dtype_under_autocast(x)
    if dtype not in DTYPES:
        return f"the kernels take float32, float16 and bfloat16, not {str(dtype)[6:]}"
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return "the channels of a token do not lie next to each other; call x.contiguous()"
    if x.device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(x.device) < (8, 0):
            return "the kernels need compute capability 8.0 or newer"
    elif x.device.type == "cpu":
        if not _IS_INTERPRETED:
            return "Triton makes no code for CPUs (TRITON_INTERPRET=1, set first, interprets it)"
    elif x.device.type != "xpu":
        return f"Triton makes no code for {x.device.type} devices"
    return None


def depthwise_conv_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: TokenGrid,
    residual: bool,
    activation: Activation | None,
    gate: Tensor | None,
    prefix_tokens: PrefixTokens,
) -> Tensor:
    """See ``api.depthwise_conv``; autocast as for torch's convolutions."""
    dtype = _dtype_under_autocast(x)
    tensors = [None if t is None else t.to(dtype) for t in (x, weight, bias, gate)]
    return torch.ops.tokenconv.depthwise_conv.default(
        *tensors, grid.size, grid.num_prefix_tokens, residual,
        "none" if activation is None else activation.value, prefix_tokens.value,
    )  # fmt: skip


def _dtype_under_autocast(x: Tensor) -> torch.dtype:
    kind = x.device.type
    if x.is_floating_point() and x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


# --- the operator ---

_library = torch.library.Library("tokenconv", "DEF")
_library.define(
    "depthwise_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? gate, SymInt[] size, "
    "SymInt num_prefix_tokens, bool residual, str activation, str prefix_tokens) -> Tensor"
)
_library.define(
    "depthwise_conv_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? gate, "
    "SymInt[] size, SymInt num_prefix_tokens, bool residual, str activation, str prefix_tokens, "
    "bool[] needed) -> (Tensor, Tensor, Tensor, Tensor)"
)


@cache
def _kernels() -> Any:
    from tokenconv.ops.depthwise_conv import triton_kernels  # when Triton is known to be there

    return triton_kernels


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What the operator is in ATen, for ``ExportedProgram.run_decompositions`` and ONNX."""
    return {torch.ops.tokenconv.depthwise_conv.default: _in_aten}


def _in_aten(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, size: Any, prefix: int,
    residual: bool, activation: str, prefix_tokens: str,
) -> Tensor:  # fmt: skip
    grid = TokenGrid(tuple(size), prefix)
    act = None if activation == "none" else Activation(activation)
    out = depthwise_conv_conv2d(x, weight, bias, grid, 1, False)
    if residual:  # not in place, as exported programs want it
        out = out + F.pad(x[:, prefix:], (0, 0, prefix, 0))
    return finish(out, x, prefix, act, gate, PrefixTokens(prefix_tokens))


def _fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, size: Any,
    prefix: int, residual: bool, activation: str, prefix_tokens: str, needed: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    like = (x, weight, x.new_empty(x.shape[-1:]), x)
    return tuple(
        one.new_empty(one.shape if wanted else (0,))
        for one, wanted in zip(like, needed, strict=True)
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.told = inputs[4:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, bias, gate = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:4])
    found = torch.ops.tokenconv.depthwise_conv_backward(
        grad, x, weight, bias, gate, *ctx.told, needed
    )
    wanted = [one if need else None for one, need in zip(found, needed, strict=True)]
    return (*wanted, *[None] * len(ctx.told))


def _backward_twice(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("the kernels have no second derivative; take impl='conv2d'")


# --- launching ---


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, size: Any, prefix: int,
    residual: bool, activation: str, prefix_tokens: str,
) -> Tensor:  # fmt: skip
    y = x.new_empty(x.shape)
    _convolve(x, weight, bias, gate, y, size, prefix, residual, activation, prefix_tokens, False)
    return y


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, y: Tensor, size: Any,
    prefix: int, residual: bool, activation: str, prefix_tokens: str, flip: bool,
) -> None:  # fmt: skip
    if not y.numel():
        return
    *frames, rows, cols = size
    batch, _, dim = x.shape
    count = math.prod(frames)
    side = weight.shape[-1]
    tiling = _FORWARD[side, x.element_size()]
    places = batch * count * -(-rows // tiling.rows) * -(-cols // tiling.cols)
    programs = (places + (batch if prefix else 0)) * -(-dim // tiling.channels)
    x, other = _in_rows(x), _in_rows(x if gate is None else gate)
    with _on(x.device):
        _kernels().convolve[(programs,)](
            x, weight.contiguous(), _in_line(bias), other, y, batch * count, count, rows, cols,
            prefix, dim, x.stride(0), x.stride(1), other.stride(0), other.stride(1), y.stride(0),
            y.stride(1),
            K=side, TH=tiling.rows, TW=tiling.cols, BC=tiling.channels, ACT=activation,
            HAS_BIAS=bias is not None, HAS_GATE=gate is not None, RESIDUAL=residual, FLIP=flip,
            PREFIX=prefix_tokens, EXACT=x.dtype == torch.float32, num_warps=tiling.warps,
        )  # fmt: skip


def _launch_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, size: Any,
    prefix: int, residual: bool, activation: str, prefix_tokens: str, needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    needs_x, needs_weight, needs_bias, needs_gate = needed
    grad, x = _in_rows(grad), _in_rows(x)
    activates = activation != "none" or gate is not None
    needs_z = needs_x and activates
    none = x.new_empty(0)
    dz = x.new_empty(x.shape) if needs_z else grad
    dgate = x.new_empty(x.shape) if needs_gate else none
    *frames, rows, cols = size
    batch, _, dim = x.shape
    count = math.prod(frames)
    side = weight.shape[-1]
    tiling = _BACKWARD[side, x.element_size()]
    blocks = -(-dim // tiling.channels)
    tiles = batch * count * -(-cols // tiling.cols) * rows
    parts = min(
        max(1, _PROGRAMS_PER_PROCESSOR * _processors(x.device) // max(1, blocks)), max(1, tiles)
    )
    sums = needs_weight or needs_bias
    partial = x.new_empty((parts, side * side + 1, dim) if sums else (0,), dtype=torch.float32)
    if not x.numel():
        partial.zero_()
    elif sums or needs_z or needs_gate:
        other = x if gate is None else _in_rows(gate)
        programs = (parts + (batch if prefix and (needs_z or needs_gate) else 0)) * blocks
        with _on(x.device):
            _kernels().gradients[(programs,)](
                x, weight.contiguous(), _in_line(bias), other, grad, dz, dgate, partial,
                batch * count, count, rows, cols, prefix, dim, parts, x.stride(0), x.stride(1),
                other.stride(0), other.stride(1), grad.stride(0), grad.stride(1),
                x.shape[1] * dim, dim,
                K=side, TW=tiling.cols, BC=tiling.channels, ACT=activation,
                HAS_BIAS=bias is not None, HAS_GATE=gate is not None, RESIDUAL=residual,
                PREFIX=prefix_tokens, EXACT=x.dtype == torch.float32, NEEDS_Z=needs_z,
                NEEDS_GATE=needs_gate, NEEDS_WEIGHT=sums, num_warps=tiling.warps,
            )  # fmt: skip
    dx = none
    if needs_x:
        dx = x.new_empty(x.shape)
        # What prefix tokens get is in dz already; without one it is the gradient, or zero.
        policy = "zero" if prefix_tokens == "zero" else "pass"
        _convolve(dz, weight, None, None, dx, size, prefix, residual, "none", policy, True)
    dweight, dbias = none, none
    if sums:
        total = partial.sum(0)
        if needs_weight:
            dweight = total[:-1].T.contiguous().reshape(weight.shape).to(weight.dtype)
        if needs_bias:
            dbias = total[-1].to(weight.dtype, copy=True)  # results of an operator share nothing
    return dx, dweight, dbias, dgate


def _in_rows(x: Tensor) -> Tensor:
    """Tokens whose channels lie next to each other; a copy where they do not."""
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def _in_line(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


@cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":  # interpreted
        return 1
    return torch.get_device_module(device).get_device_properties(device).multi_processor_count


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be this one."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


for _name, _real, _meta in (
    ("depthwise_conv", _launch, _fake),
    ("depthwise_conv_backward", _launch_backward, _fake_backward),
):
    _library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tokenconv::{_name}", _meta, lib=_library)
torch.library.register_autograd(
    "tokenconv::depthwise_conv", _backward, setup_context=_keep, lib=_library
)
torch.library.register_autograd("tokenconv::depthwise_conv_backward", _backward_twice, lib=_library)
