"""`graftserve tune`: the batching that suits this machine, by measuring."""

from pathlib import Path

import click

from .output import CommandError, ProgressPrinter, import_tensorflow, print_result

__all__ = ["command"]


@click.command("tune")
@click.argument("model_dir", type=click.Path(path_type=Path))
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="Folder for what was found.  [default: tuning-<model>-<version>]",
)
@click.option(
    "--max-latency-ms",
    type=click.FloatRange(min=0, min_open=True),
    help="The most images a second among batches that take at most this (95th percentile).",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="How long to measure each point, three times.",
)
@click.option(
    "--max-batch",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="The largest batch to try.",
)
@click.option("--publish", is_flag=True, help="Publish the version with the choice as the model's next one.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    model_dir: Path,
    output: Path | None,
    max_latency_ms: float | None,
    seconds: float,
    max_batch: int,
    publish: bool,
    as_json: bool,
) -> None:
    """Run the network of the version in MODEL_DIR over batch sizes and threads, choose, and try the choice
    against what it has now. MODEL_DIR may be a model's folder: its newest version, then.

    Writes tuning.json, tuning.html with the curve, and batching_parameters.txt for servers that are run with
    --enable_batching. A published version is never changed: --publish writes the choice into a new one. Let
    the machine do nothing else meanwhile.

    \b
    Example: graftserve tune models/flowers/3 --publish
    """
    import_tensorflow("training")
    from graftserve.export.publish import republish
    from graftserve.export.tune import CALLERS, SIZES, tune
    from graftserve.export.tune_page import render_tuning
    from graftserve.export.versions import newest_version
    from graftserve.training.files import write_atomically, write_json

    version_dir = newest_version(model_dir)
    name = f"{version_dir.resolve().parent.name} version {version_dir.name}"
    output = output or Path(f"tuning-{version_dir.resolve().parent.name}-{version_dir.name}")
    tuning = tune(
        version_dir,
        sizes=[size for size in SIZES if size <= max_batch],
        max_latency_ms=max_latency_ms,
        seconds_per_point=seconds,
        listener=ProgressPrinter(),
    )
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "tuning.json", tuning.to_dict())
        for file_name, content in (
            ("tuning.html", render_tuning(f"Batching of {name}", tuning)),
            ("batching_parameters.txt", tuning.chosen.to_text()),
        ):
            with write_atomically(output / file_name) as file:
                file.write(content)
    except OSError as error:
        raise CommandError(f"{output}: cannot be written: {error.strerror or error}") from error
    is_kept = tuning.chosen == tuning.current
    published = republish(version_dir, tuning.chosen) if publish and not is_kept else None

    if as_json:
        print_result(
            tuning.to_dict() | {"output": str(output), "published": str(published) if published else None},
            as_json=True,
        )
        return
    click.echo(f"{'batch':>5}  {'threads':>7}  {'images/s':>8}  {'median ms':>9}  {'95% ms':>8}")
    for point in tuning.points:
        mark = "  <" if point == tuning.best else ""
        click.echo(
            f"{point.batch_images:>5}  {point.threads:>7}  {point.images_per_s:>8.1f}  "
            f"{point.latency_p50_ms:>9.1f}  {point.latency_p95_ms:>8.1f}{mark}"
        )
    click.echo()
    chosen, trial = tuning.chosen, tuning.trial
    rows = {
        "choice": f"batches of up to {chosen.sizes[-1]} on {chosen.threads} threads"
        + (", as it is" if is_kept else f"; it has {tuning.current.sizes[-1]} on {tuning.current.threads}"),
        "trial": f"{trial.chosen_images_per_s:.1f} images/s for {CALLERS} callers with one image each, where "
        f"it gives {trial.current_images_per_s:.1f} now",
        "written": f"{output}/tuning.html, tuning.json, batching_parameters.txt",
    }
    if published:
        rows["published"] = str(published)
    elif not is_kept:
        rows["next"] = f"graftserve tune {model_dir} --publish"
    print_result(rows, as_json=False)
