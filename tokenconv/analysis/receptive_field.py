"""How far a model looks: effective receptive fields and attention distances.

Shape letters: B batch, N tokens = P prefix + H*W grid, C channels.
"""

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tokenconv.analysis.modes import evaluating
from tokenconv.errors import AnalysisError
from tokenconv.grid import Grid, TokenGrid, tokens_to_map


def effective_receptive_field(
    model: nn.Module,
    images: Tensor,
    *,
    layer: str | None = None,
    grid: Grid | None = None,
    channels_last: bool = False,
) -> Tensor:
    """How much each pixel moves the features in the middle of the image.

    The energy of the Jacobian from a pixel to the features in the middle (one position, or the two
    or four around it), estimated with a random direction in feature space for each of them and each
    image: the mean square of the gradient of that projection.

    Args:
        model: Runs in evaluation mode; its modes and gradients are as before afterwards.
        images: ``(B, C, H, W)``; more images, less noise.
        layer: Whose output is looked at; None takes ``model.forward_features``, or the model.
        grid: Of the tokens, where the output is ``(B, N, C)``; maps ``(B, C, H, W)`` need none.
        channels_last: Maps come as ``(B, H, W, C)``, as in Swin.

    Returns:
        ``(H, W)``, float64, sum 1.

    Raises:
        AnalysisError: If the output has no two-dimensional place, or no gradient reaches the
            images.
        GridError: If the grid does not fit the tokens.

    References:
        Luo et al., https://arxiv.org/abs/1701.04128
    """
    images = images.detach().clone().requires_grad_()
    with evaluating(model), torch.enable_grad():
        features = _features(model, images, layer)
        if channels_last and isinstance(features, Tensor):
            features = features.movedim(-1, 1)
        features = _middle(features, grid)
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(features.shape, generator=generator, device="cpu").to(features)
        (gradient,) = torch.autograd.grad(
            (features * direction).sum(), images, allow_unused=True, materialize_grads=True
        )
    energy = gradient.double().square().sum((0, 1))
    if not energy.sum() > 0:
        raise AnalysisError("no gradient reaches the images from the middle of the features")
    return energy / energy.sum()


def radius(field: Tensor, share: float = 0.5) -> float:
    """Half the side of the smallest centred square that holds a share of a field, in pixels.

    Args:
        field: ``(H, W)``, sum 1.
        share: Above 0, at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"expected 0 < share <= 1, got {share}")
    rows, columns = (
        (torch.arange(side, dtype=torch.float64, device="cpu") - (side - 1) / 2).abs()
        for side in field.shape
    )
    distance = torch.maximum(rows[:, None], columns[None]).flatten() + 0.5
    order = distance.argsort()
    held = field.flatten().cpu()[order].cumsum(0)
    reached = int(torch.searchsorted(held, share * (1 - 1e-12)).clamp(max=len(held) - 1))
    return distance[order][reached].item()


def attention_distance(model: nn.Module, images: Tensor, grid: Grid) -> list[Tensor]:
    """How far from itself each token of the grid looks, on average, by layer and head.

    The distance between query and key in tokens, weighted by attention, over all queries and
    images; prefix tokens take no part. Sees every ``F.scaled_dot_product_attention``, which timm
    calls unless told otherwise (``timm.layers.set_fused_attn``).

    Args:
        model: Runs in evaluation mode; its modes are as before afterwards.
        images: ``(B, C, H, W)``.
        grid: Of the tokens that attend to each other; attention among others is passed over.

    Returns:
        ``(heads,)`` for every layer, in order.

    Raises:
        AnalysisError: If no attention among the tokens of this grid is seen.

    References:
        ViT, figure 7, https://arxiv.org/abs/2010.11929
    """
    tokens = TokenGrid.of(grid)
    rows, columns = tokens.size[-2:]
    places = torch.tensor(list(product(range(rows), range(columns))), device="cpu").double()
    distances = torch.cdist(places, places)
    with evaluating(model), torch.no_grad(), _Attention(tokens, distances) as attention:
        model(images)
    if not attention.found:
        seen = ", ".join(f"{q}x{k}" for q, k in sorted(attention.others)) or "none at all"
        raise AnalysisError(
            f"expected attention among {tokens.num_tokens} tokens, saw queries x keys: {seen} "
            f"(only F.scaled_dot_product_attention is seen; see timm.layers.set_fused_attn)"
        )
    return attention.found


class _Attention(TorchFunctionMode):
    """Watches scaled dot-product attention."""

    def __init__(self, grid: TokenGrid, distances: Tensor):
        self.grid = grid
        self.distances = distances
        self.found: list[Tensor] = []
        self.others: set[tuple[int, int]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            query, key, _, mask, _, is_causal = (
                args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)
            )
            sizes = (query.shape[-2], key.shape[-2])
            if sizes == (self.grid.num_tokens,) * 2:
                if is_causal:
                    mask = torch.ones(sizes, dtype=torch.bool, device=query.device).tril()
                if kwargs.get("enable_gqa"):  # several query heads share a key head
                    key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
                self.found.append(self._mean(query, key, mask, kwargs.get("scale")))
            else:
                self.others.add(sizes)
        return func(*args, **kwargs)

    def _mean(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        logits = query.double() @ key.double().mT * (scale or query.shape[-1] ** -0.5)
        if mask is not None:
            logits = (
                logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
            )
        first = self.grid.num_prefix_tokens
        among = logits[..., first:, first:].softmax(-1)  # (B, heads, H*W, H*W)
        return (among * self.distances.to(among)).sum(-1).mean((0, -1)).cpu()


def _features(model: nn.Module, images: Tensor, layer: str | None) -> Any:
    if layer is None:
        forward: Any = getattr(model, "forward_features", model)
        return forward(images)
    seen: list[Any] = []
    try:
        module = model.get_submodule(layer)
    except AttributeError as error:
        raise AnalysisError(f"the model has no layer {layer!r}: {error}") from error

    def see(module: nn.Module, args: Any, out: Any) -> None:  # what follows may write into it
        seen.append(out.clone() if isinstance(out, Tensor) else out)

    with module.register_forward_hook(see):
        model(images)
    if not seen:
        raise AnalysisError(f"{layer} does not run in a forward pass")
    return seen[-1]


def _middle(features: Any, grid: Grid | None) -> Tensor:
    """What stands in the middle, ``(B, C, 1 or 2, 1 or 2)``."""
    shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
    if grid is not None:
        if not isinstance(features, Tensor) or features.ndim != 3:
            raise AnalysisError(f"expected tokens (B, N, C) for their grid, got {shape}")
        features = tokens_to_map(features, TokenGrid.of(grid))
    if not isinstance(features, Tensor) or features.ndim != 4:
        raise AnalysisError(f"expected maps (B, C, H, W), got {shape}; tokens need their grid")
    for dim in (2, 3):
        side = features.shape[dim]
        features = features.narrow(dim, (side - 1) // 2, 2 - side % 2)
    return features
