"""``compare.json``: what is written is read again, and nothing else is."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import nn

from tokenconv.errors import MeasurementError
from tokenconv.profiling import Comparison, compare, read_comparison, schema
from tokenconv.profiling.measurement import Spread
from tokenconv.profiling.results import SCHEMA_VERSION, table, write_comparison


@pytest.fixture(scope="module")
def measured() -> Comparison:
    """Two networks, one of which cannot be trained."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, groups=1), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten())
    frozen = nn.Sequential(nn.Conv2d(3, 8, 5), nn.Flatten()).requires_grad_(False)
    return compare(
        {"net": net, "frozen": frozen}, torch.randn(2, 3, 8, 8), repeats=2, about={"model": "net"}
    )


def content_of(comparison: Comparison, folder: Path) -> dict[str, Any]:
    write_comparison(comparison, folder / "compare.json")
    return json.loads((folder / "compare.json").read_text())


def test_what_was_measured_is_read_again(measured: Comparison, tmp_path: Path):
    content_of(measured, tmp_path)
    assert read_comparison(tmp_path / "compare.json") == measured
    assert str(read_comparison(tmp_path / "compare.json")) == str(measured)


def test_what_failed_is_read_again(
    made_up: Callable[..., Comparison], failed: Callable[..., Comparison], tmp_path: Path
):
    for name in ("mix_ffn", "attention_only"):
        found = failed(made_up(), name, "train")
        content_of(found, tmp_path)
        assert read_comparison(tmp_path / "compare.json") == found


def test_files_obey_the_schema(measured: Comparison, tmp_path: Path):
    content = content_of(measured, tmp_path)
    assert content["schema_version"] == SCHEMA_VERSION
    checker = jsonschema.Draft202012Validator(schema())
    checker.check_schema(schema())
    checker.validate(content)
    for wrong in (
        {**content, "schema_version": SCHEMA_VERSION + 1},
        {key: value for key, value in content.items() if key != "roof"},
        {**content, "batch_size": "two"},
        {**content, "arms": [{**content["arms"][0], "params": None}]},
    ):
        assert not checker.is_valid(wrong)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"cannot read a comparison from .*compare\.json"),
        ("{", "cannot read a comparison"),
        ("[]", "schema_version None"),
        ('{"schema_version": 1}', f"schema_version 1, expected {SCHEMA_VERSION}: measure it again"),
        (f'{{"schema_version": {SCHEMA_VERSION}}}', "is no whole comparison: baseline: "),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str | None, message: str):
    path = tmp_path / "compare.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(MeasurementError, match=message):
        read_comparison(path)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("batch_size",), "2", "batch_size: "),
        (("arms", 0, "macs"), 1.5, r"arms\.0\.macs: "),
        (("arms", 0, "modes", "infer", "ratio", "low"), "fast", r"modes\.infer\.ratio\.low: "),
        (("arms", 0, "modes", "infer", "time", 0, "phase"), "noon", r"time\.0\.phase: "),
    ],
)
def test_a_value_that_makes_no_sense_is_named(
    measured: Comparison, tmp_path: Path, where: tuple[Any, ...], value: Any, message: str
):
    content = content_of(measured, tmp_path)
    *path, last = where
    place = content
    for key in path:
        place = place[key]
    place[last] = value
    (tmp_path / "compare.json").write_text(json.dumps(content))
    with pytest.raises(MeasurementError, match=message):
        read_comparison(tmp_path / "compare.json")


def test_an_arm_that_failed_has_a_row_that_says_so(measured: Comparison):
    rows = [dict(zip(table(measured)[0], row, strict=True)) for row in table(measured)[1:]]
    assert [(row["mode"], row["arm"]) for row in rows] == [
        ("infer", "net"), ("infer", "frozen"), ("train", "net"), ("train", "frozen"),
    ]  # fmt: skip
    assert [row["verdict"] == "failed" for row in rows] == [False, False, False, True]
    assert rows[3]["latency ms (IQR)"] == "-"


@pytest.mark.parametrize(
    ("ms", "shown"),
    [(1234.56, "1,234.6"), (10.04, "10.0"), (9.876, "9.88"), (4.0, "4.00"), (0.01234, "0.0123")],
)
def test_latency_has_three_digits_that_count(measured: Comparison, ms: float, shown: str):
    net = measured.arm("net")
    figures = replace(net.modes["infer"], latency_ms=Spread.of([ms]))
    arm = replace(net, modes={"infer": figures})
    _, row, *_ = table(replace(measured, arms=(arm,)))
    assert row[4] == f"{shown} (0)"
