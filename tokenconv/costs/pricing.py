"""``cost``: the price of a model or a block, from one forward pass on the meta device."""

from collections.abc import Iterable, Sequence

from torch import nn
from torch.utils.hooks import RemovableHandle

from tokenconv.costs.meter import Meter
from tokenconv.costs.prices import Cost, Price, SiteCost
from tokenconv.costs.weightless import meta_copy, num_params, own_modules, run_meta
from tokenconv.errors import UnknownNameError


def cost(
    model: nn.Module, input_size: Sequence[int], *, sites: Iterable[str] | None = None
) -> Cost:
    """Price one forward pass of a model, and the backward pass, without memory and running neither.

    Args:
        model: Any module that takes a batch of images, or a block on tokens. It may be on the meta
            device: a model that was built there never had weights.
        input_size: ``(C, H, W)`` of one image, or of the tokens of one image: C channels on a grid
            of ``(H, W)``, without prefix tokens.
        sites: Names of modules to price by themselves; None takes the outermost tokenconv modules.

    Returns:
        Parameters, MACs and bytes, in total, per site and per category.

    Raises:
        MeasurementError: If the model refuses an image of this size, or cannot be copied.
        UnknownNameError: If there is no module of a name in ``sites``.
    """
    return price(meta_copy(model), input_size, sites=sites)


def price(
    meta: nn.Module, input_size: Sequence[int], *, sites: Iterable[str] | None = None
) -> Cost:
    """What ``cost`` does, for a model that is on the meta device already; see there."""
    modules = dict(meta.named_modules())
    meter = Meter(meta.parameters())
    hooks: list[RemovableHandle] = []
    for name in own_modules(meta) if sites is None else sites:
        if (module := modules.get(name)) is None:
            raise UnknownNameError("module", name, modules)
        hooks.append(module.register_forward_pre_hook(meter.enter(name)))
        hooks.append(module.register_forward_hook(meter.leave))
    with meter:
        run_meta(meta, 1, input_size, meter)
    for hook in hooks:
        hook.remove()
    params = meter.params()
    return Cost(
        params=num_params(meta),
        **vars(meter.total),
        sites={
            name: SiteCost(params=num_params(modules[name]), **vars(tally), **vars(visit))
            for name, (tally, visit) in meter.sites.items()
        },
        categories={
            category: Price(params=params[category], **vars(tally))
            for category, tally in meter.categories.items()
            if params[category] or tally.bytes
        },
    )
