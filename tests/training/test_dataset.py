"""Folders to examples: what counts, what is skipped and why, and splits that stay."""

import csv
import os
from collections import Counter
from pathlib import Path

import pytest

from graftserve.training import DataError
from graftserve.training.dataset import (
    Skipped,
    drop_examples,
    scan_folder,
    write_skipped,
    write_split,
)

JPEG = b"\xff\xd8\xff\xe0 looks like one"


def fill(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def test_content_decides_what_is_an_image(tmp_path: Path) -> None:
    root = fill(
        tmp_path,
        {
            "a/1.jpg": JPEG,
            "a/really_a_png.jpg": b"\x89PNG....",
            "a/deep/er/2.JPEG": JPEG,
            "a/notes.txt": b"hello",
            "a/empty.jpg": b"",
            "a/.hidden.jpg": JPEG,
            "a/.cache/3.jpg": JPEG,
            "b/noextension": b"BM....",
            "README.md": b"# data",
            ".git/x.jpg": JPEG,
        },
    )
    dataset = scan_folder(root)
    assert dataset.labels == ("a", "b")
    assert [e.path for e in dataset.examples] == [
        "a/1.jpg",
        "a/really_a_png.jpg",
        "a/deep/er/2.JPEG",
        "b/noextension",
    ]
    assert {s.path: s.reason for s in dataset.skipped} == {
        "README.md": "not in a class folder",
        "a/empty.jpg": "the file is empty",
        "a/notes.txt": "not a JPEG, PNG, GIF or BMP image",
    }


def many(count: int) -> dict[str, bytes]:
    return {f"{label}/{index}.jpg": JPEG for label in "ab" for index in range(count)}


def test_splits_follow_the_percentages_and_stay(tmp_path: Path) -> None:
    before = scan_folder(fill(tmp_path, many(400)), validation_percent=20, test_percent=10)
    counts = Counter(example.split for example in before.examples)
    assert counts["validation"] == pytest.approx(160, abs=40)
    assert counts["test"] == pytest.approx(80, abs=30)

    splits = {example.path: example.split for example in before.examples}
    (tmp_path / "a" / "7.jpg").unlink()
    after = scan_folder(fill(tmp_path, {"a/new.jpg": JPEG, "c/1.jpg": JPEG}), validation_percent=20)
    kept = [example for example in after.examples if example.path in splits]
    assert len(kept) == len(splits) - 1
    assert all(example.split == splits[example.path] for example in kept)


def test_no_percentage_means_no_split(tmp_path: Path) -> None:
    dataset = scan_folder(fill(tmp_path, many(50)), validation_percent=0, test_percent=0)
    assert {example.split for example in dataset.examples} == {"train"}


def test_a_class_always_has_something_to_train_on(tmp_path: Path) -> None:
    names = {f"class{index}/only.jpg": JPEG for index in range(60)}
    dataset = scan_folder(fill(tmp_path, names), validation_percent=45, test_percent=45)
    assert all(splits["train"] == 1 for splits in dataset.counts().values())


def test_dropping_unreadable_images_keeps_every_class_trainable(tmp_path: Path) -> None:
    dataset = scan_folder(fill(tmp_path, many(30)), validation_percent=40, test_percent=40)
    trained_on = [Skipped(e.path, "broken") for e in dataset.of("train") if e.label == 0]
    kept = drop_examples(dataset, trained_on)
    assert kept.counts()["a"]["train"] == 1
    assert len(kept.examples) + len(kept.skipped) == len(dataset.examples)
    with pytest.raises(DataError, match=r"no readable image in class a \(30 files skipped\)"):
        drop_examples(dataset, [Skipped(e.path, "broken") for e in dataset.examples if e.label == 0])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no class folders. Expected one folder of images for each class"),
        ({"1.jpg": JPEG}, "no class folders"),
        ({"a/1.jpg": JPEG}, r"one class only \(a\)"),
        ({"a/1.jpg": JPEG, "b/x.txt": b"text"}, r"no readable image in class b \(1 files skipped\)"),
        ({"a/1.jpg": JPEG, "b\nc/1.jpg": JPEG}, r"class folder 'b\\nc': a label must be printable"),
    ],
)
def test_what_cannot_be_trained_on(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        scan_folder(fill(tmp_path, files))


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        scan_folder(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="not a folder"):
        scan_folder(tmp_path / "file")


@pytest.mark.parametrize(("validation", "test"), [(-1, 10), (10, -1), (60, 40)])
def test_percentages_are_checked(tmp_path: Path, validation: float, test: float) -> None:
    with pytest.raises(ValueError, match="expected both at least 0 and together below 100"):
        scan_folder(fill(tmp_path, many(2)), validation_percent=validation, test_percent=test)


def test_written_tables_hold_everything(tmp_path: Path) -> None:
    odd = os.fsdecode(b'a/caf\xe9, "quoted".jpg')  # Latin-1 bytes, no UTF-8
    dataset = scan_folder(fill(tmp_path / "data", {odd: JPEG, "a/no.txt": b"x", "b/1.jpg": JPEG}))
    write_split(dataset, tmp_path / "split.csv")
    write_skipped(dataset, tmp_path / "skipped.csv")
    with (tmp_path / "split.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        assert [(row["path"], row["label"]) for row in csv.DictReader(file)] == [(odd, "a"), ("b/1.jpg", "b")]
    with (tmp_path / "skipped.csv").open(newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == ["a/no.txt"]
