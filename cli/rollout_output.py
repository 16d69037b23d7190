"""What `graftserve rollout` prints, and what its commands have in common wherever the version is to go."""

import getpass
import json
import os
import random
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .image_paths import ImagePaths
from .output import CommandError, CountPrinter

if TYPE_CHECKING:
    from graftserve.client import Client
    from graftserve.k8s.rollout import Record, Report, Rollout

__all__ = [
    "compare_shown",
    "differences",
    "end",
    "next_command",
    "numbers",
    "or_none",
    "print_values",
    "sample_images",
    "show",
    "show_history",
    "state_folder",
    "who",
]


def sample_images(arguments: Sequence[str], count: int, seed: int) -> list[Path]:
    """At most `count` of the images that are meant, chosen by the seed; none of no arguments."""
    if not arguments:
        return []
    paths = sorted(ImagePaths(arguments, sys.stdin.buffer))
    if not paths:
        raise CommandError(f"{arguments[0]}: expected images, found none")
    chosen = random.Random(seed).sample(paths, min(count, len(paths)))
    return [Path(path) for path in chosen]


def compare_shown(
    old: "Client", new: "Client", images: Sequence[Path], *, seed: int, max_errors: int
) -> "Report":
    """`graftserve.k8s.rollout.compare`, with its progress."""
    from graftserve.k8s.rollout import compare

    printer = CountPrinter("comparing", len(images))
    report = compare(
        *(old, new, images),
        seed=seed,
        max_errors=max_errors,
        progress=lambda done, total: printer.advance(),
    )
    printer.end()
    return report


def show(rollout: "Rollout", as_json: bool) -> None:
    """What the comparison said, and how it ended."""
    from graftserve.k8s.rollout import rollout_to_json

    if rollout.outcome is None:
        last = f"{rollout.title} waits: `graftserve rollout promote` or `graftserve rollout abort`"
    else:
        last = f"{rollout.title} {rollout.outcome}: {rollout.reason}"
    print_values(
        rollout_to_json(rollout), as_json, "\n".join((*numbers(rollout), *differences(rollout), last))
    )


def numbers(rollout: "Rollout") -> list[str]:
    """Lines with what the comparison measured."""
    report = rollout.report
    if report is None:
        return []
    lines = [f"compared   {report.compared} of {report.images} images"]
    if report.compared:
        lines += [
            f"agreement  {report.agreement:.4f}",
            f"shift      at most {report.largest_shift:.3f}, on {report.shift_image}",
            f"latency    {report.canary_p50_ms:.1f} ms against {report.stable_p50_ms:.1f} ms, "
            f"{report.latency_ratio:.2f} times (p95 {report.canary_p95_ms:.1f} and "
            f"{report.stable_p95_ms:.1f} ms)",
        ]
    if report.errors:
        lines.append(f"errors     {report.errors}; {report.first_error}")
    return lines


def differences(rollout: "Rollout") -> list[str]:
    """Lines with images that the versions disagree on."""
    rows = () if rollout.report is None else rollout.report.disagreements
    return [f"differs    {image}: {stable} became {canary}" for image, stable, canary in rows]


def next_command(rollout: "Rollout") -> str:
    """What goes on with a rollout under way."""
    if rollout.decision is not None:
        again = "undo" if rollout.kind == "undo" and rollout.decision == "promote" else rollout.decision
        return f"`graftserve rollout {again}` goes on with it ({rollout.reason})"
    ready = rollout.gate is None or rollout.report is not None
    return "`promote` or `abort`" if ready else "`start` with the same version goes on, `abort` goes back"


def or_none(version: int | None) -> str:
    """A version for people."""
    return "none" if version is None else f"version {version}"


def print_values(values: Mapping[str, Any], as_json: bool, text: str) -> None:
    """One JSON object for machines, the text for people."""
    click.echo(json.dumps(values, ensure_ascii=False) if as_json else text)


def end(ok: bool) -> None:
    """Leave the command with status 1 if it is not ok."""
    if not ok:
        click.get_current_context().exit(1)


def state_folder() -> Path:
    """Where what is known of rollouts is kept, if it is not beside what they change."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home, "graftserve", "rollouts")


def who() -> str:
    """Who is at work, for the history."""
    user = f"uid {os.getuid()}"
    with suppress(KeyError, OSError):  # a user without a name
        user = getpass.getuser()
    return f"{user}@{socket.gethostname()}"


def show_history(place: Mapping[str, str], record: "Record", as_json: bool) -> None:
    """Rollouts, the last one first. place: where they were, for machines."""
    from graftserve.k8s.rollout import rollout_to_json

    rollouts = [*record.history, *([record.current] if record.current else [])]
    values = {**place, "rollouts": [rollout_to_json(item) for item in rollouts]}
    lines = []
    for item in reversed(rollouts):
        how = f"{item.outcome or 'under way'}"
        lines.append(f"{item.started_at}  {item.title}  {how}  by {item.by or 'unknown'}")
        lines += [f"    {line}" for line in (*([item.note] if item.note else []), *numbers(item))]
        if item.reason:
            lines.append(f"    {item.reason}")
    print_values(values, as_json, "\n".join(lines) or "no rollouts yet")
