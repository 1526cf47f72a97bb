"""What was found, in sentences: the beginning of every report."""

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from tokenconv.profiling.measurement import Mode
from tokenconv.profiling.results import Arm, Comparison, Measured, Point, short

MODE_NAMES: Mapping[Mode, str] = {"infer": "Inference", "train": "A training step"}
_MOST_NAMED = 4


def title(about: Mapping[str, str], names: Sequence[str]) -> str:
    """Such as ``pvt_v2_b0: attention_only, mix_ffn``, or how many there are."""
    named = ", ".join(names) if len(names) <= _MOST_NAMED else f"{len(names)} arms"
    return f"{about.get('model', 'Comparison')}: {named}"


def summary(comparison: Comparison) -> str:
    """What matters most, in one sentence per mode."""
    return " ".join(filter(None, (_verdicts(comparison, mode) for mode in comparison.modes)))


def _verdicts(comparison: Comparison, mode: Mode) -> str:
    """Who is slower and who is faster than the baseline; empty if nobody is compared with it."""
    baseline = comparison.baseline
    told: dict[str, dict[str, float]] = {}
    for arm in comparison.arms:
        measured = arm.modes.get(mode)
        if arm.name != baseline and measured and measured.ratio:
            told.setdefault(measured.ratio.verdict, {})[arm.name] = measured.ratio.median
    parts = []
    for verdict, ratios in told.items():
        names = _named(ratios, short=len(comparison.arms) > _MOST_NAMED)
        is_or_are = "is" if len(ratios) == 1 else "are"
        parts.append(
            f"no difference from {baseline} is shown for {names}"
            if verdict == "no difference shown"
            else f"{names} {is_or_are} {verdict} than {baseline}"
        )
    return f"{MODE_NAMES[mode]}: {'; '.join(parts)}." if parts else ""


def _named(ratios: Mapping[str, float], *, short: bool) -> str:
    """Arms and their ratios; of many how many they are, and the range."""
    if short and len(ratios) > 1:
        low, high = min(ratios.values()), max(ratios.values())
        return f"{len(ratios)} arms ({low:.2f}x to {high:.2f}x the time)"
    return _listed([f"{name} ({ratio:.2f}x the time)" for name, ratio in ratios.items()])


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def arms(comparison: Comparison) -> dict[str, str]:
    """What every arm is, by name."""
    return {arm.name: _introduced(arm, comparison) for arm in comparison.arms}


def _introduced(arm: Arm, comparison: Comparison) -> str:
    said = [arm.description] if arm.description else []
    if arm.name == comparison.baseline:
        said.append("the baseline: times and memory are compared with it")
    if arm.name == comparison.reference:
        said.append("the reference: outputs are compared with it")
    if arm.compiled and not arm.description:
        said.append("through torch.compile")
    return "; ".join(said) or "no description was given"


