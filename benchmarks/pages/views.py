"""What a benchmark's section shows of its result: a few charts and compact tables.

`_VIEWS` says it for the benchmarks that are known. Of any other, rows become tables, and lists of points, as
of work and cost, become curves on logarithmic axes.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .lookup import LookupFailedError, find
from .plot import Line, Point, bars, lines
from .report import (
    Path_,
    Report,
    Table,
    is_number,
    is_rows,
    is_spread,
    items,
    keys_of,
    shown,
    table_of,
    tables,
    title,
)

__all__ = ["Figure", "Section", "View", "section", "views_of"]

_OURS = re.compile(r"graftserve.*|ours.*|client|asyncio|.*, extraction|request|callers|server")


@dataclass(frozen=True)
class Figure:
    """name: of its file. alt: for those who do not see it."""

    name: str
    caption: str
    alt: str
    svg: str


@dataclass(frozen=True)
class Section:
    """What is shown of one report. tables: by caption."""

    report: Report
    figures: tuple[Figure, ...] = ()
    tables: tuple[tuple[str, Table], ...] = ()


class View(Protocol):
    """What it makes of a result. Raises LookupFailedError where the result does not hold it."""

    def figures(self, report: Report) -> Iterator[tuple[str, str, str]]:
        """Captions, alternative texts and SVGs."""

    def tables(self, report: Report) -> Iterator[tuple[str, Table]]:
        """Captions and tables."""


@dataclass(frozen=True)
class Curves:
    """A chart for each group of rows at `path` in the result: `y` by `x`.

    y is a number, numbers by series, or a list of numbers, which x "" counts. series: of a number or a list,
    the rows with the same value of it are a line. log: axes that are logarithmic, of "xy".
    """

    path: str
    x: str
    y: str
    caption: str
    x_label: str
    y_label: str
    series: str = ""
    log: str = ""

    def figures(self, report: Report) -> Iterator[tuple[str, str, str]]:
        for group, rows in _groups(report, self.path, (self.x, self.series)):
            points: dict[str, list[Point]] = {}
            for row in rows:
                value = row.get(self.y)
                name = f"{self.series} {row[self.series]}".strip() if self.series else self.y
                if isinstance(value, list):
                    points[name] = [Point(place, y) for place, y in enumerate(value, 1)]
                    continue
                series = value if isinstance(value, Mapping) and not is_spread(value) else {name: value}
                for label, item in series.items():
                    points.setdefault(label, []).append(_point(row[self.x], item))
            caption = _joined(self.caption, group)
            yield caption, *_lines(points, caption, self.x_label, self.y_label, self.log)

    def tables(self, report: Report) -> Iterator[tuple[str, Table]]:
        yield from ()


@dataclass(frozen=True)
class Bars:
    """A chart of bars: numbers by key of the objects at `paths`, a group for each, or `only` some of them.

    With one of them there is no group, and its bars go by the objects.
    """

    paths: tuple[str, ...]
    caption: str
    x_label: str
    only: tuple[str, ...] = ()

    def figures(self, report: Report) -> Iterator[tuple[str, str, str]]:
        groups = _objects(report, self.paths, self.only)
        if len(self.only) == 1:
            groups = {"": {label: item for label, group in groups.items() for item in group.values()}}
        elif len(groups) == 1:
            groups = {"": next(iter(groups.values()))}
        ours = frozenset(name for group in groups.values() for name in group if _OURS.fullmatch(name))
        texts = (
            (f"{label}: " if label else "")
            + ", ".join(f"{name} {shown(_median(value))}" for name, value in group.items())
            for label, group in groups.items()
        )
        alt = f"{self.caption}, {self.x_label}, as bars: {'; '.join(texts)}"
        yield self.caption, alt, bars(groups, self.caption, self.x_label, ours)

    def tables(self, report: Report) -> Iterator[tuple[str, Table]]:
        yield from ()


@dataclass(frozen=True)
class Pivot:
    """A table: a row for each of `fields`, or for each key of theirs, a column for each value of `column`."""

    path: str
    column: str
    fields: tuple[str, ...]
    caption: str

    def figures(self, report: Report) -> Iterator[tuple[str, str, str]]:
        yield from ()

    def tables(self, report: Report) -> Iterator[tuple[str, Table]]:
        cells: dict[str, dict[str, str]] = {}
        columns: dict[str, None] = {}
        for group, rows in _groups(report, self.path, (self.column,)):
            for name in self.fields:
                for row in rows:
                    column = _column(self.column, row[self.column])
                    columns[column] = None
                    value = row.get(name)
                    nested = value if isinstance(value, Mapping) and not is_spread(value) else {"": value}
                    for key, item in nested.items():
                        parts = (group, name if len(self.fields) > 1 or not key else "", key)
                        label = " · ".join(part for part in parts if part)
                        cells.setdefault(label, {})[column] = shown(item)
        rows_ = tuple((label, tuple(row.get(name, "") for name in columns)) for label, row in cells.items())
        yield self.caption, Table((), tuple(columns), rows_)


@dataclass(frozen=True)
class Rows:
    """A table: the objects at `paths`, or `only` some of their fields; a path with `*` leads to several."""

    paths: tuple[str, ...]
    caption: str
    only: tuple[str, ...] = ()

    def figures(self, report: Report) -> Iterator[tuple[str, str, str]]:
        yield from ()

    def tables(self, report: Report) -> Iterator[tuple[str, Table]]:
        yield self.caption, table_of((), _objects(report, self.paths, self.only))


_VIEWS: dict[str, tuple[View, ...]] = {
    "serving_peers": (
        Curves(
            *("closed_loop", "callers", "images_per_s", "Throughput by callers"),
            *("callers (logarithmic)", "images/s"),
            log="x",
        ),
        Curves(
            *("open_loop", "rate_per_s", "p99_ms", "p99 by offered load"),
            *("images/s offered, at random moments", "ms (logarithmic)"),
            log="y",
        ),
        Pivot(
            *("closed_loop", "callers", ("images_per_s_of_graftserve_to",)),
            "Images a second of graftserve to each, by callers",
        ),
        Pivot(
            *("open_loop", "share", ("p99_of_graftserve_to",)),
            "p99 of graftserve to each, by the share of the best peer's throughput that is offered",
        ),
        Pivot(
            *("closed_loop", "callers", ("cpu_of_graftserve_to",)),
            "CPU time of graftserve to each, by callers",
        ),
        Pivot(
            *("closed_loop", "callers", ("images_per_s_of_graftserve_int8_to",)),
            "Images a second of graftserve in int8 to each in float32, by callers",
        ),
        Pivot("closed_loop", "callers", ("images_per_s",), "Images a second, by callers"),
        Pivot("closed_loop", "callers", ("p99_ms",), "p99 in milliseconds, by callers"),
        Pivot(
            *("large", "engine", ("images_per_s", "p99_ms", "cpu_s_per_1000_images")),
            "Photographs of 12 megapixels, 8 callers",
        ),
        Pivot(
            *("corrupt", "engine", ("images_per_s", "p99_ms", "errors")),
            "One image in a hundred cut off: images a second, and whole images that got an error",
        ),
        Rows(
            *(("servers/*",), "The servers"),
            ("start_s", "memory_mib", "installed_mb", "packages", "release"),
        ),
    ),
    "serving": (
        Bars(("throughput/*/images_per_s",), "Throughput", "images/s"),
        Bars(("latency/ms/*",), "p99 at 70% of the best peer's throughput", "ms", ("p99",)),
        Pivot("throughput", "callers", ("images_per_s",), "Images a second, by callers"),
        Pivot(
            *("throughput", "callers"),
            (
                *("litert_to_best_peer", "litert_to_bare_litert"),
                *("tensorflow_to_best_peer", "tensorflow_to_bare_signature"),
            ),
            "Images a second, to the best of five handwritten servers on TensorFlow, and to no server",
        ),
        Rows(("latency/ms/*",), "Milliseconds at 70% of the best peer's throughput"),
        Pivot(
            *("trivial", "callers", ("requests_per_s", "cpu_us_per_request", "cpu_to_echo")),
            "A request for next to nothing, and grpcio's own server that returns its bytes",
        ),
    ),
    "client": (
        Curves(
            *("*/closed_loop", "callers", "images_per_s", "Throughput by callers"),
            *("callers (logarithmic)", "images/s (logarithmic)"),
            log="xy",
        ),
        Bars(("*/open_loop/p99_ms",), "p99 at random moments, at 70% of the raw stub's throughput", "ms"),
        Pivot(
            *("*/closed_loop", "callers"),
            tuple(
                f"{one}_to_{other}_images_per_s"
                for one in ("client", "asyncio")
                for other in ("raw", "batcher")
            ),
            "Images a second to those of a raw stub, and of a batcher by hand, by callers",
        ),
    ),
    "client_thin": (
        Rows(
            ("import/ms", "import/mib", "encode/cpu_ms", "parse/cpu_ms", "features/cpu_ms"),
            "theirs: tensorflow-serving-api with TensorFlow's make_tensor_proto",
        ),
    ),
    "client_peers": (
        Bars(("clients/*",), "Importing", "s", ("import_s",)),
        Bars(("clients/*",), "Encoding 32 images", "ms of CPU", ("encode_ms",)),
        Rows(("ratios_to_graftserve/*",), "Each to graftserve's client"),
        Rows(("clients/*",), "Medians"),
    ),
    "decode": (
        Bars(("rows/*/ms",), "A photograph on one core", "ms", ("ours", "usual", "usual_antialiased")),
        Pivot(
            *("rows", "photo", ("times_usual", "times_usual_antialiased")),
            "The usual ways' time to ours",
        ),
        Pivot("rows", "photo", ("ms",), "Milliseconds, of parts, too"),
    ),
    "exported_signature": (
        Bars(("ms_per_image",), "An image in the signature and in its parts", "ms"),
        Rows(("weights/*",), "Weights that signatures share, and weights as constants"),
    ),
    "feature_extraction": (
        Bars(("images_per_s",), "By each way", "images/s"),
        Rows(("ratios_of_images_per_s", "ratios_of_cpu_time"), "Ratios"),
    ),
    "prepare": (
        Curves(
            *("rows", "bytes", "top_1_agreement", "The same first class, by bytes sent"),
            *("bytes (logarithmic)", "share of the photographs", "quality", "x"),
        ),
        Rows(
            *(("rows/*",), "By longer side and JPEG quality"),
            (
                "times_bytes",
                "times_time",
                "times_server_time",
                "top_1_agreement",
                "top_1_agreement_where_sure",
            ),
        ),
    ),
    "soak": (
        Curves("rows", "", "resident_mb", "Memory after each swap", "swaps", "MB", "loop"),
        Rows(
            *(("rows/*",), "Calls between and during swaps"),
            (
                *("calls", "faults", "swaps", "damaged_versions", "between_swaps", "during_swaps"),
                *("during_to_between", "growth_after_swap_10"),
            ),
        ),
    ),
    "limits": (
        Pivot(
            *("rows", "cpus", ("share_of_limit", "server_cpu_to_parts")),
            "The server's images a second, and an image's CPU time in it, to decoding and the network alone",
        ),
        Pivot("rows", "cpus", ("images_per_s",), "Images a second of each part by itself"),
        Pivot("rows", "cpus", ("cpu_ms_per_image",), "Milliseconds of CPU for an image"),
    ),
    "profile_server": (
        Pivot("rows", "callers", ("cpu_ms_per_image",), "Milliseconds of CPU for an image"),
        Pivot("rows", "callers", ("share_of_cpu",), "Shares of the CPU time"),
    ),
    "classic_keras": (
        Bars(("ours", "classic"), "By phase", "s", ("features_s", "head_s", "tuning_s", "total_s")),
        Rows(("ours", "classic"), "The whole", ("features_s", "head_s", "tuning_s", "total_s", "accuracy")),
        Rows(("times_faster",), "Times faster"),
        Rows(("equal_accuracy/seconds_until_then",), "Seconds until both are as accurate"),
    ),
    "classic_bottleneck": (
        Bars(("ours/cold", "ours/warm", "classic"), "The whole", "s", ("total_s",)),
        Rows(("ours/cold", "ours/warm", "classic"), "By phase"),
    ),
}


def views_of(report: Report) -> tuple[View, ...]:
    """Those of a benchmark that is known, or one that takes whatever there is."""
    return _VIEWS.get(report.name, (_Anything(),))


def section(report: Report) -> Section:
    """What to show of a result. Views of what it does not hold are left out."""
    if report.problem:
        return Section(report)
    figures: list[Figure] = []
    found: list[tuple[str, Table]] = []
    for view in views_of(report):
        try:
            for caption, alt, svg in view.figures(report):
                figures.append(Figure(f"{report.name}-{len(figures) + 1}", caption, alt, svg))
            found += view.tables(report)
        except (LookupFailedError, KeyError):
            continue
    return Section(report, tuple(figures), tuple(found))


class _Anything:
    """Points as curves, all else as tables."""

    def figures(self, report: Report) -> Iterator[tuple[str, str, str]]:
        for (path, x, y), curves in _charts(report).items():
            found = [point for points in curves.values() for point in points]
            is_log = {"x": all(point.x > 0 for point in found), "y": all(point.y > 0 for point in found)}
            x_label, y_label = (
                title((key,)) + (" (logarithmic)" if is_log[axis] else "")
                for axis, key in (("x", x), ("y", y))
            )
            caption = _joined(f"{title((y,))} by {title((x,))}", title(path))
            log = "".join(axis for axis in "xy" if is_log[axis])
            yield caption, *_lines(curves, caption, x_label, y_label, log)

    def tables(self, report: Report) -> Iterator[tuple[str, Table]]:
        for (path, x, y), curves in _charts(report).items():
            cells = {
                name: {point.x: shown(_spread(point)) for point in points} for name, points in curves.items()
            }
            columns = sorted({place for row in cells.values() for place in row})
            rows = tuple(
                (name, tuple(row.get(place, "") for place in columns)) for name, row in cells.items()
            )
            caption = _joined(f"{title((y,))} by {title((x,))}", title(path))
            yield caption, Table((), tuple(map(shown, columns)), rows)
        for table in tables(_without_points(report.measured()), ()):
            yield title(table.path), table


def _charts(report: Report) -> dict[tuple[Path_, str, str], dict[str, list[Point]]]:
    """Curves by name, of those that lie in the same object and have the same axes."""
    charts: dict[tuple[Path_, str, str], dict[str, list[Point]]] = {}
    for path, rows in _points(report.measured(), ()):
        *before, name = path[:-1] if path[-1] == "points" and len(path) > 1 else path
        x, y = _axes(rows[0])
        points = [_point(row[x], row[y], row.get(f"min {y}"), row.get(f"max {y}")) for row in rows]
        charts.setdefault((tuple(before), x, y), {})[name] = points
    return charts


def _objects(report: Report, paths: Sequence[str], only: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Fields of each that has any, by what `*` stands for or, without one, by its path."""
    found = {}
    for path in paths:
        for stars, value in _find(report, path).items():
            kept = {key: value[key] for key in only or value if key in value and key != "error"}
            if kept:
                found[" · ".join(stars or path.split("/"))] = kept
    return found


