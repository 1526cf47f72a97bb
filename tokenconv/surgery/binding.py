"""How the grid reaches a convolution inside a model whose blocks are called with tokens alone.

The module that makes the grid (the *source*, a patch embedding) is hooked. The container of the
blocks takes over what the hook noted and binds it to every block it hands out, so that each call
of a block carries the grid of its own forward pass: also when gradient checkpointing repeats the
call later, in another thread, after another forward of another size.

The grid travels as the shape of a tensor without elements. Integers read from a context are
constants for ``torch.compile`` and ``torch.export``; a tensor's shape stays symbolic.

Eager state is kept per thread. Under ``torch.compile`` it is a plain attribute, since Dynamo
loses thread-local writes across a graph break; nothing is written inside a block then, because
checkpointed regions must not have side effects.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tokenconv.errors import GridError, SurgeryError
from tokenconv.grid import TokenGrid


class _EagerState(threading.local):
    pending: Tensor | None = None
    """Noted by the source, not yet taken over by the container."""
    scope: Tensor | None = None
    """Grid of the block that is running."""


class _TracedState:
    pending: Tensor | None = None
    current: Tensor | None = None


class GridBinding:
    """Carries the grid from one source to the convolutions of one container.

    Args:
        num_prefix_tokens: The most prefix tokens the model puts in front of the grid.
    """

    def __init__(self, num_prefix_tokens: int):
        self.__setstate__({"num_prefix_tokens": num_prefix_tokens})

    def __getstate__(self) -> dict[str, Any]:
        return {"num_prefix_tokens": self.num_prefix_tokens}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also how deepcopy and pickle make one: a copy never shares a forward in flight."""
        self.num_prefix_tokens: int = state["num_prefix_tokens"]
        self._eager = _EagerState()
        self._traced = _TracedState()

    def note(self, source: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        """Forward hook of the source, a ``timm.layers.PatchEmbed``."""
        rows, cols = source.dynamic_feat_size(args[0].shape[-2:])  # pyright: ignore
        carrier = out.new_empty((0, rows, cols))
        if torch.compiler.is_compiling():
            self._traced.pending = carrier
        else:
            self._eager.pending = carrier

    def clear(self, model: nn.Module, args: tuple[Any, ...], out: Any = None) -> None:
        """Forward hook and pre-hook of the model: no forward pass leaves anything behind."""
        if torch.compiler.is_compiling():
            self._traced.pending = self._traced.current = None
        else:
            self._eager.pending = self._eager.scope = None

    def bind(self, blocks: list[nn.Module]) -> list[Any]:
        """Tie the pending grid to the blocks of the forward pass that begins now."""
        if torch.compiler.is_compiling():
            pending, self._traced.pending = self._traced.pending, None
            if pending is not None:
                self._traced.current = pending
            return blocks
        pending, self._eager.pending = self._eager.pending, None
        if pending is None:  # noted by a compiled source, when the graph broke behind it
            pending, self._traced.pending = self._traced.pending, None
        if pending is None:
            return blocks
        return [_BoundBlock(self, block, pending) for block in blocks]

    def grid(self, x: Tensor) -> TokenGrid:
        """The grid of the tokens that a convolution was just given.

        Args:
            x: Tokens ``(B, N, C)``.

        Raises:
            SurgeryError: If no source has run in front of this convolution.
            GridError: If the tokens do not fill the grid.
        """
        carrier = self._eager.scope
        if carrier is None and torch.compiler.is_compiling():
            carrier = self._traced.current
        if carrier is None:
            raise SurgeryError(
                "no grid is known here: a block was called by itself. Call the model, or iterate "
                "over its container of blocks after its patch embedding"
            )
        return _grid_from_carrier(carrier, x, self.num_prefix_tokens)


def _grid_from_carrier(carrier: Tensor, x: Tensor, most_prefix_tokens: int) -> TokenGrid:
    """One fx node: the check in it cannot be traced symbolically."""
    num_tokens, rows, cols = x.shape[1], carrier.shape[1], carrier.shape[2]
    if torch.jit.is_tracing():  # sizes are tensors then
        num_tokens, rows, cols = int(num_tokens), int(rows), int(cols)
    num_prefix_tokens = num_tokens - rows * cols
    if num_prefix_tokens < 0 or num_prefix_tokens > most_prefix_tokens:
        raise GridError(
            f"expected {rows}*{cols} tokens and up to {most_prefix_tokens} prefix tokens, got "
            f"{x.shape[1]} (shape {tuple(x.shape)}). Dropped or masked tokens hide the grid"
        )
    return TokenGrid((rows, cols), num_prefix_tokens)


torch.fx.wrap("_grid_from_carrier")


class _BoundBlock:
    """A block together with the grid of one forward pass; made anew for every pass."""

    def __init__(self, binding: GridBinding, block: nn.Module, carrier: Tensor):
        self._binding = binding
        self._block = block
        self._carrier = carrier

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        eager = self._binding._eager
        outer, eager.scope = eager.scope, self._carrier
        try:
            return self._block(*args, **kwargs)
        finally:
            eager.scope = outer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


class CaptureSequential(nn.Sequential):
    """The container of a model's blocks while blocks of ours are in it.

    An ``nn.Sequential`` becomes one by ``capture`` and is turned back by ``release``; keys,
    indices and slices stay as they were.
    """

    _binding: GridBinding

    @staticmethod
    def capture(container: nn.Sequential, binding: GridBinding) -> None:
        """Let ``container`` bind the grid to the blocks it hands out."""
        container.__class__ = CaptureSequential
        container._binding = binding  # pyright: ignore

    def release(self) -> None:
        """Turn the container into what it was."""
        del self._binding
        self.__class__ = nn.Sequential  # pyright: ignore

    def _bound(self) -> list[Any]:
        return self._binding.bind(list(self._modules.values()))  # pyright: ignore

    def __iter__(self) -> Iterator[Any]:
        return iter(self._bound())

    def children(self) -> Iterator[Any]:
        """What ``timm``'s ``checkpoint_seq`` iterates over."""
        return iter(self._bound())

    def __getitem__(self, index: Any) -> Any:
        blocks = list(self._modules.items())[index]
        if not isinstance(index, slice):
            return blocks[1]
        part = nn.Sequential(OrderedDict(blocks))
        CaptureSequential.capture(part, self._binding)
        return part

    def forward(self, input: Tensor) -> Tensor:
        """Run the blocks in order."""
        for block in self._bound():
            input = block(input)
        return input
