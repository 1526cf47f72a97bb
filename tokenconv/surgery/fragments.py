"""Modules that stand where a model's own module stood, and give it back on removal.

Each keeps the parameters of what it replaces under their old names, so that a checkpoint of the
unmodified model still fits.
"""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from tokenconv.layers import DWConv
from tokenconv.surgery.binding import GridBinding


class Replacement(nn.Module):
    """Stands in for ``original`` at one site of a model."""

    fragment: ClassVar[str | None] = None
    """Name of the child that holds what was added."""

    def release(self) -> nn.Module:
        """The module that stood here before, with its parameters as they are now."""
        raise NotImplementedError  # every subclass has its own

    def reset_parameters(self) -> None:
        """Make the added modules do nothing again."""
        if self.fragment:
            for parameter in self.get_submodule(self.fragment).parameters():
                nn.init.zeros_(parameter)

    def init_weights(self) -> None:
        """Called last by timm's ``model.init_weights()``, which would leave random kernels."""
        self.reset_parameters()


class ConvAct(Replacement):
    """A convolution in front of the MLP's activation: ``act(conv(x))``."""

    fragment = "conv"

    def __init__(self, act: nn.Module, conv: nn.Module, binding: GridBinding):
        super().__init__()
        self.conv = conv
        self.act = act
        self.binding = binding
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve the grid bound to this forward pass, then activate."""
        return self.act(self.conv(x, self.binding.grid(x)))

    def release(self) -> nn.Module:
        """The activation."""
        return self.act


class MergedConv(Replacement):
    """The MLP's own depthwise convolution with a second branch added to it.

    Both branches are linear and see the same input, so their kernels are added and one convolution
    runs. A larger second kernel zero-pads the first.
    """

    fragment = "added"

    def __init__(self, conv: nn.Conv2d, added: DWConv):
        super().__init__()
        self.weight = conv.weight
        self.bias = conv.bias
        self.added = added
        self.original = _Unregistered(conv)
        self.margin = (added.kernel_size - conv.kernel_size[0]) // 2
        self.padding = added.dilation * (added.kernel_size // 2)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve a map ``(B, C, H, W)``, in the memory layout it comes in."""
        weight = F.pad(self.weight, [self.margin] * 4) if self.margin else self.weight
        weight = weight + self.added.weight
        bias = self.bias
        if self.added.bias is not None:
            bias = self.added.bias if bias is None else bias + self.added.bias
        return F.conv2d(
            x,
            weight,
            bias,
            padding=self.padding,
            dilation=self.added.dilation,
            groups=self.added.dim,
        )

    def release(self) -> nn.Module:
        """The convolution, without what was added to it."""
        conv = self.original.module
        conv.weight, conv.bias = self.weight, self.bias
        return conv.train(self.training)


class RemovedConv(Replacement):
    """Where a convolution was taken out of an MLP; its weights wait here, outside the model."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.original = _Unregistered(conv)

    def forward(self, x: Tensor) -> Tensor:
        """Pass the map on."""
        return x

    def release(self) -> nn.Module:
        """The convolution that was taken out."""
        return self.original.module.train(self.training)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self.original.module._apply(fn)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        names = [name for name in state_dict if name.startswith(prefix)]
        waiting = {name.removeprefix(prefix): state_dict.pop(name) for name in names}
        if waiting:
            self.original.module.load_state_dict(waiting)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class _Unregistered:
    """Holds a module without making it a child."""

    def __init__(self, module: nn.Conv2d):
        self.module = module
