"""Where two versions of a model agree and where not, from what each says of the same images.

Numbers in, numbers out: how the predictions were made is not known here, so the same comparison serves two
folders and two running servers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["ClassChange", "Comparison", "Flip", "Predictions", "compare_predictions"]


@dataclass(frozen=True)
class Predictions:
    """What one version says of N images.

    labels: C names, in the order of the columns. probabilities: float32 [N, C], zeros where `valid` is false.
    valid: bool [N], whether the image could be read.
    """

    labels: tuple[str, ...]
    probabilities: npt.NDArray[np.float32]
    valid: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Flip:
    """An image whose top answer differs. shift: the largest change of a probability, 0 to 1.

    label: what it shows, if known.
    """

    path: str
    label: str | None
    before: str
    before_score: float
    after: str
    after_score: float
    shift: float

    @property
    def effect(self) -> str:
        """ "mended", "broken", "still wrong", or "" where the label is not known."""
        if self.label is None:
            return ""
        if self.after == self.label:
            return "mended"
        return "broken" if self.before == self.label else "still wrong"


@dataclass(frozen=True)
class ClassChange:
    """How often a class was the top answer before and after; of its own images, if labels are known, the
    shares recognised. gained, lost: images that came to it and left it."""

    label: str
    before: int
    after: int
    gained: int
    lost: int
    images: int
    recall_before: float | None
    recall_after: float | None


@dataclass(frozen=True)
class Comparison:
    """images: that both could read. agreement: the share with the same top answer.

    largest_shift: of a probability, of `largest_shift_class` in `largest_shift_image`; mean_shift and
    p95_shift are over the images' largest. Accuracies are None where no label is known; p_value: how likely
    so uneven a split of mended and broken is by chance, 1 where there is neither. unreadable_*: paths that
    only the one, the other, or neither could read. only_before, only_after: labels that only one of them has.
    """

    images: int
    agreement: float
    largest_shift: float
    largest_shift_image: str
    largest_shift_class: str
    mean_shift: float
    p95_shift: float
    accuracy_before: float | None
    accuracy_after: float | None
    mended: int
    broken: int
    p_value: float | None
    classes: tuple[ClassChange, ...]
    flips: tuple[Flip, ...]
    unreadable_before: tuple[str, ...]
    unreadable_after: tuple[str, ...]
    unreadable_both: tuple[str, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]


def compare_predictions(
    paths: Sequence[str],
    truth: Sequence[str | None],
    before: Predictions,
    after: Predictions,
) -> Comparison:
    """Compare what two versions say of the same N images.

    paths, truth: of each image its name, and its label if known. Classes that only one of them has count with
    a probability of 0 in the other. The flips come in the order of their shift, the classes in that of their
    changes. Raises ValueError if no image could be read by both.
    """
    labels = tuple(dict.fromkeys([*before.labels, *after.labels]))
    both = before.valid & after.valid
    if not both.any():
        raise ValueError(f"expected images that both versions can read, got none among {len(paths)}")
    rows = np.flatnonzero(both)
    chosen = rows.tolist()
    first, second = (_over(labels, predictions, rows) for predictions in (before, after))
    names = [paths[row] for row in chosen]
    known = [truth[row] for row in chosen]
    shifts = np.abs(second - first)
    largest = shifts.max(axis=1)
    image, column = np.unravel_index(int(shifts.argmax()), shifts.shape)
    top_before, top_after = first.argmax(axis=1), second.argmax(axis=1)
    flipped = np.flatnonzero(top_before != top_after)
    flips = sorted(
        (
            Flip(
                names[row],
                known[row],
                labels[top_before[row]],
                float(first[row, top_before[row]]),
                labels[top_after[row]],
                float(second[row, top_after[row]]),
                float(largest[row]),
            )
            for row in flipped
        ),
        key=lambda flip: (-flip.shift, flip.path),
    )
    index = {label: number for number, label in enumerate(labels)}
    true = np.array([-1 if label is None else index.get(label, -2) for label in known])
    mended = sum(flip.effect == "mended" for flip in flips)
    broken = sum(flip.effect == "broken" for flip in flips)
    is_known = true != -1
    return Comparison(
        images=len(rows),
        agreement=1 - len(flips) / len(rows),
        largest_shift=float(shifts[image, column]),
        largest_shift_image=names[image],
        largest_shift_class=labels[column],
        mean_shift=float(largest.mean()),
        p95_shift=float(np.quantile(largest, 0.95)),
        accuracy_before=_share(top_before == true, is_known),
        accuracy_after=_share(top_after == true, is_known),
        mended=mended,
        broken=broken,
        p_value=_mcnemar(mended, broken) if is_known.any() else None,
        classes=_class_changes(labels, top_before, top_after, true),
        flips=tuple(flips),
        unreadable_before=_some(paths, ~before.valid & after.valid),
        unreadable_after=_some(paths, before.valid & ~after.valid),
        unreadable_both=_some(paths, ~before.valid & ~after.valid),
        only_before=tuple(label for label in before.labels if label not in set(after.labels)),
        only_after=tuple(label for label in after.labels if label not in set(before.labels)),
    )


def _over(
    labels: tuple[str, ...], predictions: Predictions, rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """The probabilities of some rows, in columns for all of `labels`."""
    if predictions.labels == labels:
        return predictions.probabilities[rows]
    column = {label: number for number, label in enumerate(labels)}
    spread = np.zeros((len(rows), len(labels)), np.float32)
    spread[:, [column[label] for label in predictions.labels]] = predictions.probabilities[rows]
    return spread


def _class_changes(
    labels: tuple[str, ...],
    before: npt.NDArray[np.int64],
    after: npt.NDArray[np.int64],
    true: npt.NDArray[np.int64],
) -> tuple[ClassChange, ...]:
    changes = []
    for number, label in enumerate(labels):
        was, is_now, own = before == number, after == number, true == number
        changes.append(
            ClassChange(
                label,
                int(was.sum()),
                int(is_now.sum()),
                int((is_now & ~was).sum()),
                int((was & ~is_now).sum()),
                int(own.sum()),
                _share(was, own),
                _share(is_now, own),
            )
        )
    return tuple(sorted(changes, key=lambda change: -(change.gained + change.lost)))


def _share(hits: npt.NDArray[np.bool_], among: npt.NDArray[np.bool_]) -> float | None:
    return float(hits[among].mean()) if among.any() else None


def _mcnemar(mended: int, broken: int) -> float:
    """The two-sided exact test: of the changed answers, each would be as likely mended as broken by chance.

    Source: McNemar 1947, "Note on the sampling error of the difference between correlated proportions".
    """
    if not mended + broken:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(mended, mended + broken).pvalue)


def _some(paths: Sequence[str], chosen: npt.NDArray[np.bool_]) -> tuple[str, ...]:
    return tuple(paths[row] for row in np.flatnonzero(chosen).tolist())
