"""`graftserve features`: what a backbone says of each image, as a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graftserve.training.recipe import DEFAULT_BACKBONE, Recipe

from .image_paths import printable
from .output import (
    ProgressPrinter,
    cache_dir_option,
    check_folder_of,
    features_dir,
    import_tensorflow,
    print_result,
    require_extra,
)

if TYPE_CHECKING:
    from graftserve.training.dataset import Example
    from graftserve.training.features import CachedFeatures

__all__ = ["command"]

_ROW_GROUP = 4096
_LISTED = 5
_TEXT = ("path", "label", "split")


@click.command("features")
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="Table to write: .parquet (columns path, label, split, features) or .npz (arrays of those names).",
)
@click.option("--backbone", help=f"See graftserve train --list-backbones.  [default: {DEFAULT_BACKBONE}]")
@click.option("--weights", help="imagenet, none, or a file.  [default: imagenet]")
@click.option(
    "--run",
    "run_dir",
    type=click.Path(path_type=Path),
    help="Take the backbone of this run, as it was trained, and its splits.",
)
@click.option("--layer", help="Take this layer's output, averaged over space.  [default: the last]")
@click.option(
    "--engine",
    type=click.Choice(["auto", "tensorflow", "litert"]),
    default="auto",
    show_default=True,
    help="What computes features.",
)
@cache_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    data: Path,
    output: Path,
    backbone: str | None,
    weights: str | None,
    run_dir: Path | None,
    layer: str | None,
    engine: str,
    cache: Path | None,
    as_json: bool,
) -> None:
    """Write what a backbone says of each image of DATA, a data set as graftserve train takes it, to a table.

    The features come from the cache, and go to it, as those of graftserve train do.

    \b
    Example: graftserve features flowers/ --output flowers.parquet --layer block10_add
    """
    if output.suffix not in (".parquet", ".npz"):
        raise click.UsageError(f"--output: expected a name ending in .parquet or .npz, got {output.name}.")
    check_folder_of("--output", output)
    if run_dir and (backbone or weights):
        raise click.UsageError(
            "--run: names the backbone and its weights; leave --backbone and --weights out."
        )
    if output.suffix == ".parquet":
        require_extra("pyarrow", "parquet")
    import_tensorflow("training")
    from graftserve.training.backbones import BACKBONES, load_backbone, truncate
    from graftserve.training.dataset import open_dataset
    from graftserve.training.features import cache_features
    from graftserve.training.graft import split_model
    from graftserve.training.run import RunDirectory

    if run_dir:
        run = RunDirectory.open_finished(run_dir)
        network, _ = split_model(run.load_model())
        preprocess, recipe = run.preprocess, run.recipe
    else:
        name = backbone or DEFAULT_BACKBONE
        if name not in BACKBONES:
            raise click.UsageError(f"--backbone: no {name!r}. Known: {', '.join(BACKBONES)}.")
        network = load_backbone(name, weights or "imagenet")
        preprocess, recipe = BACKBONES[name].preprocess, Recipe(str(data))
    if layer:
        network = truncate(network, layer)

    dataset = open_dataset(
        data, validation_percent=recipe.validation_percent, test_percent=recipe.test_percent
    )
    found = cache_features(
        network,
        preprocess,
        dataset.images,
        [example.path for example in dataset.examples],
        features_dir(cache),
        ProgressPrinter(),
        engine=engine,
    )
    skipped = (*dataset.skipped, *found.unreadable)
    for each in skipped[:_LISTED]:
        click.echo(f"skipped {each.path}: {each.reason}", err=True)
    if len(skipped) > _LISTED:
        click.echo(f"and {len(skipped) - _LISTED} more", err=True)
    kept = [example for example in dataset.examples if example.path in found.keys]
    write = _write_parquet if output.suffix == ".parquet" else _write_npz
    write(output, kept, dataset.labels, found)
    result = {
        "output": str(output),
        "images": len(kept),
        "features": found.feature_count,
        "skipped": len(skipped),
        "computed": found.computed,
        "cached": found.cached,
        "engine": found.engine,
    }
    print_result(result, as_json=as_json)


def _write_parquet(
    output: Path, examples: "Sequence[Example]", labels: Sequence[str], found: "CachedFeatures"
) -> None:
    """A row group at a time, so that memory holds no more of the features than that."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    from graftserve.training.files import write_atomically

    vector = pa.list_(pa.float32(), found.feature_count)
    schema = pa.schema([*((name, pa.string()) for name in _TEXT), ("features", vector)])
    with write_atomically(output, "wb") as file, ParquetWriter(file, schema) as writer:
        for start in range(0, len(examples), _ROW_GROUP):
            part = examples[start : start + _ROW_GROUP]
            columns: list[Any] = [_column(part, labels, name) for name in _TEXT]
            rows = found.rows([example.path for example in part])
            columns.append(pa.FixedSizeListArray.from_arrays(rows.ravel(), type=vector))
            writer.write_table(pa.table(columns, schema=schema), row_group_size=_ROW_GROUP)


def _write_npz(
    output: Path, examples: "Sequence[Example]", labels: Sequence[str], found: "CachedFeatures"
) -> None:
    import numpy as np

    from graftserve.training.files import write_atomically

    columns: dict[str, Any] = {name: np.array(_column(examples, labels, name)) for name in _TEXT}
    with write_atomically(output, "wb") as file:
        np.savez(file, **columns, features=found.rows([example.path for example in examples]))


def _column(examples: "Sequence[Example]", labels: Sequence[str], name: str) -> list[str]:
    if name == "label":
        return [labels[example.label] for example in examples]
    return [printable(getattr(example, name)) for example in examples]
