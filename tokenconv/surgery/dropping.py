"""timm's patch dropout in a hybrid: which tokens are left is noted for the blocks."""

from typing import Any

from timm.layers.patch_dropout import PatchDropout, PatchDropoutWithIndices, patch_dropout_forward
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenconv.errors import SurgeryError
from tokenconv.surgery.binding import Captured, GridBinding, become


class NotingPatchDropout(Captured, PatchDropout):
    """A ``PatchDropout``, which tells nobody what it drops, while blocks of ours are behind it."""

    _plain = PatchDropout

    def forward(self, x: Tensor) -> Tensor:
        """Drop tokens."""
        x, kept = patch_dropout_forward(
            x, self.prob, self.num_prefix_tokens, self.ordered, self.training
        )
        if kept is not None:
            self._binding.narrow("", kept)
        return x


class NoteKept:
    """Forward hook of a ``PatchDropoutWithIndices``."""

    def __init__(self, binding: GridBinding):
        self.binding = binding

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        """Note which tokens are left."""
        if out[1] is not None:
            self.binding.narrow("", out[1])


def watch_dropout(
    root: nn.Module, binding: GridBinding, num_prefix_tokens: set[int]
) -> list[RemovableHandle]:
    """Let the patch dropout of a timm model note what it drops.

    Raises:
        SurgeryError: If it counts other tokens as prefix than there are.
    """
    dropout = getattr(root, "patch_drop", None)
    kinds = (PatchDropout, PatchDropoutWithIndices)
    if isinstance(dropout, kinds) and {dropout.num_prefix_tokens} != num_prefix_tokens:
        raise SurgeryError(
            f"the patch dropout of this {type(root).__name__} spares {dropout.num_prefix_tokens} "
            f"prefix tokens and its blocks see {max(num_prefix_tokens)}, so that it may drop one "
            f"of them; build it with patch_drop_rate=0"
        )
    if type(dropout) is PatchDropout:
        become(NotingPatchDropout, dropout, binding)
    if isinstance(dropout, PatchDropoutWithIndices):
        return [dropout.register_forward_hook(NoteKept(binding))]
    return []
