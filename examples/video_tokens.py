"""Convolve the tokens of a video over frames, rows and columns, in front of a frozen ViT's blocks.

python examples/video_tokens.py
"""

import argparse
from typing import Any

import timm
import torch
from torch import Tensor, nn

import tokenconv as tc
from tokenconv.layers import DWConv3d


class VideoModel(nn.Module):
    """A ViT for images on the tokens of all frames at once, behind a convolution over time.

    Args:
        vit: A timm ViT; its positions are those of one frame, added to every frame.
    """

    def __init__(self, vit: Any):
        super().__init__()
        self.vit = vit
        self.mix = DWConv3d(vit.embed_dim, (3, 3, 3), residual=True)
        self.mix.init_neutral_()  # x + 0: the ViT as it was

    def tokens(self, video: Tensor) -> tuple[Tensor, tc.TokenGrid]:
        """Tokens ``(B, T*H*W, C)`` of a video ``(B, T, 3, height, width)``, and their grid."""
        patches = self.vit.patch_embed(video.flatten(0, 1)).flatten(1, -2)
        rows, cols = self.vit.patch_embed.grid_size
        position = self.vit.pos_embed[:, self.vit.num_prefix_tokens :]
        grid = tc.TokenGrid((video.shape[1], rows, cols))
        return (patches + position).reshape(len(video), grid.num_tokens, -1), grid

    def forward(self, video: Tensor) -> Tensor:
        """Logits ``(B, classes)``."""
        x = self.mix(*self.tokens(video))
        cls = (self.vit.cls_token + self.vit.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = self.vit.blocks(self.vit.norm_pre(torch.cat([cls, x], dim=1)))
        return self.vit.forward_head(self.vit.norm(x))


def frames_that_move(layer: nn.Module, grid: tc.TokenGrid, dim: int) -> list[int]:
    """Frames of the output that change when the middle frame of the input does."""
    frames = grid.size[0]
    x = torch.randn(1, grid.num_tokens, dim)
    other = x.unflatten(1, (frames, -1)).clone()
    other[:, frames // 2] += 1
    with torch.no_grad():
        change = layer(x, grid) - layer(other.flatten(1, 2), grid)
    moved = change.unflatten(1, (frames, -1)).abs().amax((0, 2, 3)) > 0
    return moved.nonzero().flatten().tolist()


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="vit_tiny_patch16_224", help="a timm ViT")
    parser.add_argument("--frames", type=int, default=5)
    args = parser.parse_args()

    torch.manual_seed(0)
    vit: Any = timm.create_model(args.model).eval().requires_grad_(False)
    position = getattr(vit, "pos_embed", None)
    if position is None or position.shape[1] != vit.patch_embed.num_patches + 1:
        parser.error(f"expected a ViT with a class token in its position embedding, {args.model}")
    model = VideoModel(vit).eval()
    height, width = vit.patch_embed.img_size
    video = torch.randn(2, args.frames, 3, height, width)  # stands in for your data
    dim = vit.embed_dim
    with torch.no_grad():
        x, grid = model.tokens(video)
        print(f"grid {grid.size}: {grid.num_tokens} tokens; logits {tuple(model(video).shape)}")
        print(f"zero kernel: tokens are bit-equal: {torch.equal(model.mix(x, grid), x)}")

    print(f"frames that see the middle one, DWConv: {frames_that_move(tc.DWConv(dim), grid, dim)}")
    moved = frames_that_move(DWConv3d(dim), grid, dim)
    print(f"frames that see the middle one, DWConv3d: {moved}")


if __name__ == "__main__":
    main()
