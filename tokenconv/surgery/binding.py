"""How the grid reaches a convolution inside a model whose blocks are called with tokens alone.

A module that makes a grid (a *source*, a patch embedding) is hooked. The containers of the blocks
take over what the hook noted and bind it to every block they hand out, so that each call of a
block carries the grids of its own forward pass: also when gradient checkpointing repeats the call
later, in another thread, after another forward of another size. A container inside a block that
is running binds what the running block is bound to.

A grid travels as the shape of a tensor without elements. Integers read from a context are
constants for ``torch.compile`` and ``torch.export``; a tensor's shape stays symbolic. Where tokens
are missing, their positions travel instead.

Eager state is kept per thread. Under ``torch.compile`` it is a plain attribute, since Dynamo
loses thread-local writes across a graph break; nothing is written inside a block then, because
checkpointed regions must not have side effects.
"""

import threading
from collections.abc import Iterator
from typing import Any

import torch
from timm.models.pit import SequentialTuple
from torch import Tensor, nn

from tokenconv.errors import SurgeryError
from tokenconv.surgery.families import Source

Carriers = dict[str, Tensor]
"""Grids of one forward pass, by source: ``(0, H, W)`` floats whose shape counts or, where tokens
are missing, integers ``(B, L, 2)`` as in ``SparseGrid``."""


class _EagerState(threading.local):
    def __init__(self) -> None:
        self.pending: Carriers = {}
        """Noted by a source, not yet taken over by a container."""
        self.scope: Carriers = {}
        """Grids of the block that is running."""


class _TracedState:
    def __init__(self) -> None:
        self.pending: Carriers = {}
        self.current: Carriers = {}


class GridBinding:
    """Carries the grids from the sources of one model to the convolutions in its blocks."""

    def __init__(self) -> None:
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        return {"of": "one model"}  # not empty, or copies would skip __setstate__

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also how deepcopy and pickle make one: a copy never shares a forward in flight."""
        self._eager = _EagerState()
        self._traced = _TracedState()

    def note(self, key: str, carrier: Tensor) -> None:
        """Keep the grid of a source until a container takes it over."""
        if torch.compiler.is_compiling():
            self._traced.pending = {**self._traced.pending, key: carrier}
        else:
            self._eager.pending = {**self._eager.pending, key: carrier}

    def noted(self, key: str) -> Tensor:
        """What a source has noted, and no container has taken over.

        Raises:
            SurgeryError: If there is nothing.
        """
        traced = torch.compiler.is_compiling()
        pending = self._traced.pending if traced else self._eager.pending
        if key not in pending:
            raise SurgeryError(
                "no grid is known that tokens could be taken from: expected a call between the "
                "patch embedding and the first block, in every forward pass"
            )
        return pending[key]

    def narrow(self, key: str, kept: Tensor) -> None:
        """Say which tokens are left: indices ``(B, L)`` into those there were, negative for none.

        Raises:
            SurgeryError: If the source has not run.
        """
        self.note(key, _left(self.noted(key), kept))

    def clear(self, model: nn.Module, args: tuple[Any, ...], out: Any = None) -> None:
        """Forward hook and pre-hook of the model: no forward pass leaves anything behind."""
        if torch.compiler.is_compiling():
            self._traced.pending, self._traced.current = {}, {}
        else:
            self._eager.pending, self._eager.scope = {}, {}

    def bind(self, blocks: list[nn.Module]) -> list[Any]:
        """Tie the grids of the forward pass that is running to the blocks of a container."""
        if torch.compiler.is_compiling():
            if pending := self._traced.pending:
                self._traced.current = {**self._traced.current, **pending}
                self._traced.pending = {}
            return blocks
        pending, self._eager.pending = self._eager.pending, {}
        if not pending:  # noted by a compiled source, when the graph broke behind it
            pending, self._traced.pending = self._traced.pending, {}
        carriers = {**self._eager.scope, **pending}
        return [BoundBlock(self, block, carriers) for block in blocks] if carriers else blocks

    def carrier(self, key: str) -> Tensor:
        """The grid of a source in the forward pass that is running; see ``Carriers``.

        Raises:
            SurgeryError: If the source has not run in front of the block.
        """
        carriers = self._eager.scope
        if not carriers and torch.compiler.is_compiling():
            carriers = self._traced.current
        if key not in carriers:
            raise SurgeryError(
                "no grid is known here: a block was called by itself. Call the model, or go over "
                "its container of blocks once, from end to end, after its patch embedding"
            )
        return carriers[key]


def _left(carrier: Tensor, kept: Tensor) -> Tensor:
    if carrier.is_floating_point():
        cols = carrier.shape[2]
        coords = torch.stack([kept // cols, kept % cols], dim=-1)
    else:
        coords = carrier.gather(1, kept.clamp(min=0)[..., None].expand(-1, -1, 2))
    return coords.masked_fill((kept < 0)[..., None], -1)


class NoteGrid:
    """Forward hook, with keyword arguments, of a module that makes a grid."""

    def __init__(self, binding: GridBinding, key: str, source: Source):
        self.binding = binding
        self.key = key
        self.source = source

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        """Note the grid."""
        coords = self.source.coords(args, kwargs) if self.source.coords else None
        if coords is not None:
            self.binding.note(self.key, coords)
            return
        rows, cols = self.source.size(module, args, out)
        tokens = out[0] if isinstance(out, (tuple, list)) else out
        self.binding.note(self.key, tokens.new_empty((0, rows, cols)))


class BoundBlock:
    """A block together with the grids of one forward pass; made anew for every pass."""

    def __init__(self, binding: GridBinding, block: nn.Module, carriers: Carriers):
        vars(self).update(_binding=binding, _block=block, _carriers=carriers)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block in the scope of its grids."""
        eager = self._binding._eager
        outer, eager.scope = eager.scope, self._carriers
        try:
            return self._block(*args, **kwargs)
        finally:
            eager.scope = outer

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_block"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._block, name, value)


