"""How the commands speak: results to stdout, progress to stderr, files whole or not at all."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import click

from graftserve.training.files import write_atomically
from graftserve.training.progress import Report

__all__ = [
    "CommandError",
    "CountPrinter",
    "ProgressPrinter",
    "cache_dir_option",
    "check_folder_of",
    "features_dir",
    "import_tensorflow",
    "print_result",
    "require_extra",
    "say",
    "write_whole",
]

_REDRAW_S = 0.2
_LOG_EVERY_S = 10.0


class CommandError(Exception):
    """A failure whose message is all that the user needs."""


def print_result(values: Mapping[str, Any], *, as_json: bool) -> None:
    """Print a result: aligned lines for people, one JSON object for machines."""
    if as_json:
        click.echo(json.dumps(values, ensure_ascii=False))
        return
    width = max(map(len, values))
    for name, value in values.items():
        click.echo(f"{name:<{width}}  {value}")


def say(text: str) -> None:
    """To stderr."""
    click.echo(text, err=True)


def cache_dir_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """The option --cache-dir, which arrives as `cache`."""
    return click.option(
        "--cache-dir",
        "cache",
        type=click.Path(path_type=Path),
        envvar="GRAFTSERVE_CACHE_DIR",
        help="Where features are kept between runs.  [default: ~/.cache/graftserve]",
    )(command)


def features_dir(cache: Path | None) -> Path:
    """Where features are kept: below what --cache-dir gave, or $XDG_CACHE_HOME, or ~/.cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (cache or home / "graftserve") / "features"


def check_folder_of(option: str, path: Path) -> None:
    """Raise CommandError if the folder that the option's file is to be written to is not there."""
    if not path.absolute().parent.is_dir():
        raise CommandError(f"{option}: there is no folder {path.parent}")


def require_extra(module: str, extra: str) -> None:
    """Raise CommandError with the remedy if an optional dependency is not installed."""
    if find_spec(module) is None:
        raise CommandError(f"{module} is not installed: pip install 'graftserve[{extra}]'")


def import_tensorflow(extra: str) -> None:
    """Import TensorFlow without the lines its C++ writes to stderr before anything can be configured.

    Raises CommandError if it is not installed, and what the import raises, after showing those lines.
    """
    require_extra("tensorflow", extra)
    if click.get_current_context().find_root().obj:
        return  # --debug shows everything
    saved = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            import_module("tensorflow")
        except BaseException:
            said.seek(0)
            os.write(saved, said.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)


class ProgressPrinter:
    """Draws reports on stderr: one line redrawn in a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._stage = ""
        self._last = 0.0

    def __call__(self, report: Report) -> None:
        """Show the report if it is time to."""
        now = time.monotonic()
        begins, ends = report.stage != self._stage, report.done >= report.total
        if begins:
            self._stage, self._last = report.stage, now
        if not ends and (begins or now - self._last < (_REDRAW_S if self._live else _LOG_EVERY_S)):
            return
        self._last = now
        line = f"{report.stage}: {report.done}/{report.total}, {report.rate:.1f}/s"
        if ends:
            line += f", {report.elapsed_s:.1f} s"
            self._stage = ""
        elif report.eta_s is not None:
            line += f", {_clock(report.eta_s)} to go"
        _draw(line, live=self._live, ends=ends)


class CountPrinter:
    """Draws on stderr how many items are done, where their number may be unknown; as ProgressPrinter draws.

    total: how many there will be, or None.
    before: how many were done when this began; they do not count for the rate.
    """

    def __init__(
        self, stage: str, total: int | None, *, before: int = 0, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._live = sys.stderr.isatty()
        self._stage, self._total, self._before, self._now = stage, total, before, now
        self._done = before
        self._start = self._last = now()
        self._drawn = False

    @property
    def rate(self) -> float:
        """Items a second since this began."""
        elapsed_s = self._now() - self._start
        return (self._done - self._before) / elapsed_s if elapsed_s > 0 else 0.0

    def advance(self, note: str = "") -> None:
        """One more is done; note: what else there is to say of those that are."""
        self._done += 1
        now = self._now()
        if now - self._last >= (_REDRAW_S if self._live else _LOG_EVERY_S):
            self._last = now
            self._show(note, ends=False)

    def end(self, note: str = "") -> None:
        """End the line in a terminal; elsewhere nothing."""
        if self._drawn and self._live:
            self._show(note, ends=True)

    def _show(self, note: str, *, ends: bool) -> None:
        self._drawn = True
        of_total = "" if self._total is None else f"/{self._total}"
        line = f"{self._stage}: {self._done}{of_total}, {self.rate:.1f}/s{note}"
        if self._total is not None and not ends and self.rate:
            line += f", {_clock((self._total - self._done) / self.rate)} to go"
        _draw(line, live=self._live, ends=ends)


def write_whole(path: Path, mode: str = "w") -> AbstractContextManager[IO[Any]]:
    """As `training.files.write_atomically`, with a temporary file whose name is always the same, so that one
    that a killed process left is not left twice: two processes must not write the same `path` at a time.
    """
    return write_atomically(path, mode, temporary=path.with_name(f".{path.name}.tmp"))


def _draw(line: str, *, live: bool, ends: bool) -> None:
    if live:
        click.echo(f"\r\x1b[K{line}", err=True, nl=ends)
    else:
        click.echo(line, err=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
