"""`graftserve classify`: images to a running server, answers as they come or to a file."""

import io
import json
import sys
from collections import Counter, deque
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import click

from graftserve.client import Client, ClientError, InvalidImageError, Prediction

from .connection import Connection, connection_options
from .image_paths import STDIN, ImagePaths, printable
from .output import CommandError, CountPrinter, check_folder_of, print_result, require_extra
from .predictions import (
    FORMATS,
    Begin,
    PartFile,
    Row,
    errors_path,
    part_path,
    to_row,
    write_errors,
    write_rows,
)

__all__ = ["command"]

_INTERRUPTED = 130
_POSITIVE = click.IntRange(min=1)


@click.command("classify")
@connection_options
@click.argument("images", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Write a table, .jsonl, .csv or .parquet, with the columns image, label, score, top, version and "
    "error, in the order of IMAGES. It appears when all are done.",
)
@click.option("--resume", is_flag=True, help="With --output: continue a run that was broken off.")
@click.option(
    "--overwrite", is_flag=True, help="With --output: begin anew, and replace a table that is there."
)
@click.option("--top", type=_POSITIVE, default=1, show_default=True, help="Classes to show.")
@click.option("-0", "--null", is_flag=True, help="With -: paths end with a NUL, as find -print0 writes them.")
@click.option(
    "--max-side-px",
    type=_POSITIVE,
    metavar="N",
    help="Shrink larger images to N pixels before they are sent; also takes TIFF, and AVIF and HEIC where "
    "Pillow does.",
)
@click.option("--max-in-flight", type=_POSITIVE, metavar="N", help="Requests under way at a time.")
@click.option("--max-batch-images", type=_POSITIVE, metavar="N", help="Images in a request.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: a line for each image, or the summary.")
def command(
    target: str,
    model: str,
    version: int | None,
    timeout_s: float,
    images: tuple[str, ...],
    output: Path | None,
    resume: bool,
    overwrite: bool,
    top: int,
    null: bool,
    max_side_px: int | None,
    max_in_flight: int | None,
    max_batch_images: int | None,
    as_json: bool,
    connection: Connection,
) -> None:
    """Classify IMAGES on a running server: files, folders, patterns, or - for paths on stdin, one a line.

    Of a folder, every image below it is taken, told by content, hidden files left out. A quoted pattern such
    as 'photos/**/*.jpg' is expanded here, however many files match. Paths on stdin may be without end.

    A file that is missing or no readable image is reported, the others are classified all the same; the exit
    status is 1 then.

    With --output, what is done is kept in OUTPUT.part: after Ctrl-C, a lost server, a full disk or a kill,
    the same command with --resume continues where it stopped, given the same images. Those that failed are
    listed beside the output, in a file that ends in .errors.jsonl.

    \b
    Examples: graftserve classify --model flowers photos/
              graftserve classify --model flowers photos/ more/*.jpg --output predictions.parquet
              find photos -name '*.jpg' -print0 | graftserve classify --model flowers -0 - -o all.jsonl
    """
    if output is None and (resume or overwrite):
        raise click.UsageError("--resume and --overwrite are for runs with --output.")
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other.")
    if output is not None:
        _check_output(output)
    paths = ImagePaths(
        images,
        _unbuffered_stdin() if STDIN in images else io.BytesIO(),
        separator=b"\0" if null else b"\n",
        converted=max_side_px is not None,
    )
    options: dict[str, Any] = {"max_in_flight": max_in_flight, "max_batch_images": max_batch_images}
    if max_side_px is not None:
        from graftserve.client import Prepare

        options["prepare"] = Prepare(max_side_px=max_side_px)
    options = {name: value for name, value in options.items() if value is not None}
    options |= connection.client_arguments()
    with Client(target, model, version=version, timeout_s=timeout_s, **options) as client:
        if output is None:
            failed = _print(client, paths, top=top, as_json=as_json)
        else:
            settings = {"model": model, "version": version, "top": top, "max-side-px": max_side_px}
            run = _Run(output, settings, resume=resume, overwrite=overwrite)
            failed = run(client, paths, top=top, as_json=as_json)
    if failed:
        click.get_current_context().exit(1)


def _check_output(output: Path) -> None:
    if output.suffix not in FORMATS:
        raise click.UsageError(
            f"--output: expected a name ending in {', '.join(FORMATS)}, got {output.name}."
        )
    if output.suffix == ".parquet":
        require_extra("pyarrow", "parquet")
    check_folder_of("--output", output)
    if output.is_dir():
        raise CommandError(f"--output: {output} is a folder")


def _unbuffered_stdin() -> IO[bytes]:
    if sys.stdin is None:
        raise CommandError("-: expected paths on stdin, but it is closed")
    return open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)


def _answers(
    client: Client, paths: ImagePaths
) -> Generator[tuple[str, Prediction | InvalidImageError], None, None]:
    """Each path with its answer, in order."""
    asked: deque[str] = deque()

    def images() -> Iterator[str]:
        for path in paths:
            asked.append(path)
            yield path

    for answer in client.stream(images()):
        yield asked.popleft(), answer


