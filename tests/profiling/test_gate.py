"""Whether a comparison is worse than an earlier one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from tokenconv.errors import MeasurementError
from tokenconv.profiling import Comparison, Rule, changes, other_conditions


@pytest.fixture
def make(made_up: Callable[..., Comparison]) -> Callable[..., Comparison]:
    """Makes a comparison of two arms in one mode, with these figures of the second."""

    def made(
        low: float = 1.1,
        median: float = 1.2,
        high: float = 1.3,
        memory: float = 1.5,
        rounds: int = 10,
        **facts: Any,
    ) -> Comparison:
        whole = made_up(("infer",))
        plain, _, mix_ffn = whole.arms
        measured = mix_ffn.modes["infer"]
        assert measured.ratio is not None
        ratio = dataclasses.replace(measured.ratio, low=low, median=median, high=high)
        figures = dataclasses.replace(
            measured, ratio=ratio, memory_ratio=memory, samples_ms=measured.samples_ms[:1] * rounds
        )
        arms = (plain, dataclasses.replace(mix_ffn, modes={"infer": figures}))
        return dataclasses.replace(whole, **{"arms": arms, **facts})

    return made


Make = Callable[..., Comparison]


@pytest.mark.parametrize(
    ("text", "metric", "limit"),
    [("ratio>1.05", "ratio", 1.05), (" memory > 2 ", "memory", 2.0), ("ratio>0.9", "ratio", 0.9)],
)
def test_rules_are_read(text: str, metric: str, limit: float):
    rule = Rule.parse(text)
    assert (rule.metric, rule.limit) == (metric, limit)
    assert Rule.parse(str(rule)) == rule


@pytest.mark.parametrize("text", ["", "ratio", "ratio<1", "speed>1", "ratio>-1", "ratio>0"])
def test_other_rules_are_refused(text: str):
    with pytest.raises(ValueError, match=r"expected 'ratio>1\.05' or 'memory>1\.1', got"):
        Rule.parse(text)


def test_a_regression_is_what_both_intervals_show(make: Make):
    """Then 1.1 to 1.3. Now 1.5 to 1.7 is at least 1.5 / 1.3 = 1.154 times that."""
    (change,) = changes(make(1.5, 1.6, 1.7), make(), Rule.parse("ratio>1.15"))
    assert (change.arm, change.mode) == ("mix_ffn", "infer")
    assert change.factor == pytest.approx(1.6 / 1.2)
    assert (change.low, change.high) == pytest.approx((1.5 / 1.3, 1.7 / 1.1))
    assert change.regressed
    assert str(change) == (
        "infer of mix_ffn: ratio 1.333 times that of before (1.154-1.545): REGRESSION"
    )
    (change,) = changes(make(1.5, 1.6, 1.7), make(), Rule.parse("ratio>1.16"))
    assert not change.regressed
    assert str(change).endswith("no regression shown")


def test_memory_has_no_interval(make: Make):
    (change,) = changes(make(memory=1.7), make(), Rule.parse("memory>1.1"))
    assert change.regressed
    assert change.low == change.high == change.factor == pytest.approx(1.7 / 1.5)
    assert not changes(make(memory=1.6), make(), Rule.parse("memory>1.1"))[0].regressed


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"about": {"model": "vit"}}, "model is 'vit', was 'pvt_v2_b0'"),
        ({"batch_size": 8}, "batch_size is 8, was 4"),
        ({"memory_format": "contiguous"}, "memory_format is 'contiguous', was 'channels_last'"),
        ({"arms": ()}, r"was measured before and is not now: .*mix_ffn"),
    ],
)
def test_what_was_not_measured_alike_is_refused(make: Make, facts: dict[str, Any], message: str):
    with pytest.raises(MeasurementError, match=message):
        changes(make(**facts), make(), Rule.parse("ratio>1.05"))


def test_compiled_is_not_like_eager(make: Make):
    now = make()
    compiled = tuple(dataclasses.replace(arm, compiled=True) for arm in now.arms)
    with pytest.raises(MeasurementError, match=r"compiled is \['attention_only', 'mix_ffn'\], was"):
        changes(dataclasses.replace(now, arms=compiled), make(), Rule.parse("ratio>1.05"))


def test_new_arms_are_no_matter(make: Make):
    now = make()
    more = dataclasses.replace(now.arms[1], name="peg")
    now = dataclasses.replace(now, arms=(*now.arms, more))
    assert [c.arm for c in changes(now, make(), Rule.parse("ratio>1"))] == ["mix_ffn"]


def test_an_arm_that_fails_now_is_missed(make: Make, failed: Callable[..., Comparison]):
    then = make()
    for name in ("mix_ffn", "attention_only"):
        with pytest.raises(
            MeasurementError, match=r"was measured before and is not now: .*mix_ffn"
        ):
            changes(failed(make(), name, "infer"), then, Rule.parse("ratio>1.05"))
    for name in ("mix_ffn", "attention_only"):
        with pytest.raises(MeasurementError, match="before has no arm with a baseline to judge by"):
            changes(then, failed(make(), name, "infer"), Rule.parse("ratio>1.05"))


def test_few_rounds_judge_no_latency(make: Make):
    few, enough = make(1.5, 1.6, 1.7, rounds=9), make()
    for now, then in ((few, enough), (enough, few)):
        with pytest.raises(MeasurementError, match="cannot judge infer of mix_ffn by 9 rounds"):
            changes(now, then, Rule.parse("ratio>1.05"))
        assert len(changes(now, then, Rule.parse("memory>1.05"))) == 1


def test_other_conditions_are_told(make: Make):
    then, now = make(), make(device="a GPU", threads=8, versions={"torch": "2.16.0"})
    assert other_conditions(then, then) == []
    assert other_conditions(now, then) == [
        "device: cpu (made up) then, a GPU now",
        "threads: 2 then, 8 now",
        "python: 3.11.7 then, None now",
        "torch: 2.15.0 then, 2.16.0 now",
    ]
    plain, mix_ffn = then.arms
    larger = dataclasses.replace(mix_ffn, params=9_000_000, macs=45_000_000)
    assert other_conditions(dataclasses.replace(then, arms=(plain, larger)), then) == [
        "parameters of mix_ffn: 8100000 then, 9000000 now",
        "MACs of mix_ffn: 44000000 then, 45000000 now",
    ]
