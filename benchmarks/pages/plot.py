"""Charts as SVG that stand alone: light and dark, nothing loaded, and the same bytes for the same numbers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10
from typing import Any

from .report import is_spread, shown

__all__ = ["Line", "Point", "bars", "lines"]

_WIDTH, _HEIGHT = 760, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 176, 36, 52
_TEXT_WIDTH = 6.6
# Of each hue one that is seen on white and one on the site's dark card. The first is ours.
_COLOURS = (
    *(("#00796b", "#4db6ac"), ("#d84315", "#ff8a65"), ("#3949ab", "#9fa8da"), ("#b8860b", "#ffd54f")),
    *(("#8e24aa", "#ce93d8"), ("#0277bd", "#4fc3f7"), ("#6d4c41", "#bcaaa4"), ("#558b2f", "#aed581")),
    *(("#c2185b", "#f48fb1"), ("#546e7a", "#b0bec5")),
)


def _style() -> str:
    light = "".join(f".s{number} {{ color: {one} }} " for number, (one, _) in enumerate(_COLOURS))
    dark = "".join(f".s{number} {{ color: {one} }} " for number, (_, one) in enumerate(_COLOURS))
    return (
        ".card { fill: #ffffff } .grid { stroke: #d9dee2 } .axis { stroke: #7b858c } "
        "text { fill: #1b1f23; font: 12px system-ui, sans-serif } .small { fill: #4a5258 } "
        ".name { fill: currentColor } .middle { text-anchor: middle } .end { text-anchor: end } "
        ".line { fill: none; stroke: currentColor; stroke-width: 1.6 } .ours { stroke-width: 3.2 } "
        ".oursname { font-weight: 600 } .whisker { stroke: currentColor; opacity: 0.55 } "
        f".dot {{ fill: currentColor }} {light}\n"
        "@media (prefers-color-scheme: dark) { .card { fill: #1e2129 } .grid { stroke: #363b45 } "
        ".axis { stroke: #8b949e } text { fill: #eceff1 } .small { fill: #b0bec5 } "
        f".name {{ fill: currentColor }} {dark}}}"
    )


@dataclass(frozen=True)
class Point:
    """low and high: the least and the largest of the rounds, where they are known."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """One series."""

    name: str
    points: tuple[Point, ...]
    is_ours: bool = False


def lines(
    series: Sequence[Line], what: str, x_label: str, y_label: str, *, log_x: bool = False, log_y: bool = False
) -> str:
    """Lines through points, each with its name at its end. Logarithmic axes leave out what is not above 0."""
    series = [
        Line(line.name, kept, line.is_ours)
        for line in series
        if (kept := tuple(p for p in line.points if (p.x > 0 or not log_x) and (p.y > 0 or not log_y)))
    ]
    xs = sorted({point.x for line in series for point in line.points})
    ys = [y for line in series for p in line.points for y in (p.y, p.low, p.high) if y is not None]
    x_ticks = xs if len(xs) <= 6 else [t for t in _ticks(xs[0], xs[-1], log_x) if xs[0] <= t <= xs[-1]]
    y_ticks = _ticks(min(ys) if log_y else min(0.0, *ys), max(ys), log_y)
    x_of = _scale(xs, _LEFT + 12, _WIDTH - _RIGHT - 12, log_x)
    y_of = _scale((*ys, *y_ticks), _HEIGHT - _BOTTOM, _TOP, log_y)
    parts = []
    for tick in y_ticks:
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="small end" x="{_LEFT - 8}" y="{_r(y + 4)}">{_tick(tick)}</text>')
    base, labelled = _HEIGHT - _BOTTOM, float("-inf")
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
    for tick in x_ticks:
        x, text = x_of(tick), _tick(tick)
        if x - len(text) * _TEXT_WIDTH / 2 < labelled:
            continue
        labelled = x + len(text) * _TEXT_WIDTH / 2 + 8
        parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{base}" y2="{base + 5}"/>')
        parts.append(f'<text class="small middle" x="{x}" y="{base + 19}">{text}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="small middle" x="{middle}" y="{_HEIGHT - 12}">{escape(x_label)}</text>')
    # Others first: ours lies on top.
    for number, line in sorted(enumerate(series), key=lambda pair: pair[1].is_ours):
        parts.append(_line(line, number, x_of, y_of))
    parts += _names(series, x_of, y_of)
    parts.append(f'<text class="small" x="12" y="{_TOP - 16}">{escape(y_label)}</text>')
    return _document(what, _HEIGHT, parts)


def bars(groups: Mapping[str, Mapping[str, Any]], what: str, x_label: str, ours: frozenset[str]) -> str:
    """Bars of numbers or spreads, a group of them for each key, from 0. A spread's ends are a line."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    values = [value for group in groups.values() for value in group.values()]
    most = max(_ends(value)[2] for value in values)
    titled = len(groups) > 1 or any(groups)
    left = 20 + max(len(name) for name in names) * _TEXT_WIDTH
    ticks = _ticks(0.0, most, False)
    x_of = _scale((0.0, *ticks), left, _WIDTH - 90, False)
    parts, y = [], 14.0
    for title, group in groups.items():
        if titled:
            parts.append(f'<text x="12" y="{_r(y + 16)}">{escape(title)}</text>')
            y += 24
        for name, value in group.items():
            median, low, high = _ends(value)
            kind = f"s{_number(names, name, ours)}"
            bold = " oursname" if name in ours else ""
            parts.append(
                f'<text class="small end{bold}" x="{_r(left - 8)}" y="{_r(y + 13)}">{escape(name)}</text>'
            )
            parts.append(
                f'<g class="{kind}"><rect class="dot" x="{_r(left)}" y="{_r(y + 2)}" '
                f'width="{_r(max(x_of(median) - left, 1))}" height="14" rx="2"/></g>'
            )
            if low != high:
                ends = f'x1="{x_of(low)}" x2="{x_of(high)}" y1="{_r(y + 9)}" y2="{_r(y + 9)}"'
                parts.append(f'<line class="axis" {ends}/>')
            parts.append(f'<text x="{_r(x_of(high) + 6)}" y="{_r(y + 13)}">{shown(median)}</text>')
            y += 20
        y += 8
    height = ceil(y + 34)
    grid = [f'<line class="grid" x1="{x_of(t)}" x2="{x_of(t)}" y1="10" y2="{_r(y)}"/>' for t in ticks]
    axis = [f'<text class="small middle" x="{x_of(t)}" y="{_r(y + 14)}">{_tick(t)}</text>' for t in ticks]
    name = f'<text class="small end" x="{_WIDTH - 12}" y="{height - 6}">{escape(x_label)}</text>'
    return _document(what, height, [*grid, *parts, *axis, name])


