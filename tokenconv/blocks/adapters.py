"""Adapters: small blocks that are trained beside, in or behind a frozen Transformer's modules.

Shape letters: B batch, N tokens = P prefix + grid, C channels, w width of the bottleneck, K kernel
side.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenconv.blocks.chain import Chain, Local, Shortcut, Steps
from tokenconv.blocks.scale_experts import ScaleExperts
from tokenconv.blocks.starts import init_torch_
from tokenconv.grid import AnyGrid, Grid
from tokenconv.layers import DWConv, GridConv, GridModule, QuickGELU
from tokenconv.ops.depthwise_conv import Impl


class Scale(nn.Module):
    """Multiplies every channel by a number of its own.

    Args:
        dim: Channels C.
        value: Where it starts.
    """

    def __init__(self, dim: int, value: float = 1.0):
        super().__init__()
        self.value = value
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from one number for all."""
        nn.init.constant_(self.weight, self.value)

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels."""
        return x * self.weight


class Adapter(Chain):
    """Common to the adapters: a bottleneck whose output is multiplied by a number.

    Args:
        dim: Channels C, in and out.
        width: Width w of the bottleneck; None takes that of the paper.
        scale: The number; None takes that of the paper.
        drop: Dropout probability, at the place of the paper; None takes that of the paper.
        **own: Arguments that only one paper has.

    Raises:
        ValueError: If ``dim`` or ``width`` is not positive, or does not fit the groups.
        TypeError: If the adapter has no such argument.
    """

    width: int = 8
    """Of the class: the paper's."""
    scale: float = 1.0
    drop: ClassVar[float] = 0.1

    def __init__(
        self,
        dim: int,
        *,
        width: int | None = None,
        scale: float | None = None,
        drop: float | None = None,
        **own: Any,
    ):
        width = self.width_of(dim) if width is None else width
        if dim < 1 or width < 1:
            raise ValueError(f"expected dim >= 1 and width >= 1, got {dim=}, {width=}")
        super().__init__(**self.steps(dim, width, self.drop if drop is None else drop, **own))
        self.width = width
        if scale is not None:
            self.scale = scale
        self.reset_parameters()

    @classmethod
    def width_of(cls, dim: int) -> int:
        """The paper's width of the bottleneck."""
        return cls.width

    def steps(self, dim: int, width: int, drop: float) -> Steps:
        """The paper's steps, in their order."""
        raise NotImplementedError

    def run(self, x: Tensor, grid: AnyGrid) -> Tensor:
        """Run the steps, and scale."""
        return self.scale * super().run(x, grid)

    def reset_parameters(self) -> None:
        """Initialise as the paper's code does."""
        raise NotImplementedError


class Convpass(Adapter):
    """Convpass: a full 3x3 convolution in a bottleneck, beside attention and beside the MLP.

    ``scale * up(dropout(QuickGELU(conv(QuickGELU(down(x))))))``, width 8; it reads what the norm
    gives. Class tokens are convolved by the same kernel as images of one pixel. ``up`` starts from
    zero, ``down`` from a Xavier uniform, the convolution from the identity. Parameters:
    ``2*C*w + w + C + 9*w*w + w``.

    Args besides those of ``Adapter``:
        xavier_init: Start the convolution from a Xavier uniform.

    References:
        https://arxiv.org/abs/2207.07039
    """

    down: Any
    conv: Any
    up: Any

    def steps(self, dim: int, width: int, drop: float, xavier_init: bool = False) -> Steps:
        """See the class."""
        self.xavier_init = xavier_init
        return {
            "down": nn.Linear(dim, width),
            "act1": QuickGELU(),
            "conv": GridConv(width, width),
            "act2": QuickGELU(),
            "dropout": nn.Dropout(drop),
            "up": nn.Linear(width, dim),
        }

    def reset_parameters(self) -> None:
        """Initialise as the official repository does."""
        self.conv.init_centre_()
        for part in (self.down, self.conv) if self.xavier_init else (self.down,):
            nn.init.xavier_uniform_(part.weight)
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)


