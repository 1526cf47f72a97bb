"""How to repeat what was measured."""

from collections.abc import Mapping

from tokenconv.profiling.report.findings import counted
from tokenconv.profiling.results import Comparison


def environment(comparison: Comparison) -> dict[str, str]:
    """All that the figures may depend on, by what it is called in a report."""
    size = "x".join(str(s) for s in comparison.input_size)
    return {
        **comparison.about,
        "images": (
            f"{comparison.batch_size} of {size}, {comparison.dtype}, {comparison.memory_format}"
        ),
        **_machine(comparison),
        "compiled": ", ".join(arm.name for arm in comparison.arms if arm.compiled) or "no arm",
        "rounds": ", ".join(f"{count} {mode}" for mode, count in comparison.rounds.items()),
        "overhead": ", ".join(
            f"{share:.1%} of the time of {mode} went into measuring"
            for mode, share in comparison.overhead.items()
        ),
        "load": "{:.1f} before, {:.1f} after".format(*comparison.load),
        "roof": (
            f"{comparison.roof.flops_per_s / 1e9:,.0f} GFLOP/s in a matrix product, "
            f"{comparison.roof.bytes_per_s / 1e9:,.1f} GB/s in a copy"
        ),
        "date": comparison.date,
    }


def shared_environment(comparison: Comparison, about: Mapping[str, str]) -> dict[str, str]:
    """What all points of a sweep have in common."""
    return {**about, **_machine(comparison), "date of the first point": comparison.date}


def _machine(comparison: Comparison) -> dict[str, str]:
    return {
        "device": f"{comparison.device}, {counted(comparison.threads, 'thread')}",
        "governor": comparison.governor,
        "memory counted by": comparison.memory_source,
        "versions": ", ".join(f"{k} {v}" for k, v in comparison.versions.items()),
    }
