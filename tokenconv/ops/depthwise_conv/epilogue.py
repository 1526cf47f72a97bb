"""What follows a depthwise convolution: an activation, a gate, and what prefix tokens take of it.

Shape letters: B batch, N tokens = P prefix + grid, C channels.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from tokenconv.choice import Choice
from tokenconv.grid import PrefixTokens, behind_prefix


class Activation(Choice):
    """An activation that a convolution can have at its end; timm's names."""

    GELU = "gelu"
    """The exact one, with the error function."""
    GELU_TANH = "gelu_tanh"
    SILU = "silu"
    RELU = "relu"


ACTIVATE: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    Activation.SILU: F.silu,
    Activation.RELU: F.relu,
}
"""With torch's own functions."""


def finish(
    convolved: Tensor,
    x: Tensor,
    num_prefix_tokens: int,
    activation: Activation | None,
    gate: Tensor | None,
    prefix_tokens: PrefixTokens,
) -> Tensor:
    """Activation and gate, a pass each.

    Args:
        convolved: ``(B, N, C)``, prefix tokens as they are in ``x``.
        x: What was convolved, ``(B, N, C)``.
        num_prefix_tokens: P.
        activation: None for none.
        gate: ``(B, N, C)``, to be multiplied with, or None.
        prefix_tokens: What the first P tokens take.
    """
    out = convolved if activation is None else ACTIVATE[activation](convolved)
    out = out if gate is None else out * gate
    if prefix_tokens == PrefixTokens.ACT or not num_prefix_tokens:
        return out
    return behind_prefix(out[:, num_prefix_tokens:], x, num_prefix_tokens, prefix_tokens)
