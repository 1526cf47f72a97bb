"""Norms and branches become part of the layers beside them, for inference.

Equal in real arithmetic; the keys of what is folded go with it.
"""

import copy
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenconv.layers import BatchNorm, DWConv


def check_foldable(module: nn.Module) -> None:
    """Refuse to fold where the result would not be equal.

    Raises:
        ValueError: In training mode, or if values are stored in fewer than 32 bits.
    """
    if module.training:
        raise ValueError("it is in training mode: call eval() first")
    if any(p.dtype not in (torch.float32, torch.float64) for p in module.parameters()):
        raise ValueError("it has weights of fewer than 32 bits, which folding would round anew")


def fold_convs_(module: nn.Module) -> bool:
    """Fold every ``BatchNorm`` behind a convolution into it, in place, for inference.

    Branches that merge become one convolution first. Equal in real arithmetic; the keys of what is
    folded go with it.

    Returns:
        Whether anything changed.

    Raises:
        ValueError: In training mode, or if values are stored in fewer than 32 bits.
    """
    check_foldable(module)
    merged = [_merge_(row) for row in _rows(module)]
    return any(merged + [fold_norms_(row) for row in _rows(module)])


def _rows(module: nn.Module) -> list[nn.Sequential]:
    return [part for part in module.modules() if isinstance(part, nn.Sequential)]


# --- branches ---


def _merge_(row: nn.Sequential) -> bool:
    mergeable = {name: step for name, step in row.named_children() if hasattr(step, "merged")}
    for name, step in mergeable.items():
        row._modules[name] = step.merged()  # pyright: ignore[reportCallIssue]
    return bool(mergeable)


def merged_conv(module: nn.Module, like: nn.Conv2d) -> nn.Conv2d:
    """The one convolution, with a bias, that branches on a map are in evaluation mode.

    Its bias is what they answer to zeros, its kernel what they answer to single ones amid zeros,
    one for each channel that a filter reads: one rule for all branches, dilations, norms and
    scales, in float64.

    Args:
        module: Linear but for offsets.
        like: Has the widths, the odd side, the stride, padding and groups of that convolution.
    """
    weight, (_, read, side, _) = next(module.parameters()), like.weight.shape
    middle = side // 2
    with torch.inference_mode(False), torch.no_grad():
        exact = copy.deepcopy(module).double()
        for part in exact.modules():
            if isinstance(part, nn.Conv2d):
                part.stride = (1, 1)  # which kernels do not depend on
        ones = torch.eye(read, dtype=torch.float64, device=weight.device).repeat(1, like.groups)
        zeros = ones.new_zeros(1, like.in_channels, side, side)
        impulses = zeros.repeat(read, 1, 1, 1)
        impulses[:, :, middle, middle] = ones
        offset = exact(zeros)
        spatial: Any = {"stride": like.stride, "padding": like.padding, "groups": like.groups}
        made = nn.Conv2d(like.in_channels, like.out_channels, (side, side), **spatial).to(weight)
        made.weight.copy_((exact(impulses) - offset).transpose(0, 1).flip(-2, -1))
        made.bias.copy_(offset[0, :, middle, middle])  # pyright: ignore[reportOptionalMemberAccess]
    made.requires_grad_(any(parameter.requires_grad for parameter in module.parameters()))
    return made.eval()


# --- norms ---


def fold_norms_(row: nn.Module, but: type[nn.Module] | tuple[()] = ()) -> bool:
    """Fold every norm among steps in a row into the layer in front of it, or the linear one behind.

    Args:
        row: Its children run one after another.
        but: A kind of layer that takes no norm.

    Returns:
        Whether anything changed.
    """
    steps: Any = row._modules
    before = len(steps)
    for name, following in list(pairwise(steps)):
        one, other = steps.get(name), steps.get(following)
        if isinstance(other, _NORMS) and _takes_norm(one) and not isinstance(one, but):
            _norm_behind_(one, other)
            del steps[following]
        elif isinstance(one, _NORMS) and isinstance(other, nn.Linear):
            _norm_in_front_(one, other)
            del steps[name]
    return len(steps) < before


_NORMS = (nn.BatchNorm2d, BatchNorm)


def _takes_norm(layer: Any) -> bool:
    plain = isinstance(layer, DWConv) and not layer.residual and not layer.activation
    return plain or type(layer) is nn.Conv2d or isinstance(layer, nn.Linear)


def _line(norm: nn.BatchNorm2d | BatchNorm) -> tuple[Tensor, Tensor]:
    """Slope and offset of a norm in evaluation mode."""
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    slope = norm.weight / (var + norm.eps).sqrt()
    return slope, norm.bias - mean * slope


def _norm_behind_(layer: Any, norm: nn.BatchNorm2d | BatchNorm) -> None:
    with torch.inference_mode(False), torch.no_grad():
        slope, offset = _line(norm)
        weight = layer.weight * slope.reshape(-1, *[1] * (layer.weight.ndim - 1))
        _replace_(layer, weight, offset if layer.bias is None else layer.bias * slope + offset)


def _norm_in_front_(norm: nn.BatchNorm2d | BatchNorm, layer: nn.Linear) -> None:
    with torch.inference_mode(False), torch.no_grad():
        slope, offset = _line(norm)
        _replace_(layer, layer.weight * slope, F.linear(offset, layer.weight, layer.bias))


def _replace_(layer: Any, weight: Tensor, bias: Tensor) -> None:
    needs_grad = layer.weight.requires_grad
    layer.weight = nn.Parameter(weight, requires_grad=needs_grad)
    layer.bias = nn.Parameter(bias, requires_grad=needs_grad)
