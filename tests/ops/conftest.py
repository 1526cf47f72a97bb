"""The formula of the operator, written down once more, and inputs for it."""

import math

import pytest
import torch
import torch.nn.functional as F

import tokenconv as tc

ACTIVATIONS = {
    None: lambda z: z,
    "gelu": lambda z: 0.5 * z * (1 + torch.erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: (
        0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    ),
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "relu": lambda z: z.clamp(min=0),
}
PREFIX_TOKENS = ("act", "pass", "zero")


def formula(x, weight, bias, gate, grid, *, residual, activation, prefix_tokens):
    """Image by image and frame by frame, in NCHW memory."""
    rows, cols = grid.size[-2:]
    count = grid.num_prefix_tokens
    act = ACTIVATIONS[activation]
    images = []
    for image in x[:, count:]:
        frames = []
        for frame in image.split(rows * cols):
            fmap = frame.T.reshape(1, -1, rows, cols).contiguous()
            out = F.conv2d(fmap, weight, padding=weight.shape[-1] // 2, groups=len(weight))
            out = out[0].reshape(len(weight), -1).T
            out = out if bias is None else out + bias
            frames.append(act(out + frame if residual else out))
        images.append(torch.cat(frames))
    spatial = torch.stack(images)
    prefix = {"act": act, "pass": lambda z: z, "zero": torch.zeros_like}[prefix_tokens](
        x[:, :count]
    )
    if gate is not None:
        spatial = spatial * gate[:, count:]
        prefix = prefix * gate[:, :count] if prefix_tokens == "act" else prefix
    return torch.cat([prefix, spatial], dim=1)


def inputs(grid, dim, kernel_size=3, *, batch=2, gate=False, dtype=torch.float32, device="cpu"):
    """Tokens, weight, bias and gate, or None, from a fixed seed, drawn on the CPU."""
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (batch, grid.num_tokens, dim),
        (dim, 1, kernel_size, kernel_size),
        (dim,),
        (batch, grid.num_tokens, dim),
    ]
    drawn = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    drawn[1] = drawn[1] / kernel_size
    return [*drawn[:3], drawn[3] if gate else None]


def wide(tensors):
    """The same values in float64, as leaves."""
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def assert_gradients_agree(out, leaves, expected, wanted, cotangent, tolerance):
    """Of the leaves that require one."""
    asked = [
        (a, b) for a, b in zip(leaves, wanted, strict=True) if a is not None and a.requires_grad
    ]
    ours = torch.autograd.grad(out, [a for a, _ in asked], cotangent)
    theirs = torch.autograd.grad(expected, [b for _, b in asked], cotangent.double())
    for one, other in zip(ours, theirs, strict=True):
        scale = other.abs().max().clamp(min=1)
        torch.testing.assert_close(one.double() / scale, other / scale, rtol=0, atol=tolerance)


@pytest.fixture
def profiled():
    """Names of the operators that a call runs."""

    def names(call):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call()
        return {event.key for event in profile.key_averages()}

    return names


@pytest.fixture
def grid():
    """A class token in front of three rows of five."""
    return tc.TokenGrid((3, 5), 1)
