"""What would change in a model, worked out on a weightless copy of it."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from operator import index
from typing import Any

from torch import nn

from tokenconv.blocks import BLOCKS
from tokenconv.costs import SiteCost, price
from tokenconv.errors import MeasurementError, SurgeryError, UnknownNameError
from tokenconv.patterns import compiled
from tokenconv.surgery.accelerate import check_not_accelerated
from tokenconv.surgery.edits import (
    NONE,
    TAKES_THE_PLACE,
    Edit,
    carry_out,
    check_stem,
    edit_for,
)
from tokenconv.surgery.places import Place
from tokenconv.surgery.sites import SITES, BlockSites, Survey, survey

FORMAT = 1
"""Version of the JSON form of a plan."""

Costs = Mapping[str, SiteCost]
Blocks = int | slice | str | Iterable[int] | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What ``insert_`` will do; print it to see every site before anything changes.

    Plans for the same model add up: ``plan(model, "peg", blocks=0) + plan(model, "mix_ffn")``.
    """

    model_class: str
    """Class of the timm model that the plan was made for."""
    input_size: tuple[int, int, int]
    """``(C, H, W)`` of the image that the added MACs are for."""
    edits: tuple[Edit, ...]
    allow_change: bool = False
    """Whether ``insert_`` may change the output of the model."""
    skipped: tuple[str, ...] = ()
    """Why blocks that were not asked for by name are left out."""

    @property
    def exact(self) -> bool:
        """Whether the output of the model stays as it was."""
        return all(edit.exact for edit in self.edits)

    @property
    def added_params(self) -> int:
        """Parameters added in all; negative where something is taken out."""
        return sum(edit.added_params for edit in self.edits)

    @property
    def added_macs(self) -> int:
        """Multiply-accumulates added for one image."""
        return sum(edit.added_macs for edit in self.edits)

    def __add__(self, other: "Plan") -> "Plan":
        if not isinstance(other, Plan):
            return NotImplemented
        if (self.model_class, self.input_size) != (other.model_class, other.input_size):
            raise SurgeryError(
                f"plans for {self.model_class} {self.input_size} and {other.model_class} "
                f"{other.input_size} cannot be joined; make both for the same model"
            )
        return replace(
            self,
            edits=_without_conflict(self.edits + other.edits),
            allow_change=self.allow_change or other.allow_change,
            skipped=tuple(dict.fromkeys(self.skipped + other.skipped)),
        )

    def __str__(self) -> str:
        names = [edit.inserted or edit.place.host for edit in self.edits]
        width = max(len(name) for name in names)
        lines = [f"{self.model_class}, one image of {'x'.join(str(s) for s in self.input_size)}"]
        for name, edit in zip(names, self.edits, strict=True):
            arguments = ", ".join(f"{key}={value!r}" for key, value in edit.kwargs.items())
            lines.append(
                f"  {name:<{width}}  {edit.block}({arguments})"
                f"  dim {edit.place.dim}  params {edit.added_params:+,}  MACs {edit.added_macs:+,}"
            )
        lines.extend(f"  left out: {reason}" for reason in self.skipped)
        lines.append(
            f"  {len(self.edits)} sites, params {self.added_params:+,}, MACs {self.added_macs:+,}; "
            + ("output unchanged" if self.exact else "CHANGES THE OUTPUT, needs allow_change=True")
        )
        return "\n".join(lines)

    def to_json(self) -> str:
        """The plan as JSON text, for ``from_json``.

        Raises:
            SurgeryError: If an argument of a block has no JSON form.
        """
        content = {"format": FORMAT, **asdict(self)}
        try:
            return json.dumps(content, indent=2) + "\n"
        except TypeError as error:
            raise SurgeryError(f"an argument of a block has no JSON form: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that ``to_json`` wrote.

        Raises:
            SurgeryError: If the text is no plan, or one of another version.
        """
        try:
            content = json.loads(text)
            if (version := content.pop("format", None)) != FORMAT:
                raise SurgeryError(f"expected a plan of format {FORMAT}, got {version!r}")
            edits = tuple(
                Edit(**{**edit, "place": Place(**edit["place"])}) for edit in content["edits"]
            )
            lists = {name: tuple(content[name]) for name in ("input_size", "skipped")}
            made = cls(**{**content, **lists, "edits": edits})
            _check_types(made)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if isinstance(error, SurgeryError):
                raise
            raise SurgeryError(f"this is no plan of tokenconv: {error}") from error
        for edit in made.edits:
            if edit.site not in SITES:
                raise UnknownNameError("site", edit.site, SITES)
            if edit.block != NONE and edit.block not in BLOCKS:
                raise UnknownNameError("block", edit.block, [*BLOCKS, NONE])
        return made


def _check_types(made: Plan) -> None:
    texts = [text for e in made.edits for text in (e.site, e.block, e.place.host)]
    flags = [made.allow_change, *(edit.exact for edit in made.edits)]
    counts = [n for e in made.edits for n in (e.added_params, e.added_macs, e.place.dim)]
    sides = list(made.input_size)
    if (
        not made.edits
        or not all(isinstance(text, str) for text in [made.model_class, *texts, *made.skipped])
        or not all(isinstance(flag, bool) for flag in flags)
        or not all(type(number) is int for number in counts + sides)
        or not (len(sides) == 3 and all(side > 0 for side in sides))
        or not all(isinstance(edit.kwargs, dict) for edit in made.edits)
    ):
        raise TypeError("its entries are not what to_json writes")


def plan(
    model: nn.Module,
    block: str,
    *,
    blocks: Blocks = None,
    site: str | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    input_size: tuple[int, int, int] | None = None,
    allow_change: bool = False,
    **block_kwargs: Any,
) -> Plan:
    """Work out where a block goes in a timm model and what it adds; nothing is changed.

    The plan is rehearsed on a weightless copy of the model: every insertion must run once in a
    forward pass, on the tokens of its grid.

    Args:
        model: A live timm model with token blocks, or a module that holds one.
        block: A key of ``BLOCKS``; ``"none"`` takes out the convolution that an MLP has.
        blocks: Transformer blocks to change, by index, slice or several indices, counted through
            all stages, or by a regular expression searched in their names; None takes all that
            have the site.
        site: Where in a block: ``before_act`` or ``after_act`` (inside the MLP; in a gated one the
            gate half), ``before_mlp``, ``beside_mlp``, ``before_attn``, ``beside_attn``,
            ``before_block``, ``after_block``, or ``replace_attn``, which changes the output. None
            takes the usual place of the block; ``tokenconv list`` shows it. Stems go to
            ``replace_patch_embed``, which changes the output as well, where they make as many
            tokens; ``blocks`` counts patch embeddings then.
        filter_fn: ``filter_fn(module, name)`` says whether to change a Transformer block.
        input_size: ``(C, H, W)`` of the image to plan with; None takes the one that the model was
            built for.
        allow_change: Permit ``insert_`` to change the output of the model.
        **block_kwargs: Keyword arguments of what the block adds: for ``mix_ffn`` ``kernel_size``,
            ``dilation``, ``bias`` and ``impl``.

    Returns:
        The plan, to be printed, and to be handed to ``insert_``.

    Raises:
        UnknownNameError: If there is no such block or site.
        SurgeryError: If the model is of no known family, already changed, or takes no such block.
        ValueError: If an argument does not fit the block.
    """
    if block != NONE and block not in BLOCKS:
        raise UnknownNameError("block", block, [*BLOCKS, NONE])
    if site is not None and site not in SITES:
        raise UnknownNameError("site", site, SITES)
    check_untouched(model)
    found = survey(model, input_size)
    chosen = _select(model, _offered(found, block, site), blocks, filter_fn)
    everything = blocks is None and filter_fn is None
    made = plan_blocks(found, chosen, block, site, block_kwargs, skip=everything)
    return replace(made, allow_change=allow_change)


def plan_blocks(
    found: Survey,
    chosen: Iterable[BlockSites],
    block: str,
    site: str | None,
    block_kwargs: dict[str, Any],
    *,
    skip: bool,
) -> Plan:
    """What ``plan`` does once the blocks are chosen; uses the survey up.

    Args:
        found: What the model offers.
        chosen: Transformer blocks to change.
        block: A key of ``BLOCKS``, or ``"none"``.
        site: Where in a block; None takes the usual place.
        block_kwargs: Keyword arguments of the block.
        skip: Leave out blocks that cannot take it, as long as one can.
    """
    edits: list[Edit] = []
    refusals: list[str] = []
    for candidate in chosen:
        where = site or _usual_site(block, candidate)
        if where in candidate.refusals:
            refusals.append(candidate.refusals[where])
            continue
        for place in candidate.places[where]:
            edits.append(edit_for(found.meta, place, where, block, block_kwargs))
    if refusals and not (skip and edits):
        then = "there is nothing to take out" if block == NONE else f"{block} cannot go there"
        raise SurgeryError(f"{refusals[0]}, so {then}")
    draft = Plan(
        model_class=type(found.meta.get_submodule(found.root)).__name__,
        input_size=found.input_size,
        edits=tuple(edits),
        skipped=tuple(dict.fromkeys(refusals)),
    )
    return rehearse(found, draft)


def check_fits(model: nn.Module, made: Plan) -> Plan:
    """Refuse a plan that was made for a model of another shape; returns it rehearsed."""
    found = survey(model, otherwise=made.input_size)
    model_class = type(model.get_submodule(found.root)).__name__
    if model_class != made.model_class:
        raise SurgeryError(f"the plan was made for a {made.model_class}, got a {model_class}")
    places = {
        (site, place.host): place
        for candidate in [*found.blocks, *found.embeds]
        for site, offered in candidate.places.items()
        for place in offered
    }
    refusals = {
        (site, candidate.name): reason
        for candidate in [*found.blocks, *found.embeds]
        for site, reason in candidate.refusals.items()
    }
    fitting: list[Edit] = []
    for edit in made.edits:
        expected, site = edit.place, edit.site
        if (place := places.get((site, expected.host))) is None:
            why = next(
                (
                    reason
                    for (where, name), reason in refusals.items()
                    if where == site and f"{expected.host}.".startswith(f"{name}.")
                ),
                "which this model does not have",
            )
            raise SurgeryError(f"the plan changes {expected.host} ({site}): {why}")
        if place != expected:
            raise SurgeryError(
                f"the plan expects {expected.dim} channels and {expected.num_prefix_tokens} prefix "
                f"tokens at {expected.host}, this model has {place.dim} and "
                f"{place.num_prefix_tokens}; or its grid is made in another way"
            )
        own = edit_for(found.meta, place, site, edit.block, dict(edit.kwargs))
        if edit.exact and not own.exact:
            raise SurgeryError(f"{edit.block} at {expected.host} would change the output here")
        fitting.append(own)
    return rehearse(found, replace(made, edits=tuple(fitting)))


def rehearse(found: Survey, draft: Plan) -> Plan:
    """Carry a plan out on a weightless copy of the model, which is used up.

    Returns:
        The plan, with what each edit adds.

    Raises:
        SurgeryError: If an insertion would not run exactly once, or the model not at all.
    """
    edits = _without_conflict(draft.edits)
    prefix = f"{found.root}." if found.root else ""
    root = found.meta.get_submodule(found.root)
    lost = {e.place.host for e in edits if e.site.startswith(TAKES_THE_PLACE)}
    inserted = {edit.inserted for edit in edits if edit.inserted}
    for edit in edits:
        if SITES[edit.site] == "embed":
            check_stem(edit, found.input_size, found.sizes[edit.place.host])
    try:
        before = price(root, found.input_size, sites=_inside(lost, prefix)).sites
        carry_out(found.meta, edits)
        names = _inside(lost | inserted, prefix)
        after = price(root, found.input_size, sites=names).sites
    except (MeasurementError, SurgeryError, UnknownNameError) as error:
        raise SurgeryError(f"the plan does not run on this model: {error}") from error
    return replace(
        draft,
        input_size=found.input_size,
        edits=tuple(_priced(edit, before, after, prefix) for edit in edits),
    )


def check_untouched(model: nn.Module) -> None:
    """Refuse a model that is already under surgery, or accelerated."""
    check_not_accelerated(model)
    if any("_tokenconv" in vars(module) for module in model.modules()):
        raise SurgeryError("this model already holds blocks of tokenconv; call remove_ first")


def _inside(names: Iterable[str], prefix: str) -> list[str]:
    return sorted(name.removeprefix(prefix) for name in names)


def _priced(edit: Edit, before: Costs, after: Costs, prefix: str) -> Edit:
    host = edit.place.host.removeprefix(prefix)
    watched = host if host in after else (edit.inserted or "").removeprefix(prefix)
    if after[watched].calls != 1:
        raise SurgeryError(
            f"{prefix}{watched} would run {after[watched].calls} times in a forward pass, expected "
            f"once: the model does not call its modules as timm does"
        )
    params, macs = after[watched].params, after[watched].macs
    if host in before:
        params, macs = params - before[host].params, macs - before[host].macs
    return replace(edit, added_params=params, added_macs=macs)


def _without_conflict(edits: tuple[Edit, ...]) -> tuple[Edit, ...]:
    """Refuse two edits that need the same place."""
    taken: dict[tuple[str, str], Edit] = {}
    for edit in edits:
        own = edit.site in ("merge_conv", "remove_conv")
        position = "convolution" if own else edit.site.partition("_")[0]
        other = taken.setdefault((edit.place.host, position), edit)
        if other is not edit:
            raise SurgeryError(
                f"{other.block} and {edit.block} cannot both go to {edit.place.host} ({edit.site})"
            )
    return edits


def _offered(found: Survey, block: str, site: str | None) -> list[BlockSites]:
    """The Transformer blocks, or the patch embeddings if that is where a block goes."""
    usual = None if block == NONE else next(iter(BLOCKS[block].sites), None)
    if SITES.get(site or usual or "") != "embed":
        return found.blocks
    if not found.embeds:
        name = type(found.meta.get_submodule(found.root)).__name__
        raise SurgeryError(f"no patch embedding is known of this {name}, for {block} to replace")
    return found.embeds


def _usual_site(block: str, candidate: BlockSites) -> str:
    if block == NONE:
        return "remove_conv"
    sites = BLOCKS[block].sites
    if not sites:
        raise SurgeryError(f"{block} goes into no live model; build it with create_block")
    if "merge_conv" in sites and "conv" in candidate.kinds:
        return "merge_conv"
    return next(iter(sites))


def _select(
    model: nn.Module,
    offered: list[BlockSites],
    blocks: Blocks,
    filter_fn: Callable[[nn.Module, str], bool] | None,
) -> list[BlockSites]:
    count = len(offered)
    if blocks is None:
        chosen = offered
    elif isinstance(blocks, slice):
        chosen = offered[blocks]
    elif isinstance(blocks, str):
        try:
            pattern = compiled(blocks)
        except ValueError as error:
            raise SurgeryError(str(error)) from error
        chosen = [block for block in offered if pattern.search(block.name)]
    else:
        try:
            wanted = [index(i) for i in (blocks if isinstance(blocks, Iterable) else [blocks])]
        except TypeError as error:
            raise SurgeryError(
                f"expected an index, a slice, several indices or a regular expression as blocks, "
                f"got {blocks!r}"
            ) from error
        if bad := [i for i in wanted if not -count <= i < count]:
            raise SurgeryError(f"the model has blocks 0 to {count - 1}, asked for {bad}")
        chosen = [offered[i] for i in sorted({i % count for i in wanted})]
    if filter_fn is not None:
        chosen = [b for b in chosen if filter_fn(model.get_submodule(b.name), b.name)]
    if not chosen:
        asked = "filter_fn" if filter_fn is not None else f"blocks={blocks!r}"
        raise SurgeryError(
            f"{asked} selects none of the {count} blocks, {offered[0].name} to {offered[-1].name}"
        )
    return chosen
