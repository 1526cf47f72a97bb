"""A stem beside a ViT, whose tokens are those of several scales.

Shape letters: I channels that come in, C channels that come out, w width inside.
"""

from collections import OrderedDict
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tokenconv.blocks import layout
from tokenconv.blocks.folding import fold_convs_
from tokenconv.blocks.map_layers import conv
from tokenconv.blocks.starts import init_by_group_
from tokenconv.blocks.stems.base import conv_row
from tokenconv.grid import MultiGrid, map_to_tokens


class SpatialPrior(nn.Module):
    """Spatial prior module of ViT-Adapter: tokens of three scales beside those of a ViT.

    ``conv (3x3, stride 2) -> BN -> ReLU``, twice the same without a stride, the maximum of 3x3 with
    stride 2; three times ``conv (3x3, stride 2) -> BN -> ReLU`` of widths 2w, 4w and 4w; and from
    each of the four maps a 1x1 convolution to C. No biases but in the last. ``prior(images)`` gives
    ``(tokens, MultiGrid)``: those of strides 8, 16 and 32, one behind the other, each plus a vector
    of its scale. ``prior.maps(images)`` gives the maps of strides 4, 8, 16 and 32, without that.

    Args:
        dim: Channels C that come out.
        in_chans: Channels I that come in.
        width: Channels w of the first map.

    Raises:
        ValueError: If a width is not positive.

    References:
        https://arxiv.org/abs/2205.08534
    """

    def __init__(self, dim: int, *, in_chans: int = 3, width: int = 64):
        super().__init__()
        if min(dim, in_chans, width) < 1:
            raise ValueError(f"expected positive widths, got {dim=}, {in_chans=}, {width=}")
        self.dim, self.in_chans = dim, in_chans
        widths = (width, 2 * width, 4 * width, 4 * width)
        stem = conv_row((in_chans, width, width, width), 3, (2, 1, 1), nn.ReLU)
        rows = [conv_row(pair, 3, [2], nn.ReLU) for pair in pairwise(widths)]
        first = OrderedDict(**stem, pool=nn.MaxPool2d(3, 2, 1))
        self.stages = nn.ModuleList(nn.Sequential(OrderedDict(row)) for row in [first, *rows])
        self.proj = nn.ModuleList(conv(w, dim, bias=True) for w in widths)
        self.level_embed = nn.Parameter(torch.empty(3, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the paper's code does."""
        init_by_group_(self)
        nn.init.normal_(self.level_embed)

    def maps(self, images: Tensor) -> list[Tensor]:
        """The maps of four scales."""
        fmap, found = layout.checked_map(images, self.in_chans), list[Tensor]()
        for stage, proj in zip(self.stages, self.proj, strict=True):
            fmap = stage(fmap)
            found.append(proj(fmap))
        return found

    def forward(self, x: Tensor) -> Any:
        """Tokens of three scales and their grid; see the class."""
        maps = self.maps(x)[1:]
        tokens = [
            map_to_tokens(fmap) + level for fmap, level in zip(maps, self.level_embed, strict=True)
        ]
        return torch.cat(tokens, dim=1), MultiGrid(tuple(tuple(m.shape[2:]) for m in maps))

    fold_ = fold_convs_
