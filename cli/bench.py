"""`graftserve bench`: throughput and latency of a running server under load."""

import io
import json
import math
import platform
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import version as version_of
from itertools import islice
from pathlib import Path
from typing import Any, Final

import click

from graftserve.client import Client, Prediction

from .connection import Connection, connection_options
from .image_paths import ImagePaths
from .latency import PERCENTILES
from .latency_plot import PLOT_FORMATS, write_plot
from .load import Clock, Level, closed_loop, open_loop
from .output import CommandError, check_folder_of, require_extra, write_whole
from .raw_caller import RawCaller

__all__ = ["command", "synthetic_images"]

_INTERRUPTED: Final = 130
_CONCURRENCY: Final = (1, 8, 64)
_AUTO: Final = "auto"
_AUTO_SHARES: Final = (0.25, 0.5, 0.75, 0.9)
_PROBE_TIMEOUT_S: Final = 10.0
_MAX_IMAGES: Final = 256
_SYNTHETIC_IMAGES: Final = 16
_SIZE_PX: Final = (500, 375)
# Above it, Python's one interpreter may be what limits.
_BUSY_CPUS: Final = 0.9
_COLUMNS: Final = (
    "load",
    "images/s",
    *(f"p{percent:g}" for percent in PERCENTILES),
    "max",
    "batch",
    "errors",
    "late",
    "not sent",
)