class ConvAdapter(Adapter):
    """Conv-Adapter: a grouped convolution to a narrow width and a linear layer, beside a module.

    ``scale * channel_scale * up(act(conv(x)))``, width ``C // 8``; every channel of the
    bottleneck sees ``C / w`` channels. ConvNeXt's takes ``kernel_size=7`` and
    ``act_layer=nn.GELU``. Prefix tokens, which the paper has none of, are convolved as images of
    one pixel. Starts as torch's layers, ``channel_scale`` from one, so it is no identity; surgery
    starts ``channel_scale`` from zero. Parameters: ``C*K*K + w + w*C + C + C``.

    Args besides those of ``Adapter``, of which it has no dropout:
        kernel_size: Odd kernel side K.
        act_layer: Makes the activation.

    References:
        https://arxiv.org/abs/2208.07463
    """

    drop = 0.0

    @classmethod
    def width_of(cls, dim: int) -> int:
        """An eighth of the channels."""
        return max(1, dim // 8)

    def steps(
        self,
        dim: int,
        width: int,
        drop: float,
        kernel_size: int = 3,
        act_layer: Callable[[], nn.Module] = nn.ReLU,
    ) -> Steps:
        """See the class."""
        return {
            "conv": GridConv(dim, width, kernel_size, groups=width),
            "act": act_layer(),
            "dropout": nn.Dropout(drop) if drop else None,
            "up": nn.Linear(width, dim),
            "channel_scale": Scale(dim),
        }

    def reset_parameters(self) -> None:
        """Initialise as torch's layers."""
        init_torch_(self)


class ConvLoRA(Adapter):
    """Conv-LoRA: a bottleneck with a mixture of convolutions at several scales, beside a layer.

    ``scale * up(y + expert_i(y))``, ``y = down(x)``, width 3, ``scale = alpha / width``, no biases
    in the two linear layers. Expert i of E makes the map i times as large (bicubic),
    ``GELU(conv3x3)`` runs on it, and it is made small again; the means of ``y`` choose one expert
    per image, with noise in training. In the paper it stands beside the query, key and value
    projections of SAM; surgery puts it beside the whole attention. Prefix tokens, which the paper
    has none of, skip the experts. ``up`` starts from zero, ``down`` as ``nn.Linear``, the gates
    from zero. All experts run, and one is taken, so that shapes do not depend on values.

    In training the gradient of a loss that balances the experts is added in the backward pass, see
    ``NoisyTopOne``; the official module returns that loss instead.

    Parameters: ``C*w + w*O + E*(9*w*w + w) + 2*w*E``.

    Args besides those of ``Adapter``:
        out_dim: Channels O that come out; None takes ``dim``.
        alpha: The scale times the width, unless ``scale`` is given.
        num_experts: Convolutions E.
        balance: Weight of the loss that balances them.

    References:
        https://arxiv.org/abs/2401.17868
    """

    width = 3
    drop = 0.0
    down: Any
    up: Any

    def steps(
        self,
        dim: int,
        width: int,
        drop: float,
        out_dim: int | None = None,
        alpha: float = 32.0,
        num_experts: int = 8,
        balance: float = 1e-2,
    ) -> Steps:
        """See the class."""
        self.scale = alpha / width
        experts = ScaleExperts(width, num_experts=num_experts, balance=balance)
        return {
            "dropout": nn.Dropout(drop) if drop else None,
            "down": nn.Linear(dim, width, bias=False),
            "local": Shortcut(experts=experts),
            "up": nn.Linear(width, dim if out_dim is None else out_dim, bias=False),
        }

    def reset_parameters(self) -> None:
        """Initialise as the official code does."""
        init_torch_(self)
        self.get_submodule("local.experts").reset_parameters()  # pyright: ignore
        nn.init.zeros_(self.up.weight)


class Mona(Adapter):
    """Mona: norm, bottleneck with three convolutions, and residual, behind attention and MLP.

    ``x + scale * up(dropout(GELU(op(down(LN(x) * gamma + x * gammax)))))``, width 64, where ``op``
    is ``y + linear(y)`` of ``y = x + (DWConv3(x) + DWConv5(x) + DWConv7(x)) / 3``. The norm has eps
    1e-5, ``gamma`` starts from 1e-6, ``gammax`` from one. The paper has no prefix tokens; here they
    skip the convolutions and take the rest. Starts as torch's layers, so it is no identity; surgery
    starts ``up`` from zero. Parameters: ``2*C*w + w + C + 4*C + 86*w + w*w + w``.

    References:
        https://arxiv.org/abs/2408.08345
    """

    width = 64

    def steps(self, dim: int, width: int, drop: float, impl: Impl | str | None = None) -> Steps:
        """See the class."""
        convs = (DWConv(width, side, impl=impl) for side in (3, 5, 7))
        return {
            "norm": _ScaledNorm(dim),
            "down": nn.Linear(dim, width),
            "local": Local(convs=_Mean(*convs)),
            "mix": Shortcut(linear=nn.Linear(width, width)),
            "act": nn.GELU(),
            "dropout": nn.Dropout(drop),
            "up": nn.Linear(width, dim),
        }

    def run(self, x: Tensor, grid: AnyGrid) -> Tensor:
        """Run the steps, scale and add."""
        return x + super().run(x, grid)

    def reset_parameters(self) -> None:
        """Initialise as torch's layers."""
        init_torch_(self)


class _ScaledNorm(nn.Module):
    """``LN(x) * gamma + x * gammax``."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.gamma = nn.Parameter(torch.empty(dim))
        self.gammax = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.norm.reset_parameters()
        nn.init.constant_(self.gamma, 1e-6)
        nn.init.ones_(self.gammax)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * self.gamma + x * self.gammax


class _Mean(GridModule):
    """The mean of what several convolutions make of the same tokens."""

    def __init__(self, *convs: DWConv):
        super().__init__()
        self.convs = nn.ModuleList(convs)

    def forward(self, x: Tensor, *grid: Grid) -> Tensor:
        return torch.stack([conv(x, *grid) for conv in self.convs]).mean(0)


class RepAdapter(Adapter):
    """RepAdapter: two linear layers and a residual, in front of attention and of the MLP.

    ``x + scale * up(dropout(down(x)))``, width 8, ``up`` in two groups of channels. ``up`` starts
    from zero, ``down`` from a Xavier uniform. No convolution over the grid; prefix tokens take
    part.
    Parameters: ``C*w + w + C*w/groups + C``.

    Args besides those of ``Adapter``:
        groups: Groups of ``up``.

    References:
        https://arxiv.org/abs/2302.08106
    """

    down: Any
    up: Any

    def steps(self, dim: int, width: int, drop: float, groups: int = 2) -> Steps:
        """See the class."""
        return {
            "down": nn.Linear(dim, width),
            "dropout": nn.Dropout(drop),
            "up": GroupedLinear(width, dim, groups),
        }

    def run(self, x: Tensor, grid: AnyGrid) -> Tensor:
        """Run the steps, scale and add."""
        return x + super().run(x, grid)

    def reset_parameters(self) -> None:
        """Initialise as the official repository does."""
        nn.init.xavier_uniform_(self.down.weight)
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)


class GroupedLinear(nn.Module):
    """``nn.Linear`` in groups of channels that do not see each other: a grouped 1x1 convolution.

    Args:
        dim: Channels C.
        out_dim: Channels that come out.
        groups: Number of groups.

    Raises:
        ValueError: If ``groups`` does not divide both widths.
    """

    def __init__(self, dim: int, out_dim: int, groups: int):
        super().__init__()
        if groups < 1 or dim % groups or out_dim % groups:
            raise ValueError(f"expected groups to divide {dim=} and {out_dim=}, got {groups=}")
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(out_dim, dim // groups))
        self.bias = nn.Parameter(torch.empty(out_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Linear`` of one group."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map the channels of ``(..., C)``."""
        grouped = x.unflatten(-1, (self.groups, -1))
        weight = self.weight.unflatten(0, (self.groups, -1))
        return torch.einsum("...gi,goi->...go", grouped, weight).flatten(-2) + self.bias


class AdaptFormer(Adapter):
    """AdaptFormer: a bottleneck without a convolution, the baseline of the others.

    ``scale * up(dropout(ReLU(down(x))))``, width 64, scale 0.1. In the paper it stands beside the
    MLP and its norm, and reads the tokens that are not normalised; ``beside_mlp`` gives it those
    behind the norm. ``up`` starts from zero, ``down`` as ``nn.Linear`` with a bias of zero. Prefix
    tokens take part. Parameters: ``2*C*w + w + C``.

    References:
        https://arxiv.org/abs/2205.13535
    """

    width = 64
    scale = 0.1
    down: Any
    up: Any

    def steps(self, dim: int, width: int, drop: float) -> Steps:
        """See the class."""
        return {
            "down": nn.Linear(dim, width),
            "act": nn.ReLU(),
            "dropout": nn.Dropout(drop),
            "up": nn.Linear(width, dim),
        }

    def reset_parameters(self) -> None:
        """Initialise as the official repository does."""
        self.down.reset_parameters()
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)
