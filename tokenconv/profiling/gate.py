"""Whether a comparison is worse than an earlier one: a gate for continuous integration."""

import re
from dataclasses import dataclass

from tokenconv.errors import MeasurementError
from tokenconv.profiling.measurement import ENOUGH_ROUNDS, Mode
from tokenconv.profiling.results import Comparison, Measured

_SAME = ("baseline", "batch_size", "input_size", "dtype", "memory_format")
_METRICS = ("ratio", "memory")


@dataclass(frozen=True)
class Rule:
    """What counts as a regression: a figure that grew by more than a factor.

    ``ratio`` is the latency of an arm over that of the baseline, ``memory`` its peak memory over
    that of the baseline; both now, over then. So machines and loads that slow both arms alike
    cancel out.
    """

    metric: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> "Rule":
        """Read ``ratio>1.05`` or ``memory>1.1``.

        Raises:
            ValueError: If it is neither.
        """
        found = re.fullmatch(rf"\s*({'|'.join(_METRICS)})\s*>\s*(\d+(?:\.\d+)?)\s*", text)
        if not found or float(found[2]) <= 0:
            raise ValueError(f"expected 'ratio>1.05' or 'memory>1.1', got {text!r}")
        return cls(found[1], float(found[2]))

    def __str__(self) -> str:
        return f"{self.metric}>{self.limit:g}"


@dataclass(frozen=True)
class Change:
    """How a figure of one arm moved."""

    arm: str
    mode: str
    metric: str
    factor: float
    """Now over then."""
    low: float
    high: float
    """What it may be, if both were at the ends of their intervals."""
    regressed: bool
    """Whether even the lower end is above the limit."""

    def __str__(self) -> str:
        said = "REGRESSION" if self.regressed else "no regression shown"
        return (
            f"{self.mode} of {self.arm}: {self.metric} {self.factor:.3f} times that of before "
            f"({self.low:.3f}-{self.high:.3f}): {said}"
        )


def changes(now: Comparison, then: Comparison, rule: Rule) -> list[Change]:
    """How the figure of a rule moved in every arm and mode that was there before.

    Args:
        now: A comparison.
        then: An older one.
        rule: What counts as a regression.

    Raises:
        MeasurementError: If model, baseline, batch, size, dtype, memory format or compilation
            differ, an arm or a mode of then is missing now, there is nothing to judge, or there
            were too few rounds to judge latency by.
    """
    _check_same(now, then)
    new, old = _figures(now), _figures(then)
    if not old:
        raise MeasurementError(
            "what was measured before has no arm with a baseline to judge by: measure that again"
        )
    found: list[Change] = []
    for (arm, mode), before in old.items():
        for one in (new[arm, mode], before):
            if rule.metric == "ratio" and len(one.samples_ms) < ENOUGH_ROUNDS:
                raise MeasurementError(
                    f"cannot judge {mode} of {arm} by {len(one.samples_ms)} rounds: measure at "
                    f"least {ENOUGH_ROUNDS}, then and now"
                )
        low, middle, high = _ends(new[arm, mode], rule.metric)
        old_low, old_middle, old_high = _ends(before, rule.metric)
        worst, best = high / old_low, low / old_high
        found.append(
            Change(arm, mode, rule.metric, middle / old_middle, best, worst, best > rule.limit)
        )
    return found


def other_conditions(now: Comparison, then: Comparison) -> list[str]:
    """What differs between two comparisons that may move ratios by itself, a line each.

    Args:
        now: A comparison.
        then: An older one.
    """
    pairs = [("device", now.device, then.device), ("threads", now.threads, then.threads)]
    versions = (now.versions, then.versions)
    pairs += [
        (key, *(one.get(key) for one in versions)) for key in sorted({*versions[0], *versions[1]})
    ]
    was = {arm.name: arm for arm in then.arms}
    for arm in now.arms:
        if arm.name in was:
            pairs.append((f"parameters of {arm.name}", arm.params, was[arm.name].params))
            pairs.append((f"MACs of {arm.name}", arm.macs, was[arm.name].macs))
    return [f"{key}: {old} then, {new} now" for key, new, old in pairs if new != old]


def _check_same(now: Comparison, then: Comparison) -> None:
    """Refuse to judge what was not measured alike."""
    for key, is_now, was in (
        ("model", now.about.get("model"), then.about.get("model")),
        *((key, getattr(now, key), getattr(then, key)) for key in _SAME),
        ("compiled", *([arm.name for arm in one.arms if arm.compiled] for one in (now, then))),
    ):
        if is_now != was:
            raise MeasurementError(
                f"cannot compare with what was measured before: {key} is {is_now!r}, was {was!r}"
            )
    missing = _figures(then).keys() - _figures(now).keys()
    if missing:
        raise MeasurementError(f"was measured before and is not now: {sorted(missing)}")


def _figures(comparison: Comparison) -> dict[tuple[str, Mode], Measured]:
    """Of the arms that are compared with a baseline."""
    return {
        (arm.name, mode): measured
        for arm in comparison.arms
        for mode, measured in arm.modes.items()
        if arm.name != comparison.baseline and measured.ratio is not None
    }


def _ends(measured: Measured, metric: str) -> tuple[float, float, float]:
    ratio, memory = measured.ratio, measured.memory_ratio
    assert ratio is not None  # or it would be no figure to judge
    assert memory is not None
    return (memory, memory, memory) if metric == "memory" else (ratio.low, ratio.median, ratio.high)
