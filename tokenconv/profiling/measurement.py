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
from torch.profiler import record_function

Mode = Literal["infer", "train"]
Phase = Literal["forward", "backward", "optimizer", "between"]
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


CONFIDENCE = 0.99
"""Of the intervals: high, since several arms and modes are judged at once."""
ENOUGH_ROUNDS = 10
"""Below which an interval would promise more than it knows."""
_RESAMPLES = 2000


@dataclass(frozen=True)
class Ratio(Spread):
    """How long an arm takes over another one, from ratios round by round.

    The interval is that of the median, by resampling the rounds with replacement (percentile
    bootstrap, 99%).
    """

    low: float
    high: float
    verdict: str
    """``faster`` or ``slower`` if the interval excludes 1, and else ``no difference shown``; with
    fewer than 10 rounds always the latter."""

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Ratio":
        """Judge ratios; the same ratios give the same interval."""
        values = torch.tensor(samples, dtype=torch.float64)
        count = len(values)
        generator = torch.Generator().manual_seed(0)
        draws = values[torch.randint(count, (_RESAMPLES, count), generator=generator)]
        middle = draws.sort(dim=1).values[:, [(count - 1) // 2, count // 2]].mean(dim=1)
        ends = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
        low, high = middle.quantile(ends).tolist()
        known = count >= ENOUGH_ROUNDS
        verdict = "slower" if low > 1 and known else "faster" if high < 1 and known else None
        spread = vars(Spread.of(samples))
        return cls(**spread, low=low, high=high, verdict=verdict or "no difference shown")

    @property
    def half_width(self) -> float:
        """Half the interval, over the median."""
        return (self.high - self.low) / 2 / self.median


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """How many rounds to time: as many as the precision needs, within a time.

    Args:
        baseline: The arm that the others are judged against.
        least: Rounds that count, at least.
        most: Rounds that count, at most.
        precision: Half the interval of every ratio, over its median, that is good enough.
        budget_s: Seconds after which no further round begins, once there are the least.
        warmup: Rounds before them that do not count, at least; there are more, up to ten times as
            many, while the steps of an arm go on changing by more than 5%.
    """

    baseline: str
    least: int = 20
    most: int = 500
    precision: float = 0.02
    budget_s: float = 20.0
    warmup: int = 3

    @classmethod
    def exactly(cls, count: int, *, baseline: str, warmup: int) -> "Rounds":
        """This many rounds, and this many before them."""
        return cls(baseline=baseline, least=count, most=count, warmup=warmup)

    def is_warm(self, samples: Mapping[str, Sequence[float]]) -> bool:
        """Whether what was timed so far is enough to begin."""
        count = len(next(iter(samples.values())))
        if count < self.warmup:
            return False
        if self.least == self.most or count >= 10 * self.warmup:
            return True
        if count < 4:
            return False
        halves = [(own[-4:-2], own[-2:]) for own in samples.values()]
        return all(abs(sum(later) / sum(before) - 1) < 0.05 for before, later in halves)

    def are_enough(self, samples: Mapping[str, Sequence[float]], elapsed_s: float) -> bool:
        """Whether what counted so far will do."""
        count = len(next(iter(samples.values())))
        if count < self.least:
            return False
        if count >= self.most or elapsed_s >= self.budget_s or self.baseline not in samples:
            return True
        return self._is_time_to_look(count) and all(
            paired(own, samples[self.baseline]).half_width <= self.precision
            for name, own in samples.items()
            if name != self.baseline
        )

    def _is_time_to_look(self, count: int) -> bool:
        """Ever more rarely (20, 30, ..., 60, 80, 100, 120, 160, ...): it takes ever longer."""
        stride = 10 * 2 ** max(0, (count // 30).bit_length() - 1)
        return count % stride == 0


def paired(own: Sequence[float], base: Sequence[float]) -> Ratio:
    """The ratio of two arms from what was timed in the same rounds."""
    return Ratio.of([a / b for a, b in zip(own, base, strict=True)])


RANGE = "tokenconv: "
"""Every range of ours that the profiler sees begins with this."""


def record_phase(name: Phase) -> record_function:
    """A range around a phase of a step, for the profiler."""
    return record_function(RANGE + name)


def phase_of_range(name: str) -> Phase | None:
    """The phase that a range of this name is around; None if it is around none."""
    phases: tuple[Phase, ...] = ("forward", "backward", "optimizer")
    return next((phase for phase in phases if name == RANGE + phase), None)


class Step:
    """One step of work: a forward pass without gradients, or a whole training step.

    A training step is forward, mean square of the output as loss, backward and AdamW. The learning
    rate is 0, which costs the same and leaves the weights as they are, unless gradients overflow.
    A step that fails frees what it held, so that others have the memory.

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
        eps = 1e-4 if images.dtype is torch.float16 else 1e-8  # 1e-8 is 0 in half precision
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, eps=eps) if mode == "train" else None

    def __call__(self) -> None:
        """Do the work once."""
        try:
            if self.optimizer is None:
                with torch.inference_mode(), record_phase("forward"):
                    self.run(self.images)
            else:
                self._train(self.optimizer)
        except Exception:
            self._release()
            raise

    def _train(self, optimizer: torch.optim.Optimizer) -> None:
        with record_phase("forward"):
            loss = self.run(self.images).float().square().mean()
        with record_phase("backward"):
            loss.backward()
        with record_phase("optimizer"):
            optimizer.step()
        optimizer.zero_grad()  # at the end, so that arms do not hold gradients between their turns

    def _release(self) -> None:
        if self.optimizer is not None:
            self.optimizer.zero_grad()
            self.optimizer.state.clear()
        if self.images.device.type == "cuda":
            torch.cuda.empty_cache()

    def has_ruined_weights(self) -> bool:
        """Whether a weight that was trained is not finite any more."""
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        return not all(bool(p.isfinite().all()) for group in groups for p in group["params"])

    def optimizer_state(self) -> list[Tensor]:
        """What the optimizer keeps between steps."""
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]


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
    global _keeps_freed_memory
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_max = -1, -4  # from malloc.h
    done = libc.mallopt(m_trim_threshold, 2**31 - 1) and libc.mallopt(m_mmap_max, 0)
    _keeps_freed_memory = bool(done)
    return "glibc, keeps freed memory" if done else "glibc, as it comes"


_keeps_freed_memory = False


def keeps_freed_memory() -> bool:
    """Whether ``steady_allocator`` has been called, and could do it."""
    return _keeps_freed_memory


def synchronize(device: torch.device) -> None:
    """Wait for the device, where it works on by itself."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Timing:
    """What was timed."""

    samples_ms: dict[str, list[float]]
    """Per name; the same index is the same round. Steps that failed are not in it."""
    failures: dict[str, str]
    """Why a step failed, by name."""
    overhead: float
    """Time of the rounds that was not spent in steps, over that which was."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on a CPU."""
    no_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return no_memory or "can't allocate memory" in str(error)


def reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, LookupError):  # a key alone says nothing
        text = f"{type(error).__name__} {text}".rstrip()
    return f"out of memory: {text}" if is_out_of_memory(error) else text


def time_interleaved(
    steps: Mapping[str, Callable[[], object]],
    *,
    rounds: Rounds,
    device: torch.device,
    tick: Callable[[], object] = lambda: None,
) -> Timing:
    """Time every step in every round, in random order.

    A step that fails is left out from then on; the others go on.

    Args:
        steps: What to time, by name.
        rounds: How often.
        device: Where the steps run. On a GPU its own clock is read, and its cache is emptied
            before every step.
        tick: Called after every single step.
    """
    order = random.Random(0)
    timer = _CudaTimer(device) if device.type == "cuda" else _time_ms
    running, failures = dict(steps), {}

    def one_round(samples: dict[str, list[float]]) -> None:
        for name in order.sample(list(running), len(running)):
            try:
                samples[name].append(timer(running[name]))
            except Exception as error:  # whatever a model raises is its own matter
                failures[name] = reason(error)
                del running[name], samples[name]
            tick()

    warm: dict[str, list[float]] = {name: [] for name in running}
    while warm and not rounds.is_warm(warm):
        one_round(warm)
    samples: dict[str, list[float]] = {name: [] for name in running}
    start = time.perf_counter()
    while samples and not rounds.are_enough(samples, time.perf_counter() - start):
        one_round(samples)
    elapsed_ms, spent_ms = 1e3 * (time.perf_counter() - start), sum(map(sum, samples.values()))
    return Timing(samples, failures, max(elapsed_ms / spent_ms - 1, 0.0) if spent_ms else 0.0)


def _time_ms(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start)


class _CudaTimer:
    """Times a step by events on the device, with a cold cache, as a model in a loader loop has."""

    def __init__(self, device: torch.device):
        self.device = device
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(2 * l2, dtype=torch.int8, device=device)

    def __call__(self, step: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda.synchronize(self.device)
        start.record(torch.cuda.current_stream(self.device))
        step()
        end.record(torch.cuda.current_stream(self.device))
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end)
