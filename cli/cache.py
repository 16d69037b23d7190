"""`graftserve cache`: what is kept between runs, and how to be rid of it."""

import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .output import cache_dir_option, features_dir, print_result

if TYPE_CHECKING:
    from graftserve.training.cache import CacheEntry

__all__ = ["command"]

_COLUMNS = ("kind", "backbone", "engine", "view", "rows", "MB", "last used")
_DAY_S = 24 * 3600.0


@click.group("cache")
def command() -> None:
    """Show or prune what is kept between runs: features, converted networks, and which files were read."""


@command.command("info")
@cache_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def info(cache: Path | None, as_json: bool) -> None:
    """Show what the cache holds, what was used last first.

    \b
    Example: graftserve cache info
    """
    from graftserve.training.cache import list_entries

    folder = features_dir(cache)
    entries = list_entries(folder)
    size_bytes = sum(entry.size_bytes for entry in entries)
    if as_json:
        rows = [_as_json(entry) for entry in entries]
        values = {"cache": str(folder), "size_bytes": size_bytes, "entries": rows}
        click.echo(json.dumps(values, ensure_ascii=False))
        return
    total = ("total", "", "", "", "", _megabytes(size_bytes), "")
    _print_table([_COLUMNS, *(_as_row(entry) for entry in entries), total])


@command.command("prune")
@cache_dir_option
@click.option(
    "--older-than-days",
    "unused_days",
    type=click.FloatRange(min=0),
    metavar="N",
    help="Remove what has not been used for N days.",
)
@click.option(
    "--max-mb",
    type=click.FloatRange(min=0),
    metavar="N",
    help="Remove what has not been used for longest, until at most N MB are left.",
)
@click.option("--all", "everything", is_flag=True, help="Remove all of it.")
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def prune(
    cache: Path | None,
    unused_days: float | None,
    max_mb: float | None,
    everything: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove what the cache holds; it is computed again when it is wanted.

    Runs under way keep what they have opened.

    \b
    Example: graftserve cache prune --older-than-days 30 --max-mb 2000
    """
    if unused_days is None and max_mb is None and not everything:
        raise click.UsageError("--older-than-days, --max-mb or --all: expected at least one of them.")
    from graftserve.training.cache import list_entries, prune_entries

    folder = features_dir(cache)
    limits: dict[str, float] = {}
    if unused_days is not None:
        limits["unused_s"] = unused_days * _DAY_S
    if max_mb is not None:
        limits["max_bytes"] = max_mb * 1e6
    if everything:
        limits = {"max_bytes": -1}
    before = sum(entry.size_bytes for entry in list_entries(folder))
    removed = prune_entries(folder, **limits, now_s=time.time(), dry_run=dry_run)
    removed_bytes = sum(entry.size_bytes for entry in removed)
    if as_json:
        rows = [_as_json(entry) for entry in removed]
        values = {"cache": str(folder), "dry_run": dry_run, "removed": rows, "removed_bytes": removed_bytes}
        click.echo(json.dumps(values, ensure_ascii=False))
        return
    if removed:
        _print_table([_COLUMNS, *map(_as_row, removed)])
    print_result(
        {
            "would remove"
            if dry_run
            else "removed": f"{len(removed)} entries, {_megabytes(removed_bytes)} MB",
            "left": f"{_megabytes(before - removed_bytes)} MB in {folder}",
        },
        as_json=False,
    )


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    for row in rows:
        cells = [
            cell.rjust(width) if name in ("rows", "MB") else cell.ljust(width)
            for name, cell, width in zip(_COLUMNS, row, widths, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


def _as_row(entry: "CacheEntry") -> tuple[str, ...]:
    described = (str(entry.meta.get(name, "")) for name in ("backbone", "engine", "view"))
    rows = f"{entry.rows:,}" if entry.rows else ""
    last_used = datetime.fromtimestamp(entry.last_used_s).strftime("%Y-%m-%d %H:%M")
    return (entry.kind, *described, rows, _megabytes(entry.size_bytes), last_used)


def _as_json(entry: "CacheEntry") -> dict[str, Any]:
    return {
        "path": str(entry.path),
        **entry.meta,
        "kind": entry.kind,
        "rows": entry.rows,
        "size_bytes": entry.size_bytes,
        "last_used": datetime.fromtimestamp(entry.last_used_s, UTC).isoformat(timespec="seconds"),
    }


def _megabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:,.1f}"
