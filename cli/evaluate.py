"""`graftserve evaluate`: a run judged on images it has not seen."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .output import ProgressPrinter, cache_dir_option, features_dir, import_tensorflow, print_result

if TYPE_CHECKING:
    from graftserve.training.judge import Judgement

__all__ = ["command"]

_WORST = 3


@click.command("evaluate")
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path), required=False)
@click.option(
    "--split",
    type=click.Choice(["train", "validation", "test"]),
    help="Which of the run's own images to judge by, without DATA.  [default: test]",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder to write; an evaluation that is there is replaced.  [default: RUN_DIR/evaluation-NAME]",
)
@cache_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    run_dir: Path, data: Path | None, split: Any, output: Path | None, cache: Path | None, as_json: bool
) -> None:
    """Judge RUN_DIR, which graftserve train wrote, on images it has not seen.

    Without DATA these are the images that the run held out. With DATA, all images of another data set, whose
    labels have to be among the run's.

    \b
    Example: graftserve evaluate runs/flowers new-photos/
    """
    if data and split:
        raise click.UsageError("--split: is of the run's own images; leave it or DATA out.")
    import_tensorflow("training")
    from graftserve.training.judge import judge_run
    from graftserve.training.run import RunDirectory

    judgement = judge_run(
        RunDirectory.open_finished(run_dir),
        data,
        split=split or "test",
        output=output,
        cache_dir=features_dir(cache),
        listener=ProgressPrinter(),
    )
    if as_json:
        print_result(
            {"run": str(run_dir), "output": str(judgement.output)} | judgement.to_dict(), as_json=True
        )
        return
    result = judgement.evaluation
    low, high = result.accuracy_interval
    values: dict[str, Any] = {
        "images": f"{result.images} of {judgement.name}, {len(judgement.skipped)} skipped",
        "accuracy": f"{result.accuracy:.4f}, 95% interval {low:.4f} to {high:.4f}",
        "top 5": f"{result.top5_accuracy:.4f}",
        "macro F1": f"{result.macro_f1:.4f}",
        "log-loss": _tempered(judgement, "log_loss"),
        "calibration error": _tempered(judgement, "calibration_error"),
        "weakest classes": ", ".join(
            f"{judgement.labels[label]} (F1 {result.classes[label].f1:.4f})"
            for label in result.worst_classes(_WORST)
        ),
        "report": judgement.output / "report.html",
    }
    print_result(values, as_json=False)


def _tempered(judgement: "Judgement", name: str) -> str:
    """A number as it is, and as the run's temperature makes it."""
    before, after = getattr(judgement.evaluation, name), getattr(judgement.calibrated, name)
    if judgement.temperature == 1:
        return f"{before:.4f}"
    return f"{before:.4f}, {after:.4f} at temperature {judgement.temperature:.3f}"
