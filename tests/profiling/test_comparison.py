"""The figures of a comparison: consistent with each other, with the models, and side by side."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokenconv import MeasurementError, UnknownNameError
from tokenconv.profiling import Comparison, Spread, compare, comparison, operator_changes
from tokenconv.profiling.attribution import Category
from tokenconv.profiling.measurement import Timing
from tokenconv.profiling.memory import Peaks
from tokenconv.profiling.results import SCHEMA_VERSION, TimeSpent
from tokenconv.profiling.traces import Profiled

MIB = 2**20


def net(width: int = 8, *, offset: float = 0.0) -> nn.Module:
    """A small network; its outputs are zero, but for the first, which is ``offset``."""
    torch.manual_seed(0)
    head = nn.Linear(16 * width, 5)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    nn.init.constant_(head.bias[:1], offset)
    return nn.Sequential(
        nn.Conv2d(3, width, 4, stride=4), nn.BatchNorm2d(width), nn.Flatten(), head
    )


def images(batch_size: int = 3) -> Tensor:
    return torch.randn(batch_size, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def measured() -> Comparison:
    """Two real networks in both modes."""
    models = {"small": net(8), "wide": net(16, offset=0.5)}
    return compare(models, images(), repeats=3, warmup=1)


def test_arms_keep_their_order_and_the_first_is_the_baseline(measured: Comparison):
    assert [arm.name for arm in measured.arms] == ["small", "wide"]
    assert (measured.baseline, measured.reference) == ("small", "small")


@pytest.mark.parametrize(("index", "width"), [(0, 8), (1, 16)])
def test_parameters_and_macs_are_those_of_the_model(measured: Comparison, index: int, width: int):
    arm = measured.arms[index]
    assert arm.params == sum(p.numel() for p in net(width).parameters())
    assert arm.macs == 16 * width * 3 * 4 * 4 + 16 * width * 5  # the convolution and the linear
    assert arm.macs_by_flop_counter == arm.macs
    assert arm.bytes > 4 * arm.params


def test_throughput_follows_from_latency(measured: Comparison):
    for arm in measured.arms:
        for figures in arm.modes.values():
            assert figures.latency_ms.median > 0
            assert figures.latency_ms.q25 <= figures.latency_ms.median <= figures.latency_ms.q75
            expected = 1000 * measured.batch_size / figures.latency_ms.median
            assert figures.images_per_s == pytest.approx(expected)


def test_time_shares_add_up_to_one(measured: Comparison):
    for arm in measured.arms:
        for figures in arm.modes.values():
            assert set(figures.time_share) == {category.value for category in Category}
            assert all(share >= 0 for share in figures.time_share.values())
            assert sum(figures.time_share.values()) == pytest.approx(1)


def test_the_baseline_is_one_times_itself(measured: Comparison):
    for figures in measured.arms[0].modes.values():
        assert dataclasses.asdict(figures.ratio) == {
            "median": 1,
            "iqr": 0,
            "q25": 1,
            "q75": 1,
            "low": 1,
            "high": 1,
            "verdict": "no difference shown",
        }
        assert figures.memory_ratio == 1


def test_ratios_of_memory_refer_to_the_baseline(measured: Comparison):
    small, wide = measured.arms
    for mode in ("infer", "train"):
        expected = wide.modes[mode].memory.peak / small.modes[mode].memory.peak
        assert wide.modes[mode].memory_ratio == pytest.approx(expected)


def test_difference_is_the_largest_of_the_outputs(measured: Comparison):
    assert [arm.max_abs_diff_at_insertion for arm in measured.arms] == [0, 0.5]


def test_environment_is_told(measured: Comparison):
    told = measured.to_dict()
    assert told["schema_version"] == SCHEMA_VERSION
    assert f"({torch.backends.cpu.get_cpu_capability()})" in told["device"]
    assert told["dtype"] == "float32"
    assert told["threads"] == 1
    assert told["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(told["versions"]) >= {"python", "torch", "timm", "einops", "tokenconv"}
    assert (told["batch_size"], told["input_size"]) == (3, (3, 16, 16))
    assert told["rounds"] == {"infer": 3, "train": 3}
    assert all(arm["compiled"] is False for arm in told["arms"])
    assert told["memory_format"] == "contiguous"
    assert len(told["load"]) == 2
    assert told["governor"]


def test_dictionary_survives_json(measured: Comparison):
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = json.dumps(measured.to_dict())
    arms = json.loads(text, parse_constant=refuse)["arms"]
    assert arms[1]["modes"]["train"]["latency_ms"]["median"] == pytest.approx(
        measured.arms[1].modes["train"].latency_ms.median
    )


def test_printed_table_has_a_row_per_mode_and_arm(measured: Comparison):
    header, *rows = str(dataclasses.replace(measured, warnings=("beware",))).splitlines()
    assert rows.pop() == "warning: beware"
    assert header.split()[:4] == ["mode", "arm", "params", "MACs"]
    assert [row.split()[:2] for row in rows] == [
        ["infer", "small"], ["infer", "wide"], ["train", "small"], ["train", "wide"],
    ]  # fmt: skip


def test_training_memory_holds_gradients_and_moments():
    """One linear of 4 MiB: the weight; then also its gradient and two moments."""
    torch.manual_seed(0)
    models = {"linear": nn.Sequential(nn.Flatten(), nn.Linear(1024, 1024, bias=False))}
    batch = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    (arm,) = compare(models, batch, repeats=1, warmup=0).arms
    assert arm.modes["infer"].memory.peak / MIB == pytest.approx(4, rel=0.05)
    # AdamW's foreach update takes up to three more buffers of the size of the weight.
    assert 16 <= arm.modes["train"].memory.peak / MIB <= 16 + 3 * 4 + 1


@pytest.mark.parametrize("training", [True, False])
def test_the_models_of_the_caller_are_left_alone(training: bool):
    models = {"a": net(8).train(training), "b": net(16).train(training)}
    before = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}
    compare(models, images(), repeats=1, warmup=1)
    for name, model in models.items():
        assert all(module.training is training for module in model.modules())
        assert all(p.grad is None for p in model.parameters())
        assert all(p.requires_grad for p in model.parameters())
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[name][key]), f"{name}.{key}"
        assert not any(module._forward_hooks for module in model.modules())


# --- arithmetic, on planned measurements ---


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """Replaces the clock and the profiler; returns the samples per arm, to be filled in."""
    samples: dict[str, list[float]] = {}
    time = (TimeSpent(Category.OTHER, "forward", "", 1.0),)
    found = Profiled(time, {}, {}, Peaks(3 * MIB, 0, 0, None))
    monkeypatch.setattr(
        comparison, "time_interleaved", lambda steps, **kwargs: Timing(samples, {}, 0.0)
    )
    monkeypatch.setattr(comparison, "profile_step", lambda step, device: found)
    return samples


def test_latency_ratio_is_paired_round_by_round(planned: dict[str, list[float]]):
    planned |= {"a": [1, 2, 4, 10], "b": [2, 2, 2, 2]}
    a, b = compare({"a": net(), "b": net()}, images(), mode="infer", repeats=4).arms
    assert a.modes["infer"].latency_ms == Spread.of([1, 2, 4, 10])
    assert a.modes["infer"].samples_ms == (1, 2, 4, 10)
    ratio = b.modes["infer"].ratio
    assert ratio.median == pytest.approx(0.75), "of 2, 1, 0.5 and 0.2; medians give 0.67"
    assert ratio.iqr == pytest.approx(1.25 - 0.425)
    assert b.modes["infer"].images_per_s == pytest.approx(1500)


def test_a_verdict_needs_ten_rounds(planned: dict[str, list[float]]):
    for count, verdict in ((9, "no difference shown"), (10, "slower")):
        planned |= {"a": [1.0] * count, "b": [1.1] * count}
        result = compare({"a": net(), "b": net()}, images(), mode="infer", repeats=count)
        assert result.arms[1].modes["infer"].ratio.verdict == verdict
        assert verdict in str(result).splitlines()[2]


def test_warns_of_a_busy_machine_and_of_what_is_not_known_well(
    planned: dict[str, list[float]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(comparison.os, "getloadavg", lambda: (7.5, 0, 0))
    monkeypatch.setattr(comparison.os, "cpu_count", lambda: 4)
    planned |= {"a": [1.0] * 20, "b": [1.0, 2.0] * 10, "c": [1.5] * 20, "d": [1.0, 1.5] * 10}
    models = {name: net() for name in planned}
    result = compare(models, images(), mode="infer", repeats=20)
    busy, unknown = result.warnings
    assert busy.startswith("the machine was busy before: 7.5 processes on 4 cores")
    assert unknown.startswith(
        "ratios of infer are known less well than to 2.0% (2 arms, at worst b to 33.3%): "
    )
    assert result.load == (7.5, 7.5)
    assert all(f"warning: {line}" in str(result) for line in result.warnings)


def test_operators_that_differ_are_listed():
    more = nn.Sequential(net(), nn.GELU(), nn.Linear(5, 5))
    result = compare({"a": net(), "more": more}, images(), repeats=2, warmup=0)
    assert operator_changes(result, "a", "infer") == []
    for mode in ("infer", "train"):
        found = {change.name: change for change in operator_changes(result, "more", mode)}
        gelu, linear = found["aten::gelu"], found["aten::addmm"]
        assert (gelu.kind, gelu.before.calls, gelu.after.calls) == ("appears", 0, 1)
        assert (linear.kind, linear.before.calls, linear.after.calls) == ("changes", 1, 2)
        assert gelu.after.self_ms > 0 == gelu.before.self_ms
        assert "aten::_convolution" not in found
        assert ("aten::gelu_backward" in found) is (mode == "train")
        gaps = [abs(c.after.self_ms - c.before.self_ms) for c in found.values()]
        assert gaps == sorted(gaps, reverse=True)
    turned = dataclasses.replace(result, baseline="more")
    kinds = {change.name: change.kind for change in operator_changes(turned, "a", "train")}
    assert kinds["aten::gelu"] == "vanishes"
    with pytest.raises(UnknownNameError, match="unknown arm 'mre': did you mean more"):
        operator_changes(result, "mre", "infer")
    with pytest.raises(UnknownNameError, match="unknown mode 'both'"):
        operator_changes(result, "more", "both")  # pyright: ignore[reportArgumentType]


def test_another_baseline(planned: dict[str, list[float]]):
    planned |= {"a": [2, 2], "b": [4, 4]}
    result = compare({"a": net(), "b": net(16)}, images(), mode="infer", repeats=2, baseline="b")
    a, b = result.arms
    assert (result.baseline, result.reference) == ("b", "b")
    assert a.modes["infer"].ratio.median == 0.5
    assert b.modes["infer"].ratio.median == 1


def test_reference_need_not_be_the_baseline(planned: dict[str, list[float]]):
    planned |= {"a": [1], "b": [1]}
    models = {"a": net(offset=2.0), "b": net(offset=0.5)}
    result = compare(models, images(), mode="infer", repeats=1, reference="b")
    assert (result.baseline, result.reference) == ("a", "b")
    assert [arm.max_abs_diff_at_insertion for arm in result.arms] == [1.5, 0]


def test_peak_is_what_is_held_and_what_a_step_takes(planned: dict[str, list[float]]):
    planned |= {"a": [1]}
    model, batch = net(), images()
    (arm,) = compare({"a": model}, batch, mode="infer", repeats=1).arms
    held = sum(t.numel() * t.element_size() for t in [*model.state_dict().values(), batch])
    assert arm.modes["infer"].memory.peak == held + 3 * MIB


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("infer", ["infer"]), ("train", ["train"]), ("both", ["infer", "train"])],
)
def test_mode_chooses_what_is_measured(
    planned: dict[str, list[float]], mode: str, expected: list[str]
):
    planned |= {"a": [1]}
    (arm,) = compare({"a": net()}, images(), mode=mode, repeats=1).arms
    assert list(arm.modes) == expected


@pytest.mark.parametrize(
    ("compiled", "expected"), [(True, ["a", "b"]), (False, []), (["b"], ["b"])]
)
def test_arms_are_compiled_as_asked_for(
    planned: dict[str, list[float]],
    monkeypatch: pytest.MonkeyPatch,
    compiled: Any,
    expected: list[str],
):
    planned |= {"a": [1], "b": [1]}
    compiled_modules: list[nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled_modules.append(model) or model)
    models = {"a": net(), "b": net()}
    result = compare(models, images(), mode="infer", repeats=1, compiled=compiled)
    assert [arm.name for arm in result.arms if arm.compiled] == expected
    assert len(compiled_modules) == 2 * len(expected), "once to compare outputs, once to time"


def test_outputs_of_compiled_arms_are_those_that_are_looked_at(
    planned: dict[str, list[float]], monkeypatch: pytest.MonkeyPatch
):
    planned |= {"a": [1], "b": [1]}
    models = {"a": net(), "b": net(), "c": net()}
    wrong = {"b": lambda out: out + 0.25, "c": lambda out: out * float("nan")}

    def miscompile(model: nn.Module) -> Any:
        return lambda x: wrong[model.own_name](model(x))

    for name, model in models.items():
        model.own_name = name  # which copies have as well
    monkeypatch.setattr(torch, "compile", miscompile)
    result = compare(models, images(), mode="infer", repeats=1, compiled=["b", "c"])
    assert result.arm("b").max_abs_diff_at_insertion == pytest.approx(0.25, abs=1e-6)
    assert "not finite" in result.arm("c").failures["infer"]


def test_what_cannot_be_compiled_fails_the_arm(monkeypatch: pytest.MonkeyPatch):
    def fail(model: nn.Module) -> Any:
        raise NotImplementedError("no compiler for this")

    monkeypatch.setattr(torch, "compile", fail)
    result = compare({"a": net(), "b": net()}, images(), mode="infer", repeats=1, compiled=["b"])
    assert result.arm("b").failures == {"infer": "no compiler for this"}
    assert list(result.arm("a").modes) == ["infer"]


def test_dtype_is_that_of_the_images(planned: dict[str, list[float]]):
    planned |= {"a": [1]}
    result = compare({"a": net().double()}, images().double(), mode="infer", repeats=1)
    assert result.dtype == "float64"


def test_the_memory_format_is_that_of_the_images(planned: dict[str, list[float]]):
    planned |= {"a": [1]}
    batch = images().contiguous(memory_format=torch.channels_last)
    result = compare({"a": net()}, batch, mode="infer", repeats=1)
    assert result.memory_format == "channels_last"


def test_a_baseline_without_parameters(planned: dict[str, list[float]]):
    planned |= {"nothing": [1], "net": [2]}
    models = {"nothing": nn.Identity(), "net": nn.Conv2d(3, 3, 1)}
    nothing, other = compare(models, images(), mode="infer", repeats=1).arms
    assert (nothing.params, nothing.macs, nothing.macs_by_flop_counter) == (0, 0, 0)
    assert other.params == 12
    assert other.modes["infer"].ratio.median == 2


# --- refusals ---


def test_unknown_arm_is_refused_with_the_nearest():
    with pytest.raises(UnknownNameError, match=r"unknown arm 'smal': did you mean small\?"):
        compare({"small": net()}, images(), baseline="smal")
    with pytest.raises(UnknownNameError, match=r"unknown arm 'smal'"):
        compare({"small": net()}, images(), reference="smal")


def test_no_model_is_refused():
    with pytest.raises(ValueError, match="expected models to compare, got none"):
        compare({}, images())


@pytest.mark.parametrize(
    ("numbers", "got"),
    [
        ({"repeats": 0}, "0, 3, "),
        ({"repeats": 2, "warmup": -1}, "2, -1, "),
        ({"precision": 0.0}, "20, 3, 0.0 and 20.0"),
        ({"precision": float("nan")}, "20, 3, nan and 20.0"),
        ({"budget_s": -1.0}, "20, 3, 0.02 and -1.0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(numbers: dict[str, Any], got: str):
    with pytest.raises(ValueError, match=f"^expected repeats >= 1, .* got {got}"):
        compare({"a": net()}, images(), **numbers)


def test_unknown_mode_is_refused():
    with pytest.raises(UnknownNameError, match=r"unknown mode 'training': did you mean train"):
        compare({"a": net()}, images(), mode="training")


@pytest.mark.parametrize("name", ["a/b", "", ".."])
def test_arms_that_cannot_name_a_folder_are_refused(name: str):
    with pytest.raises(ValueError, match=r"expected arm names that can name a folder, got"):
        compare({"a": net(), name: net()}, images())


@pytest.mark.parametrize("shape", [(3, 16, 16), (0, 3, 16, 16)])
def test_no_batch_of_images_is_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"expected images \(B, C, H, W\), got \("):
        compare({"a": net()}, torch.zeros(shape))


def test_more_arms_than_torch_compiles_are_refused():
    models = {f"a{i}": net() for i in range(9)}
    with pytest.raises(ValueError, match=r"torch.compile keeps 8 versions .*, got 9 models"):
        compare(models, images(), compiled=True)


def test_outputs_other_than_one_tensor_are_refused():
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(MeasurementError, match="expected one tensor as output, pair gives a tuple"):
        compare({"pair": Pair()}, images())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_training_is_measured_whatever_the_caller_does(context: Any):
    models, batch = {"a": net()}, images()
    with context():
        (arm,) = compare(models, batch, mode="train", repeats=1, warmup=0).arms
    params_mib = 4 * arm.params / MIB
    assert arm.modes["train"].memory.peak / MIB > 3 * params_mib, "AdamW holds two moments"


def test_images_that_an_arm_refuses_are_named():
    with pytest.raises(MeasurementError, match=r"^b refuses images of 3x3x16x16: .*channels"):
        compare({"a": net(), "b": nn.Conv2d(4, 4, 1)}, images())


# --- arms that fail ---


class Fails(nn.Module):
    """A network that gives up in one of its forward passes."""

    def __init__(self, error: Exception, when: int, mode: str):
        super().__init__()
        self.net, self.error, self.when, self.mode = net(), error, when, mode

    def forward(self, x: Tensor) -> Tensor:
        counts = self.training is (self.mode == "train") and not x.is_meta
        self.when -= counts
        if counts and self.when < 0:
            raise self.error
        return self.net(x)


OUT = torch.OutOfMemoryError("tried to allocate 8 EiB")


def check_others(result: Comparison, *modes: str) -> None:
    """The arms around the one that failed have all figures, and those are sound."""
    first, _, last = result.arms
    for arm in (first, last):
        assert arm.failures == {}
        assert list(arm.modes) == list(modes)
        assert all(figures.ratio is not None for figures in arm.modes.values())


@pytest.mark.parametrize(
    "when", [1, 2, 3, 6, 7], ids=["first", "warm-up", "round", "last", "profile"]
)
def test_memory_that_runs_out_loses_no_other_arm(when: int):
    models = {"a": net(), "big": Fails(OUT, when, "infer"), "b": net()}
    result = compare(models, images(), repeats=3, warmup=1)
    check_others(result, "infer", "train")
    big = result.arm("big")
    assert big.failures == {"infer": "out of memory: tried to allocate 8 EiB"}
    assert list(big.modes) == ["train"]
    assert big.max_abs_diff_at_insertion == 0
    assert (big.params, big.macs) == (result.arm("a").params, result.arm("a").macs)
    assert "failed" in str(result).splitlines()[2]


def test_memory_that_runs_out_at_once_fails_every_mode():
    models = {"a": net(), "big": Fails(OUT, 0, "infer"), "b": net()}
    result = compare(models, images(), repeats=1, warmup=0)
    check_others(result, "infer", "train")
    assert set(result.arm("big").failures) == {"infer", "train"}
    assert result.arm("big").max_abs_diff_at_insertion is None


def test_memory_that_a_cpu_does_not_have_is_called_so():
    class Greedy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.new_empty(2**55)[0]

    result = compare({"a": nn.Flatten(), "b": Greedy()}, images(), mode="infer", repeats=1)
    assert result.arm("b").failures["infer"].startswith("out of memory: ")


def test_an_arm_that_cannot_be_trained_keeps_its_other_figures():
    models = {"a": net(), "frozen": net().requires_grad_(False), "b": net()}
    result = compare(models, images(), repeats=1, warmup=0)
    check_others(result, "infer", "train")
    frozen = result.arm("frozen")
    assert list(frozen.modes) == ["infer"]
    assert list(frozen.failures) == ["train"]
    assert "parameter list" in frozen.failures["train"]


def test_an_arm_may_raise_whatever_it_likes():
    class Raises(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise KeyError("k")
            return self.net(x)

    result = compare({"a": net(), "b": Raises()}, images(), repeats=2)
    assert result.arm("b").failures == {"train": "KeyError 'k'"}
    assert list(result.arm("b").modes) == ["infer"]
    assert list(result.arm("a").modes) == ["infer", "train"]


def test_weights_that_overflow_fail_the_arm():
    class Overflows(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] + 1e6  # more than there is in half precision

    class Big(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            return Overflows.apply(self.net(x))

    half = {"a": net().half(), "b": Big().half()}
    result = compare(half, images().half(), mode="train", repeats=2)
    assert "its weights are not finite after training steps" in result.arm("b").failures["train"]
    assert list(result.arm("a").modes) == ["train"]


def test_weights_that_are_not_trained_may_be_infinite():
    """Such as a mask that is a parameter."""
    masked = nn.Sequential(net())
    masked.mask = nn.Parameter(torch.tensor([0.0, float("-inf")]), requires_grad=False)
    result = compare({"a": net(), "b": masked}, images(), repeats=1)
    assert list(result.arm("b").modes) == ["infer", "train"]


def test_a_model_that_must_see_values_is_named():
    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) if x.sum() > 0 else -x.flatten(1)

    with pytest.raises(MeasurementError, match="the cost of b cannot be told without running it"):
        compare({"a": nn.Flatten(), "b": Looks()}, images(), repeats=1)


def test_outputs_that_mean_nothing_fail_the_arm():
    models = {"a": net(), "bad": net(offset=float("nan")), "b": net()}
    result = compare(models, images(), repeats=1, warmup=0)
    check_others(result, "infer", "train")
    assert set(result.arm("bad").failures) == {"infer", "train"}
    assert result.arm("bad").failures["train"].startswith("its output is not finite")
    models["bad"] = nn.Flatten()
    (_, bad, _) = compare(models, images(), mode="infer", repeats=1, warmup=0).arms
    shapes = "the shape (3, 768), that of a (3, 5)"
    assert bad.failures == {"infer": f"its output has {shapes}"}


def test_without_a_baseline_there_are_figures_and_no_ratios():
    models = {"a": Fails(OUT, 2, "infer"), "b": net()}
    result = compare(models, images(), mode="infer", repeats=3, warmup=1)
    assert result.arm("a").failures
    figures = result.arm("b").modes["infer"]
    assert (figures.ratio, figures.memory_ratio) == (None, None)
    assert figures.latency_ms.median > 0
    assert result.rounds == {"infer": 3}


def test_a_reference_that_fails_is_nothing_to_be_compared_with():
    models = {"a": net(offset=float("nan")), "b": net(), "c": nn.Flatten()}
    result = compare(models, images(), mode="infer", repeats=1, warmup=0)
    assert [arm.max_abs_diff_at_insertion for arm in result.arms] == [None, None, None]
    assert set(result.arm("c").modes) == {"infer"}


def test_nothing_that_can_be_measured_is_an_error():
    with pytest.raises(MeasurementError, match=r"no arm can be measured; a: its output is not"):
        compare({"a": net(offset=float("inf"))}, images())
    with pytest.raises(MeasurementError, match=r"no arm can be measured; a: .*parameter list"):
        compare({"a": net().requires_grad_(False)}, images(), mode="train")


# --- traces that cannot be kept ---


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("no")])
def test_traces_that_cannot_be_written_lose_no_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
):
    def write(step: Any, device: Any, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{step.mode}.1.pt.trace.json.gz").write_text("half of it")
        raise error

    monkeypatch.setattr(comparison, "record_trace", write)
    models = {"a": net(), "b": net(), "c": net()}
    result = compare(models, images(), repeats=1, warmup=0, trace_dir=tmp_path / "traces")
    check_others(result, "infer", "train")
    lost = [line for line in result.warnings if line.startswith("no trace of ")]
    assert len(lost) == 6
    assert lost[0] == f"no trace of infer of a in {tmp_path / 'traces'}: {error}"
    assert not list(tmp_path.rglob("*.gz"))


def test_a_trace_folder_that_is_a_file_loses_no_figures(tmp_path: Path):
    (tmp_path / "traces").write_text("mine")
    result = compare({"a": net()}, images(), mode="infer", repeats=1, trace_dir=tmp_path / "traces")
    assert list(result.arms[0].modes) == ["infer"]
    assert result.warnings[0].startswith("no trace of infer of a in ")
