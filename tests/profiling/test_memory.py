"""Memory of a step: known bytes are found exactly, and a process really takes what is counted."""

import os
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType

import tokenconv as tc
from tokenconv.profiling.measurement import Mode, Step
from tokenconv.profiling.memory import Peaks, measure_memory, peaks_of, saved_activations
from tokenconv.profiling.results import Memory
from tokenconv.profiling.traces import profile_step

CPU = torch.device("cpu")
MIB = 2**20


def memory_of(model: nn.Module, images: Tensor, mode: Mode) -> Memory:
    step = Step(model, images, mode)
    step()
    return measure_memory(step, profile_step(step, CPU).peaks)


# --- what is held ---


def test_what_is_held_is_known_to_the_byte():
    model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.Flatten())
    model[0].bias.requires_grad_(False)
    images = torch.randn(2, 3, 8, 8)
    weights, bias, norm = 4 * 8 * 3 * 16, 4 * 8, 4 * 2 * 8
    found = memory_of(model, images, "train")
    assert found.parameters == weights + bias + norm
    assert found.buffers == 4 * 2 * 8 + 8, "running mean and variance, and a counter"
    assert found.images == 4 * 2 * 3 * 8 * 8
    assert found.gradients == weights + norm
    trained_tensors = 3
    assert found.optimizer_state == 2 * (weights + norm) + 4 * trained_tensors
    assert found.held == (found.parameters + found.buffers + found.images + found.optimizer_state)
    inferring = memory_of(model, images, "infer")
    assert (inferring.gradients, inferring.optimizer_state, inferring.saved) == (0, 0, {})
    assert (inferring.backward_peak, inferring.optimizer_peak) == (0, 0)
    assert inferring.reserved is None


def test_gradients_and_moments_have_the_dtype_of_the_weights():
    found = memory_of(nn.Conv2d(3, 4, 1).double(), torch.randn(1, 3, 2, 2).double(), "train")
    assert found.parameters == found.gradients == 8 * 16
    assert found.optimizer_state == 2 * 8 * 16 + 4 * 2


# --- peaks ---


class Allocates(nn.Module):
    """Takes ``count`` buffers of 64 MiB, either one after the other or all at once."""

    def __init__(self, count: int, *, at_once: bool):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.count, self.at_once = count, at_once

    def forward(self, x: Tensor) -> Tensor:
        held = []
        for _ in range(self.count):
            held.append(torch.zeros(16 * MIB))
            x = x * self.scale + held[-1][0]
            if not self.at_once:
                held.clear()
        return x


@pytest.mark.parametrize(
    ("count", "at_once", "expected_mib"),
    [(1, False, 64), (3, False, 64), (2, True, 128)],
    ids=["one", "one after the other", "two at once"],
)
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_the_peak_of_the_forward_pass_is_that_of_a_known_buffer(
    count: int, at_once: bool, expected_mib: int, mode: Mode
):
    found = memory_of(Allocates(count, at_once=at_once), torch.randn(1, 8), mode)
    assert found.forward_peak / MIB == pytest.approx(expected_mib, rel=0.001)
    assert found.backward_peak < MIB / 10
    assert found.peak == found.held + found.forward_peak


@dataclass
class Event:
    """What the profiler tells, in nanoseconds."""

    label: str
    start: int
    length: int = 0
    change: int = 0
    device: DeviceType = DeviceType.CPU

    def name(self) -> str:
        return self.label

    def start_ns(self) -> int:
        return self.start

    def duration_ns(self) -> int:
        return self.length

    def nbytes(self) -> int:
        return self.change

    def device_type(self) -> DeviceType:
        return self.device


def test_peaks_on_a_gpu_are_timed_by_the_cpu():
    """A GPU runs the forward pass when the CPU is in the backward pass already."""
    gpu = DeviceType.CUDA
    events = [
        Event("[memory]", 150, change=7, device=gpu),
        Event("[memory]", 120, change=100, device=gpu),  # events come in any order
        Event("[memory]", 125, change=10**9),  # of the CPU
        Event("tokenconv: forward", 100, 100),
        Event("tokenconv: backward", 200, 100),
        Event("tokenconv: forward", 190, 400, device=gpu),
        Event("[memory]", 130, change=-100, device=gpu),
        Event("[memory]", 250, change=1000, device=gpu),
    ]
    results = SimpleNamespace(events=lambda: events)
    run: Any = SimpleNamespace(profiler=SimpleNamespace(kineto_results=results))
    assert peaks_of(run, reserved=5000) == Peaks(100, 1007, 0, 5000)


