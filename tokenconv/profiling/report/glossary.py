"""What the words of a report mean, for a reader who has seen none before."""

GLOSSARY = {
    "arm": "One of the compared models. The baseline is the arm that the others are compared with; "
    "the reference is the arm that their outputs are compared with.",
    "inserted": "What tokenconv has put into a model: blocks that are named after the paper that "
    "has them, such as mix_ffn and peg.",
    "infer, train": "One forward pass without gradients; one whole training step, which is forward "
    "pass, backward pass and optimizer (AdamW).",
    "latency": "Time of one batch: the median of all rounds.",
    "IQR": "Interquartile range: the middle half of the rounds lies within a range this wide. "
    "Small means that the machine was quiet.",
    "vs baseline": "The paired ratio. In every round all arms run once, in random order, so that "
    "whatever disturbs the machine disturbs all of them. The arm's time is divided by the "
    "baseline's of the same round; shown is the median of these ratios. 1.10x takes 10% longer, "
    "below 1 is faster.",
    "99% interval": "Where the ratio lies with 99% confidence, by resampling the rounds "
    "(bootstrap; with few rounds it is rather 97%). It covers the noise of this run and not other "
    "machines, models or settings.",
    "verdict": "faster or slower only where the whole interval is below or above 1, and there are "
    "10 rounds at least. No difference shown is no proof that there is none.",
    "params": "Numbers that the model learns.",
    "MACs": "Multiply-accumulates for one image, one multiplication and one addition each, which "
    "is 2 FLOPs: those of convolutions, linears and attention's two matrix products.",
    "traffic": "What the operators read and write for one image, if nothing is served from caches.",
    "peak memory": "The most that is allocated at one moment: what is held between steps "
    "(parameters, buffers, images, optimizer state) and the most that forward pass, backward pass "
    "or optimizer take on top of it. 1 MiB is 2^20 bytes.",
    "saved activations": "What the forward pass keeps for the backward pass. In training they "
    "usually decide the peak, and with it the largest batch.",
    "diff at insertion": "Largest difference between the outputs of arm and reference before any "
    "training. 0 is equal bit for bit: the inserted blocks change nothing until they learn.",
    "share of the time": "Measured under PyTorch's profiler, in another run than the latency: it "
    "says where time goes and not how long it takes. Attention is all in the attention modules, "
    "their projections included; MLP matmul the linear layers of the MLPs; depthwise convolution "
    "and other convolution those anywhere; inserted matmul the linear layers of what was inserted; "
    "normalisation and activation what their names say; layout copies what only moves numbers; "
    "optimizer all that AdamW does; other the rest, with what is compiled, since a compiled kernel "
    "does the work of several operators.",
    "phase": "Forward pass, backward pass and optimizer; between is what is in none of them.",
    "roofline": "Nothing can compute faster than the device's arithmetic (the flat roof) or than "
    "its memory delivers data (the slanted roof). A point far below both leaves speed unused. "
    "Arithmetic intensity is FLOPs per byte that is read or written.",
    "depthwise convolution": "A convolution that looks at every channel by itself: little "
    "arithmetic, much traffic, so it is usually limited by memory.",
}
