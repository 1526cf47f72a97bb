"""What the training scripts share: data, the loop, checkpoints, heads. Copy the folder with them."""