def _find(report: Report, path: str) -> dict[Path_, Any]:
    return find({report.name: report}, f"{report.name}/{path}")


def _groups(
    report: Report, path: str, besides: Sequence[str]
) -> Iterator[tuple[str, Sequence[Mapping[str, Any]]]]:
    """Rows by the words that tell them apart, such as an engine, and by what `*` in the path stands for."""
    for stars, rows in _find(report, path).items():
        keys = [key for key in keys_of(rows) if isinstance(rows[0][key], str) and key not in besides]
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for row in rows:
            groups.setdefault(" · ".join((*stars, *(row[key] for key in keys))), []).append(row)
        yield from groups.items()


def _lines(
    points: Mapping[str, Sequence[Point]], caption: str, x_label: str, y_label: str, log: str
) -> tuple[str, str]:
    """Alternative text and SVG, ours first."""
    names = sorted(points, key=lambda name: not _OURS.fullmatch(name))
    series = [Line(name, tuple(points[name]), bool(_OURS.fullmatch(name))) for name in names]
    last = ", ".join(f"{line.name} {shown(line.points[-1].y)}" for line in series)
    at = shown(series[0].points[-1].x)
    alt = f"{caption}: {y_label} by {x_label}, as lines; at {at} {last}"
    return alt, lines(series, caption, x_label, y_label, log_x="x" in log, log_y="y" in log)


