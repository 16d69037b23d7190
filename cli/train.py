"""`graftserve train`: flags to a recipe to a run directory."""

import shlex
from pathlib import Path

import click

from graftserve.training.recipe import DEFAULT_BACKBONE, Recipe

from .output import ProgressPrinter, cache_dir, import_tensorflow, print_result

__all__ = ["command"]

_PERCENT = click.FloatRange(0, 100, max_open=True)


def _list_backbones(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    import_tensorflow("training")
    from graftserve.training.backbones import BACKBONES

    for row in BACKBONES.values():
        click.echo(f"{row.name:<20} {row.side_px:>4} px  {row.feature_count:>5} features")
    ctx.exit()


@click.command("train")
@click.argument("data_dir", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Run directory to write."
)
@click.option("--backbone", default=DEFAULT_BACKBONE, show_default=True, help="See --list-backbones.")
@click.option(
    "--list-backbones",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_backbones,
    help="Show the backbone table and exit.",
)
@click.option(
    "--weights",
    default="imagenet",
    show_default=True,
    help="imagenet, none, or a file: .weights.h5, .h5, .keras, .pth.",
)
@click.option("--validation-percent", type=_PERCENT, default=10.0, show_default=True)
@click.option("--test-percent", type=_PERCENT, default=10.0, show_default=True)
@click.option("--strict", is_flag=True, help="Stop at files that are no readable images.")
@click.option("--resume", is_flag=True, help="Continue an unfinished run.")
@click.option("--overwrite", is_flag=True, help="Replace a run that is there.")
@click.option(
    "--cache-dir",
    "cache",
    type=click.Path(path_type=Path),
    envvar="GRAFTSERVE_CACHE_DIR",
    help="Where features are kept between runs.  [default: ~/.cache/graftserve]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    data_dir: Path,
    output: Path,
    backbone: str,
    weights: str,
    validation_percent: float,
    test_percent: float,
    strict: bool,
    resume: bool,
    overwrite: bool,
    cache: Path | None,
    as_json: bool,
) -> None:
    """Fine-tune a backbone on DATA_DIR, a folder with one folder of images for each class.

    Features are computed once and cached, so a second run on the same images takes seconds.

    \b
    Example: graftserve train flowers/ --output runs/flowers
    """
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other.")
    if validation_percent + test_percent >= 100:
        raise click.UsageError("--validation-percent and --test-percent: expected less than 100 together.")
    import_tensorflow("training")
    recipe = Recipe(str(data_dir), backbone, weights, validation_percent, test_percent)
    from graftserve.training import train
    from graftserve.training.backbones import BACKBONES
    from graftserve.training.dataset import SPLITS

    if backbone not in BACKBONES:
        raise click.UsageError(f"--backbone: no {backbone!r}. Known: {', '.join(BACKBONES)}.")
    run = train(
        recipe,
        output,
        cache_dir=(cache or cache_dir()) / "features",
        strict=strict,
        resume=resume,
        overwrite=overwrite,
        listener=ProgressPrinter(),
    )
    metrics = run.metrics
    if as_json:
        print_result({"run": str(run.path), "labels": run.labels} | metrics, as_json=True)
        return
    counts = [sum(splits[split] for splits in metrics["images"].values()) for split in SPLITS]
    images = ", ".join(f"{count} {split}" for count, split in zip(counts, SPLITS, strict=True))
    features = metrics["features"]
    print_result(
        {
            "run": run.path,
            "backbone": f"{metrics['backbone']}, linear head",
            "images": f"{images}, {metrics['skipped']} skipped",
            "accuracy": ", ".join(
                _accuracy(metrics["evaluation"], split) for split in ("test", "validation")
            ),
            "features": f"{features['computed']} computed, {features['cached']} cached, "
            f"{features['seconds']:.1f} s",
            "report": run.path / "report.md",
            "next": shlex.join(
                ["graftserve", "export", str(run.path), "--model-base-path", f"models/{run.path.name}"]
            ),
        },
        as_json=False,
    )


def _accuracy(evaluation: dict[str, dict[str, float] | None], split: str) -> str:
    result = evaluation[split]
    return f"{result['accuracy']:.4f} on {split}" if result else f"not measured on {split} (no images)"
