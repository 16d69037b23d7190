"""`graftserve export`: a run directory to a published version."""

import shlex
from pathlib import Path

import click

from .output import import_tensorflow, print_result

__all__ = ["command"]


@click.command("export")
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option(
    "--model-base-path",
    type=click.Path(path_type=Path),
    required=True,
    help="The model's folder; its name is the model's name.",
)
@click.option(
    "--version", type=click.IntRange(min=1), help="Number of the version.  [default: the next free one]"
)
@click.option(
    "--top-k", type=click.IntRange(min=1), default=5, show_default=True, help="Classes that an answer names."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(run_dir: Path, model_base_path: Path, version: int | None, top_k: int, as_json: bool) -> None:
    """Publish RUN_DIR, which graftserve train wrote, as a version of a model.

    The version appears whole: it is written aside, loaded as a server would, compared with the trained model,
    and renamed last.

    \b
    Example: graftserve export runs/flowers --model-base-path models/flowers
    """
    import_tensorflow("training")
    from graftserve.export import export_run

    exported = export_run(run_dir, model_base_path, version=version, top_k=top_k)
    check = exported.check
    if as_json:
        print_result(
            {
                "path": str(exported.path),
                "version": exported.version,
                "size_bytes": exported.size_bytes,
                "warmup_records": exported.warmup_records,
                "checked_images": check.images,
                "largest_difference": check.largest_difference,
                "seconds": round(exported.seconds, 3),
            },
            as_json=True,
        )
        return
    base = exported.path.parent
    difference = f"largest difference {check.largest_difference:.1e}"
    print_result(
        {
            "version": exported.path,
            "size": f"{exported.size_bytes / 1e6:.1f} MB, {exported.warmup_records} warmup requests",
            "checked": f"{check.images} images in a Session, {difference}",
            "next": shlex.join(
                ["graftserve", "serve", "--model_name", base.name, "--model_base_path", str(base)]
            ),
        },
        as_json=False,
    )
