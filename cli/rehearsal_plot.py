"""The timeline of a rehearsal: who answered, the weight that was set, how long it took, what was decided."""

import io
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .output import write_whole

if TYPE_CHECKING:
    from graftserve.k8s.rehearsal import Answer, Step

__all__ = ["write_timeline"]

_COLOURS = ("#4477aa", "#228833", "#ee6677", "#ccbb44")  # Paul Tol's "bright": told apart by everybody


def write_timeline(steps: "Sequence[Step]", answers: "Sequence[Answer]", path: Path) -> None:
    """Write it as SVG, whole or not at all; needs matplotlib.

    Above: answers in each second by version, and the canary's weight; below: the latency of each answer, and
    what failed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(12, 6), layout="constrained")
    counts, times = figure.subplots(2, 1, sharex=True)
    versions = sorted({answer.version for answer in answers if answer.version is not None})
    seconds = range(math.ceil(max((answer.sent_s for answer in answers), default=0.0)))
    below = [0] * len(seconds)
    for version, colour in zip(versions, _COLOURS * len(versions), strict=False):
        own = [answer for answer in answers if answer.version == version]
        by_second = Counter(int(answer.sent_s) for answer in own)
        heights = [by_second[second] for second in seconds]
        counts.bar(
            seconds, heights, 1.0, bottom=below, align="edge", color=colour, label=f"version {version}"
        )
        below = [low + height for low, height in zip(below, heights, strict=True)]
        times.plot(
            [answer.sent_s for answer in own],
            [answer.latency_s * 1e3 for answer in own],
            ".",
            markersize=2,
            color=colour,
            rasterized=True,  # thousands of them
        )
    for answer in answers:
        if answer.error:
            times.plot(answer.sent_s, answer.latency_s * 1e3, "x", color="black")
    weights = counts.twinx()
    weights.step(
        [*(step.changed_s for step in steps), *(step.ended_s for step in steps[-1:])],
        [*(step.weight_percent for step in steps), *(step.weight_percent for step in steps[-1:])],
        where="post",
        color="black",
        linewidth=1.2,
    )
    weights.set_ylim(0, 140)  # above 100, what is said of each step
    counts.set_ylim(0, 1.4 * max(below, default=1))
    weights.set_ylabel("canary's weight, %")
    for step in steps:
        for axes in (counts, times):
            axes.axvline(step.changed_s, color="grey", linewidth=0.5)
        said = f"{step.name}\n{step.weight_percent}%"
        if step.report is not None:
            said += f"\n{'does not agree' if step.failures else 'passed'}"
        middle_s = (step.changed_s + step.ended_s) / 2
        weights.text(middle_s, 138, said, ha="center", va="top", fontsize=7)
    counts.set_ylabel("answers a second")
    if versions:
        figure.legend(loc="outside right upper", fontsize=8)
    times.set_yscale("log")
    times.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    times.yaxis.set_major_formatter("{x:g}")
    times.yaxis.set_minor_formatter("{x:g}")
    times.set_ylabel("latency, ms")
    times.set_xlabel("s")
    failed = sum(bool(answer.error) for answer in answers)
    figure.suptitle(f"{len(answers)} requests, {failed} failed")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", dpi=150)
    with write_whole(path, "wb") as file:
        file.write(buffer.getvalue())
