"""`graftserve verify`: a published version, checked offline or against a running server."""

from pathlib import Path

import click

from graftserve.client import Client

from .connection import Connection, access_options
from .output import CommandError, import_tensorflow, print_result
from .replay import replay

__all__ = ["command"]


@click.command("verify")
@click.argument("model_dir", type=click.Path(path_type=Path))
@click.option("--target", help="gRPC address of a server to ask instead of checking offline.")
@click.option("--model", help="Name of the model there.  [default: the name of MODEL_DIR's folder]")
@click.option("--version", type=click.IntRange(min=0), help="Ask this version there.  [default: the latest]")
@access_options
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    help="With --target: how far a probability may be off. GPUs round otherwise than CPUs.  [default: 0.001, "
    "or what the network in int8 needs]",
)
@click.option(
    "--timeout-s",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="With --target: seconds that a call may take, retries included.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    model_dir: Path,
    target: str | None,
    model: str | None,
    version: int | None,
    tolerance: float | None,
    timeout_s: float,
    as_json: bool,
    connection: Connection,
) -> None:
    """Check the version in MODEL_DIR, such as models/flowers/3: every file's sum, every signature in a
    Session as a server loads it, the golden images' answers, network.tflite and the warmup requests.

    With --target, replay its golden images against a running server, graftserve's or TensorFlow Serving, and
    print the largest difference; that needs no TensorFlow here.

    \b
    Example: graftserve verify models/flowers/3 --target flowers:8500 --model flowers
    """
    if target is None:
        for name, value in (("--model", model), ("--version", version)):
            if value is not None:
                raise click.UsageError(f"{name} asks a server: give its --target, too")
        if connection != Connection():
            raise click.UsageError("--tls and --header are for a server: give its --target, too")
        _verify_offline(model_dir, as_json)
        return
    model = model or model_dir.resolve().parent.name
    arguments = connection.client_arguments()
    with Client(target, model, version=version, timeout_s=timeout_s, **arguments) as client:
        result = replay(model_dir, client, model)
    if as_json:
        print_result(
            {
                "target": target,
                "model": model,
                "version": result.version,
                "images": result.images,
                "largest_difference": result.largest_difference,
                "worst_image": result.worst,
            },
            as_json=True,
        )
    else:
        print_result(
            {
                "asked": f"{model} version {result.version} at {target}",
                "images": f"{result.images} golden images, one by one and all at once",
                "difference": f"at most {result.largest_difference:.1e}, on {result.worst}",
            },
            as_json=False,
        )
    tolerance = result.tolerance if tolerance is None else tolerance
    if not result.largest_difference <= tolerance:
        raise CommandError(
            f"{model} version {result.version} at {target} differs from {model_dir} by "
            f"{result.largest_difference:.3g}, expected at most {tolerance:g}: another model or version"
        )


def _verify_offline(model_dir: Path, as_json: bool) -> None:
    import_tensorflow("training")
    from graftserve.export.verify import verify_version

    check = verify_version(model_dir)
    lite = check.lite_difference
    if as_json:
        print_result(
            {
                "path": str(model_dir),
                "files": check.files,
                "signatures": list(check.signatures),
                "images": check.images,
                "largest_difference": check.largest_difference,
                "lite_difference": lite,
                "warmup_records": check.warmup_records,
            },
            as_json=True,
        )
        return
    print_result(
        {
            "version": model_dir,
            "files": f"{check.files}, all with the sums of the manifest",
            "signatures": ", ".join(check.signatures),
            "goldens": f"{check.images} images, largest difference {check.largest_difference:.1e}",
            "network": "no network.tflite" if lite is None else f"network.tflite differs by {lite:.1e}",
            "warmup": f"{check.warmup_records} requests",
        },
        as_json=False,
    )