def _print(client: Client, paths: ImagePaths, *, top: int, as_json: bool) -> int:
    """Print answers as they come; returns how many images failed."""
    images = failed = 0
    with closing(_answers(client, paths)) as answered:
        for path, result in answered:
            images += 1
            name = printable(path)
            if isinstance(result, InvalidImageError):
                failed += 1
                click.echo(f"{name}: {result}", err=True)
            if as_json:
                row = to_row(name, result, top)
                shown = (
                    ("image", "label", "score", "top", "version")
                    if row["error"] is None
                    else ("image", "error")
                )
                click.echo(json.dumps({key: row[key] for key in shown}, ensure_ascii=False))
            elif isinstance(result, Prediction):
                answers = "  ".join(f"{label} {score:.4f}" for label, score in result.top[:top])
                click.echo(f"{name}  {answers}")
    _check_found(paths, images)
    _say_passed_over(paths)
    if failed:
        click.echo(f"{failed} of {images} images could not be classified", err=True)
    return failed


class _Run:
    """Answers into `output`, by way of its part; called once."""

    def __init__(self, output: Path, settings: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        self._output, self._settings = output, settings
        self._part, self._errors = part_path(output), errors_path(output)
        self._begin: Begin = "resume" if resume else "overwrite" if overwrite else "new"
        self._images = 0
        self._failed: Counter[str] = Counter()
        self._versions: set[int] = set()

    def __call__(self, client: Client, paths: ImagePaths, *, top: int, as_json: bool) -> int:
        """Do all that is not done yet; returns how many images failed."""
        if self._output.exists() and not self._part.exists():
            if self._begin == "new":
                raise CommandError(f"{self._output}: exists; --overwrite replaces it")
            if self._begin == "resume":
                click.echo(f"{self._output} is complete: nothing to resume", err=True)
                return int(self._errors.exists())
        with PartFile(self._part, self._settings, self._begin) as part:
            paths.skip(self._images_done(part))
            before = self._images
            if before:
                click.echo(f"resuming after {_counted(before)}", err=True)
            try:
                rate = self._ask(part, client, paths, top)
                self._finish(part)
            except KeyboardInterrupt:
                click.echo(f"interrupted; {self._keep(part)}", err=True)
                click.get_current_context().exit(_INTERRUPTED)
            except (ClientError, CommandError, OSError) as error:
                raise CommandError(f"{_message(error)}; {self._keep(part)}") from error
        self._summarise(paths, rate, as_json=as_json)
        return self._failed.total()

    def _ask(self, part: PartFile, client: Client, paths: ImagePaths, top: int) -> float:
        """Returns images a second."""
        progress = CountPrinter("classifying", paths.total, before=self._images)
        try:
            with closing(_answers(client, paths)) as answers:
                for path, result in answers:
                    row = to_row(path, result, top)
                    part.append(row)
                    self._count(row)
                    progress.advance(f", {self._failed.total()} failed" if self._failed else "")
        finally:
            progress.end()
        _check_found(paths, self._images)
        return progress.rate

    def _finish(self, part: PartFile) -> None:
        if self._failed:
            write_errors(part.rows(), self._errors)
        else:
            self._errors.unlink(missing_ok=True)
        write_rows(part.rows(), self._output)
        part.remove()

    def _summarise(self, paths: ImagePaths, rate: float, *, as_json: bool) -> None:
        _say_passed_over(paths)
        failed = self._failed.total()
        if failed:
            classes = ", ".join(f"{count} {name}" for name, count in self._failed.most_common())
            click.echo(
                f"{failed} of {_counted(self._images)} could not be classified ({classes}): {self._errors}",
                err=True,
            )
        versions = sorted(self._versions)
        if len(versions) > 1:
            click.echo(
                f"answered by versions {', '.join(map(str, versions))}, as the column version says; "
                "--version asks one only",
                err=True,
            )
        summary = {"output": str(self._output), "images": self._images, "failed": failed}
        if as_json:
            errors = str(self._errors) if failed else None
            print_result(
                summary | {"errors": errors, "versions": versions, "images_per_s": rate}, as_json=True
            )
        else:
            answered_by = ", ".join(map(str, versions)) or "none"
            print_result(summary | {"versions": answered_by, "images/s": f"{rate:.1f}"}, as_json=False)

    def _images_done(self, part: PartFile) -> Iterator[str]:
        for row in part.rows():
            yield row["image"]
            self._count(row)

    def _count(self, row: Row) -> None:
        self._images += 1
        if row["error"] is None:
            self._versions.add(row["version"])
        else:
            self._failed[row["error_class"]] += 1

    def _keep(self, part: PartFile) -> str:
        """What is left of a run that ends early."""
        if not self._images:
            part.remove()
            return "nothing was done"
        return (
            f"{_counted(self._images)} done and kept in {self._part}: the same command with --resume"
            f"{' in place of --overwrite' if self._begin == 'overwrite' else ''} continues"
        )


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _check_found(paths: ImagePaths, images: int) -> None:
    if not images and not paths.from_stdin:
        raise CommandError("no images: expected JPEG, PNG, GIF, BMP or WebP files")


def _counted(images: int) -> str:
    return f"{images} image{'' if images == 1 else 's'}"


def _say_passed_over(paths: ImagePaths) -> None:
    for path in paths.examples:
        click.echo(f"passed over {printable(path)}: no image", err=True)
    if paths.passed_over > len(paths.examples):
        click.echo(f"and {paths.passed_over - len(paths.examples)} more", err=True)
