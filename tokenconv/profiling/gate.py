"""Whether a comparison is worse than an earlier one: a gate for continuous integration."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenconv.errors import MeasurementError
from tokenconv.profiling.comparison import SCHEMA_VERSION

_SAME = ("model", "baseline", "batch_size", "input_size", "dtype", "compiled")
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


def read_comparison(path: Path) -> dict[str, Any]:
    """Read a ``compare.json``.

    Raises:
        MeasurementError: If it is none, or of another version.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise MeasurementError(f"cannot read a comparison from {path}: {error}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise MeasurementError(
            f"{path} has schema_version {version}, expected {SCHEMA_VERSION}: measure it again"
        )
    return content


def _check_same(now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
    """Refuse to judge what was not measured alike."""
    for key in _SAME:
        if now.get(key) != then.get(key):
            raise MeasurementError(
                f"cannot compare with what was measured before: {key} is {now.get(key)!r}, was "
                f"{then.get(key)!r}"
            )
    missing = _figures(then).keys() - _figures(now).keys()
    if missing:
        raise MeasurementError(f"was measured before and is not now: {sorted(missing)}")


def changes(now: Mapping[str, Any], then: Mapping[str, Any], rule: Rule) -> list[Change]:
    """How the figure of a rule moved in every arm and mode that was there before.

    Args:
        now: Content of a ``compare.json``.
        then: Content of an older one.
        rule: What counts as a regression.

    Raises:
        MeasurementError: If model, baseline, batch, size, dtype or compilation differ, or an arm or
            a mode of then is missing now.
    """
    _check_same(now, then)
    new, old = _figures(now), _figures(then)
    found: list[Change] = []
    for (arm, mode), before in old.items():
        if arm == then["baseline"]:
            continue
        low, middle, high = _ends(new[arm, mode], rule.metric)
        old_low, old_middle, old_high = _ends(before, rule.metric)
        worst, best = high / old_low, low / old_high
        found.append(
            Change(arm, mode, rule.metric, middle / old_middle, best, worst, best > rule.limit)
        )
    return found


def _figures(content: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    return {
        (arm["name"], mode): arm["ratios"][mode] for arm in content["arms"] for mode in arm["modes"]
    }


def _ends(ratios: Mapping[str, Any], metric: str) -> tuple[float, float, float]:
    if metric == "memory":
        return (ratios["peak_memory"],) * 3
    latency = ratios["latency"]
    return latency["low"], latency["median"], latency["high"]
