"""What is timed, in which order, and what a step of work leaves behind."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tokenconv.profiling import Spread, measurement
from tokenconv.profiling.measurement import Step, time_interleaved

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
    return time_interleaved(steps, repeats=repeats, warmup=warmup, device=CPU, tick=tick)


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
    step = Step(model, images(), "train")
    step()
    step()
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert torch.equal(parameter, before[name]), name
    assert any(bool(p.grad.abs().max() > 0) for p in model.parameters() if p.grad is not None)


def test_training_step_runs_the_optimizer():
    step = Step(small_net(), images(), "train")
    step()
    assert step.optimizer is not None
    assert len(step.optimizer.state) == len(list(step.model.parameters()))


def test_training_step_starts_from_fresh_gradients():
    step = Step(small_net(), images(), "train")
    step()
    first = [p.grad.clone() for p in step.model.parameters() if p.grad is not None]
    step()
    second = [p.grad for p in step.model.parameters() if p.grad is not None]
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)
    step.release_gradients()
    assert all(p.grad is None for p in step.model.parameters())


def test_inference_step_makes_no_gradients():
    model = small_net().train()
    seen: list[bool] = []
    model.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    Step(model, images(), "infer")()
    assert seen == [False]
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_resident_bytes_count_everything_held_between_steps():
    model, batch = small_net(), images()
    params = sum(p.numel() for p in model.parameters())
    tensors = len(list(model.parameters()))
    batch_norm = 2 * 8 * 4 + 8  # running mean and variance, and a 64-bit counter
    inferring = Step(model, batch, "infer")
    inferring()
    assert inferring.resident_bytes() == 4 * (params + batch.numel()) + batch_norm
    training = Step(model, batch, "train")
    training()
    adamw = 4 * 2 * params + 4 * tensors  # two moments each, and a step counter per tensor
    assert training.resident_bytes() == inferring.resident_bytes() + adamw
