"""How an inserted block is fastened to a model, so that every part of the model keeps its name.

A block stands beside, before or after a module as its child, called by a hook of that module; or a
module of ours takes the place of an activation, a convolution, an attention or a patch embedding,
and gives it back on removal.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from timm.layers import LayerScale
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenconv.errors import GridError
from tokenconv.layers import DWConv
from tokenconv.surgery.binding import Captured
from tokenconv.surgery.layouts import RETURNS, Layout


class Hook:
    """Calls the inserted child of a module, in the layout of its tokens."""

    def __init__(self, layout: Layout):
        self.layout = layout


class Before(Hook):
    """Forward pre-hook: ``module(block(x))``."""

    def __call__(self, host: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments with new tokens."""
        return (self.layout.call(host.before, args[0]), *args[1:])  # pyright: ignore


class After(Hook):
    """Forward hook: ``block(module(x))``; what is returned beside the tokens stays."""

    def __call__(self, host: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        """The result with new tokens."""
        if isinstance(out, (tuple, list)):
            return type(out)((self.layout.call(host.after, out[0]), *out[1:]))  # pyright: ignore
        return self.layout.call(host.after, out)  # pyright: ignore[reportArgumentType]


class Beside(Hook):
    """Forward hook: ``module(x) + block(x)``."""

    def __call__(self, host: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """The sum."""
        branch = self.layout.call(host.beside, args[0])  # pyright: ignore[reportArgumentType]
        return out + branch.to(out.dtype)


class BesideScaled(Hook):
    """Forward hook: ``module(x)`` and ``block(x)`` as one tensor, for ``SparingLayerScale``."""

    def __call__(self, host: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """Both, one behind the other in the channels."""
        branch = self.layout.call(host.beside, args[0])  # pyright: ignore[reportArgumentType]
        return torch.cat([out, branch.to(out.dtype)], dim=-1)


class SparingLayerScale(Captured, LayerScale):
    """A LayerScale that scales what the model's own module returned, and not what is beside it."""

    _plain = LayerScale

    def forward(self, x: Tensor) -> Tensor:
        """``gamma * own + branch``, of ``own`` and ``branch`` in one tensor."""
        own, branch = x.chunk(2, dim=-1)
        return super().forward(own) + branch


def attach(
    host: nn.Module, position: str, block: nn.Module, layout: Layout, *, scaled: bool = False
) -> RemovableHandle:
    """Let ``block`` run ``before``, ``after`` or ``beside`` a module, as its child of that name.

    Where what the module returns is ``scaled``, the block beside it must be spared.
    """
    host.add_module(position, block)
    if position == "before":
        return host.register_forward_pre_hook(Before(layout))
    if position == "after":
        return host.register_forward_hook(After(layout))
    return host.register_forward_hook(BesideScaled(layout) if scaled else Beside(layout))


class Replacement(nn.Module):
    """Stands where a model's own module stood.

    Keeps the parameters of that module under their old names, so that a checkpoint of the
    unmodified model still fits.
    """

    def release(self) -> nn.Module:
        """The module that stood here before, with its parameters as they are now."""
        raise NotImplementedError  # every subclass has its own


class AroundAct(Replacement):
    """An MLP's activation with a block before it, after it, or both.

    No hook does this, because ``torch.fx`` skips the hooks of activations.
    """

    def __init__(self, act: nn.Module, layout: Layout):
        super().__init__()
        self.layout = layout
        self.before: nn.Module | None = None
        self.act = act
        self.after: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Convolve the tokens and activate them."""
        if self.before is not None:
            x = _with_strides_of(x, self.layout.call(self.before, x))
        x = self.act(x)
        return x if self.after is None else self.layout.call(self.after, x)

    def release(self) -> nn.Module:
        """The activation."""
        return self.act


@torch.fx.wrap
def _with_strides_of(x: Tensor, y: Tensor) -> Tensor:
    """``y`` laid out in memory as ``x``, one half of a packed projection.

    On a CPU an activation gives other last bits for half a row than for a copy of it.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.stride() == y.stride():
        return y
    return torch.empty_strided(x.shape, x.stride(), dtype=y.dtype).copy_(y)


class MergedConv(Replacement):
    """The MLP's own depthwise convolution with a second branch added to it.

    Both branches are linear and see the same input, so their kernels are added and one convolution
    runs. A larger second kernel zero-pads the first.

    ``fold_`` computes the sum once for inference. It is kept beside the parameters, which stay as
    they are: the state dict has no other keys and values, and loading one, or going back to
    training mode, brings the sum up to date.
    """

    kernel: Optional[Tensor]  # noqa: UP045  # TorchScript reads it
    offset: Optional[Tensor]  # noqa: UP045

    def __init__(self, conv: nn.Conv2d, added: DWConv):
        super().__init__()
        self.weight = conv.weight
        self.bias = conv.bias
        self.added = added
        self.original = Unregistered(conv)
        self.margin = (added.kernel_size - conv.kernel_size[0]) // 2
        self.padding = added.dilation * (added.kernel_size // 2)
        self.register_buffer("kernel", None, persistent=False)
        self.register_buffer("offset", None, persistent=False)
        self.register_load_state_dict_post_hook(_fold_again)

    def fold_(self) -> bool:
        """Compute the sum of the kernels once; returns whether that was new."""
        if self.kernel is not None:
            return False
        with torch.inference_mode(False), torch.no_grad():
            weight, bias = self.merged()
        self.kernel = weight
        self.offset = None if bias is None else bias.detach()  # a parameter would get a key
        return True

    def train(self, mode: bool = True) -> "MergedConv":
        """In training mode the sum is computed in every forward pass, so that both parts learn."""
        if mode:
            self.kernel = self.offset = None
        return super().train(mode)

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """The kernel and the bias that the convolution takes."""
        kernel = self.kernel
        if kernel is not None:
            return kernel, self.offset
        weight = F.pad(self.weight, [self.margin] * 4) if self.margin else self.weight
        bias = self.bias
        if self.added.bias is not None:
            bias = self.added.bias if bias is None else bias + self.added.bias
        return weight + self.added.weight, bias

    def forward(self, input: Tensor) -> Tensor:
        """Convolve a map ``(B, C, H, W)``, in the memory layout it comes in."""
        weight, bias = self.merged()
        dilation, groups = self.added.dilation, self.added.dim
        return F.conv2d(input, weight, bias, padding=self.padding, dilation=dilation, groups=groups)

    def release(self) -> nn.Module:
        """The convolution, without what was added to it."""
        conv = self.original.module
        conv.weight, conv.bias = self.weight, self.bias  # pyright: ignore
        return conv.train(self.training)


def _fold_again(module: MergedConv, incompatible_keys: Any) -> None:
    """After new values were loaded."""
    if module.kernel is not None:
        module.kernel = module.offset = None
        module.fold_()


class _Vacancy(Replacement):
    """Where a module was taken out of a model; its weights wait here, outside the model."""

    def __init__(self, original: nn.Module):
        super().__init__()
        self.original = Unregistered(original)
        self.was_training = original.training

    def release(self) -> nn.Module:
        """The module that was taken out, in the mode that the model has been brought to since."""
        if self.training != self.was_training:  # parts of it may have had another mode than it
            self.original.module.train(self.training)  # LeViT's attention returns nothing from it
        return self.original.module

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self.original.module._apply(fn)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        ours = tuple(f"{prefix}{name}." for name in self._modules)
        names = [
            n for n in state_dict if n.startswith(prefix) and not (ours and n.startswith(ours))
        ]
        waiting = {name.removeprefix(prefix): state_dict.pop(name) for name in names}
        if waiting:
            metadata, _, missing, unexpected, errors = args
            assign = metadata.get("assign_to_params_buffers", False)
            try:
                result = self.original.module.load_state_dict(waiting, strict=False, assign=assign)
            except RuntimeError as error:  # sizes
                errors.append(f"{prefix}: {error}")
            else:
                missing += [prefix + key for key in result.missing_keys]
                unexpected += [prefix + key for key in result.unexpected_keys]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class RemovedConv(_Vacancy):
    """Where an MLP's own convolution was taken out."""

    def forward(self, x: Tensor) -> Tensor:
        """Pass the map on."""
        return x


class ReplacedAttention(_Vacancy):
    """A block in place of an attention."""

    def __init__(self, attention: nn.Module, instead: nn.Module, layout: Layout):
        super().__init__(attention)
        self.layout = layout
        self.instead = instead

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Mix the tokens; what attention is told besides (masks, positions) is not needed."""
        return self.layout.call(self.instead, x)


class ReplacedPatchEmbed(_Vacancy):
    """A stem in place of a patch embedding, which still tells the model its sizes."""

    def __init__(self, embed: nn.Module, instead: nn.Module, returns: str):
        super().__init__(embed)
        self.instead = instead
        self.returns = returns

    def forward(self, x: Tensor) -> Any:
        """The tokens of images, in the layout of the patch embedding."""
        fmap = self.instead.run(x)  # pyright: ignore[reportCallIssue]
        _check_size(self, x, fmap)
        return RETURNS[self.returns](fmap)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original" not in vars(self):  # while it is being copied
                raise
            return getattr(self.original.module, name)


@torch.fx.wrap
def _check_size(embed: Any, x: Tensor, fmap: Tensor) -> None:
    """Refuse an image of which a stem makes other tokens than the model reckons with."""
    if torch.compiler.is_compiling() or not hasattr(embed, "dynamic_feat_size"):
        return
    rows, cols = embed.dynamic_feat_size(tuple(x.shape[2:]))
    if (rows, cols) != tuple(fmap.shape[2:]):
        raise GridError(
            f"expected {rows}*{cols} tokens of an image of {x.shape[2]}x{x.shape[3]}, got "
            f"{fmap.shape[2]}*{fmap.shape[3]} of the stem; take sizes that the patches of the "
            f"model divide"
        )


class Unregistered:
    """Holds a module without making it a child."""

    def __init__(self, module: nn.Module):
        self.module = module
