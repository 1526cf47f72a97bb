"""What blocks are composed of: steps on tokens in a row, a shortcut around some, a gate.

Shape letters: B batch, N tokens = P prefix + grid, C channels, K kernel side.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokenconv.grid import AnyGrid, Grid, grid_of
from tokenconv.layers import BatchNorm, DWConv, GridModule

Steps = Mapping[str, nn.Module | None]
"""Modules by name, in their order; None is left out."""


class Chain(GridModule):
    """Steps on tokens, one after another; those that need the grid are given it.

    Args:
        **steps: Modules by name, in their order; None is left out.
    """

    prefix_tokens: Literal["take part", "pass", "vanish"] = "take part"
    """What prefix tokens do: take the steps (but convolutions), pass unchanged, or become zero."""

    def __init__(self, **steps: nn.Module | None):
        super().__init__()
        for name, step in steps.items():
            if step is not None:
                self.add_module(name, step)

    def forward(self, x: Tensor, *grid: Grid) -> Tensor:
        """See ``GridModule``."""
        known = grid_of(*grid)
        if self.prefix_tokens == "take part":
            return self.run(x, known)
        parts = _split(x, known)
        return _join(parts[0], self.run(parts[1], parts[2]), self.prefix_tokens)

    def run(self, x: Tensor, grid: AnyGrid) -> Tensor:
        """Run the steps."""
        for step in self._modules.values():  # children() would skip a module that is there twice
            x = step(x, grid) if isinstance(step, GridModule) else step(x)  # pyright: ignore
        return x

    def init_neutral_(self) -> None:
        """Make the output zero, by the last step that has parameters; the others start anew."""
        type(self).reset_parameters(self)  # pyright: ignore  # every block has it; surgery hides it
        last = [step for step in self.children() if next(step.parameters(), None) is not None][-1]
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def fold_(self) -> bool:
        """Fold norms into the layers beside them, in place, for inference.

        A ``BatchNorm`` goes into the linear layer in front of it or behind it, or into the
        convolution in front of it, if prefix tokens, which skip that, do not meet the norm; its
        keys go with it. What is inside the steps is folded as well. Equal in real arithmetic.

        Returns:
            Whether anything changed.

        Raises:
            ValueError: In training mode, or if values are stored in fewer than 32 bits.
        """
        check_foldable(self)
        steps: Any = self._modules
        folded = [step.fold_() for step in steps.values() if hasattr(step, "fold_")]
        before = len(steps)
        for name, following in list(pairwise(steps)):
            one, other = steps.get(name), steps.get(following)
            takes = isinstance(one, nn.Linear) or (
                isinstance(one, DWConv)
                and not one.residual
                and not one.activation
                and self.prefix_tokens != "take part"
            )
            if takes and isinstance(other, BatchNorm):
                _norm_behind_(one, other)
                del steps[following]
            elif isinstance(one, BatchNorm) and isinstance(other, nn.Linear):
                _norm_in_front_(one, other)
                del steps[name]
        return any(folded) or len(steps) < before


def _split(x: Tensor, grid: AnyGrid) -> tuple[Tensor, Tensor, AnyGrid]:
    """Prefix tokens, the others, and the grid of these."""
    count = grid.num_prefix_tokens
    if not count:
        return x[:, :0], x, grid
    grid.check(x)
    return x[:, :count], x[:, count:], replace(grid, num_prefix_tokens=0)


def _join(prefix: Tensor, rest: Tensor, policy: str) -> Tensor:
    if not prefix.shape[1]:
        return rest
    first = prefix if policy == "pass" else torch.zeros_like(prefix)
    return torch.cat([first.to(rest.dtype), rest], dim=1)


for _checks in ("grid_of", "_split", "_join"):  # which cannot be traced symbolically
    torch.fx.wrap(_checks)


class Shortcut(Chain):
    """``x`` plus what the steps make of it."""

    def run(self, x: Tensor, grid: AnyGrid) -> Tensor:
        """Run the steps, and add."""
        return x + super().run(x, grid)


class Local(Shortcut):
    """A shortcut around steps that prefix tokens do not take."""

    prefix_tokens = "pass"


# --- a norm becomes part of the layer beside it ---


def check_foldable(module: nn.Module) -> None:
    """Refuse to fold where the result would not be equal.

    Raises:
        ValueError: In training mode, or if values are stored in fewer than 32 bits.
    """
    if module.training:
        raise ValueError("it is in training mode: call eval() first")
    if any(p.dtype not in (torch.float32, torch.float64) for p in module.parameters()):
        raise ValueError("it has weights of fewer than 32 bits, which folding would round anew")


def _line(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Slope and offset of a norm in evaluation mode."""
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    slope = norm.weight / (var + norm.eps).sqrt()
    return slope, norm.bias - mean * slope


def _norm_behind_(layer: nn.Linear | DWConv, norm: BatchNorm) -> None:
    with torch.inference_mode(False), torch.no_grad():
        slope, offset = _line(norm)
        bias = offset if layer.bias is None else layer.bias * slope + offset
        weight = layer.weight * slope.reshape(-1, *[1] * (layer.weight.ndim - 1))
    _replace_(layer, weight, bias)


def _norm_in_front_(norm: BatchNorm, layer: nn.Linear) -> None:
    with torch.inference_mode(False), torch.no_grad():
        slope, offset = _line(norm)
        bias = layer.weight @ offset if layer.bias is None else layer(offset)
    _replace_(layer, layer.weight.detach() * slope.detach(), bias)


def _replace_(layer: nn.Linear | DWConv, weight: Tensor, bias: Tensor) -> None:
    needs_grad = layer.weight.requires_grad
    layer.weight = nn.Parameter(weight, requires_grad=needs_grad)
    layer.bias = nn.Parameter(bias, requires_grad=needs_grad)


# --- how the papers' code starts its weights; norms start from one and zero everywhere ---


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