def _line(line: Line, number: int, x_of: Callable[[float], float], y_of: Callable[[float], float]) -> str:
    places = [(x_of(point.x), y_of(point.y)) for point in line.points]
    ours = " ours" if line.is_ours else ""
    dashes = ' stroke-dasharray="5 3"' if number >= len(_COLOURS) else ""
    path = "M" + " ".join(f"{x} {y}" for x, y in places)
    whiskers = "".join(
        f'<line class="whisker" x1="{x_of(p.x)}" x2="{x_of(p.x)}" y1="{y_of(p.low)}" y2="{y_of(p.high)}"/>'
        for p in line.points
        if p.low is not None and p.high is not None
    )
    dots = "".join(f'<circle class="dot" cx="{x}" cy="{y}" r="{3.5 if ours else 2.5}"/>' for x, y in places)
    kind = f"s{number % len(_COLOURS)}"
    return f'<g class="{kind}">{whiskers}<path class="line{ours}" d="{path}"{dashes}/>{dots}</g>'


def _names(
    series: Sequence[Line], x_of: Callable[[float], float], y_of: Callable[[float], float]
) -> list[str]:
    """At the right, pushed apart where they would lie on each other, and drawn back to the lines' ends."""
    gap, x = 15.0, _WIDTH - _RIGHT + 4
    wanted = sorted((y_of(line.points[-1].y), number) for number, line in enumerate(series))
    places: list[float] = []
    for y, _ in wanted:
        places.append(max(y, places[-1] + gap) if places else y)
    bottom = _HEIGHT - 8.0
    for index in range(len(places) - 1, -1, -1):
        places[index] = min(places[index], bottom - gap * (len(places) - 1 - index))
    parts = []
    for (y, number), place in zip(wanted, places, strict=True):
        line, kind = series[number], f"s{number % len(_COLOURS)}"
        bold = " oursname" if line.is_ours else ""
        back = f"M{_r(x_of(line.points[-1].x) + 5)} {y} {x - 4} {y} {x + 12} {_r(place)}"
        parts.append(
            f'<g class="{kind}"><path class="whisker" fill="none" stroke-dasharray="1 3" d="{back}"/>'
            f'<text class="name{bold}" x="{x + 16}" y="{_r(place + 4)}">{escape(line.name)}</text></g>'
        )
    return parts


def _number(names: Sequence[str], name: str, ours: frozenset[str]) -> int:
    """The colour: the first for ours, the others in turn."""
    if name in ours:
        return 0
    others = [other for other in names if other not in ours]
    return 1 + others.index(name) % (len(_COLOURS) - 1)


def _ends(value: Any) -> tuple[float, float, float]:
    if isinstance(value, Mapping) and is_spread(value):
        return value["median"], value["min"], value["max"]
    return value, value, value


def _ticks(least: float, most: float, log: bool) -> list[float]:
    """Round numbers that enclose what is between."""
    if log:
        low, high = floor(log10(least)), ceil(log10(most))
        steps = (1, 2, 5) if high - low <= 3 else (1,)
        ticks = [float(f"{step}e{power}") for power in range(low, high + 1) for step in steps]
        lower = max((t for t in ticks if t <= least), default=ticks[0])
        upper = min((t for t in ticks if t >= most), default=ticks[-1])
        return [t for t in ticks if lower <= t <= upper]
    span = (most - least) or abs(most) or 1.0
    power = 10 ** floor(log10(span / 4))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if span / (step * power) <= 5)
    return [round(number * step, 9) for number in range(floor(least / step), ceil(most / step) + 1)]


def _scale(values: Sequence[float], start: float, end: float, log: bool) -> Callable[[float], float]:
    place: Callable[[float], float] = log10 if log else float
    least, most = place(min(values)), place(max(values))
    span = (most - least) or 1.0

    def at(value: float) -> float:
        return _r(start + (place(value) - least) / span * (end - start))

    return at


def _tick(value: float) -> str:
    if value and not 0.001 <= abs(value) < 1e6:
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    return f"{value:.4g}" if abs(value) < 100 else f"{value:,.0f}"


def _r(value: float) -> float:
    """Short, and the same on every machine."""
    return round(value, 1)


def _document(what: str, height: int, parts: Sequence[str]) -> str:
    lines_ = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{escape(what)}">\n<style>\n{_style()}\n</style>\n'
        f'<rect class="card" width="{_WIDTH}" height="{height}" rx="8"/>\n{lines_}\n</svg>\n'
    )
