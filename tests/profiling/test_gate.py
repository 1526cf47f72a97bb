"""Whether a comparison is worse than an earlier one."""

import copy
import json

import pytest

from tokenconv.errors import MeasurementError
from tokenconv.profiling import Rule, changes, read_comparison
from tokenconv.profiling.comparison import SCHEMA_VERSION


def made_up(low=1.1, median=1.2, high=1.3, memory=1.5, **facts):
    """What ``compare.json`` holds, as far as the gate reads it."""

    def arm(name, *figures):
        keys = ("low", "median", "high")
        latency = dict(zip(keys, figures, strict=True))
        ratios = {"latency": latency, "peak_memory": memory if name == "mix_ffn" else 1.0}
        return {"name": name, "modes": {"infer": {}}, "ratios": {"infer": ratios}}

    return {
        "schema_version": SCHEMA_VERSION, "model": "vit", "baseline": "plain", "batch_size": 4,
        "input_size": [3, 64, 64], "dtype": "float32", "compiled": False,
        "arms": [arm("plain", 1.0, 1.0, 1.0), arm("mix_ffn", low, median, high)], **facts,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "metric", "limit"),
    [("ratio>1.05", "ratio", 1.05), (" memory > 2 ", "memory", 2.0), ("ratio>0.9", "ratio", 0.9)],
)
def test_rules_are_read(text, metric, limit):
    rule = Rule.parse(text)
    assert (rule.metric, rule.limit) == (metric, limit)
    assert Rule.parse(str(rule)) == rule


@pytest.mark.parametrize("text", ["", "ratio", "ratio<1", "speed>1", "ratio>-1", "ratio>0"])
def test_other_rules_are_refused(text):
    with pytest.raises(ValueError, match=r"expected 'ratio>1\.05' or 'memory>1\.1', got"):
        Rule.parse(text)


def test_a_regression_is_what_both_intervals_show():
    """Then 1.1 to 1.3. Now 1.5 to 1.7 is at least 1.5 / 1.3 = 1.154 times that."""
    (change,) = changes(made_up(1.5, 1.6, 1.7), made_up(), Rule.parse("ratio>1.15"))
    assert (change.arm, change.mode) == ("mix_ffn", "infer")
    assert change.factor == pytest.approx(1.6 / 1.2)
    assert (change.low, change.high) == pytest.approx((1.5 / 1.3, 1.7 / 1.1))
    assert change.regressed
    assert str(change) == (
        "infer of mix_ffn: ratio 1.333 times that of before (1.154-1.545): REGRESSION"
    )
    (change,) = changes(made_up(1.5, 1.6, 1.7), made_up(), Rule.parse("ratio>1.16"))
    assert not change.regressed
    assert str(change).endswith("no regression shown")


def test_memory_has_no_interval():
    (change,) = changes(made_up(memory=1.7), made_up(), Rule.parse("memory>1.1"))
    assert change.regressed
    assert change.low == change.high == change.factor == pytest.approx(1.7 / 1.5)
    assert not changes(made_up(memory=1.6), made_up(), Rule.parse("memory>1.1"))[0].regressed


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"model": "pvt"}, "model is 'pvt', was 'vit'"),
        ({"batch_size": 8}, "batch_size is 8, was 4"),
        ({"compiled": True}, "compiled is True, was False"),
        ({"arms": []}, r"was measured before and is not now: .*mix_ffn"),
    ],
)
def test_what_was_not_measured_alike_is_refused(facts, message):
    with pytest.raises(MeasurementError, match=message):
        changes(made_up(**facts), made_up(), Rule.parse("ratio>1.05"))


def test_new_arms_are_no_matter():
    now = made_up()
    more = copy.deepcopy(now["arms"][1])
    now["arms"].append({**more, "name": "peg"})
    assert [c.arm for c in changes(now, made_up(), Rule.parse("ratio>1"))] == ["mix_ffn"]


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "compare.json"
    with pytest.raises(MeasurementError, match=r"cannot read a comparison from .*compare\.json"):
        read_comparison(path)
    for text, message in (
        ("{", "cannot read a comparison"),
        ("[]", "schema_version None"),
        ('{"schema_version": 1}', f"schema_version 1, expected {SCHEMA_VERSION}: measure it again"),
    ):
        path.write_text(text)
        with pytest.raises(MeasurementError, match=message):
            read_comparison(path)
    path.write_text(json.dumps(made_up()))
    assert read_comparison(path) == made_up()
