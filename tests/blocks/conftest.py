"""What the tests of blocks share: oracles under official names, random values, and comparisons."""

import torch
from torch import nn


class Net(nn.Module):
    """Layers under their official names, and what runs them; without that, one after another."""

    def __init__(self, run=None, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        if self.run is not None:
            return self.run(self, x)
        for layer in self.children():
            x = layer(x)
        return x


def pw(dim, out_dim, **kwargs):
    return nn.Conv2d(dim, out_dim, 1, **kwargs)


def dw(dim, side=3, dilation=1, **kwargs):
    reach = dilation * (side // 2)
    return nn.Conv2d(dim, dim, side, padding=reach, dilation=dilation, groups=dim, **kwargs)


def bn(dim):
    return nn.BatchNorm2d(dim)


def scale(*shape):
    return nn.Parameter(torch.zeros(*shape))


def on_channels(layer, fmap):
    """A linear layer, or a norm of tokens, on a map."""
    return layer(fmap.movedim(1, -1)).movedim(-1, 1)


def randomize_(module, std=0.5, but=()):
    """Values of its own for every parameter, and norms that have seen something."""
    generator = torch.Generator().manual_seed(0)
    for key, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.is_floating_point() and key not in but:
            drawn = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            value.data.copy_(0.5 + drawn.abs() if "var" in key else std * drawn)
    return module


def assert_same_on_maps(ours, theirs, pairs, fmaps, atol=1e-13):
    """Results and gradients, step by step, and the statistics behind them.

    ``pairs`` has the key of theirs for every one of ours.
    """
    for fmap in fmaps:
        fmap.requires_grad_()
        results = []
        for module in (ours, theirs):
            out = module(fmap)
            parameters = dict(module.named_parameters())
            keys = pairs.values() if module is theirs else pairs
            wanted = [parameters[key] for key in keys if key in parameters]
            grads = torch.autograd.grad(out.sin().sum(), [fmap, *wanted])
            results.append([out, *(grad.flatten() for grad in grads)])
        for mine, other in zip(*results, strict=True):
            largest = float(other.detach().abs().max())  # zero, but for rounding, before a norm
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9 * largest + atol)
    for mine, other in pairs.items():
        if "running" in mine:
            torch.testing.assert_close(
                ours.state_dict()[mine], theirs.state_dict()[other], rtol=1e-9, atol=1e-13
            )