def _numbers(kind: Callable[[str], float], *words: str) -> Callable[..., Any]:
    """What reads an option's numbers above zero, separated by commas, or one of the words."""

    def read(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
        if value is None or value in words:
            return value
        try:
            numbers = tuple(kind(part) for part in value.split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(0 < number < math.inf for number in numbers):
            wanted = " or ".join([f"{'whole ' * (kind is int)}numbers above 0, separated by commas", *words])
            raise click.BadParameter(f"expected {wanted}, got {value!r}", ctx, param)
        return numbers

    return read


_SECONDS = click.FloatRange(min=0, min_open=True)


@click.command("bench")
@connection_options
@click.argument("images", nargs=-1)
@click.option(
    "--concurrency",
    callback=_numbers(int),
    metavar="N,...",
    help="Closed loops: so many callers, each asking again when it is answered.  [default: 1,8,64 without "
    "--rate]",
)
@click.option(
    "--rate",
    callback=_numbers(float, _AUTO),
    metavar="R,...|auto",
    help="Open loops: so many images a second, at random moments, however fast the answers come. auto: 25, "
    "50, 75 and 90 percent of the best closed loop.",
)
@click.option("--duration-s", type=_SECONDS, default=10.0, show_default=True, help="Of each level.")
@click.option(
    "--warm-up-s",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="Before each level, not counted.",
)
@click.option(
    "--max-callers",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Threads of an open loop at most.",
)
@click.option("--raw", is_flag=True, help="To compare: a request for each image, as a bare stub sends it.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random moments.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write everything, histograms too, as JSON."
)
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Write latency over percentile: .png, .svg or .html."
)
@click.option("--json", "as_json", is_flag=True, help="Print what --output writes.")
def command(
    target: str,
    model: str,
    version: int | None,
    timeout_s: float,
    images: tuple[str, ...],
    concurrency: tuple[int, ...] | None,
    rate: tuple[float, ...] | str | None,
    duration_s: float,
    warm_up_s: float,
    max_callers: int,
    raw: bool,
    seed: int,
    output: Path | None,
    plot: Path | None,
    as_json: bool,
    connection: Connection,
) -> None:
    """Ask a running server for IMAGES (files, folders, patterns; the first 256) over and over, and measure.
    Without IMAGES, for 16 synthetic photographs of 500 x 375 pixels.

    Latencies are in ms. In an open loop they count from the moment when a request was due, not from when a
    caller was free to send it: a server that falls behind shows, where a closed loop would just ask it less
    (coordinated omission; after Gil Tene's wrk2). "late" were sent 10 ms or more after they were due; "not
    sent" still waited for a caller when as much time again had passed, and make the percentiles lower bounds,
    marked ≥. Failed requests are counted by their class and are in no latency.

    "batch" is the mean number of images in a request, where the client counts it. Ctrl-C ends it with
    what was measured so far. Let this machine do nothing else meanwhile; better, run it on another than
    the server's.

    \b
    Example: graftserve bench --target localhost:8500 --model flowers --rate auto --plot latency.png
    """
    if plot is not None:
        if plot.suffix not in PLOT_FORMATS:
            raise click.UsageError(
                f"--plot: expected a name ending in {', '.join(PLOT_FORMATS)}, got {plot.name}."
            )
        require_extra("matplotlib", "plot")
    for name, path in (("--output", output), ("--plot", plot)):
        if path is not None:
            check_folder_of(name, path)
    arguments = connection.client_arguments()
    bench = _Bench(
        lambda: Client(target, model, version=version, timeout_s=timeout_s, **arguments),
        (lambda: RawCaller(target, model, version, timeout_s, **arguments)) if raw else None,
        _read(images) if images else synthetic_images(_SYNTHETIC_IMAGES),
        seconds={"warm_up_s": warm_up_s, "duration_s": duration_s},
        max_callers=max_callers,
        seed=seed,
    )
    if concurrency is None and rate in (None, _AUTO):
        concurrency = _CONCURRENCY
    began = datetime.now(UTC)
    answer = bench.first_answer(min(timeout_s, _PROBE_TIMEOUT_S))
    done: list[tuple[Level, Any]] = []
    interrupted = False
    try:
        for level, stats in bench.levels(concurrency or (), rate or ()):
            interrupted = level.interrupted
            if level.answers or level.errors or not interrupted:
                if not as_json:
                    _print_row(level, stats, first=not done)
                _warn(level)
                done.append((level, stats))
    except KeyboardInterrupt:
        interrupted = True
    result = {
        "graftserve": version_of("graftserve"),
        "python": platform.python_version(),
        "grpcio": version_of("grpcio"),
        "protobuf": version_of("protobuf"),
        "platform": platform.platform(),
        "began": began.isoformat(timespec="seconds"),
        "target": target,
        "model": model,
        "version": answer.version,
        "settings": {
            "version": version,
            "timeout_s": timeout_s,
            "concurrency": concurrency,
            "rate": rate,
            "duration_s": duration_s,
            "warm_up_s": warm_up_s,
            "max_callers": max_callers,
            "raw": raw,
            "seed": seed,
        },
        "images": {"given": bool(images), **bench.images()},
        "interrupted": interrupted,
        "levels": [level.to_dict() | {"client_stats": stats} for level, stats in done],
    }
    if as_json:
        click.echo(json.dumps(result, ensure_ascii=False))
    if output is not None:
        with write_whole(output) as file:
            json.dump(result, file, indent=2, ensure_ascii=False)
            file.write("\n")
    if plot is not None:
        write_plot([level for level, _ in done], f"{model} version {answer.version} at {target}", plot)
    if interrupted:
        click.echo("interrupted; this is what was measured so far", err=True)
        click.get_current_context().exit(_INTERRUPTED)
    if not any(level.answers for level, _ in done):
        raise CommandError("no request was answered")


class _Bench:
    """One model on one server, asked for `contents` over and over.

    raw: what calls instead of the client, or None.
    seconds: warm_up_s and duration_s of each level.
    """

    def __init__(
        self,
        connect: Callable[[], Client],
        raw: Callable[[], RawCaller] | None,
        contents: Sequence[bytes],
        *,
        seconds: dict[str, float],
        max_callers: int,
        seed: int,
    ) -> None:
        self._connect, self._raw = connect, raw
        self._contents, self._seconds = contents, seconds
        self._max_callers, self._seed = max_callers, seed
        self._clock = Clock()

    def images(self) -> dict[str, float]:
        """How many, and how large."""
        sizes = list(map(len, self._contents))
        return {"count": len(sizes), "mean_bytes": sum(sizes) / len(sizes)}

    def first_answer(self, timeout_s: float) -> Prediction:
        """What tells a wrong target, model or image before anything is measured."""
        with self._connect() as client:
            return client.classify(self._contents[0], timeout_s=timeout_s)

    def levels(self, concurrency: Sequence[int], rates: Sequence[float] | str) -> Iterator[tuple[Level, Any]]:
        """Each level, and what the client counted meanwhile; one that was interrupted is the last."""
        best = 0.0
        for callers in concurrency:
            level, stats = self._measure(closed_loop, callers)
            yield level, stats
            if level.interrupted:
                return
            best = max(best, level.images_per_s)
        if isinstance(rates, str):
            rates = [float(f"{best * share:.3g}") for share in _AUTO_SHARES] if best else []
        for rate in rates:
            level, stats = self._measure(
                open_loop,
                rate,
                max_callers=self._max_callers,
                drain_s=self._seconds["duration_s"],
                chance=random.Random(self._seed),
            )
            yield level, stats
            if level.interrupted:
                return

    def _measure(self, loop: Callable[..., Level], load: float, **options: Any) -> tuple[Level, Any]:
        """A level over a connection of its own, so that none begins with what another left."""
        connection = self._connect() if self._raw is None else self._raw()
        ask_one = connection.ask if isinstance(connection, RawCaller) else connection.classify

        def ask(number: int) -> None:
            ask_one(self._contents[number % len(self._contents)])

        with closing(connection):
            level = loop(ask, load, **self._seconds, **options, cancel=connection.close, clock=self._clock)
            return level, _stats(connection)


def _stats(connection: object) -> Any:
    """What the client counts, where it does."""
    read = getattr(connection, "stats", None)
    found = read() if callable(read) else None
    return asdict(found) if is_dataclass(found) and not isinstance(found, type) else found


def _read(images: Sequence[str]) -> list[bytes]:
    paths = list(islice(ImagePaths(images, io.BytesIO()), _MAX_IMAGES))
    if not paths:
        raise CommandError("no images: expected JPEG, PNG, GIF, BMP or WebP files")
    return [Path(path).read_bytes() for path in paths]


def synthetic_images(count: int, seed: int = 0) -> list[bytes]:
    """JPEG files of 500 x 375 pixels, from smooth to noisy: some 10 to 100 kB. The same for the same seed."""
    import numpy as np
    from PIL import Image

    width, height = _SIZE_PX
    chance = np.random.default_rng(seed)
    across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    contents = []
    for number in range(count):
        corners = chance.uniform(0, 255, (4, 3))
        weights = ((1 - across) * (1 - down), across * (1 - down), (1 - across) * down, across * down)
        pixels = sum(
            weight[..., None] * corner for weight, corner in zip(weights, corners, strict=True)
        ) + chance.normal(0, 30 * number / max(1, count - 1), (height, width, 1))
        buffer = io.BytesIO()
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
        contents.append(buffer.getvalue())
    return contents


def _print_row(level: Level, stats: Any, *, first: bool) -> None:
    cells = [level.name, f"{level.images_per_s:.1f}"]
    bound = "≥" if level.not_sent else ""
    found = level.latencies
    latencies_s = [*map(found.percentile_s, PERCENTILES), found.max_s]
    cells += [bound + _milliseconds(latency_s) if found.count else "-" for latency_s in latencies_s]
    batch = stats.get("batch_images") if isinstance(stats, dict) else None
    cells += ["-" if batch is None else f"{batch:.1f}", str(sum(level.errors.values()))]
    cells += ["-", "-"] if level.rate_per_s is None else [str(level.late), str(level.not_sent)]
    if first:
        click.echo(_aligned(_COLUMNS))
    click.echo(_aligned(cells))


def _milliseconds(latency_s: float) -> str:
    return f"{latency_s * 1e3:.{1 if latency_s < 1 else 0}f}"


def _aligned(cells: Sequence[str]) -> str:
    first, *rest = cells
    return f"{first:<12}" + "".join(f"{cell:>10}" for cell in rest)


def _warn(level: Level) -> None:
    for name, count in level.errors.items():
        click.echo(f"{level.name}: {count} {name}", err=True)
    if level.cpus > _BUSY_CPUS:
        click.echo(
            f"{level.name}: this process kept {level.cpus:.1f} CPUs busy, so it may be what limits", err=True
        )