def _point(x: float, value: Any, low: float | None = None, high: float | None = None) -> Point:
    if isinstance(value, Mapping):
        return Point(x, value["median"], value["min"], value["max"])
    return Point(x, value, low, high)


def _spread(point: Point) -> Any:
    if point.low is None or point.high is None:
        return point.y
    return {"median": point.y, "min": point.low, "max": point.high}


def _median(value: Any) -> Any:
    return value["median"] if isinstance(value, Mapping) and is_spread(value) else value


def _column(name: str, value: Any) -> str:
    return value if isinstance(value, str) else f"{title((name,))} {value}"


def _joined(caption: str, group: str) -> str:
    return f"{caption}: {group}" if group else caption


def _points(value: Any, path: Path_) -> Iterator[tuple[Path_, Sequence[Mapping[str, Any]]]]:
    if _are_points(value):
        yield path, value
    else:
        for label, item in items(value):
            yield from _points(item, (*path, label))


def _without_points(value: Any) -> Any:
    """Rows by their names, too."""
    if isinstance(value, Mapping) or is_rows(value):
        return {label: _without_points(item) for label, item in items(value) if not _are_points(item)}
    return value


def _are_points(value: Any) -> bool:
    """Three rows or more of nothing but numbers, of which the first two are always there."""
    return (
        is_rows(value)
        and len(value) > 2
        and len({tuple(row)[:2] for row in value}) == 1
        and all(_is_point(list(row.values())) for row in value)
    )


def _is_point(values: Sequence[Any]) -> bool:
    first, others = values[:2], values[2:]
    return (
        len(first) == 2
        and all(map(_is_quantity, first))
        and all(value is None or _is_quantity(value) for value in others)
    )


def _is_quantity(value: Any) -> bool:
    return is_number(value) or (isinstance(value, Mapping) and is_spread(value))


def _axes(point: Mapping[str, Any]) -> tuple[str, str]:
    """Work and cost, or the first two fields."""
    if {"work", "cost"} <= set(point):
        return "work", "cost"
    first, second, *_ = point
    return first, second
