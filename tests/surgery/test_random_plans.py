"""Random plans are inserted, saved, loaded and removed, with nothing lost."""

import copy
import tempfile
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tokenconv as tc

PLACES = [(block, site) for block, info in tc.BLOCKS.items() for site in info.sites]


@pytest.fixture(params=["vision_transformer, gated", "pvt_v2", "swin_transformer"])
def plain(request, families):
    return families[request.param]


@cache
def built(case):
    model = case.build()
    with torch.no_grad():
        return model, case.images(), model(case.images())


part = st.tuples(
    st.sampled_from(PLACES),
    st.lists(st.integers(0, 1), min_size=1, max_size=2, unique=True),
    st.sampled_from([3, 5]),
)


def random_plan(model, size, parts):
    """The sum of the parts that this model can take; None if it can take none."""
    joined = None
    for (block, site), blocks, kernel_size in parts:
        try:
            made = tc.plan(model, block, site=site, blocks=blocks, kernel_size=kernel_size,
                           input_size=(3, *size), allow_change=True)  # fmt: skip
            joined = made if joined is None else joined + made
        except (tc.SurgeryError, ValueError):  # no such site, or no such kernel
            continue
    return joined


def check(case, parts, disturb_):
    plain, images, before = built(case)
    plan = random_plan(plain, case.size, parts)
    if plan is None:
        return
    assert tc.Plan.from_json(plan.to_json()) == plan
    model = tc.insert_(copy.deepcopy(plain), plan)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        if plan.exact:
            torch.testing.assert_close(model(images), before, rtol=1e-5, atol=1e-6)
        expected = disturb_(model, std=0.1)(images)
        tc.save(model, folder)
        loaded = tc.load_(copy.deepcopy(plain), folder)
        assert torch.equal(loaded(images), expected)
        for changed in (model, loaded):
            tc.remove_(changed)
            assert list(changed.state_dict()) == list(plain.state_dict())
            assert torch.equal(changed(images), before)


QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=5, deadline=None, suppress_health_check=QUIET)
@given(parts=st.lists(part, min_size=1, max_size=4))
def test_nothing_is_lost(plain, parts, disturb_):
    check(plain, parts, disturb_)


@pytest.mark.slow
@settings(max_examples=70, deadline=None, suppress_health_check=QUIET)
@given(parts=st.lists(part, min_size=1, max_size=4))
def test_nothing_is_lost_in_two_hundred_plans(plain, parts, disturb_):
    check(plain, parts, disturb_)
