"""`graftserve export`: a run, a Keras model or a SavedModel to a published version."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .output import CommandError, ProgressPrinter, import_tensorflow, print_result

if TYPE_CHECKING:
    from graftserve.export.publish import Exported
    from graftserve.export.source import Source

__all__ = ["command"]

_SHARE = click.FloatRange(0, 1)


def _brought(option: str, **settings: Any) -> Callable[[Any], Any]:
    """An option for models that graftserve did not train."""
    settings["help"] = f"A model you bring: {settings['help']}"
    return click.option(option, **settings)


@click.command("export")
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--model-base-path",
    required=True,
    help="The model's folder, or its URL in an object store (gs://, s3://); its name is the model's name.",
)
@click.option(
    "--version", default="next", show_default=True, help="next, timestamp (seconds since 1970), or a number."
)
@click.option(
    "--top-k", type=click.IntRange(min=1), default=5, show_default=True, help="Classes that an answer names."
)
@_brought("--labels", type=click.Path(path_type=Path), help="its labels, one a line, in the outputs' order.")
@_brought(
    "--preprocess",
    help="what pixels it expects: a backbone's name (resnet50), or pixels=0..1,resize=crop and the like.",
)
@_brought("--goldens", type=click.Path(path_type=Path), help="a folder of images to check the export with.")
@_brought("--feature-layer", help="the layer that gives the features.  [default: what the last Dense takes]")
@_brought(
    "--activation",
    type=click.Choice(["auto", "softmax", "sigmoid", "none"]),
    default="auto",
    show_default=True,
    help="what turns its outputs into probabilities.",
)
@_brought(
    "--signature", default="serving_default", show_default=True, help="of a SavedModel, the one to use."
)
@click.option(
    "--signature-outputs",
    "signature_outputs",
    multiple=True,
    metavar="NAME[=OUTPUT,...]",
    help="Only this signature, with these outputs; may be repeated.  [default: all of all four]",
)
@click.option(
    "--batching",
    type=click.Choice(["graph", "none"]),
    default="graph",
    show_default=True,
    help="Gather requests inside the graph, or leave that to the server.",
)
@click.option("--tune", is_flag=True, help="Choose batch sizes and threads by measuring on this machine.")
@click.option(
    "--quantize",
    type=click.Choice(["int8"]),
    help="Add network.int8.tflite, which graftserve serve --engine=litert_int8 takes, and say what it costs.",
)
@click.option(
    "--max-accuracy-drop",
    type=_SHARE,
    default=0.01,
    show_default=True,
    help="With --quantize: what it may cost.",
)
@click.option("--require-accuracy", type=_SHARE, help="Publish only if the test accuracy is at least this.")
@click.option("--require-top5", type=_SHARE, help="Publish only if the top-5 accuracy is at least this.")
@click.option(
    "--max-latency-ms",
    type=click.FloatRange(min=0, min_open=True),
    help="Publish only if one image takes at most this (95th percentile, on this machine).",
)
@click.option(
    "--serving-check/--no-serving-check",
    "check_serving",
    default=True,
    show_default=True,
    help="Let a real server answer the golden images before the version appears.",
)
@click.option(
    "--keep", type=click.IntRange(min=1), help="Afterwards, remove all but the newest of so many versions."
)
@click.option(
    "--model-config-file",
    type=click.Path(path_type=Path),
    help="With --keep: the server's file; versions that it labels or pins are never removed.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    source: Path,
    model_base_path: str,
    version: str,
    labels: Path | None,
    preprocess: str | None,
    goldens: Path | None,
    feature_layer: str | None,
    activation: str,
    signature: str,
    signature_outputs: tuple[str, ...],
    batching: str,
    quantize: str | None,
    check_serving: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Publish SOURCE as a version of a model: a run directory of graftserve train, a Keras model (.keras,
    .h5), or a SavedModel.

    The version appears whole: it is written aside, loaded as a server would, compared with the trained model,
    served on trial, and renamed last.

    \b
    Examples:
      graftserve export runs/flowers --model-base-path models/flowers
      graftserve export mine.keras --labels labels.txt --preprocess pixels=0..1 --model-base-path models/mine
    """
    import_tensorflow("training")
    from graftserve.export import Batching, ExportOptions
    from graftserve.export.publish import export_model

    from .serving_check import serving_check

    chosen = ExportOptions(
        version=version,
        batching=Batching() if batching == "graph" else None,
        signature_outputs=_parse_outputs(signature_outputs),
        quantize=quantize is not None,
        serving_check=serving_check if check_serving else None,
        **options,
    )
    opened = _open(source, labels, preprocess, goldens, feature_layer, activation, signature)
    for note in opened.notes:
        click.echo(f"note: {note}", err=True)
    exported = export_model(opened, model_base_path, chosen, ProgressPrinter())
    if as_json:
        print_result(_document(exported), as_json=True)
    else:
        print_result(_summary(exported), as_json=False)


