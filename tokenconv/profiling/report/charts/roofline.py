"""The roofline chart: depthwise convolutions under what the device can do."""

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from tokenconv.profiling.measurement import Mode
from tokenconv.profiling.report.roofline import roofline_points
from tokenconv.profiling.results import Comparison
from tokenconv.reports.chart import INK, Chart
from tokenconv.reports.ladder import elided
from tokenconv.reports.palette import COLORS, MARKERS
from tokenconv.reports.scaled import finish, scaled


def roofline(comparison: Comparison, mode: Mode) -> Chart | None:
    """None where no depthwise convolution was timed.

    Args:
        comparison: What was measured.
        mode: One of its modes.
    """
    found = {arm.name: roofline_points(comparison, arm, mode) for arm in comparison.arms}
    found = {name: points for name, points in found.items() if points}
    if not found:
        return None
    roof = comparison.roof
    ridge = roof.flops_per_s / roof.bytes_per_s
    every = [point for points in found.values() for point in points]

    def draw(ax: Axes) -> None:
        ends = [
            min(ridge, *(p.intensity for p in every)) / 3,
            max(ridge, *(p.intensity for p in every)) * 3,
        ]
        ax.set(xscale="log", yscale="log", xlim=ends)
        ax.plot(
            [ends[0], ridge, ends[1]],
            [ends[0] * roof.bytes_per_s / 1e9, roof.flops_per_s / 1e9, roof.flops_per_s / 1e9],
            lw=1.5,
            color=INK,
        )
        legend = []
        for i, (name, points) in enumerate(found.items()):
            (drawn,) = ax.plot(
                [point.intensity for point in points],
                [point.flops_per_s / 1e9 for point in points],
                MARKERS[i % len(MARKERS)], color=COLORS[i % len(COLORS)], ms=6, alpha=0.75,
                mec="none",
            )  # fmt: skip
            legend.append((drawn, elided(name)))
        ax.margins(y=0.12)
        plain = FuncFormatter(lambda value, _: f"{value:,g}")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(plain)
            axis.set_minor_formatter(NullFormatter())
        finish(ax, legend, across="arithmetic intensity [FLOP per byte]", up="GFLOP/s", columns=2)

    return Chart(
        name=f"{mode}-roofline",
        title=f"{mode}: roofline of the depthwise convolutions",
        words=f"The device: {roof.flops_per_s / 1e9:,.0f} GFLOP/s, "
        f"{roof.bytes_per_s / 1e9:,.1f} GB/s; "
        + "; ".join(
            f"{name}: {len(points)} convolutions, "
            f"{min(p.flops_per_s for p in points) / 1e9:.3g} to "
            f"{max(p.flops_per_s for p in points) / 1e9:.3g} GFLOP/s at "
            f"{min(p.intensity for p in points):.2g} to {max(p.intensity for p in points):.2g} "
            f"FLOP per byte"
            for name, points in found.items()
        ),
        note=f"The line is what the device can do: {roof.bytes_per_s / 1e9:,.1f} GB/s in a copy "
        f"(slanted), {roof.flops_per_s / 1e9:,.0f} GFLOP/s in a matrix product (flat). A point is "
        f"one convolution in the forward pass; points above the slanted roof are served from "
        f"caches.",
        draw=draw,
        **scaled(legend=(len(found) + 1) // 2),
    )
