"""Insert convolutions into a live timm model, train them alone, and take them out again.

python examples/insert_timm.py
python examples/insert_timm.py pvt_v2_b0 --pretrained
"""

import argparse

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config

import tokenconv as tc


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="vit_tiny_patch16_224", help="a timm model")
    parser.add_argument("--pretrained", action="store_true", help="download its weights")
    parser.add_argument("--steps", type=int, default=3, help="training steps")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = timm.create_model(args.model, pretrained=args.pretrained).eval()
    input_size = resolve_model_data_config(model)["input_size"]
    images = torch.randn(4, *input_size)  # stands in for your data
    labels = torch.arange(4)
    with torch.no_grad():
        before = model(images)

    # Insert. Nothing happens to the output: every new kernel starts at zero, beside a residual.
    model.requires_grad_(False)  # first, so that only what is inserted will be trained
    plan = tc.plan(model, "mix_ffn", kernel_size=3)
    print(plan)
    tc.insert_(model, plan)
    with torch.no_grad():
        print(f"inserted: logits are bit-equal: {torch.equal(model(images), before)}")

    # Train. A ViT that reads its class token alone gives the last convolution no gradient: it
    # mixes grid tokens, and nothing reads them after the last block.
    inserted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(inserted, lr=1e-3)
    for step in range(args.steps):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}: loss {loss.item():.4f}")
    with torch.no_grad():
        print(f"trained: logits moved by up to {(model(images) - before).abs().max():.4f}")

    # Remove. The model is what it was, whatever the convolutions have learned.
    tc.remove_(model)
    with torch.no_grad():
        print(f"removed: logits are bit-equal: {torch.equal(model(images), before)}")


if __name__ == "__main__":
    main()
