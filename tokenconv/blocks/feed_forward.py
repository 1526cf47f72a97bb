"""What all feed-forward blocks have in common: what their steps are made of, and their arguments.

Shape letters: C channels, h hidden width, K kernel side.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from tokenconv.blocks.chain import Chain, Steps
from tokenconv.blocks.starts import init_torch_
from tokenconv.layers import DWConv
from tokenconv.ops.depthwise_conv import Impl


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the steps of a feed-forward are made of."""

    dim: int
    hidden_dim: int
    kernel_size: int
    act: Callable[[], nn.Module]
    drop_prob: float
    impl: Impl | str | None

    def expand(self, times: int = 1, *, bias: bool = True) -> nn.Linear:
        """The linear layer that comes first, to ``times`` the hidden width."""
        return nn.Linear(self.dim, times * self.hidden_dim, bias=bias)

    def project(self, *, bias: bool = True) -> nn.Linear:
        """The linear layer that comes last."""
        return nn.Linear(self.hidden_dim, self.dim, bias=bias)

    def conv(self, dim: int | None = None, **kwargs: Any) -> DWConv:
        """The depthwise convolution, at the hidden width if no other is said."""
        return DWConv(dim or self.hidden_dim, self.kernel_size, impl=self.impl, **kwargs)

    def drop(self) -> nn.Dropout:
        """Dropout."""
        return nn.Dropout(self.drop_prob)


class FeedForward(Chain):
    """Common to all feed-forwards: what their steps are made of.

    Args:
        dim: Channels C, in and out.
        mlp_ratio: Hidden width over ``dim``, rounded down; None takes that of the paper.
        kernel_size: Odd kernel side K; None takes that of the paper.
        act_layer: Makes the activation.
        drop: Dropout probability, at the places of the paper.
        impl: Implementation of the convolution, see ``Impl``; None chooses.
        **own: Arguments that only one paper has.

    Raises:
        ValueError: If the kernel is even, or ``dim`` or the hidden width is not positive.
        TypeError: If the block has no such argument.
    """

    mlp_ratio: float = 4.0
    kernel_size: int = 3
    """Both of the class: the paper's."""
    init: ClassVar[Callable[[nn.Module], None]] = staticmethod(init_torch_)
    """How the paper's code starts the weights."""

    def __init__(
        self,
        dim: int,
        *,
        mlp_ratio: float | None = None,
        kernel_size: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        impl: Impl | str | None = None,
        **own: Any,
    ):
        ratio = self.mlp_ratio if mlp_ratio is None else mlp_ratio
        hidden_dim = self.hidden_dim_of(dim, ratio)
        if dim < 1 or hidden_dim < 1:
            raise ValueError(f"expected a positive dim and hidden width, got {dim=}, {hidden_dim=}")
        parts = Parts(
            dim=dim,
            hidden_dim=hidden_dim,
            kernel_size=self.kernel_size if kernel_size is None else kernel_size,
            act=act_layer,
            drop_prob=drop,
            impl=impl,
        )
        super().__init__(**self.steps(parts, **own))
        self.mlp_ratio, self.kernel_size = ratio, parts.kernel_size
        self.reset_parameters()

    @staticmethod
    def hidden_dim_of(dim: int, mlp_ratio: float) -> int:
        """The hidden width."""
        return int(dim * mlp_ratio)

    def steps(self, parts: Parts) -> Steps:
        """The paper's steps, in their order."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Initialise as the paper's code does."""
        type(self).init(self)
