"""What the words of an analysis mean, for a reader who has seen none before."""

GLOSSARY = {
    "dense convolution": "One that mixes channels and looks at more than one position, such as a "
    "3x3 convolution from 64 channels to 64.",
    "pair": "A depthwise convolution, which looks at every channel by itself, and a pointwise one, "
    "which looks at every position by itself. A dense kernel is a sum of such pairs.",
    "dw_pw, pw_dw": "Which part comes first: depthwise as in MobileNets, or pointwise as in "
    "blueprint separable convolutions.",
    "rank": "How many pairs. As many as the full rank are exact.",
    "energy": "The sum of the squares of a kernel's weights. What the best pairs keep of it is "
    "known without any data, and no other pairs keep more.",
    "error": "The root of the energy that is lost, over that of the kernel. It ranks choices. How "
    "much accuracy is lost it does not say: that takes images and, as a rule, some training.",
    "nearly separable": "One pair keeps the energy that was asked for.",
    "correlation": "Share of the energy that one pair carries, the mean over filters (intra-"
    "kernel, pw_dw) or over input channels (cross-kernel, dw_pw). Random kernels have some, too: "
    "only what is above theirs is structure.",
    "MACs": "Multiply-accumulates for one image; time depends on more than these.",
    "params": "Numbers that the model learns.",
    "distance from the identity": "Norm of a depthwise kernel minus the kernel that changes "
    "nothing. What insert_ puts into a model begins at 0.",
    "off the centre": "Share of a depthwise kernel's energy that comes from neighbours.",
    "field": "The effective receptive field: how strongly each pixel moves the features in the "
    "middle. Its radius is half the side of the centred square that holds half of it.",
    "attention distance": "How far from itself a token looks, weighted by attention, in tokens.",
}