class Captured(nn.Module):
    """A module of the model that takes part in the binding, by a class derived from its own.

    It becomes one by ``become`` and is turned back by ``release``.
    """

    _plain: type[nn.Module]
    _binding: GridBinding


class _Capture(Captured):
    """A container of blocks that binds the grid to the blocks it hands out.

    Its keys, indices and slices stay as they were.
    """

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
        part = type(self)()
        part._binding = self._binding
        for i, (name, block) in enumerate(blocks):
            renamed = str(i) if isinstance(part, nn.ModuleList) else name  # as torch does
            part.add_module(renamed, block)  # pyright: ignore[reportArgumentType]
        return part


class CaptureSequential(_Capture, nn.Sequential):
    """An ``nn.Sequential`` while blocks of ours are in it."""

    _plain = nn.Sequential

    def forward(self, input: Tensor) -> Tensor:
        """Run the blocks in order."""
        for block in self._bound():
            input = block(input)
        return input


class CaptureSequentialTuple(_Capture, SequentialTuple):
    """PiT's stages while blocks of ours are in them."""

    _plain = SequentialTuple


class CaptureModuleList(_Capture, nn.ModuleList):
    """An ``nn.ModuleList`` while blocks of ours are in it."""

    _plain = nn.ModuleList


_CAPTURES = {
    cls._plain: cls for cls in (CaptureSequential, CaptureSequentialTuple, CaptureModuleList)
}


def can_capture(module: nn.Module) -> bool:
    """Whether a module is a container whose blocks can be bound."""
    return type(module) in _CAPTURES


def capture(container: nn.Module, binding: GridBinding) -> None:
    """Let a container bind the grid to the blocks it hands out."""
    become(_CAPTURES[type(container)], container, binding)


def become(cls: type[Captured], module: nn.Module, binding: GridBinding) -> None:
    """Give a module a class of ours."""
    module.__class__ = cls
    vars(module)["_binding"] = binding


def release(module: nn.Module) -> None:
    """Turn a captured module into what it was; leave any other alone."""
    if isinstance(module, Captured):
        del module._binding
        module.__class__ = module._plain  # pyright: ignore[reportAttributeAccessIssue]
