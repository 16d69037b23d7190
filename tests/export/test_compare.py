"""Where two versions disagree: the numbers on made-up predictions, and two real versions."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from graftserve.export import SourceError, VerificationError
from graftserve.export.compare import Predictions, compare_predictions
from graftserve.export.compare_page import render_comparison
from graftserve.export.compare_versions import compare_versions, open_images
from graftserve.training.errors import DataError

PATHS = ["a", "b", "c", "d"]
BEFORE = np.array([[0.9, 0.1, 0], [0.4, 0.6, 0], [0.2, 0.2, 0.6], [0.5, 0.3, 0.2]], np.float32)
AFTER = np.array([[0.8, 0.2, 0], [0.7, 0.3, 0], [0.2, 0.7, 0.1], [0.5, 0.3, 0.2]], np.float32)
ALL = np.ones(4, np.bool_)
LABELS = ("x", "y", "z")


def predictions(probabilities: np.ndarray, labels=LABELS, valid: np.ndarray = ALL) -> Predictions:
    return Predictions(labels, probabilities, valid)


def test_what_changed() -> None:
    result = compare_predictions(PATHS, ["x", "y", "y", "x"], predictions(BEFORE), predictions(AFTER))
    assert result.images == 4
    assert result.agreement == 0.5
    assert result.largest_shift == pytest.approx(0.5)
    assert (result.largest_shift_image, result.largest_shift_class) == ("c", "y")
    assert result.mean_shift == pytest.approx((0.1 + 0.3 + 0.5 + 0) / 4)
    assert (result.accuracy_before, result.accuracy_after) == (0.75, 0.75)
    assert (result.mended, result.broken, result.p_value) == (1, 1, 1.0)
    flips = [(flip.path, flip.before, flip.after, flip.effect) for flip in result.flips]
    assert flips == [("c", "z", "y", "mended"), ("b", "y", "x", "broken")]
    changes = {
        change.label: (change.before, change.after, change.gained, change.lost) for change in result.classes
    }
    assert changes == {"x": (2, 3, 1, 0), "y": (1, 1, 1, 1), "z": (1, 0, 0, 1)}
    recalls = {change.label: (change.recall_before, change.recall_after) for change in result.classes}
    assert recalls == {"x": (1.0, 1.0), "y": (0.5, 0.5), "z": (None, None)}
    assert result.classes[0].label == "y"


def test_another_order_of_the_labels_is_no_change() -> None:
    other = predictions(BEFORE[:, [2, 0, 1]], ("z", "x", "y"))
    result = compare_predictions(PATHS, [None] * 4, predictions(BEFORE), other)
    assert (result.agreement, result.largest_shift, result.flips) == (1.0, 0.0, ())
    assert (result.accuracy_before, result.p_value) == (None, None)
    assert (result.only_before, result.only_after) == ((), ())


def test_classes_that_only_one_of_them_has() -> None:
    other = predictions(AFTER, ("x", "y", "w"))
    result = compare_predictions(PATHS, ["x", "x", "w", "x"], predictions(BEFORE), other)
    assert (result.only_before, result.only_after) == (("z",), ("w",))
    assert result.flips[0].path == "c"
    assert result.accuracy_after == 0.75


def test_images_that_one_of_them_cannot_read_are_left_out() -> None:
    result = compare_predictions(
        PATHS,
        [None] * 4,
        predictions(BEFORE, valid=np.array([True, False, True, False])),
        predictions(AFTER, valid=np.array([True, True, False, False])),
    )
    assert result.images == 1
    assert result.unreadable_before == ("b",)
    assert result.unreadable_after == ("c",)
    assert result.unreadable_both == ("d",)
    with pytest.raises(ValueError, match="images that both versions can read, got none among 4"):
        compare_predictions(PATHS, [None] * 4, predictions(BEFORE, valid=~ALL), predictions(AFTER))


def test_an_uneven_split_is_not_by_chance() -> None:
    """Ten mended and none broken: 2 / 2**10, as McNemar's exact test has it."""
    before = np.tile(np.array([0.4, 0.6], np.float32), (10, 1))
    after = before[:, ::-1].copy()
    result = compare_predictions(
        list("abcdefghij"),
        ["x"] * 10,
        *(Predictions(("x", "y"), rows, np.ones(10, bool)) for rows in (before, after)),
    )
    assert (result.mended, result.broken) == (10, 0)
    assert result.p_value == pytest.approx(2 / 2**10)


@pytest.fixture(scope="module")
def two_versions(exported, tmp_path_factory) -> tuple[Path, Path]:
    """The exported version, and one whose labels 3 and 5 have changed places."""
    other = tmp_path_factory.mktemp("other") / "2"
    shutil.copytree(exported.path, other)
    labels = (other / "assets/labels.txt").read_text().splitlines()
    labels[3], labels[5] = labels[5], labels[3]
    (other / "assets/labels.txt").write_text("".join(f"{label}\n" for label in labels))
    return exported.path, other


def test_two_versions_on_a_dataset(two_versions, digits_dir: Path) -> None:
    images = open_images(digits_dir, limit=60)
    result = compare_versions(*two_versions, images)
    comparison = result.comparison
    assert comparison.images == 60
    assert {change.label for change in comparison.classes if change.gained or change.lost} == {"3", "5"}
    assert comparison.accuracy_after < comparison.accuracy_before
    assert comparison.broken > comparison.mended
    assert result.ms_before > 0
    page = render_comparison("one", "two <b>", result, images)
    assert "two &lt;b&gt;" in page
    assert page.count("data:image/jpeg;base64,") == len(comparison.flips)
    assert "<script" not in page


def test_a_version_agrees_with_itself(two_versions, digits_dir: Path) -> None:
    result = compare_versions(two_versions[0], two_versions[0], open_images(digits_dir / "3", limit=9))
    assert result.comparison.agreement == 1
    assert result.comparison.largest_shift < 1e-5
    assert result.comparison.accuracy_before is None


def test_broken_images_are_named(two_versions, digits_dir: Path, tmp_path: Path) -> None:
    good = sorted((digits_dir / "3").iterdir())[0].read_bytes()
    (tmp_path / "good.jpg").write_bytes(good)
    (tmp_path / "cut.jpg").write_bytes(good[: len(good) // 2])
    result = compare_versions(*two_versions, open_images(tmp_path))
    assert result.comparison.images == 1
    assert result.comparison.unreadable_both == ("cut.jpg",)
    with pytest.raises(SourceError, match="images that both versions can read"):
        compare_versions(*two_versions, open_images(tmp_path / "cut.jpg"))


def test_what_cannot_be_compared(exported, tmp_path: Path, digits_dir: Path) -> None:
    with pytest.raises(VerificationError, match="not a version that graftserve export wrote"):
        compare_versions(exported.path, tmp_path, open_images(digits_dir, limit=1))
    with pytest.raises(DataError):
        open_images(tmp_path / "nothing")
    with pytest.raises(DataError):
        open_images(tmp_path)
    contract = shutil.copytree(exported.path, tmp_path / "1") / "assets.extra/contract.json"
    document = json.loads(contract.read_text())
    document["signatures"]["serving_default"].remove("probabilities")
    contract.write_text(json.dumps(document))
    with pytest.raises(VerificationError, match="comparing needs serving_default with probabilities"):
        compare_versions(exported.path, tmp_path / "1", open_images(digits_dir, limit=1))
