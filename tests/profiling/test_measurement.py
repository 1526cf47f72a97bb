"""What is timed, in which order, and what a step of work leaves behind."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tokenconv.profiling import Spread, measurement
from tokenconv.profiling.measurement import (
    Ratio,
    Rounds,
    Step,
    paired,
    reason,
    time_interleaved,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 20])
def test_spread_agrees_with_numpy(count: int):
    samples = np.random.default_rng(count).uniform(1, 100, count)
    q25, median, q75 = np.quantile(samples, [0.25, 0.5, 0.75])
    spread = Spread.of(samples.tolist())
    assert (spread.q25, spread.median, spread.q75) == pytest.approx((q25, median, q75))
    assert spread.iqr == pytest.approx(q75 - q25)


# --- rounds ---


class Clock:
    """A clock that only recorded steps move on."""

    def __init__(self):
        self.now = 0.0
        self.calls: list[str] = []

    def step(self, name: str, seconds: Callable[[int], float]) -> Callable[[], None]:
        """A step that takes ``seconds(round)``."""

        def run() -> None:
            self.now += seconds(self.calls.count(name))
            self.calls.append(name)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measurement, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def time_three(clock: Clock, *, repeats: int, warmup: int, tick: Callable[[], object]):
    steps = {
        "a": clock.step("a", lambda round_number: 1 + round_number),
        "b": clock.step("b", lambda round_number: 100 + round_number),
        "c": clock.step("c", lambda round_number: 1000),
    }
    rounds = Rounds.exactly(repeats, baseline="a", warmup=warmup)
    return time_interleaved(steps, rounds=rounds, device=CPU, tick=tick).samples_ms


def test_a_round_has_every_arm_once_and_its_order_changes(clock: Clock):
    time_three(clock, repeats=20, warmup=3, tick=lambda: None)
    rounds = [tuple(clock.calls[i : i + 3]) for i in range(0, len(clock.calls), 3)]
    assert len(rounds) == 20 + 3
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) == 6, "23 random rounds of three arms show every order"


def test_the_order_is_the_same_in_every_run():
    first, second = Clock(), Clock()
    for clock in (first, second):
        time_three(clock, repeats=8, warmup=0, tick=lambda: None)
    assert first.calls == second.calls


def test_samples_are_milliseconds_of_the_rounds_that_count(clock: Clock):
    samples = time_three(clock, repeats=4, warmup=2, tick=lambda: None)
    assert samples["a"] == pytest.approx([3e3, 4e3, 5e3, 6e3])
    assert samples["b"] == pytest.approx([102e3, 103e3, 104e3, 105e3])
    assert samples["c"] == pytest.approx([1000e3] * 4)


def test_every_single_step_ticks(clock: Clock):
    ticks: list[int] = []
    time_three(clock, repeats=4, warmup=2, tick=lambda: ticks.append(len(clock.calls)))
    assert ticks == list(range(1, 3 * (4 + 2) + 1))


def test_overhead_is_what_the_rounds_spend_beside_the_steps(clock: Clock):
    def tick() -> None:
        clock.now += 0.5

    steps = {"a": clock.step("a", lambda i: 8.0), "b": clock.step("b", lambda i: 12.0)}
    rounds = Rounds.exactly(4, baseline="a", warmup=1)
    found = time_interleaved(steps, rounds=rounds, device=CPU, tick=tick)
    assert found.overhead == pytest.approx(0.5 * 2 / 20)


@pytest.mark.parametrize("when", [0, 2, 4], ids=["warm-up", "round", "last round"])
@pytest.mark.parametrize("who", ["base", "other"])
def test_a_step_that_fails_is_left_out_from_then_on(clock: Clock, when: int, who: str):
    def fail_then(i: int) -> float:
        if i == when:
            raise torch.OutOfMemoryError("8 EiB\nasked for")
        return 1.0

    names = ("base", "other", "third")
    steps = {n: clock.step(n, fail_then if n == who else lambda i: 2.0) for n in names}
    rounds = Rounds.exactly(4, baseline="base", warmup=1)
    found = time_interleaved(steps, rounds=rounds, device=CPU)
    assert found.failures == {who: "out of memory: 8 EiB asked for"}
    assert found.samples_ms == {n: pytest.approx([2e3] * 4) for n in names if n != who}
    assert clock.calls.count(who) == when


def test_no_step_is_left(clock: Clock):
    def fail() -> None:
        raise ValueError("no")

    rounds = Rounds(baseline="a")
    found = time_interleaved({"a": fail, "b": fail}, rounds=rounds, device=CPU)
    assert (found.samples_ms, found.failures) == ({}, {"a": "no", "b": "no"})


def test_an_error_of_another_kind_is_not_swallowed(clock: Clock):
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        time_interleaved({"a": stop}, rounds=Rounds(baseline="a"), device=CPU)


# --- as many rounds as it takes ---


class Noisy:
    """Steps with noise of a shared machine: skewed, with spikes, and a drift that all have."""

    def __init__(self, clock: Clock, seed: int):
        self.clock, self.random = clock, np.random.default_rng(seed)

    def step(self, seconds: float) -> Callable[[], None]:
        def run() -> None:
            noise = 1 + 0.05 * abs(self.random.standard_normal())
            spike = self.random.exponential(0.5) if self.random.random() < 0.1 else 0.0
            drift = 1 + 0.1 * np.sin(self.clock.now)
            self.clock.now += seconds * drift * (noise + spike)

        return run


def verdict(clock: Clock, seed: int, factor: float) -> tuple[str, int]:
    noisy = Noisy(clock, seed)
    steps = {"base": noisy.step(0.1), "other": noisy.step(0.1 * factor)}
    rounds = Rounds(baseline="base")
    samples = time_interleaved(steps, rounds=rounds, device=CPU).samples_ms
    return paired(samples["other"], samples["base"]).verdict, len(samples["base"])


def test_a_planted_slowdown_is_found_and_equal_arms_are_not_called_different(clock: Clock):
    for factor, expected in ((1.1, "slower"), (1.0, "no difference shown"), (0.9, "faster")):
        found = [verdict(clock, seed, factor)[0] for seed in range(100)]
        assert found.count(expected) >= 95, factor


def test_rounds_end_when_the_interval_is_narrow_or_the_time_is_over(clock: Clock):
    steady = {
        "base": clock.step("base", lambda i: 0.01),
        "other": clock.step("other", lambda i: 0.02),
    }
    samples = time_interleaved(steady, rounds=Rounds(baseline="base"), device=CPU).samples_ms
    assert len(samples["base"]) == 20
    for budget, least in ((4.0, 20), (30.0, 20)):
        noisy = Noisy(clock, 0)
        steps = {"base": noisy.step(0.1), "other": noisy.step(0.1)}
        rounds = Rounds(baseline="base", precision=1e-4, budget_s=budget, least=least, most=120)
        start = clock.now
        count = len(time_interleaved(steps, rounds=rounds, device=CPU).samples_ms["base"])
        assert 20 <= count <= 120
        assert (count == 120) is (budget == 30.0)
        assert budget == 30.0 or clock.now - start < 2 * budget


def test_without_a_baseline_there_is_nothing_to_know_better():
    rounds = Rounds(baseline="base")
    assert not rounds.are_enough({"other": [1.0] * 19}, 1.0)
    assert rounds.are_enough({"other": [1.0, 9.0] * 10}, 1.0)


def test_the_interval_is_looked_at_ever_more_rarely():
    rounds = Rounds(baseline="base")
    steady = {"base": [1.0] * 500, "other": [2.0] * 500}
    looked = [
        count
        for count in range(1, 500)
        if rounds.are_enough({name: own[:count] for name, own in steady.items()}, 0.0)
    ]
    assert looked == [20, 30, 40, 50, 60, 80, 100, 120, 160, 200, 240, 320, 400, 480]


def test_warm_up_goes_on_while_latencies_fall(clock: Clock):
    """As while an allocator or a compiler learns: by half, round by round, ten times."""
    step = clock.step("base", lambda i: max(0.1, 100 / 2**i))
    rounds = Rounds(baseline="base")
    samples = time_interleaved({"base": step}, rounds=rounds, device=CPU).samples_ms
    assert samples["base"] == pytest.approx([100] * 20)
    restless = clock.step("restless", lambda i: 1.0 + (i % 4 > 1))
    clock.calls.clear()
    time_interleaved({"base": restless}, rounds=Rounds(baseline="base", most=20), device=CPU)
    assert len(clock.calls) <= 30 + 20


@pytest.mark.parametrize("count", [25, 40, 100])
def test_the_interval_is_that_of_numpys_resampling(count: int):
    """Ends agree to what chance leaves."""
    random = np.random.default_rng(count)
    samples = random.lognormal(0.1, 0.2, count)
    draws = np.median(random.choice(samples, (20_000, count)), axis=1)
    low, high = np.quantile(draws, [0.005, 0.995])
    found = Ratio.of(samples.tolist())
    assert (found.low, found.high) == pytest.approx((low, high), rel=0.06)
    assert Ratio.of(samples.tolist()) == found
    assert found.median == pytest.approx(np.median(samples))


# --- one step ---


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(128, 5)
    )


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_training_step_makes_gradients_and_leaves_the_weights():
    model = small_net().eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    norms: list[float] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: norms.append(float(p.grad.norm())))
    step = Step(model, images(), "train")
    step()
    step()
    assert model.training
    assert len(norms) == 2 * len(before)
    assert np.isfinite(norms).all()
    assert max(norms) > 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_training_step_runs_the_optimizer():
    step = Step(small_net(), images(), "train")
    step()
    assert step.optimizer is not None
    assert len(step.optimizer.state) == len(list(step.model.parameters()))


def test_training_step_starts_from_fresh_gradients_and_leaves_none():
    step = Step(small_net(), images(), "train")
    assert step.optimizer is not None
    seen: list[list[Tensor]] = []

    def look(optimizer: Any, args: Any, kwargs: Any) -> None:
        seen.append([p.grad.clone() for p in step.model.parameters() if p.grad is not None])

    step.optimizer.register_step_pre_hook(look)
    for _ in range(2):
        step()
        assert all(p.grad is None for p in step.model.parameters())
    first, second = seen
    assert len(first) == len(list(step.model.parameters()))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("fails_in", ["forward", "backward", "optimizer"])
def test_a_step_that_fails_frees_what_it_held(fails_in: str):
    step = Step(small_net(), images(), "train")
    assert step.optimizer is not None
    step()
    assert step.optimizer_state()

    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("no memory left")

    if fails_in == "forward":
        step.model.register_forward_hook(fail)
    elif fails_in == "backward":
        next(step.model.parameters()).register_hook(fail)
    else:
        step.optimizer.register_step_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        step()
    assert not step.optimizer_state()
    assert all(p.grad is None for p in step.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_training_steps_leave_the_weights_as_they_are(dtype: torch.dtype):
    model = small_net().to(dtype)
    before = [p.clone() for p in model.parameters()]
    step = Step(model, images().to(dtype), "train")
    for _ in range(3):
        step()
    assert not step.has_ruined_weights()
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("one\n  two"), "one two"),
        (RuntimeError(), "RuntimeError"),
        (KeyError("k"), "KeyError 'k'"),
        (MemoryError(), "out of memory: MemoryError"),
    ],
)
def test_a_reason_is_one_line(error: Exception, told: str):
    assert reason(error) == told


def test_inference_step_makes_no_gradients():
    model = small_net().train()
    seen: list[bool] = []
    model.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    Step(model, images(), "infer")()
    assert seen == [False]
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
