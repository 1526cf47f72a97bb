"""What is timed and how: one step of work per arm, arms in turn, in random order."""

import ctypes
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Mode = Literal["infer", "train"]
MIB = 2**20


@dataclass(frozen=True)
class Spread:
    """Median and interquartile range of repeated measurements."""

    median: float
    iqr: float
    """``q75 - q25``."""
    q25: float
    q75: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Summarise samples; a single one has no spread."""
        if len(samples) < 2:
            return cls(samples[0], 0.0, samples[0], samples[0])
        q25, median, q75 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, q75 - q25, q25, q75)


class Step:
    """One step of work: a forward pass without gradients, or a whole training step.

    A training step is forward, mean square of the output as loss, backward and AdamW. The learning
    rate is 0, which costs the same and leaves the weights as they are.

    Args:
        model: Is switched to evaluation or training mode.
        images: ``(B, C, H, W)`` on the device of the model.
        mode: ``infer`` or ``train``.
        compiled: Run the model through ``torch.compile``.
    """

    def __init__(self, model: nn.Module, images: Tensor, mode: Mode, *, compiled: bool = False):
        self.model = model.train(mode == "train")
        self.images = images
        self.mode = mode
        self.run: Callable[[Tensor], Tensor] = torch.compile(model) if compiled else model
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0) if mode == "train" else None

    def __call__(self) -> None:
        """Do the work once."""
        if self.optimizer is None:
            with torch.inference_mode():
                self.run(self.images)
            return
        self.optimizer.zero_grad()
        self.run(self.images).float().square().mean().backward()
        self.optimizer.step()

    def release_gradients(self) -> None:
        """Free what the last step left behind, so that the next one starts as the first did."""
        if self.optimizer is not None:
            self.optimizer.zero_grad()

    def resident_bytes(self) -> int:
        """Bytes held between steps: parameters, buffers, images and optimizer state."""
        held: list[Tensor] = [*self.model.parameters(), *self.model.buffers(), self.images]
        if self.optimizer is not None:
            for state in self.optimizer.state.values():
                held += [value for value in state.values() if isinstance(value, Tensor)]
        return sum(t.numel() * t.element_size() for t in held)


def steady_allocator() -> str:
    """Let this process keep the memory it frees, as jemalloc and tcmalloc do.

    By default glibc hands large blocks back to the system at once, and whichever operator touches
    fresh pages next pays for them: on a CPU this moves latencies by tens of percent and blames the
    wrong operators. It concerns the whole process and cannot be undone, so the command line calls
    it and ``compare`` does not.

    Returns:
        What was done, for the report.
    """
    if platform.libc_ver()[0] != "glibc":
        return "as the system has it"
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_max = -1, -4  # from malloc.h
    done = libc.mallopt(m_trim_threshold, 2**31 - 1) and libc.mallopt(m_mmap_max, 0)
    return "glibc, keeps freed memory" if done else "glibc, as it comes"


def synchronize(device: torch.device) -> None:
    """Wait for the device, where it works on by itself."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_interleaved(
    steps: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int,
    device: torch.device,
    tick: Callable[[], object],
) -> dict[str, list[float]]:
    """Time every step in every round, in random order.

    Args:
        steps: What to time, by name.
        repeats: Rounds that count.
        warmup: Rounds before them that do not.
        device: Where the steps run.
        tick: Called after every single step.

    Returns:
        Milliseconds per name; the same index is the same round.
    """
    order = random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(warmup + repeats):
        for name in order.sample(list(steps), len(steps)):
            synchronize(device)
            start = time.perf_counter()
            steps[name]()
            synchronize(device)
            elapsed_ms = 1e3 * (time.perf_counter() - start)
            if round_number >= warmup:
                samples[name].append(elapsed_ms)
            tick()
    return samples
