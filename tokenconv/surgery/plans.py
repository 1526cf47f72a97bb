"""What would change in a model, worked out on a weightless copy of it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from operator import index
from typing import Any

from torch import nn

from tokenconv.blocks import BLOCKS
from tokenconv.costs import cost, meta_copy
from tokenconv.errors import MeasurementError, SurgeryError, UnknownNameError
from tokenconv.surgery.edits import NONE, Edit, carry_out, edit_for
from tokenconv.surgery.families import Site, family_of


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What ``insert_`` will do; print it to see every site before anything changes."""

    model_class: str
    """Class of the timm model that the plan was made for."""
    input_size: tuple[int, int, int]
    """``(C, H, W)`` of the image that the added MACs are for."""
    edits: tuple[Edit, ...]
    allow_change: bool = False
    """Whether ``insert_`` may change the output of the model."""

    @property
    def exact(self) -> bool:
        """Whether the output of the model stays as it was."""
        return all(edit.exact for edit in self.edits)

    @property
    def added_params(self) -> int:
        """Parameters added in all; negative where a convolution is taken out."""
        return sum(edit.added_params for edit in self.edits)

    @property
    def added_macs(self) -> int:
        """Multiply-accumulates added for one image."""
        return sum(edit.added_macs for edit in self.edits)

    def __str__(self) -> str:
        width = max(len(edit.name) for edit in self.edits)
        lines = [f"{self.model_class}, one image of {'x'.join(str(s) for s in self.input_size)}"]
        for edit in self.edits:
            arguments = ", ".join(f"{key}={value!r}" for key, value in edit.kwargs.items())
            lines.append(
                f"  {edit.name:<{width}}  {edit.mode:<6}  {edit.block}({arguments})"
                f"  dim {edit.dim}  params {edit.added_params:+,}  MACs {edit.added_macs:+,}"
            )
        lines.append(
            f"  {len(self.edits)} sites, params {self.added_params:+,}, MACs {self.added_macs:+,}; "
            + ("output unchanged" if self.exact else "CHANGES THE OUTPUT, needs allow_change=True")
        )
        return "\n".join(lines)


def plan(
    model: nn.Module,
    block: str,
    *,
    blocks: int | slice | Iterable[int] | None = None,
    allow_change: bool = False,
    **block_kwargs: Any,
) -> Plan:
    """Work out where a block goes in a timm model and what it adds; nothing is changed.

    The plan is rehearsed on a weightless copy of the model: every insertion must run once in a
    forward pass, on the tokens of its grid.

    Args:
        model: A live timm ``VisionTransformer`` or ``PyramidVisionTransformerV2``.
        block: A key of ``BLOCKS``; ``"none"`` takes out the convolution that an MLP has.
        blocks: Transformer blocks to change, by index, slice or several indices, counted through
            all stages; None takes all.
        allow_change: Permit ``insert_`` to change the output of the model.
        **block_kwargs: Keyword arguments of what the block adds to an MLP: for ``mix_ffn``
            ``kernel_size``, ``dilation`` and ``bias``.

    Returns:
        The plan, to be printed, and to be handed to ``insert_``.

    Raises:
        UnknownNameError: If there is no such block.
        SurgeryError: If the model is of no known family, already changed, or takes no such block.
        ValueError: If an argument does not fit the block.
    """
    if block != NONE and block not in BLOCKS:
        raise UnknownNameError("block", block, [*BLOCKS, NONE])
    check_untouched(model)
    sites = _select(list(family_of(model).sites(model)), blocks)
    draft = Plan(
        model_class=type(model).__name__,
        input_size=_input_size(model),
        edits=tuple(edit_for(site, block, block_kwargs) for site in sites),
        allow_change=allow_change,
    )
    return rehearse(model, draft)


def check_fits(model: nn.Module, made: Plan) -> None:
    """Refuse a plan that was made for a model of another shape."""
    if type(model).__name__ != made.model_class:
        raise SurgeryError(
            f"the plan was made for a {made.model_class}, got a {type(model).__name__}"
        )
    sites = {site.name: site for site in family_of(model).sites(model)}
    for edit in made.edits:
        if (site := sites.get(edit.name)) is None:
            raise SurgeryError(f"the plan changes {edit.name}, which this model does not have")
        fitting = edit_for(site, edit.block, edit.kwargs)
        if (fitting.dim, fitting.mode, fitting.exact) != (edit.dim, edit.mode, edit.exact):
            raise SurgeryError(
                f"the plan expects {edit.mode} at {edit.name} with {edit.dim} channels, this model "
                f"takes {fitting.mode} with {fitting.dim}"
            )


def rehearse(model: nn.Module, draft: Plan) -> Plan:
    """Carry a plan out on a weightless copy of the model.

    Returns:
        The plan, with what each edit adds.

    Raises:
        SurgeryError: If an insertion would not run exactly once, or the model not at all.
    """
    names = [edit.name for edit in draft.edits]
    input_size = _input_size(model)
    try:
        copy = meta_copy(model)
        before = cost(copy, input_size, sites=names).sites
        carry_out(copy, draft.edits)
        after = cost(copy, input_size, sites=names).sites
    except MeasurementError as error:
        raise SurgeryError(f"the plan does not run on this model: {error}") from error
    for name in names:
        if after[name].calls != 1:
            raise SurgeryError(
                f"{name} would run {after[name].calls} times in a forward pass, expected once: "
                f"the model does not call its modules as timm does"
            )
    edits = tuple(
        replace(
            edit,
            added_params=after[edit.name].params - before[edit.name].params,
            added_macs=after[edit.name].macs - before[edit.name].macs,
        )
        for edit in draft.edits
    )
    return replace(draft, edits=edits)


def check_untouched(model: nn.Module) -> None:
    """Refuse a model that is already under surgery."""
    if "_tokenconv" in vars(model):
        raise SurgeryError("this model already holds blocks of tokenconv; call remove_ first")


def _select(sites: list[Site], blocks: int | slice | Iterable[int] | None) -> list[Site]:
    count = len(sites)
    if blocks is None:
        chosen = sites
    elif isinstance(blocks, slice):
        chosen = sites[blocks]
    else:
        try:
            wanted = [index(i) for i in (blocks if isinstance(blocks, Iterable) else [blocks])]
        except TypeError as error:
            raise SurgeryError(
                f"expected an index, a slice or several indices as blocks, got {blocks!r}"
            ) from error
        if bad := [i for i in wanted if not -count <= i < count]:
            raise SurgeryError(f"the model has blocks 0 to {count - 1}, asked for {bad}")
        chosen = [sites[i] for i in sorted({i % count for i in wanted})]
    if not chosen:
        raise SurgeryError(f"blocks={blocks!r} selects none of the {count} blocks")
    return chosen


def _input_size(model: nn.Module) -> tuple[int, int, int]:
    """The image size the model was built for, 224x224 where it does not say."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is None:
        size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[1:]
    channels = model.get_submodule("patch_embed.proj").in_channels
    return (int(channels), *size)  # pyright: ignore[reportArgumentType, reportReturnType]
