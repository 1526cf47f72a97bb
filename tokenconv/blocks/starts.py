"""How weights start: as in the papers' code, norms from one and zero everywhere, or neutral."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tokenconv.blocks.chain import Chain
from tokenconv.layers import DWConv


def init_linears_(module: nn.Module) -> None:
    """Linear layers from a truncated normal of std 0.02, biases zero; convolutions as in torch."""
    _init_(module, linear=_truncated_, conv=None)


def init_pvt_(module: nn.Module) -> None:
    """As ``init_linears_``, depthwise kernels from a normal of std ``sqrt(2) / K``.

    Other convolutions from one of std ``sqrt(2 / (K*K*outputs))``, all biases zero.
    """
    _init_(module, linear=_truncated_, conv=_by_group_)


def init_pvt_convs_(module: nn.Module) -> None:
    """As ``init_pvt_`` where all layers are convolutions: linear ones of std ``sqrt(2 / out)``."""
    _init_(module, linear=_kaiming_, conv=_by_kernel_)


def init_truncated_(module: nn.Module) -> None:
    """Everything from a truncated normal of std 0.02, biases zero."""
    _init_(module, linear=_truncated_, conv=_truncated_)


def init_kaiming_(module: nn.Module) -> None:
    """Everything from a Kaiming normal over the outputs, gain ``sqrt(2)``, biases zero."""
    _init_(module, linear=_kaiming_, conv=_kaiming_)


def init_kaiming_convs_(module: nn.Module) -> None:
    """As ``init_linears_``, convolutions from a Kaiming normal over the outputs, biases zero."""
    _init_(module, linear=_truncated_, conv=_kaiming_)


def init_by_group_(module: nn.Module) -> None:
    """Everything from a normal of std ``sqrt(2 / (K*K*outputs))``, outputs of one group."""
    _init_(module, linear=_kaiming_, conv=_by_group_)


def init_torch_(module: nn.Module) -> None:
    """As ``nn.Linear`` and ``nn.Conv2d``."""
    _init_(module, linear=None, conv=None)


def _init_(
    module: nn.Module,
    linear: Callable[[Tensor], object] | None,
    conv: Callable[[Tensor], object] | None,
) -> None:
    for part in module.modules():
        ours = part is module or isinstance(part, Chain)  # their start is this one
        if not ours and hasattr(part, "reset_parameters"):
            part.reset_parameters()  # pyright: ignore[reportCallIssue]
        init = linear if isinstance(part, nn.Linear) else conv
        if init and isinstance(part, (nn.Linear, DWConv, nn.Conv1d, nn.Conv2d)):
            init(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def _truncated_(weight: Tensor) -> None:
    nn.init.trunc_normal_(weight, std=0.02)


def _kaiming_(weight: Tensor) -> None:
    nn.init.kaiming_normal_(weight, mode="fan_out")


def _by_group_(weight: Tensor) -> None:
    """Depthwise kernels, of one input channel, are groups of one output."""
    (_by_kernel_ if weight.shape[1] == 1 else _kaiming_)(weight)


def _by_kernel_(weight: Tensor) -> None:
    nn.init.normal_(weight, std=math.sqrt(2 / weight[0, 0].numel()))


def silence_(part: Any) -> None:
    """Make what a module gives zero, by the last layers that have parameters."""
    if hasattr(part, "init_neutral_"):
        part.init_neutral_()
    elif type(part) is nn.Sequential:
        silence_([step for step in part if next(step.parameters(), None) is not None][-1])
    else:
        for parameter in part.parameters():
            nn.init.zeros_(parameter)
