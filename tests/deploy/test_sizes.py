"""Which sizes a program is traced at and checked with."""

import pytest
from torch import nn

from tokenconv.deploy.sizes import sizes_for


class Says(nn.Module):
    """A model that says what it wants, as timm's do."""

    def __init__(self, reductions=(), patch_size=None):
        super().__init__()
        if reductions:
            self.feature_info = [{"reduction": reduction} for reduction in reductions]
        if patch_size is not None:
            self.patch_embed = nn.Module()
            self.patch_embed.patch_size = patch_size


@pytest.mark.parametrize(
    ("model", "given", "step"),
    [
        (Says(), 4, (4, 4)),
        (Says(), (4, 6), (4, 6)),
        (Says([4, 8, 8]), None, (8, 8)),
        (Says([4, 6]), None, (12, 12)),  # both have to fit
        (Says([4, 8], patch_size=16), None, (8, 8)),
        (Says(patch_size=16), None, (16, 16)),
        (Says(patch_size=(8, 12)), None, (8, 12)),
        (Says([4, 8]), (2, 3), (2, 3)),  # who says it knows better
    ],
)
def test_steps_are_those_of_the_model(model, given, step):
    sizes = sizes_for(model, (3, 48, 96), ("hw", "batch"), given, 1)
    assert sizes.multiple_of == step
    assert sizes.dynamic == ("batch", "hw")
    pixels = [shape[2:] for shape in (sizes.traced, *sizes.checked)]
    assert all(h % step[0] == w % step[1] == 0 for h, w in pixels)
    assert all(h >= 2 * step[0] and w >= 2 * step[1] for h, w in pixels)
    assert sizes.traced[2:] not in pixels[1:]  # a size of its own
    assert sizes.traced[2] // step[0] != sizes.traced[3] // step[1]
    assert pixels[1] == (48, 96)
    assert len({*pixels[1:]}) == 4
    assert {shape[0] for shape in sizes.checked} == {1, 3}
    assert sizes.traced[0] == 2
