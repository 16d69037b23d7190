"""`graftserve dataset`: look into images before training on them, or pack them into TFRecord shards."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from .output import ProgressPrinter, import_tensorflow, print_result

__all__ = ["command"]

_PERCENT = click.FloatRange(0, 100, max_open=True)
_SHOWN = 20


@click.group("dataset")
def command() -> None:
    """Look into a dataset, or pack it into TFRecord shards.

    DATA is a folder with one folder of images for each class, a .csv or .jsonl manifest (path, label, split),
    or TFRecord shards.
    """


def _percents(wrapped: Any) -> Any:
    for name, part in (("test", "judges"), ("validation", "chooses between fits")):
        wrapped = click.option(
            f"--{name}-percent",
            type=_PERCENT,
            default=10.0,
            show_default=True,
            help=f"Share of the images that {part}, where DATA does not say.",
        )(wrapped)
    return wrapped


def _open(data: Path, validation_percent: float, test_percent: float) -> Any:
    if validation_percent + test_percent >= 100:
        raise click.UsageError("--validation-percent and --test-percent: expected less than 100 together.")
    from graftserve.training.dataset import open_dataset, source_kind

    if source_kind(data) == "shards":
        import_tensorflow("training")
    return open_dataset(data, validation_percent=validation_percent, test_percent=test_percent)


@command.command()
@click.argument("data", type=click.Path(path_type=Path))
@_percents
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def info(data: Path, validation_percent: float, test_percent: float, as_json: bool) -> None:
    """Show the classes and splits of DATA, and what is wrong with it.

    Reads every image, to find those that are there twice: in more than one split, or under more than one
    label. Images are not decoded.

    \b
    Example: graftserve dataset info flowers/
    """
    dataset = _open(data, validation_percent, test_percent)
    from graftserve.training.dataset import content_keys, drop_examples, find_duplicates, small_classes

    keys, unreadable = content_keys(dataset, ProgressPrinter())
    dataset = drop_examples(dataset, unreadable)
    groups = find_duplicates(dataset.examples, keys)
    duplicates = [
        [{"path": e.path, "label": dataset.labels[e.label], "split": e.split} for e in group]
        for group in groups
    ]
    skipped = [{"path": skipped.path, "reason": skipped.reason} for skipped in dataset.skipped]
    if as_json:
        values = {
            "data": str(data),
            "classes": dataset.counts(),
            "skipped": skipped,
            "duplicates": duplicates,
            "small_classes": small_classes(dataset),
        }
        print_result(values, as_json=True)
        return
    counts = dataset.counts()
    click.echo("\n".join(_table(counts)))
    small = [f"{label}  {sum(counts[label].values())}" for label in small_classes(dataset)]
    _section("classes with fewer than 20 images", small)
    _section("files passed over", [f"{each['path']}  {each['reason']}" for each in skipped])
    for key, title in (
        ("split", "images in more than one split"),
        ("label", "images under more than one label"),
    ):
        torn = [group for group in duplicates if len({each[key] for each in group}) > 1]
        _section(title, [" = ".join(f"{each['path']} ({each[key]})" for each in group) for group in torn])


def _table(counts: Mapping[str, Mapping[Any, int]]) -> list[str]:
    splits = list(next(iter(counts.values())))
    rows = [(label, *(row[split] for split in splits), sum(row.values())) for label, row in counts.items()]
    total = ("total", *(sum(column) for column in list(zip(*rows, strict=True))[1:]))
    cells = [[str(cell) for cell in row] for row in (("class", *splits, "total"), *rows, total)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]


def _section(title: str, lines: list[str]) -> None:
    click.echo(f"\n{title}: {len(lines)}")
    for line in lines[:_SHOWN]:
        click.echo(f"  {line}")
    if len(lines) > _SHOWN:
        click.echo(f"  and {len(lines) - _SHOWN} more; --json shows all")


@command.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@_percents
@click.option("--shards", type=click.IntRange(min=1), help="How many to write for training.")
@click.option(
    "--shard-mb",
    type=click.FloatRange(min=0, min_open=True),
    help="Megabytes in a shard, about.  [default: 100]",
)
@click.option(
    "--workers", type=click.IntRange(1, 256), default=8, show_default=True, help="Shards written at once."
)
@click.option("--overwrite", is_flag=True, help="Replace shards that are there.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def pack(
    data: Path,
    output: Path,
    validation_percent: float,
    test_percent: float,
    shards: int | None,
    shard_mb: float | None,
    workers: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write the images of DATA as TFRecord shards to the folder OUTPUT, shuffled, their bytes untouched.

    OUTPUT can be trained on as DATA is. Few large files are read faster than many small ones, above all over
    a network.

    \b
    Example: graftserve dataset pack flowers/ flowers-packed
    """
    if shards is not None and shard_mb is not None:
        raise click.UsageError("--shards and --shard-mb exclude each other.")
    import_tensorflow("training")
    from graftserve.training.pack import pack as pack_dataset

    packed = pack_dataset(
        _open(data, validation_percent, test_percent),
        output,
        shards=shards,
        shard_mb=100.0 if shard_mb is None else shard_mb,
        workers=workers,
        overwrite=overwrite,
        listener=ProgressPrinter(),
    )
    if as_json:
        values = {
            "output": str(output),
            "images": packed.images,
            "shards": packed.shards,
            "size_bytes": packed.size_bytes,
            "skipped": len(packed.skipped),
        }
        print_result(values, as_json=True)
        return
    print_result(
        {
            "output": output,
            "images": ", ".join(f"{count} {split}" for split, count in packed.images.items()),
            "shards": ", ".join(f"{count} {split}" for split, count in packed.shards.items()),
            "size": f"{packed.size_bytes / 1e6:.1f} MB",
            "skipped": f"{len(packed.skipped)}, listed in {output / 'skipped.csv'}",
            "next": shlex.join(["graftserve", "train", str(output), "--output", f"runs/{output.name}"]),
        },
        as_json=False,
    )
