"""Latency over percentile, a curve for each level of load."""

import html
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from .load import Level
from .output import write_whole

__all__ = ["PLOT_FORMATS", "write_plot"]

PLOT_FORMATS: Final = (".png", ".svg", ".html")

# As HdrHistogram's plots: each decade nearer to 100% is as wide as the one before.
_TICKS: Final = (0.0, 90.0, 99.0, 99.9, 99.99, 99.999)
_STEPS_A_DECADE: Final = 20


def write_plot(levels: Sequence[Level], title: str, path: Path) -> None:
    """Write the curves, whole or not at all; needs matplotlib. A dashed curve is a lower bound.

    Every curve ends where less than one request would be slower.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    longest = 0.0
    for level in levels:
        if not level.latencies.count:
            continue
        percents = _percents(level.latencies.count)
        latencies_ms = [level.latencies.percentile_s(percent) * 1e3 for percent in percents]
        axes.plot(
            [_place(percent) for percent in percents],
            latencies_ms,
            label=level.name,
            linestyle="--" if level.not_sent else "-",
        )
        longest = max(longest, percents[-1])
    ticks = [tick for tick in _TICKS if tick <= max(longest, 90.0)]
    axes.set_xticks([_place(tick) for tick in ticks], [f"{tick:g}%" for tick in ticks])
    axes.set_yscale("log")
    axes.set_xlabel("percentile")
    axes.set_ylabel("latency, ms")
    axes.set_title(title)
    axes.grid(visible=True, which="both", alpha=0.2)
    if axes.lines:
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png" if path.suffix == ".png" else "svg", dpi=150)
    content = buffer.getvalue()
    if path.suffix == ".html":
        svg = content.decode()
        page = (
            f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
            f"{svg[svg.index('<svg') :]}</html>\n"
        )
        content = page.encode()
    with write_whole(path, "wb") as file:
        file.write(content)


def _percents(count: int) -> list[float]:
    """From 0 to where one of `count` is left, evenly on the axis."""
    percents = [0.0]
    step = 1
    while (share_left := 10 ** (-step / _STEPS_A_DECADE)) * count >= 1:
        percents.append(100 * (1 - share_left))
        step += 1
    return percents


def _place(percent: float) -> float:
    return -math.log10(1 - percent / 100)
