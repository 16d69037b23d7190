"""`graftserve train`: flags to a recipe to a run directory."""

import shlex
from pathlib import Path
from typing import Any

import click

from graftserve.training.errors import RecipeError
from graftserve.training.recipe import DEFAULT_BACKBONE, DEFAULT_RECIPE
from graftserve.training.recipe_files import describe_recipe, load_recipe, recipe_names

from .output import (
    ProgressPrinter,
    cache_dir_option,
    features_dir,
    import_tensorflow,
    print_result,
    require_extra,
)

__all__ = ["command"]

_PERCENT = click.FloatRange(0, 100, max_open=True)
_RATE = click.FloatRange(0, min_open=True)


def _list_backbones(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    import_tensorflow("training")
    from graftserve.training.backbones import BACKBONES

    for row in BACKBONES.values():
        click.echo(
            f"{row.name:<20} {row.side_px:>4} px  {row.feature_count:>5} features  boundary {row.boundary}"
        )
    ctx.exit()


def _list_recipes(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    for name in recipe_names():
        click.echo(f"{name:<16} {describe_recipe(name)}")
    ctx.exit()


@click.command("train")
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Run directory to write."
)
@click.option(
    "--recipe",
    default=DEFAULT_RECIPE,
    show_default=True,
    metavar="NAME|FILE",
    help="How to train: one of --list-recipes, or a .toml file.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a setting of the recipe, as in --set head.dropout=0.3; repeatable.",
)
@click.option(
    "--list-recipes",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_recipes,
    help="Show the recipes and exit.",
)
@click.option("--backbone", help=f"See --list-backbones.  [default: {DEFAULT_BACKBONE}]")
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
    help="imagenet, none, or a file: .weights.h5, .h5, .keras, .pth, a checkpoint.  [default: imagenet]",
)
@click.option("--weights-until", metavar="LAYER", help="Load no layer above this one.")
@click.option("--weights-exclude", multiple=True, metavar="LAYER", help="Do not load these; repeatable.")
@click.option("--truncate-at", metavar="LAYER", help="Use the network up to this layer as the backbone.")
@click.option(
    "--validation-percent", type=_PERCENT, help="Share of the images that choose between fits.  [default: 10]"
)
@click.option("--test-percent", type=_PERCENT, help="Share of the images that judge.  [default: 10]")
@click.option("--epochs", type=_RATE, help="Of every stage.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Images in a step.")
@click.option("--learning-rate", type=_RATE, help="Of every stage's head.")
@click.option("--find-learning-rate", is_flag=True, help="Sweep it before every stage, and take what suits.")
@click.option(
    "--unfreeze", metavar="LAYER", help="What learns in the last stage: all, boundary, or a layer on."
)
@click.option(
    "--unlabeled", type=click.Path(path_type=Path), metavar="DIR", help="More images, for pseudo-labels."
)
@click.option("--mixed-precision", is_flag=True, help="Compute in float16, on GPUs that can.")
@click.option("--seed", type=click.IntRange(min=0), help="Of everything random.  [default: 0]")
@click.option(
    "--engine",
    type=click.Choice(["auto", "tensorflow", "litert"]),
    default="auto",
    show_default=True,
    help="What computes features.",
)
@click.option("--tensorboard", is_flag=True, help="Write RUN/tensorboard, too.")
@click.option("--strict", is_flag=True, help="Stop at files that are no readable images.")
@click.option("--resume", is_flag=True, help="Continue an unfinished run.")
@click.option("--overwrite", is_flag=True, help="Replace a run that is there.")
@cache_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    data: Path,
    output: Path,
    recipe: str,
    settings: tuple[str, ...],
    engine: str,
    tensorboard: bool,
    strict: bool,
    resume: bool,
    overwrite: bool,
    cache: Path | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Fine-tune a backbone on DATA: a folder with one folder of images for each class, a .csv or .jsonl
    manifest (path, label, split), or TFRecord shards.

    Features are computed once and cached, so a second run on the same images takes seconds.

    \b
    Examples: graftserve train flowers/ --output runs/flowers
              graftserve train flowers/ --output runs/tuned --recipe two-stage --set stages.1.epochs=5
    """
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other.")
    if tensorboard:
        require_extra("tensorboard", "tensorboard")
    try:
        wanted = load_recipe(recipe, str(data), settings, _recipe_keys(**flags))
    except RecipeError as error:
        raise click.UsageError(str(error)) from error
    import_tensorflow("training")
    from graftserve.training import train
    from graftserve.training.backbones import BACKBONES
    from graftserve.training.dataset import SPLITS

    if wanted.backbone not in BACKBONES:
        raise click.UsageError(f"--backbone: no {wanted.backbone!r}. Known: {', '.join(BACKBONES)}.")
    run = train(
        wanted,
        output,
        cache_dir=features_dir(cache),
        engine=engine,
        strict=strict,
        resume=resume,
        overwrite=overwrite,
        tensorboard=tensorboard,
        listener=ProgressPrinter(),
    )
    if not run.finished:  # the worker that writes it may be on another machine
        click.echo("this worker's part is done; the first worker writes the run", err=True)
        return
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
            "backbone": f"{metrics['backbone']}, {_method(metrics)}",
            "images": f"{images}, {metrics['skipped']} skipped",
            "accuracy": ", ".join(
                _accuracy(metrics["evaluation"], split) for split in ("test", "validation")
            ),
            "features": f"{features['computed']} computed, {features['cached']} cached "
            f"({features['engine']}), {metrics['seconds']['features']:.1f} s",
            "report": run.path / "report.html",
            "next": shlex.join(
                ["graftserve", "export", str(run.path), "--model-base-path", f"models/{run.path.name}"]
            ),
        },
        as_json=False,
    )


def _recipe_keys(
    *,
    backbone: str | None,
    weights: str | None,
    weights_until: str | None,
    weights_exclude: tuple[str, ...],
    truncate_at: str | None,
    validation_percent: float | None,
    test_percent: float | None,
    epochs: float | None,
    batch_size: int | None,
    learning_rate: float | None,
    find_learning_rate: bool,
    unfreeze: str | None,
    unlabeled: Path | None,
    mixed_precision: bool,
    seed: int | None,
) -> dict[str, Any]:
    """The settings that were given as flags; the others are the recipe's."""
    keys = {
        "backbone": backbone,
        "weights": weights,
        "weights_until": weights_until,
        "weights_exclude": list(weights_exclude) or None,
        "truncate_at": truncate_at,
        "validation_percent": validation_percent,
        "test_percent": test_percent,
        "stages.epochs": epochs,
        "stages.steps": None if epochs is None else 0,
        "batch_size": batch_size,
        "stages.learning_rate": learning_rate,
        "stages.find_learning_rate": find_learning_rate or None,
        "stages.-1.unfreeze": unfreeze,
        "pseudo_labels.unlabeled_dir": None if unlabeled is None else str(unlabeled),
        "mixed_precision": mixed_precision or None,
        "seed": seed,
    }
    return {key: value for key, value in keys.items() if value is not None}


def _method(metrics: dict[str, Any]) -> str:
    stages = metrics["stages"]
    if metrics["method"] == "probe":
        return "linear head"
    return ", then ".join(stage["name"] for stage in stages)


def _accuracy(evaluation: dict[str, dict[str, Any] | None], split: str) -> str:
    result = evaluation[split]
    if not result:
        return f"not measured on {split} (no images)"
    low, high = result["accuracy_interval"]
    return f"{result['accuracy']:.4f} on {split} ({low:.3f} to {high:.3f})"