class AllocatesBackward(torch.autograd.Function):
    """Takes 64 MiB in the backward pass alone."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad + torch.zeros(16 * MIB)[0]


def test_the_peak_of_the_backward_pass_is_apart():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return AllocatesBackward.apply(x * self.scale)

    found = memory_of(Model(), torch.randn(1, 8), "train")
    assert found.backward_peak / MIB == pytest.approx(64, rel=0.001)
    assert found.forward_peak < MIB / 10
    assert found.optimizer_peak < MIB / 10
    assert found.peak == found.held + found.backward_peak


def test_what_the_forward_pass_keeps_counts_in_the_backward_pass():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, MIB // 4, bias=False), nn.GELU())
    found = memory_of(model, torch.randn(1, 1, 4, 4), "train")
    hidden = MIB
    assert found.saved == {"2": hidden}, "GELU's input"
    assert found.forward_peak >= 2 * hidden, "and its output, for the loss"
    assert found.backward_peak >= 2 * hidden


# --- what autograd keeps ---


def test_saved_activations_are_known_to_the_byte():
    """Two images of five tokens, eight channels: a linear and a norm keep their input."""
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8), nn.LayerNorm(8))
    tokens = torch.randn(2, 5, 8)
    hidden, out, statistics = 4 * 2 * 5 * 32, 4 * 2 * 5 * 8, 4 * 2 * 5
    assert saved_activations(model, tokens) == {
        "1": hidden,  # the input of the first linear is the model's own
        "2": hidden,
        "3": out + 2 * statistics,
    }


def test_a_storage_that_two_modules_keep_counts_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = x + 1
            return self.first(x) + self.second(x.view(-1, 8)).view_as(x)

    assert saved_activations(Twice(), torch.randn(2, 5, 8)) == {"first": 4 * 2 * 5 * 8}


def test_a_depthwise_convolution_keeps_its_input_and_nothing_else():
    class Model(nn.Module):
        def __init__(self, impl):
            super().__init__()
            self.conv = tc.DWConv(8, impl=impl)

        def forward(self, x):
            return self.conv(x + 1, 5, 7)

    tokens = torch.randn(2, 35, 8)
    assert saved_activations(Model(None), tokens) == {"conv": 4 * 2 * 35 * 8}
    naive = saved_activations(Model("naive"), tokens)
    assert naive == {"conv": 4 * 2 * 35 * 8}, "the copy"


def test_gradient_checkpointing_keeps_less_and_no_hook_stays():
    torch.manual_seed(0)
    model = tc.insert_(timm.create_model("test_vit", img_size=32), "mix_ffn").train()
    images = torch.randn(2, 3, 32, 32)
    whole = saved_activations(model, images)
    sites = {name for name in whole if name.endswith("act.before")}
    assert len(sites) == len(model.blocks)
    model.set_grad_checkpointing()
    assert sum(saved_activations(model, images).values()) < 0.5 * sum(whole.values())
    assert all(not m._forward_pre_hooks for n, m in model.named_modules() if n.endswith("norm1"))


# --- against the process ---

RESIDENT = """
import re, sys
import torch
from pathlib import Path
from torch import nn
from tokenconv.profiling.measurement import Step
from tokenconv.profiling.memory import measure_memory
from tokenconv.profiling.traces import profile_step

def status(key):
    return 1024 * int(re.search(rf"{key}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

class Layer(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(count))
    def forward(self, x):
        return nn.functional.gelu(x * self.weight)

def run(count, mode):
    step = Step(nn.Sequential(*[Layer(count) for _ in range(6)]), torch.ones(1, 1, 1, count), mode)
    step()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    profiled = profile_step(step, torch.device("cpu"))
    return measure_memory(step, profiled.peaks).peak, status("VmHWM")

mode = sys.argv[1]
run(2**10, mode)  # what is loaded by the first run is not the model's
before = status("VmRSS")
tracked, most = run(2**22, mode)
print(tracked, most - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is resident on Linux only")
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_the_process_takes_what_is_counted(mode: Mode):
    """With an allocator that gives back at once what is freed, as glibc does for large blocks."""
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, mode],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB)},
    )
    assert done.returncode == 0, done.stderr
    tracked, resident = map(int, done.stdout.split())
    assert tracked > 100 * MIB
    assert resident == pytest.approx(tracked, rel=0.1)
