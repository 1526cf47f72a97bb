"""What the training scripts share: data, the loop, checkpoints, heads: copy it with them."""
