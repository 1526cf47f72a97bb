"""RGB and depth tokens in one sequence: attention mixes the maps, no convolution crosses them.

python examples/rgbd_tokens.py
"""

import argparse
from typing import Any

import torch
from torch import Tensor, nn

import tokenconv as tc


class Block(nn.Module):
    """A pre-norm Transformer block with PVTv2's feed-forward, whose convolution knows the maps."""

    def __init__(self, dim: int, num_heads: int = 4):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = tc.create_block("mix_ffn", dim=dim)

    def forward(self, x: Tensor, grid: tc.MultiGrid) -> Tensor:
        """Tokens ``(B, N, C)`` of all maps."""
        normed = self.norm1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.norm2(x), grid)


class RGBD(nn.Module):
    """A class token, the patches of a photograph and the coarser ones of its depth map."""

    def __init__(self, dim: int = 64, depth: int = 2, num_classes: int = 10):
        super().__init__()
        self.rgb = nn.Conv2d(3, dim, 16, 16)
        self.depth = nn.Conv2d(1, dim, 32, 32)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.head = nn.Linear(dim, num_classes)

    def tokens(self, rgb: Tensor, depth: Tensor) -> tuple[Tensor, tc.MultiGrid]:
        """Tokens of both maps behind the class token, and where they lie."""
        maps = [self.rgb(rgb), self.depth(depth)]
        sizes = tuple((fmap.shape[2], fmap.shape[3]) for fmap in maps)
        grid = tc.MultiGrid(sizes, num_prefix_tokens=1)
        cls = self.cls.expand(len(rgb), -1, -1)
        return torch.cat([cls, *(tc.map_to_tokens(fmap) for fmap in maps)], dim=1), grid

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        """Logits ``(B, classes)`` of ``(B, 3, H, W)`` and ``(B, 1, H, W)``."""
        x, grid = self.tokens(rgb, depth)
        for block in self.blocks:
            x = block(x, grid)
        return self.head(x[:, 0])


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, default=(96, 160), help="height and width")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = RGBD().eval()
    rgb, depth = torch.randn(2, 3, *args.size), torch.randn(2, 1, *args.size)
    with torch.no_grad():
        x, grid = model.tokens(rgb, depth)
        print(
            f"maps {grid.sizes}, {grid.num_tokens} tokens; logits {tuple(model(rgb, depth).shape)}"
        )
        changed, _ = model.tokens(rgb, depth + 1)
        rgb_tokens = slice(1, 1 + grid.maps[0].num_positions)
        mlp: Any = model.blocks[0].get_submodule("mlp")
        still = torch.equal(mlp(x, grid)[:, rgb_tokens], mlp(changed, grid)[:, rgb_tokens])
        print(f"another depth map leaves the photograph's convolutions alone: {still}")
        print(f"but not the logits: {not torch.equal(model(rgb, depth), model(rgb, depth + 1))}")


if __name__ == "__main__":
    main()
