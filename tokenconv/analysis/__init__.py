"""What a model's kernels are, from its weights; nothing is timed."""
