"""The page a person reads after a run."""

from collections.abc import Mapping
from typing import Any

from .dataset import Dataset
from .evaluate import Evaluation
from .recipe import Recipe

__all__ = ["render_report"]

_MOST_CONFUSED = 10


def render_report(
    recipe: Recipe,
    dataset: Dataset,
    evaluations: Mapping[Any, Evaluation | None],
    metrics: Mapping[str, Any],
) -> str:
    """Markdown: the accuracy first, then where it comes from and what to look at next."""
    lines = [f"# {recipe.backbone} on {dataset.root.name}", ""]
    lines += ["| split | images | accuracy | log-loss |", "|---|---:|---:|---:|"]
    for split, result in evaluations.items():
        if result:
            lines.append(f"| {split} | {result.images} | {result.accuracy:.4f} | {result.log_loss:.4f} |")
        else:
            lines.append(f"| {split} | 0 | not measured | not measured |")

    test = evaluations["test"]
    lines += [
        "",
        "## Classes",
        "",
        "| class | train | validation | test | recall on test |",
        "|---|---:|---:|---:|---:|",
    ]
    for index, (label, counts) in enumerate(dataset.counts().items()):
        recall = test.recall(index) if test else None
        shown = "not measured" if recall is None else f"{recall:.3f}"
        lines.append(f"| {label} | {counts['train']} | {counts['validation']} | {counts['test']} | {shown} |")

    mistakes = test.most_confused(_MOST_CONFUSED) if test else []
    if mistakes:
        lines += ["", "## Most confused on test", ""]
        lines += [
            f"- {dataset.labels[true]} taken for {dataset.labels[predicted]}: {count}"
            for true, predicted, count in mistakes
        ]
    features = metrics["features"]
    lines += [
        "",
        "## Run",
        "",
        f"- head: linear, inverse penalty {metrics['head']['strength']:g}",
        f"- features: {features['computed']} computed, {features['cached']} from the cache, "
        f"{features['seconds']:.1f} s",
        f"- files skipped: {metrics['skipped']}{' (see skipped.csv)' if metrics['skipped'] else ''}",
        f"- total: {metrics['total_seconds']:.1f} s",
    ]
    return "\n".join(lines) + "\n"
