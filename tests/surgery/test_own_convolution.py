"""PVTv2, whose MLPs have a convolution already."""

import copy

import pytest
import torch
from torch import nn

import tokenconv as tc


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("kernel_size", "tolerance"), [(3, 0), (5, 1e-6), (7, 1e-6)])
def test_a_second_kernel_changes_nothing(pvt, images, kernel_size, tolerance):
    with torch.no_grad():
        before = pvt(images)
        plan = tc.plan(pvt, "mix_ffn", kernel_size=kernel_size)
        assert plan.exact
        tc.insert_(pvt, plan)
        difference = (pvt(images) - before).abs().max() / before.abs().max()
    assert difference <= tolerance


def test_old_and_new_kernel_add_up(pvt, images):
    with torch.no_grad():
        doubled = copy.deepcopy(pvt)
        for block in (b for stage in doubled.stages for b in stage.blocks):
            block.mlp.dwconv.weight.mul_(2)
            block.mlp.dwconv.bias.mul_(2)
        expected = doubled(images)
        tc.insert_(pvt, "mix_ffn")
        for block in (b for stage in pvt.stages for b in stage.blocks):
            block.mlp.dwconv.added.weight.copy_(block.mlp.dwconv.weight)
            block.mlp.dwconv.added.bias.copy_(block.mlp.dwconv.bias)
        assert torch.equal(pvt(images), expected)


def test_none_takes_no_arguments(pvt):
    with pytest.raises(tc.SurgeryError, match='"none" takes no arguments, got kernel_size'):
        tc.plan(pvt, "none", kernel_size=3)


def test_none_takes_the_convolution_out(pvt, images):
    state = copy.deepcopy(pvt.state_dict())
    with torch.no_grad():
        before = pvt(images)
        without = copy.deepcopy(pvt)
        for block in (b for stage in without.stages for b in stage.blocks):
            block.mlp.dwconv = nn.Identity()
        expected = without(images)
        plan = tc.plan(pvt, "none")
        assert not plan.exact
        assert plan.added_params == -sum(v.numel() for k, v in state.items() if "dwconv" in k)
        tc.insert_(pvt, plan, allow_change=True)
        assert torch.equal(pvt(images), expected)
        assert not any("dwconv" in key for key in pvt.state_dict())
        tc.remove_(pvt)
        assert torch.equal(pvt(images), before)
    assert list(pvt.state_dict()) == list(state)


def test_weights_taken_out_follow_checkpoints_and_conversions(pvt, images):
    changed = {k: v + 0.1 for k, v in pvt.state_dict().items()}
    tc.insert_(pvt, "none", allow_change=True)
    pvt.load_state_dict(changed, strict=True)
    pvt.double()
    tc.remove_(pvt)
    for key, value in pvt.state_dict().items():
        assert value.dtype == torch.float64, key
        assert torch.equal(value, changed[key].double()), key


def test_weights_loaded_by_assignment_stay_after_removal(pvt):
    changed = {k: v + 0.1 for k, v in pvt.state_dict().items()}
    tc.insert_(pvt, "mix_ffn")
    pvt.load_state_dict(changed, strict=True, assign=True)
    tc.remove_(pvt)
    for key, value in pvt.state_dict().items():
        assert torch.equal(value, changed[key]), key


def test_dilation_changes_the_output_and_needs_permission(pvt, images):
    with torch.no_grad():
        before = pvt(images)
        plan = tc.plan(pvt, "mix_ffn", dilation=2)
        assert not plan.exact
        assert "CHANGES THE OUTPUT" in str(plan)
        with pytest.raises(tc.SurgeryError, match="pass allow_change=True"):
            tc.insert_(pvt, plan)
        assert torch.equal(pvt(images), before)
        expected = copy.deepcopy(pvt)
        for block in (b for stage in expected.stages for b in stage.blocks):
            block.mlp.dwconv.dilation = block.mlp.dwconv.padding = (2, 2)
        tc.insert_(pvt, plan, allow_change=True)
        torch.testing.assert_close(pvt(images), expected(images), rtol=1e-5, atol=1e-5)


def test_permission_can_stand_in_the_plan(pvt):
    tc.insert_(pvt, tc.plan(pvt, "none", allow_change=True))
    tc.remove_(pvt)
    tc.insert_(pvt, "none", allow_change=True)


def test_a_smaller_kernel_is_refused(pvt):
    with pytest.raises(tc.SurgeryError, match=r"side 3 at stages\.0.*take kernel_size >= 3"):
        tc.plan(pvt, "mix_ffn", kernel_size=1)


def test_training_after_removal_keeps_what_was_learnt(pvt, images):
    """The model's own weights are the same parameters before, during and after."""
    own = dict(pvt.named_parameters())
    tc.insert_(pvt, "mix_ffn")
    optimizer = torch.optim.SGD(pvt.parameters(), lr=0.1)
    pvt(images).sum().backward()
    optimizer.step()
    tc.remove_(pvt)
    assert all(p is own[n] for n, p in pvt.named_parameters())
