"""`graftserve pull`: a version from an object store, every sum checked. Needs no TensorFlow."""

from pathlib import Path

import click

from .output import ProgressPrinter, print_result

__all__ = ["command"]


@click.command("pull")
@click.argument("url")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--version", type=click.IntRange(min=1), help="Bring this version.  [default: the newest]")
@click.option("--overwrite", is_flag=True, help="Replace a version in DIR that differs or is damaged.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(url: str, directory: Path, version: int | None, overwrite: bool, as_json: bool) -> None:
    """Bring a version to DIR/<N>. URL is a model's place (gs://, s3://, a folder) or a version's.

    It appears whole: files come aside, every sum is checked, and the folder is renamed last. A pull that was
    cut off goes on where it was, and one that is done does nothing, so an init container may run it at every
    start.

    \b
    Example: graftserve pull gs://bucket/models/flowers/3 models/flowers
    """
    from graftserve.export.pull import pull

    pulled = pull(url, directory, version=version, overwrite=overwrite, listener=ProgressPrinter())
    if as_json:
        print_result(
            {
                "path": str(pulled.path),
                "version": pulled.version,
                "files": pulled.files,
                "size_bytes": pulled.size_bytes,
                "reused_bytes": pulled.reused_bytes,
            },
            as_json=True,
        )
        return
    fetched = pulled.size_bytes - pulled.reused_bytes
    news = f"{fetched / 1e6:.1f} MB of it fetched" if fetched else "all of it there already"
    print_result(
        {
            "version": pulled.path,
            "files": f"{pulled.files}, every sum as in the manifest",
            "size": f"{pulled.size_bytes / 1e6:.1f} MB, {news}",
        },
        as_json=False,
    )
