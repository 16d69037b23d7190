"""`graftserve compare`: where two versions of a model disagree."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .output import CommandError, ProgressPrinter, import_tensorflow, print_result

if TYPE_CHECKING:
    from graftserve.export.compare import Comparison
    from graftserve.export.compare_versions import VersionComparison
    from graftserve.training.listing import Split

__all__ = ["command"]

_SHARE = click.FloatRange(0, 1)
_FLIPS_SHOWN = 10
_CLASSES_SHOWN = 5


@click.command("compare")
@click.argument("before", metavar="A", type=click.Path(path_type=Path))
@click.argument("after", metavar="B", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--split", type=click.Choice(["train", "validation", "test"]), help="Only DATA's images of this."
)
@click.option("--limit", type=click.IntRange(min=1), help="At most so many images, spread evenly.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write a page with the flipped images.")
@click.option("--require-agreement", type=_SHARE, help="Fail if fewer images get the same answer.")
@click.option("--max-shift", type=_SHARE, help="Fail if a probability changes by more.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    before: Path,
    after: Path,
    data: Path,
    split: "Split | None",
    limit: int | None,
    output: Path | None,
    require_agreement: float | None,
    max_shift: float | None,
    as_json: bool,
) -> None:
    """Ask versions A and B for every image of DATA: a dataset as graftserve train reads it, or a folder of
    images without labels.

    \b
    Example: graftserve compare models/flowers/3 models/flowers/4 new-photos/ --output comparison.html
    """
    import_tensorflow("training")
    from graftserve.export.compare_page import render_comparison
    from graftserve.export.compare_versions import compare_versions, open_images
    from graftserve.training.files import write_atomically

    images = open_images(data, split=split, limit=limit)
    result = compare_versions(before, after, images, ProgressPrinter())
    comparison = result.comparison
    if output is not None:
        page = render_comparison(str(before), str(after), result, images)
        with write_atomically(output) as file:
            file.write(page)
    if as_json:
        print_result(
            asdict(comparison) | {"ms_before": result.ms_before, "ms_after": result.ms_after},
            as_json=True,
        )
    else:
        _print(result, output)
    if require_agreement is not None and comparison.agreement < require_agreement:
        raise CommandError(
            f"agreement: expected at least {require_agreement:g}, got {comparison.agreement:.4f} on "
            f"{comparison.images} images"
        )
    if max_shift is not None and comparison.largest_shift > max_shift:
        raise CommandError(
            f"shift: expected at most {max_shift:g}, got {comparison.largest_shift:.4f} on "
            f"{comparison.largest_shift_image}"
        )


def _print(result: "VersionComparison", output: Path | None) -> None:
    comparison = result.comparison
    flipped = len(comparison.flips)
    rows = {
        "agreement": f"{comparison.agreement:.4f} of {comparison.images} images, {flipped} flipped",
        "shift": f"at most {comparison.largest_shift:.3f} ({comparison.largest_shift_class}, "
        f"{comparison.largest_shift_image}), {comparison.mean_shift:.3f} on average",
    }
    if comparison.accuracy_before is not None:
        rows["accuracy"] = (
            f"{comparison.accuracy_before:.4f} before, {comparison.accuracy_after:.4f} after: "
            f"{comparison.mended} mended, {comparison.broken} broken (p = {comparison.p_value:.2g})"
        )
    rows["time"] = f"{result.ms_before:.1f} ms an image before, {result.ms_after:.1f} ms after"
    for name, labels in (("only in A", comparison.only_before), ("only in B", comparison.only_after)):
        if labels:
            rows[name] = ", ".join(labels)
    for name, paths in (
        ("unread by A", comparison.unreadable_before),
        ("unread by B", comparison.unreadable_after),
        ("unreadable", comparison.unreadable_both),
    ):
        if paths:
            rows[name] = _named(paths)
    if output is not None:
        rows["page"] = str(output)
    print_result(rows, as_json=False)
    _print_changes(comparison)


def _print_changes(comparison: "Comparison") -> None:
    changed = [change for change in comparison.classes if change.gained or change.lost]
    if changed:
        click.echo()
    for change in changed[:_CLASSES_SHOWN]:
        click.echo(
            f"{change.label}: {change.before} before, {change.after} after ({change.gained} gained, "
            f"{change.lost} lost)"
        )
    if comparison.flips:
        click.echo()
    for flip in comparison.flips[:_FLIPS_SHOWN]:
        label = "" if flip.label is None else f"  {flip.effect}, it is {flip.label}"
        before, after = f"{flip.before} {flip.before_score:.4f}", f"{flip.after} {flip.after_score:.4f}"
        click.echo(f"{flip.path}  {before} -> {after}{label}")
    more = len(comparison.flips) - _FLIPS_SHOWN
    if more > 0:
        click.echo(f"and {more} more")


def _named(paths: tuple[str, ...]) -> str:
    more = len(paths) - _CLASSES_SHOWN
    return ", ".join(paths[:_CLASSES_SHOWN]) + (f" and {more} more" if more > 0 else "")