def counted(count: int, thing: str) -> str:
    """Such as ``1 image`` and ``4 images``."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def introduction(comparison: Comparison) -> str:
    """What was done, for those who were not there."""
    return (
        f"{counted(len(comparison.arms), 'arm')} took turns on the same images, in random order: "
        f"{setting(comparison)}. Whatever disturbs the machine disturbs all of them, so it is "
        f"their ratios that are reliable."
    )


def setting(comparison: Comparison) -> str:
    """What was run on what."""
    size = "x".join(str(s) for s in comparison.input_size)
    return (
        f"{counted(comparison.batch_size, 'image')} of {size} in {comparison.dtype} on "
        f"{comparison.device}, {counted(comparison.threads, 'thread')}"
    )


def findings(comparison: Comparison) -> list[str]:
    """What was found about every arm but the baseline."""
    others = [arm for arm in comparison.arms if arm.name != comparison.baseline]
    return [line for arm in others for line in _of_arm(arm, comparison)]


def failures(comparison: Comparison) -> list[str]:
    """What could not be measured, and why."""
    return [
        f"{MODE_NAMES[mode]} of {arm.name}: {reason}"
        for arm in comparison.arms
        for mode, reason in arm.failures.items()
    ]


def _of_arm(arm: Arm, comparison: Comparison) -> Iterator[str]:
    for mode, measured in arm.modes.items():
        yield f"{MODE_NAMES[mode]} of {arm.name} takes {_time(measured, comparison)}."
    if arm.name != comparison.reference:
        yield f"The output of {arm.name} {_difference(arm, comparison.reference)}."
    if arm.macs != arm.macs_by_flop_counter:
        yield (
            f"MACs of {arm.name} are not confirmed: {arm.macs:,} by formula, "
            f"{arm.macs_by_flop_counter:,} by PyTorch's FlopCounterMode."
        )


def _time(measured: Measured, comparison: Comparison) -> str:
    ratio, memory = measured.ratio, measured.memory_ratio
    images = counted(comparison.batch_size, "image")
    taken = f"{short(measured.latency_ms.median)} ms for {images}"
    if ratio is None or memory is None:
        return f"{taken}; {comparison.baseline} failed, so there is nothing to compare it with"
    return (
        f"{ratio.median:.2f}x the time of {comparison.baseline} ({ratio.low:.2f} to "
        f"{ratio.high:.2f}: {ratio.verdict}; {taken}) and {memory:.2f}x its memory"
    )


def _difference(arm: Arm, reference: str) -> str:
    difference = arm.max_abs_diff_at_insertion
    if difference is None:
        return f"could not be compared with that of {reference}"
    if difference == 0:
        return f"is equal to that of {reference}, bit for bit"
    return f"differs from that of {reference} by up to {difference:.2g}"


# --- of a sweep ---


def measured_points(points: Sequence[Point]) -> list[tuple[Point, Comparison]]:
    """Points that have a comparison, with it."""
    return [(point, point.comparison) for point in points if point.comparison is not None]


def sweep_arms(points: Sequence[Point]) -> list[str]:
    """Names of the arms, in their order."""
    return list(
        dict.fromkeys(arm.name for _, found in measured_points(points) for arm in found.arms)
    )


def sweep_modes(points: Sequence[Point]) -> list[Mode]:
    """What was measured at any point."""
    return list(dict.fromkeys(mode for _, found in measured_points(points) for mode in found.modes))


def sweep_introduction(points: Sequence[Point]) -> str:
    """What was done, for those who were not there."""
    values: dict[str, dict[str, None]] = {}
    for point in points:
        for key, value in point.settings.items():
            values.setdefault(key, {})[value] = None
    varied = "; ".join(f"{key} {', '.join(own)}" for key, own in values.items())
    return (
        f"The arms were compared at {len(points)} points: {varied}. At each of them they were "
        f"given the same images, in turn and in random order. Ratios are to the baseline of the "
        f"same point."
    )


def sweep_findings(points: Sequence[Point]) -> list[str]:
    """The range of every arm's ratios over the points."""
    found: dict[tuple[Mode, str], list[tuple[Point, Measured]]] = {}
    for point, comparison in measured_points(points):
        for arm in comparison.arms:
            for mode, measured in arm.modes.items():
                if arm.name != comparison.baseline and measured.ratio is not None:
                    found.setdefault((mode, arm.name), []).append((point, measured))
    return [
        f"{MODE_NAMES[mode]} of {name} takes {_range(measured)}."
        for (mode, name), measured in found.items()
    ]


def _range(measured: Sequence[tuple[Point, Measured]]) -> str:
    ratios = {point.name: one.ratio for point, one in measured if one.ratio is not None}
    memory = [one.memory_ratio for _, one in measured if one.memory_ratio is not None]
    least = min(ratios, key=lambda name: ratios[name].median)
    most = max(ratios, key=lambda name: ratios[name].median)
    middle = statistics.median(ratio.median for ratio in ratios.values())
    counted = Counter(ratio.verdict for ratio in ratios.values())
    verdicts = ", ".join(f"{verdict} at {count}" for verdict, count in counted.items())
    return (
        f"{ratios[least].median:.2f}x ({least}) to {ratios[most].median:.2f}x ({most}) the time of "
        f"the baseline, {middle:.2f}x in the median of {len(ratios)} points ({verdicts}), and "
        f"{min(memory):.2f}x to {max(memory):.2f}x its memory"
    )


def sweep_failures(points: Sequence[Point]) -> list[str]:
    """Points, and arms at points, that could not be measured."""
    lines = [f"{p.name}: {p.failure}" for p in points if p.comparison is None]
    for point, comparison in measured_points(points):
        lines += [f"At {point.name}: {line}" for line in failures(comparison)]
    return lines


def sweep_warnings(points: Sequence[Point]) -> list[str]:
    """Why figures of points may be worth less than they look."""
    names: dict[str, list[str]] = {}
    for point, comparison in measured_points(points):
        for line in comparison.warnings:
            names.setdefault(line, []).append(point.name)
    return [f"{line} (at {'; '.join(own)})" for line, own in names.items()]
