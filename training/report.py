"""What there is to tell of a run, and the short page in Markdown; `html_report` has the long one."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .evaluate import Evaluation
from .predictions import Mistake

__all__ = ["ReportData", "render_report"]

_MOST_CONFUSED = 10


@dataclass(frozen=True)
class ReportData:
    """All that the reports show; a run leaves at its default what it does not have.

    counts: images for each label and split. evaluations: by split, None for one without images, of the
        probabilities before any temperature.
    judged: the split that the reports speak of; where it has no images, "validation" stands in.
    temperature: as fitted; calibrated: the judged split at that temperature.
    history: a mapping for each evaluation with stage (its name) and epoch (of the stage, 0 before its first
        step), and of loss, validation_loss, validation_accuracy and learning_rate those that are not None.
    stages: a mapping for each, with name, unfreeze, trainable_parameters, parameters, epochs (run), stopped
        (why) and best_epoch.
    sweeps: by stage, a mapping with the rates and losses of its learning-rate sweep and the rate suggested.
    mistakes: the worst first. read_image: a path's bytes, OSError if there are none.
    skipped: (path, reason). duplicates: groups of the same image, in several splits or with several labels;
        each member (path, label, split).
    timings: seconds by what took them. notes: the warnings given.
    auto: the situation and the reasons for what was chosen, any nesting of mappings, lists and plain values.
    weights: which weights were loaded, as text: a line that says it in short, then a table.
    """

    title: str
    recipe: Mapping[str, Any]
    labels: Sequence[str]
    counts: Mapping[str, Mapping[Any, int]]
    evaluations: Mapping[Any, Evaluation | None]
    judged: str = "test"
    temperature: float | None = None
    calibrated: Evaluation | None = None
    history: Sequence[Mapping[str, Any]] = ()
    stages: Sequence[Mapping[str, Any]] = ()
    sweeps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    mistakes: Sequence[Mistake] = ()
    read_image: Callable[[str], bytes] | None = None
    skipped: Sequence[tuple[str, str]] = ()
    duplicates: Sequence[Sequence[tuple[str, str, str]]] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()
    auto: Mapping[str, Any] | None = None
    weights: str | None = None

    @property
    def verdict(self) -> tuple[str, Evaluation] | None:
        """The split that the reports speak of and how the model did on it; None if nothing was held out."""
        for split in (self.judged, "validation"):
            if result := self.evaluations.get(split):
                return split, result
        return None

    @property
    def tempered(self) -> Evaluation | None:
        """The judged split at the fitted temperature; None if that is 1, which changes nothing."""
        return self.calibrated if self.temperature not in (None, 1.0) else None

    @property
    def across_splits(self) -> int:
        """How many of the duplicates were learnt and then asked for."""
        return sum(len({split for _, _, split in group}) > 1 for group in self.duplicates)

    @property
    def contradictory(self) -> int:
        """How many of the duplicates have more than one label."""
        return sum(len({label for _, label, _ in group}) > 1 for group in self.duplicates)


def render_report(data: ReportData) -> str:
    """Markdown: the accuracy first, then where it comes from and what to look at next."""
    lines = [f"# {_escape(data.title)}", ""]
    lines += ["| split | images | accuracy | 95% interval | log-loss |", "|---|---:|---:|---:|---:|"]
    for split, result in data.evaluations.items():
        if result:
            low, high = result.accuracy_interval
            accuracy = f"{result.accuracy:.4f} | {low:.4f} to {high:.4f}"
            lines.append(f"| {split} | {result.images} | {accuracy} | {result.log_loss:.4f} |")
        else:
            lines.append(f"| {split} | 0 | not measured | not measured | not measured |")
    verdict = data.verdict
    if verdict:
        lines += ["", *_calibration(data, *verdict)]
    lines += ["", *_classes(data)]

    mistakes = verdict[1].most_confused(_MOST_CONFUSED) if verdict else []
    if verdict and mistakes:
        names = [_escape(label) for label in data.labels]
        lines += ["", f"## Most confused on {verdict[0]}", ""]
        lines += [f"- {names[true]} taken for {names[answer]}: {count}" for true, answer, count in mistakes]
    lines += ["", "## Run", ""]
    for stage in data.stages:
        lines.append(
            f"- {_escape(str(stage['name']))}: {stage['trainable_parameters']:,} of {stage['parameters']:,} "
            f"parameters learnt, {stage['epochs']:g} epochs, {_escape(str(stage['stopped']))}"
        )
    lines.append(f"- files skipped: {len(data.skipped)}{' (see skipped.csv)' if data.skipped else ''}")
    if data.duplicates:
        lines.append(
            f"- the same image in more than one split: {data.across_splits}; with more than one label: "
            f"{data.contradictory} (see duplicates.csv)"
        )
    lines += [f"- {name}: {seconds:.1f} s" for name, seconds in data.timings.items()]
    lines += [f"- note: {_escape(note)}" for note in data.notes]
    return "\n".join(lines) + "\n"


def _calibration(data: ReportData, split: str, result: Evaluation) -> list[str]:
    line = f"Calibration error on {split}: {result.calibration_error:.4f}"
    if data.tempered:
        line += f", and {data.tempered.calibration_error:.4f} at temperature {data.temperature:.3f}"
    return [f"{line}. Macro F1: {result.macro_f1:.4f}."]


def _classes(data: ReportData) -> list[str]:
    splits = list(data.evaluations)
    columns = ["class", *splits]
    scores = None
    if data.verdict:
        split, result = data.verdict
        columns += [f"recall on {split}", f"precision on {split}"]
        scores = result.classes
    lines = ["## Classes", "", f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    for index, label in enumerate(data.labels):
        counts = data.counts.get(label, {})
        cells = [_escape(label), *(str(counts.get(split, 0)) for split in splits)]
        if scores:
            shares = scores[index].recall, scores[index].precision
            cells += ["not measured" if share is None else f"{share:.3f}" for share in shares]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _escape(text: str) -> str:
    """What a user named, so that it cannot become a table's border, markup or HTML."""
    return re.sub(r"([\\`*|<\[])", r"\\\1", " ".join(text.split()))
