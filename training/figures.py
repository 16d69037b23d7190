"""Figures as SVG for inclusion in a page: no ids that clash, text in the page's own colour."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .evaluate import Evaluation

__all__ = ["learning_curves", "reliability_diagram", "sweep_figures", "trade_off"]

# Stands for whatever colour the page's text has; light or dark is decided where the page is read.
_TEXT = "#010203"
# Told apart on light and on dark ground, and by those who see no red or no green (Okabe and Ito 2008).
_BLUE, _ORANGE = "#3b8ad8", "#e08a00"
_LINES = (_BLUE, _ORANGE, "#2e8b57", "#8a63c9", "#d65428")
_STYLE = {
    "svg.hashsalt": "graftserve",  # the same figure has the same ids in every process
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": _TEXT,
    "axes.edgecolor": _TEXT,
    "axes.labelcolor": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _TEXT,
    "grid.alpha": 0.15,
    "legend.frameon": False,
}
_MANY_POINTS = 40


def learning_curves(history: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """SVG figures by their titles, of what was measured of loss, accuracy and learning rate over the epochs.

    history: as in ReportData. The stages follow each other along the axis, with a dashed line between.
    """
    epochs, borders = _along_one_axis(history)
    panels = {
        "Loss": {"training": "loss", "validation": "validation_loss"},
        "Accuracy on validation": {"": "validation_accuracy"},
        "Learning rate": {"": "learning_rate"},
    }
    figures: dict[str, str] = {}
    for title, series in panels.items():
        curves = {
            name: [
                (x, entry[key])
                for x, entry in zip(epochs, history, strict=True)
                if entry.get(key) is not None
            ]
            for name, key in series.items()
        }
        if any(curves.values()):
            figures[title] = _curves_figure(title, curves, borders)
    return figures


def sweep_figures(sweeps: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """SVG figures by their titles, of the loss over the rates of each learning-rate sweep.

    sweeps: as in ReportData. A dashed line stands at the rate that was taken.
    """
    figures: dict[str, str] = {}
    for number, (stage, sweep) in enumerate(sweeps.items()):
        with matplotlib.style.context(["default", _STYLE]):
            figure = Figure(figsize=(4.6, 2.7), layout="constrained")
            axes = figure.subplots()
            axes.plot(sweep["rates"], sweep["losses"], color=_BLUE, linewidth=1.4)
            axes.axvline(sweep["suggested"], color=_ORANGE, linestyle="--", linewidth=1.4)
            axes.set(xlabel="learning rate", ylabel="loss", xscale="log")
            title = f"Learning rate of {stage}: {sweep['suggested']:.2g}"
            figures[title] = _to_svg(figure, f"sweep-{number}", "Loss over the learning rate")
    return figures


def reliability_diagram(before: Evaluation, after: Evaluation | None) -> str:
    """SVG: accuracy over the top score for each bin, larger where more images are; below, the images' shares.

    On the diagonal a score says how often it is right; below it the model is too sure. after: at the fitted
    temperature.
    """
    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(4.6, 4.2), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.plot([0, 1], [0, 1], color=_TEXT, alpha=0.4, linestyle="--", linewidth=1)
        width = 0.4 / len(before.reliability)
        for result, name, color, side in (
            (before, "as trained", _ORANGE, -1),
            (after, "with temperature", _BLUE, 1),
        ):
            if result is None:
                continue
            middles = (np.arange(len(result.reliability)) + 0.5) / len(result.reliability)
            share = result.reliability[:, 0] / result.images
            lower.bar(middles + side * width / 2, share, width, color=color)
            filled = share > 0
            _, score, accuracy = result.reliability[filled].T
            upper.scatter(score, accuracy, 10 + 150 * share[filled], color=color, label=name, alpha=0.9)
        upper.set(ylabel="accuracy", xlim=(0, 1.04), ylim=(-0.04, 1.04))
        lower.set(xlabel="score of the answer", ylabel="images", ylim=(0, None))
        lower.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        for handle in upper.legend(loc="lower right").legend_handles:
            handle.set_sizes([20])
        return _to_svg(figure, "reliability", "Accuracy over the score of the answer")


def trade_off(
    lines: Mapping[str, Sequence[tuple[float, float, str]]], chosen: tuple[float, float], x: str, y: str
) -> str:
    """SVG: for up to five lines, by their names, points (x, y) with a text beside each; one is circled."""
    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        for (name, points), color in zip(lines.items(), _LINES, strict=False):
            across, up, texts = zip(*points, strict=True)
            axes.plot(across, up, color=color, label=name, marker="o", markersize=4, linewidth=1.4)
            for place in zip(texts, across, up, strict=True):
                axes.annotate(place[0], place[1:], textcoords="offset points", xytext=(5, -10), fontsize=8)
        axes.scatter(*chosen, 140, facecolors="none", edgecolors=_TEXT, linewidths=1.4)
        axes.set(xlabel=x, ylabel=y, xscale="log", ylim=(0, None))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.legend(loc="lower right")
        return _to_svg(figure, "trade-off", f"{y} over {x}")


def _along_one_axis(history: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Each entry's place in epochs since the first stage began, and where one stage follows another."""
    epochs: list[float] = []
    borders: list[float] = []
    begin = 0.0
    for index, entry in enumerate(history):
        before = history[index - 1] if index else entry
        if entry["stage"] != before["stage"] or entry["epoch"] < before["epoch"]:
            begin = epochs[-1]
            borders.append(begin)
        epochs.append(begin + entry["epoch"])
    return epochs, borders


def _curves_figure(
    title: str, curves: Mapping[str, Sequence[tuple[float, float]]], borders: Sequence[float]
) -> str:
    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.subplots()
        for (name, points), color in zip(curves.items(), (_BLUE, _ORANGE), strict=False):
            if points:
                x, y = zip(*points, strict=True)
                marker = "o" if len(points) <= _MANY_POINTS else None
                axes.plot(x, y, color=color, label=name, marker=marker, markersize=3, linewidth=1.4)
        for border in borders:
            axes.axvline(border, color=_TEXT, alpha=0.5, linestyle="--", linewidth=1)
        axes.set(xlabel="epochs", ylabel=title.lower())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(curves) > 1:
            axes.legend()
        return _to_svg(figure, title.lower().replace(" ", "-"), f"{title} over the epochs")


def _to_svg(figure: Figure, name: str, description: str) -> str:
    """The svg element alone, in the page's font. `name` makes its ids differ from those of other figures."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_TEXT, "currentColor")
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font-family: [^;]+;", "", text)
    text = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", text, count=1)  # it fills what room there is
    return text.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)