def _open(
    source: Path,
    labels: Path | None,
    preprocess: str | None,
    goldens: Path | None,
    feature_layer: str | None,
    activation: str,
    signature: str,
) -> "Source":
    from graftserve.export.keras_source import open_keras
    from graftserve.export.run_source import open_run
    from graftserve.export.saved_model_source import open_saved_model

    if source.suffix in (".keras", ".h5", ".hdf5"):
        return open_keras(
            source, labels, preprocess, goldens=goldens, feature_layer=feature_layer, activation=activation
        )
    if (source / "saved_model.pb").is_file():
        return open_saved_model(
            source, labels, preprocess, goldens=goldens, signature=signature, activation=activation
        )
    for option, value in (("--labels", labels), ("--preprocess", preprocess), ("--goldens", goldens)):
        if value is not None:
            raise CommandError(
                f"{option}: {source} is no Keras model and no SavedModel, and a run has its own; leave it out"
            )
    return open_run(source)


def _parse_outputs(texts: tuple[str, ...]) -> dict[str, tuple[str, ...]] | None:
    if not texts:
        return None
    chosen: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, _, outputs = text.partition("=")
        chosen[name.strip()] = tuple(output.strip() for output in outputs.split(",") if output.strip())
    return chosen


def _document(exported: "Exported") -> dict[str, Any]:
    check, quantization, serving = exported.check, exported.quantization, exported.serving
    return {
        "path": exported.location,
        "version": exported.version,
        "size_bytes": exported.size_bytes,
        "signatures": list(check.signatures),
        "warmup_records": check.warmup_records,
        "checked_images": check.images,
        "largest_difference": check.largest_difference,
        "lite_difference": check.lite_difference,
        "lite_reason": exported.lite.reason,
        "int8_accuracy": quantization.int8_accuracy if quantization else None,
        "int8_accuracy_drop": quantization.drop if quantization else None,
        "batching": exported.tuning.chosen.to_dict() if exported.tuning else None,
        "latency_ms": check.latency_ms,
        "served_by": serving.server if serving else None,
        "served_difference": serving.largest_difference if serving else None,
        "pruned": list(exported.pruned),
        "seconds": round(exported.seconds, 3),
    }


def _summary(exported: "Exported") -> dict[str, Any]:
    check, quantization = exported.check, exported.quantization
    rows: dict[str, Any] = {
        "version": exported.location,
        "size": f"{exported.size_bytes / 1e6:.1f} MB, {check.warmup_records} warmup requests",
        "checked": f"{check.images} images in a Session, largest difference {check.largest_difference:.1e}",
    }
    if check.lite_difference is not None:
        rows["network.tflite"] = f"largest difference {check.lite_difference:.1e}"
    if quantization:
        rows["int8"] = (
            f"accuracy {quantization.int8_accuracy:.4f} where it was {quantization.float_accuracy:.4f}, on "
            f"{quantization.images} images"
        )
    if exported.tuning:
        chosen = exported.tuning.chosen
        rows["batching"] = f"up to {chosen.sizes[-1]} images on {chosen.threads} threads"
    if check.latency_ms is not None:
        rows["latency"] = f"{check.latency_ms:.1f} ms for one image (95th percentile)"
    if exported.serving:
        rows["served"] = (
            f"by {exported.serving.server}, largest difference {exported.serving.largest_difference:.1e}"
        )
    if exported.pruned:
        rows["removed"] = "version " + ", ".join(map(str, exported.pruned))
    rows["next"] = _next(exported)
    return rows


def _next(exported: "Exported") -> str:
    if "://" in exported.location:
        return shlex.join(["graftserve", "pull", exported.location, "models"])
    base = exported.path.parent
    return shlex.join(["graftserve", "serve", "--model_name", base.name, "--model_base_path", str(base)])
