"""oneDNN's convolution with the activation in it, on kernels packed once: inference on CPUs.

An eager convolution packs its kernel anew in every call, which takes longer than a small
convolution, and its activation is another pass over memory. ``torch.compile`` knows both, with
frozen weights; this is the same primitive in eager mode.

Shape letters: B batch, N tokens = P prefix + grid, C channels, K kernel side.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _len_torch_dispatch_stack
from torch.utils.weak import WeakIdKeyDictionary

from tokenconv.grid import PrefixTokens, TokenGrid, frames_to_tokens, tokens_to_frames
from tokenconv.ops.depthwise_conv.epilogue import ACTIVATE, Activation, finish

_ATTRIBUTES: dict[Activation | None, tuple[str, str]] = {
    None: ("none", ""),
    Activation.GELU: ("gelu", "none"),
    Activation.GELU_TANH: ("gelu", "tanh"),
    Activation.SILU: ("swish", ""),
    Activation.RELU: ("relu", ""),
}
"""What oneDNN calls an activation, and its algorithm."""

_packed: Any = WeakIdKeyDictionary()
"""By parameter: the values that were packed, and the kernel made of them, without and with a
residual. It serves maps of any shape."""


def refusal(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why the primitive cannot take a call; None if it can."""
    if x.device.type != "cpu":
        return f"it is for CPUs, and the tokens are on {x.device}"
    if x.dtype != torch.float32:
        return f"it takes float32, not {str(x.dtype)[6:]}"
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return "the channels of a token do not lie next to each other; call x.contiguous()"
    learned = any(t is not None and t.requires_grad for t in (x, weight, bias))
    if torch.is_grad_enabled() and learned:
        return "it has no gradient; call it under torch.no_grad() or torch.inference_mode()"
    if torch.is_autocast_enabled("cpu"):
        return "it does not take part in autocast"
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "compilers and tracers fuse an activation by themselves"
    if type(x) is not Tensor or _len_torch_dispatch_stack():
        return "it takes plain tensors only, and no dispatch mode sees inside it"
    if not torch.backends.mkldnn.enabled or not _is_there():
        return "this PyTorch has no oneDNN, or it is switched off"
    return None


@cache
def _is_there() -> bool:
    """Whether PyTorch has the operators, which are not public."""
    names = ("_convolution_pointwise", "_reorder_convolution_weight")
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in names
    )


def depthwise_conv_onednn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: TokenGrid,
    dilation: int,
    residual: bool,
    activation: Activation | None,
    gate: Tensor | None,
    prefix_tokens: PrefixTokens,
) -> Tensor:
    """See ``api.depthwise_conv``; prefix tokens take two copies, as anywhere on a CPU."""
    num_prefix_tokens, fmap = grid.num_prefix_tokens, tokens_to_frames(x, grid)
    if num_prefix_tokens:
        fmap = fmap.contiguous(memory_format=torch.channels_last)
    in_kernel = residual and activation is not None
    kernel = _kernel(weight, in_kernel)
    around = [dilation * (weight.shape[-1] // 2)] * 2
    attribute, algorithm = _ATTRIBUTES[activation]
    out = torch.ops.mkldnn._convolution_pointwise(
        fmap, kernel, None if bias is None else bias.contiguous(), around, [1, 1], [dilation] * 2,
        x.shape[-1], attribute, [], algorithm,
    )  # fmt: skip
    if residual and not in_kernel:
        out = out.add_(fmap)  # keeps `x + 0` the same to the bit, as insertion promises
    tokens = frames_to_tokens(out, grid)
    if num_prefix_tokens:
        prefix = x[:, :num_prefix_tokens]
        if activation is not None:  # which ``finish`` takes back for other policies
            prefix = ACTIVATE[activation](prefix)
        tokens = torch.cat([prefix, tokens], dim=1)
    return finish(tokens, x, num_prefix_tokens, None, gate, prefix_tokens)


def _kernel(weight: Tensor, with_residual: bool) -> Tensor:
    """The kernel as the primitive wants it; packed where it is a parameter, which comes again.

    Values are compared, not version counters: these do not see what is written through ``.data``,
    and tensors made in inference mode have none. Depthwise kernels are small enough for it.
    """
    if not isinstance(weight, nn.Parameter):
        return _with_residual(weight) if with_residual else weight
    own = weight.detach()
    known = _packed.get(weight)
    if known is None or not torch.equal(known[0], own):
        known = _packed[weight] = (own.clone(), {})
    values, kernels = known
    if with_residual not in kernels:
        plain = _with_residual(values) if with_residual else values
        kernels[with_residual] = torch.ops.mkldnn._reorder_convolution_weight(
            plain, groups=weight.shape[0]
        )
    return kernels[with_residual]


def _with_residual(weight: Tensor) -> Tensor:
    """The kernel of ``x + conv(x)``."""
    grown, centre = weight.clone(), weight.shape[-1] // 2
    grown[:, :, centre, centre] += 1
    return grown
