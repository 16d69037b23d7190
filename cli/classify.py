"""`graftserve classify`: images to a running server, answers as they come."""

import json
from pathlib import Path

import click

from graftserve.client import Client, InvalidImageError, Prediction

from .connection import connection_options

__all__ = ["command"]

_AT_ONCE = 256  # answers are printed after so many images


@click.command("classify")
@connection_options
@click.argument("images", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--top", type=click.IntRange(min=1), default=1, show_default=True, help="Classes to show.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON Lines, one object for each image.")
def command(
    target: str,
    model: str,
    version: int | None,
    timeout_s: float,
    images: tuple[Path, ...],
    top: int,
    as_json: bool,
) -> None:
    """Classify IMAGES on a running server.

    A file that is missing or no readable image is reported on stderr, the others are classified all the same;
    the exit status is 1 then.

    \b
    Example: graftserve classify --target localhost:8500 --model flowers photos/*.jpg
    """
    failed = 0
    with Client(target, model, version=version, timeout_s=timeout_s) as client:
        for start in range(0, len(images), _AT_ONCE):
            paths = images[start : start + _AT_ONCE]
            for path, result in zip(paths, client.classify_many(paths), strict=True):
                if isinstance(result, InvalidImageError):
                    failed += 1
                    click.echo(f"{path}: {result}", err=True)
                if as_json:
                    click.echo(json.dumps(_record(path, result, top), ensure_ascii=False))
                elif isinstance(result, Prediction):
                    answers = "  ".join(f"{label} {score:.4f}" for label, score in result.top[:top])
                    click.echo(f"{path}  {answers}")
    if failed:
        click.echo(f"{failed} of {len(images)} images could not be classified", err=True)
        click.get_current_context().exit(1)


def _record(path: Path, result: Prediction | InvalidImageError, top: int) -> dict[str, object]:
    if isinstance(result, InvalidImageError):
        return {"image": str(path), "error": str(result)}
    return {
        "image": str(path),
        "label": result.label,
        "score": result.score,
        "top": [{"label": label, "score": score} for label, score in result.top[:top]],
        "version": result.version,
    }
