"""Fix the image size of a hybrid, so that ``torch.jit.script`` can compile it.

TorchScript knows no hooks without types, no containers of ours, no ``*grid`` and no ``TokenGrid``.
So the grids become constants, and inserted modules are given a class with the same parameters and
a plain ``forward(x)``. A class, because parameters, keys, hooks and identity then stay as they are.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any, List, Tuple  # noqa: UP035  # TorchScript reads them

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenconv.costs import meta_copy, run_meta
from tokenconv.errors import GridError, MeasurementError, SurgeryError
from tokenconv.grid import TokenGrid
from tokenconv.layers import DWConv, SeparableConv
from tokenconv.ops.depthwise_conv import Impl
from tokenconv.surgery.accelerate import check_not_accelerated
from tokenconv.surgery.binding import GridBinding, NoteGrid, release
from tokenconv.surgery.dropping import NoteKept
from tokenconv.surgery.edits import Insertion, inserted_modules, insertion_of
from tokenconv.surgery.fragments import AroundAct, Hook
from tokenconv.surgery.sites import locate


class FixedDWConv(DWConv):
    """A ``DWConv`` on one grid."""

    rows: int
    cols: int
    num_prefix_tokens: int

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Convolve tokens ``(B, N, C)``, or a map ``(B, H, W, C)``."""
        skipped, rows, cols = self.num_prefix_tokens, self.rows, self.cols
        size = [rows, cols] if x.dim() == 4 else [skipped + rows * cols]
        if list(x.shape[1:-1]) != size:
            raise GridError(f"the grid is frozen to {rows}*{cols}, got a tensor of {x.shape}")
        grid = x[:, skipped:]
        fmap = grid.reshape(x.shape[0], rows, cols, x.shape[-1]).permute(0, 3, 1, 2)
        padding = self.dilation * (self.kernel_size // 2)
        out = F.conv2d(
            fmap, self.weight, self.bias, padding=padding, dilation=self.dilation, groups=self.dim
        )
        if self.residual:
            out = out + fmap
        tokens = out.permute(0, 2, 3, 1).reshape(grid.shape)
        if skipped == 0:
            return tokens
        return torch.cat([x[:, :skipped].to(tokens.dtype), tokens], dim=1)


class FixedSeparableConv(SeparableConv):
    """A ``SeparableConv`` on one grid."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Convolve the tokens."""
        return self.pointwise(self.act(self.norm(self.depthwise(x))))


class FixedAroundAct(AroundAct):
    """An ``AroundAct`` whose blocks know their grid."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Convolve the tokens and activate them."""
        if self.before is not None:
            x = self.before(x)
        x = self.act(x)
        if self.after is not None:
            x = self.after(x)
        return x


_FIXED: dict[type[nn.Module], type[nn.Module]] = {
    DWConv: FixedDWConv,
    SeparableConv: FixedSeparableConv,
    AroundAct: FixedAroundAct,
}


def beside_tokens(self: Any, input: Tuple[Tensor], output: Tensor) -> Tensor:  # noqa: UP006
    """Hook of a module that is called with tokens."""
    return output + self.beside(input[0]).to(output.dtype)


def beside_tokens_and_size(
    self: Any,
    input: Tuple[Tensor, List[int]],  # noqa: UP006
    output: Tensor,
) -> Tensor:
    """Hook of a module that is called with tokens and the size of their grid, as in PVTv2."""
    return output + self.beside(input[0]).to(output.dtype)


_BESIDE: dict[tuple[str, ...], Callable[..., Tensor]] = {
    ("x",): beside_tokens,
    ("x", "feat_size"): beside_tokens_and_size,
}
"""By the arguments of the module; TorchScript wants their types."""


def check_size(self: Any, input: Tuple[Tensor]) -> None:  # noqa: UP006
    """Pre-hook of the module that makes the grid: images of another size are refused."""
    rows, cols = self.tokenconv_size
    if input[0].shape[-2] != rows or input[0].shape[-1] != cols:
        raise GridError(f"the size is frozen to {rows}x{cols}, got a tensor of {input[0].shape}")


def freeze_grid_(model: nn.Module, size: tuple[int, int]) -> nn.Module:
    """Fix the image size of a hybrid, in place, so that it can be scripted.

    ``torch.jit.script(freeze_grid_(model, (224, 224)))`` then works wherever it works for the
    unmodified model, with blocks inside the MLP (``before_act``, ``after_act``, ``merge_conv``,
    ``remove_conv``) and beside it (``beside_mlp``; PVTv2 has ``beside_attn`` too). Other sites
    cannot be scripted: TorchScript wants one type of call for a hook, and timm calls attention and
    whole Transformer blocks in several ways. In eager mode the model goes on working, for the one
    size. Parameters and keys stay as they are, and ``remove_`` gives the model back as before, for
    every size.

    Args:
        model: A model that ``insert_`` has changed.
        size: ``(H, W)`` of the images, in pixels.

    Returns:
        The same model. Images of another size raise a ``GridError`` (scripted, a
        ``torch.jit.Error``).

    Raises:
        SurgeryError: If nothing is inserted, the size does not fit the model or is frozen already,
            or an inserted block cannot be scripted; the model is as it was then.
    """
    check_not_accelerated(model)
    insertion = insertion_of(model)
    if any(type(module) in _FIXED.values() for module in model.modules()):
        raise SurgeryError("the size is frozen already; call remove_ and insert_ anew")
    beside = _hooks_beside(model)
    _check_blocks(model, insertion)
    grids, sizes = _rehearse(model, insertion, size)
    _take_hooks_out(model)
    insertion.binding = None
    for name, block in inserted_modules(model).items():
        _fix(block, grids.get(name, TokenGrid((1, 1))))  # a merged kernel has no call of its own
    for module in model.modules():
        if type(module) is AroundAct:
            module.__class__ = FixedAroundAct
    for host, hook in beside:
        insertion.handles.append(host.register_forward_hook(hook))
    for name, shape in sizes.items():
        source = model.get_submodule(name)
        vars(source)["tokenconv_size"] = shape
        insertion.attached.append((source, "tokenconv_size"))
        insertion.handles.append(source.register_forward_pre_hook(check_size))
    return model


def _hooks_beside(model: nn.Module) -> list[tuple[nn.Module, Callable[..., Tensor]]]:
    """Modules with a block beside them, and the hook that calls it; refuses other hooks."""
    found = []
    for name, block in inserted_modules(model).items():
        site, host_name = vars(block)["tokenconv_site"], name.rpartition(".")[0]
        host = model.get_submodule(host_name)
        if site in ("before_act", "after_act", "merge_conv") and not _hooked(host):
            continue
        hook = _BESIDE.get(tuple(signature(host.forward).parameters))
        if not site.startswith("beside_") or hook is None:
            raise SurgeryError(
                f"{name} ({site}) cannot be scripted: TorchScript wants one type of call for a "
                f"hook, so only blocks inside an MLP can be, and those beside a module that is "
                f"given tokens, or tokens and a size; leave this one out of the plan"
            )
        found.append((host, hook))
    return found


def _hooked(host: nn.Module) -> bool:
    hooks = [*host._forward_hooks.values(), *host._forward_pre_hooks.values()]
    return any(isinstance(hook, Hook) for hook in hooks)


def _check_blocks(model: nn.Module, insertion: Insertion) -> None:
    for edit in insertion.plan.edits:
        if edit.place.layer_scale:
            raise SurgeryError(
                f"{edit.inserted} cannot be scripted: it is spared by the LayerScale of the model"
            )
        if edit.place.rolled is not None:
            raise SurgeryError(
                f"{edit.place.host} cannot be scripted: its tokens are in the order of mask units"
            )
    for name, block in inserted_modules(model).items():
        if type(block) not in _FIXED:
            raise SurgeryError(f"{name} cannot be scripted: no {type(block).__name__} can be yet")
        for part in block.modules():
            if isinstance(part, DWConv) and part.impl not in (None, Impl.CONV2D):
                raise SurgeryError(f"{name} asks for impl={part.impl!r}; only conv2d is scriptable")


def _rehearse(
    model: nn.Module, insertion: Insertion, size: tuple[int, int]
) -> tuple[dict[str, TokenGrid], dict[str, tuple[int, int]]]:
    """One forward pass on a weightless copy: grids by block, sizes of what their sources get."""
    grids: dict[str, TokenGrid] = {}
    given: dict[str, tuple[Any, ...]] = {}

    def note_grid(name: str) -> Any:
        def hook(block: nn.Module, args: tuple[Any, ...]) -> None:
            grids[name] = TokenGrid.of(*args[1:])

        return hook

    def note_given(name: str) -> Any:
        def hook(source: nn.Module, args: tuple[Any, ...]) -> None:
            given[name] = args

        return hook

    root, family = locate(model)
    prefix = f"{root}." if root else ""
    try:
        meta = meta_copy(model)
        for name, block in inserted_modules(meta).items():
            block.register_forward_pre_hook(note_grid(name))
        for source in family.sources.values():
            name = prefix + source.module
            meta.get_submodule(name).register_forward_pre_hook(note_given(name))
        run_meta(meta.get_submodule(root), 1, (insertion.plan.input_size[0], *size))
    except MeasurementError as error:
        raise SurgeryError(str(error)) from error
    if more := [name for name, args in given.items() if len(args) > 1]:
        raise SurgeryError(f"{more[0]} takes more than an image, which a typed hook cannot check")
    return grids, {name: tuple(args[0].shape[-2:]) for name, args in given.items()}


def _take_hooks_out(model: nn.Module) -> None:
    for module in model.modules():
        release(module)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(
                    getattr(hook, "__self__", hook), (GridBinding, NoteGrid, NoteKept, Hook)
                ):
                    del hooks[key]


def _fix(block: nn.Module, grid: TokenGrid) -> None:
    """Give a block and its parts classes that know the grid."""
    for part in block.modules():
        if type(part) in _FIXED:
            part.__class__ = _FIXED[type(part)]
        if isinstance(part, FixedDWConv):
            (part.rows, part.cols), part.num_prefix_tokens = grid.size, grid.num_prefix_tokens
