import csv
import os
from collections import Counter
from pathlib import Path

import pytest

from graftserve.training import DataError
from graftserve.training.dataset import (
    Dataset,
    Example,
    Skipped,
    content_keys,
    drop_examples,
    find_duplicates,
    open_dataset,
    small_classes,
    unlabeled_images,
    write_duplicates,
    write_skipped,
    write_split,
)
from graftserve.training.images import FolderImages, content_key

JPEG = b"\xff\xd8\xff\xe0 looks like one"


def fill(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def splits(dataset: Dataset) -> dict[str, str]:
    return {example.path: example.split for example in dataset.examples}


def test_content_decides_what_is_an_image(tmp_path: Path) -> None:
    root = fill(
        tmp_path,
        {
            "a/1.jpg": JPEG,
            "a/really_a_png.jpg": b"\x89PNG....",
            "a/deep/er/2.JPEG": JPEG,
            "a/notes.txt": b"hello",
            "a/empty.jpg": b"",
            "a/sound.webp": b"RIFF....WAVEfmt ",
            "a/.hidden.jpg": JPEG,
            "a/.cache/3.jpg": JPEG,
            "b/noextension": b"BM....",
            "b/4.WebP": b"RIFF....WEBPVP8 ",
            "README.md": b"# data",
            ".git/x.jpg": JPEG,
        },
    )
    dataset = open_dataset(root)
    assert dataset.labels == ("a", "b")
    assert [e.path for e in dataset.examples] == [
        "a/1.jpg",
        "a/really_a_png.jpg",
        "a/deep/er/2.JPEG",
        "b/4.WebP",
        "b/noextension",
    ]
    assert {s.path: s.reason for s in dataset.skipped} == {
        "README.md": "not in a class folder",
        "a/empty.jpg": "the file is empty",
        "a/notes.txt": "not a JPEG, PNG, GIF, BMP or WebP image",
        "a/sound.webp": "not a JPEG, PNG, GIF, BMP or WebP image",
    }


def test_what_is_no_file_is_passed_over(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", {"a/1.jpg": JPEG, "b/1.jpg": JPEG})
    fill(tmp_path / "elsewhere", {"c/1.jpg": JPEG, "2.jpg": JPEG})
    os.mkfifo(root / "a" / "pipe.jpg")
    (root / "a" / "broken.jpg").symlink_to(tmp_path / "nowhere")
    (root / "a" / "linked.jpg").symlink_to(tmp_path / "elsewhere" / "2.jpg")
    (root / "a" / "folder").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "loop").symlink_to(root / "a" / "loop")
    (root / "loop").symlink_to(root / "loop")
    (root / "c").symlink_to(tmp_path / "elsewhere" / "c")
    dataset = open_dataset(root)
    assert [e.path for e in dataset.examples] == ["a/1.jpg", "a/linked.jpg", "b/1.jpg", "c/1.jpg"]
    assert {s.path: s.reason for s in dataset.skipped} == {
        "a/broken.jpg": "cannot be read: No such file or directory",
        "a/folder": "a link to a folder: not followed",
        "a/loop": "cannot be read: Too many levels of symbolic links",
        "a/pipe.jpg": "not a regular file",
        "loop": "not in a class folder",
    }


def test_a_relative_folder_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fill(tmp_path, {**many(20), "a/b/c/1.jpg": JPEG})
    absolute = open_dataset(root)
    monkeypatch.chdir(root)
    relative = open_dataset(Path("."))
    assert relative.examples == absolute.examples
    monkeypatch.chdir("/")
    assert relative.images.read("a/0.jpg") == JPEG


def many(count: int, labels: str = "ab") -> dict[str, bytes]:
    return {f"{label}/{index}.jpg": JPEG for label in labels for index in range(count)}


def test_splits_follow_the_percentages_and_stay(tmp_path: Path) -> None:
    before = open_dataset(fill(tmp_path, many(400)), validation_percent=20, test_percent=10)
    counts = Counter(example.split for example in before.examples)
    assert counts["validation"] == pytest.approx(160, abs=40)
    assert counts["test"] == pytest.approx(80, abs=30)

    (tmp_path / "a" / "7.jpg").unlink()
    after = splits(open_dataset(fill(tmp_path, {"a/new.jpg": JPEG, "c/1.jpg": JPEG}), validation_percent=20))
    kept = {path: split for path, split in splits(before).items() if path != "a/7.jpg"}
    assert kept.items() <= after.items()


def test_the_hashes_of_earlier_versions_hold(tmp_path: Path) -> None:
    dataset = open_dataset(fill(tmp_path, many(24, "a") | {"b/x.jpg": JPEG}))
    assert sorted(e.path for e in dataset.of("validation")) == ["a/10.jpg", "a/18.jpg", "a/20.jpg", "a/6.jpg"]
    assert sorted(e.path for e in dataset.of("test")) == ["a/2.jpg", "a/21.jpg"]


def test_names_alike_up_to_nohash_stay_together(tmp_path: Path) -> None:
    names = {f"{c}/plant{p}_nohash_{i}.jpg": JPEG for c in "ab" for p in range(60) for i in range(3)}
    dataset = open_dataset(fill(tmp_path, names), validation_percent=30, test_percent=30)
    where: dict[str, set[str]] = {}
    for example in dataset.examples:
        where.setdefault(example.path.partition("_nohash_")[0], set()).add(example.split)
    assert len(where) == 120
    assert all(len(together) == 1 for together in where.values())
    assert {split for together in where.values() for split in together} == {"train", "validation", "test"}
    only_a = {path: split for path, split in splits(dataset).items() if path.startswith("a/")}
    only_b = {"a" + path[1:]: split for path, split in splits(dataset).items() if path.startswith("b/")}
    assert only_a != only_b  # the folder is part of what is hashed


def test_no_percentage_means_no_split(tmp_path: Path) -> None:
    dataset = open_dataset(fill(tmp_path, many(50)), validation_percent=0, test_percent=0)
    assert {example.split for example in dataset.examples} == {"train"}


def test_a_class_always_has_something_to_train_on(tmp_path: Path) -> None:
    names = {f"class{index}/only.jpg": JPEG for index in range(60)}
    dataset = open_dataset(fill(tmp_path, names), validation_percent=45, test_percent=45)
    assert all(counts["train"] == 1 for counts in dataset.counts().values())


def test_what_is_kept_for_training_keeps_what_belongs_to_it(tmp_path: Path) -> None:
    names = {f"class{c}/one_nohash_{i}.jpg": JPEG for c in range(60) for i in range(2)}
    dataset = open_dataset(fill(tmp_path, names), validation_percent=45, test_percent=45)
    assert all(counts["train"] == 2 for counts in dataset.counts().values())


def test_dropping_unreadable_images_keeps_every_class_trainable(tmp_path: Path) -> None:
    dataset = open_dataset(fill(tmp_path, many(30)), validation_percent=40, test_percent=40)
    trained_on = [Skipped(e.path, "broken") for e in dataset.of("train") if e.label == 0]
    kept = drop_examples(dataset, trained_on)
    assert kept.counts()["a"]["train"] == 1
    assert len(kept.examples) + len(kept.skipped) == len(dataset.examples)
    with pytest.raises(DataError, match=r"no readable image in class a \(30 files skipped\)"):
        drop_examples(dataset, [Skipped(e.path, "broken") for e in dataset.examples if e.label == 0])


@pytest.mark.parametrize("name", ["validation", "val"])
def test_split_folders_are_kept_as_they_are(tmp_path: Path, name: str) -> None:
    files = {
        f"{split}/{label}/{i}.jpg": JPEG for split in ("train", name, "test") for label in "ab" for i in "123"
    }
    dataset = open_dataset(fill(tmp_path, {**files, "README": b"x", "train/notes": b"x"}))
    assert dataset.labels == ("a", "b")
    assert splits(dataset) == {path: path.split("/")[0].replace(name, "validation") for path in files}
    assert [s.path for s in dataset.skipped] == ["README", "train/notes"]
    assert dataset.images.read("test/a/1.jpg") == JPEG


def test_a_missing_split_is_taken_from_training(tmp_path: Path) -> None:
    files = {f"train/{path}": JPEG for path in many(300)}
    only_train = Counter(splits(open_dataset(fill(tmp_path, files))).values())
    assert only_train["validation"] == pytest.approx(60, abs=25)
    assert only_train["test"] == pytest.approx(60, abs=25)

    held_out = {"test/a/1.jpg": JPEG, "test/b/1.jpg": JPEG}
    with_test = open_dataset(fill(tmp_path, held_out))
    assert {e.path for e in with_test.of("test")} == held_out.keys()
    assert len(with_test.of("validation")) == only_train["validation"]
    nothing_taken = open_dataset(tmp_path, validation_percent=0)
    assert len(nothing_taken.of("train")) == 600


def test_dropping_never_trains_on_what_was_given_for_testing(tmp_path: Path) -> None:
    files = {f"{split}/{path}": JPEG for split in ("train", "val", "test") for path in many(2)}
    dataset = open_dataset(fill(tmp_path, files))
    unreadable = [Skipped(f"train/a/{i}.jpg", "broken") for i in range(2)]
    with pytest.raises(DataError, match=r"no readable image to train on in class a: all are given as"):
        drop_examples(dataset, unreadable)


def test_classes_called_like_splits_are_classes(tmp_path: Path) -> None:
    among_others = open_dataset(fill(tmp_path / "1", {f"{label}/x.jpg": JPEG for label in ("test", "car")}))
    assert among_others.labels == ("car", "test")
    flat = open_dataset(fill(tmp_path / "2", {f"{label}/x.jpg": JPEG for label in ("test", "train")}))
    assert flat.labels == ("test", "train")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no class folders. Expected one folder of images for each class"),
        ({"1.jpg": JPEG}, "no class folders"),
        ({"a/1.jpg": JPEG}, r"one class only \(a\)"),
        ({"a/1.jpg": JPEG, "b/x.txt": b"text"}, r"no readable image in class b \(1 files skipped\)"),
        ({"a/1.jpg": JPEG, "b\nc/1.jpg": JPEG}, r"label 'b\\nc': expected printable text in one line"),
        (
            {"train/a/1.jpg": JPEG, "train/b/1.jpg": JPEG, "test/c/1.jpg": JPEG},
            "no readable image to train on in class c: all are given as validation or test",
        ),
        ({"test/a/1.jpg": JPEG, "val/b/1.jpg": JPEG}, "no readable image to train on in classes a, b"),
        (
            {f"{split}/{label}/1.jpg": JPEG for split in ("train", "val", "validation") for label in "ab"},
            "holds both val and validation",
        ),
        (
            {"train/a/1.jpg": JPEG, "train/b/1.jpg": JPEG, "test/1.jpg": JPEG},
            "expected class folders in test and train, found none in test",
        ),
        ({"a/1.jpg": JPEG, "b.tfrecord": b""}, r"holds both TFRecord shards and folders \(a\)"),
    ],
)
def test_what_cannot_be_trained_on(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(fill(tmp_path, files))


def test_no_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder or file"):
        open_dataset(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"not a folder, a manifest \(.csv, .jsonl, .ndjson\) or a TFRecord"):
        open_dataset(tmp_path / "file")


@pytest.mark.parametrize(("validation", "test"), [(-1, 10), (10, -1), (60, 40)])
def test_percentages_are_checked(tmp_path: Path, validation: float, test: float) -> None:
    with pytest.raises(ValueError, match="expected both at least 0 and together below 100"):
        open_dataset(fill(tmp_path, many(2)), validation_percent=validation, test_percent=test)


def test_labels_of_a_model_number_the_examples(tmp_path: Path) -> None:
    root = fill(tmp_path, {"b/1.jpg": JPEG, "b/2.jpg": JPEG, "d/x.txt": b"no image"})
    dataset = open_dataset(root, labels=["z", "b", "a"])
    assert dataset.labels == ("z", "b", "a")
    assert [(e.path, e.label) for e in dataset.examples] == [("b/1.jpg", 1), ("b/2.jpg", 1)]
    with pytest.raises(
        DataError, match=r"class b is not among the 7 that the model knows: c, d, e, f, g, \.\.\."
    ):
        open_dataset(root, labels=list("cdefghi"))


def test_dropping_from_what_is_only_judged(tmp_path: Path) -> None:
    images = {f"test/{path}": content for path, content in many(2).items()}
    dataset = open_dataset(fill(tmp_path, images), labels=["a", "b", "c"])
    kept = drop_examples(dataset, [Skipped("test/a/0.jpg", "broken"), Skipped("test/a/1.jpg", "broken")])
    assert [(e.path, e.split) for e in kept.examples] == [("test/b/0.jpg", "test"), ("test/b/1.jpg", "test")]


def test_only_test_folders_are_enough_to_judge(tmp_path: Path) -> None:
    dataset = open_dataset(fill(tmp_path, {"test/a/1.jpg": JPEG}), labels=["a", "b"])
    assert dataset.examples == (Example("test/a/1.jpg", 0, "test"),)


def test_small_classes_are_named(tmp_path: Path) -> None:
    dataset = open_dataset(fill(tmp_path, many(20, "ab") | many(19, "c")))
    assert small_classes(dataset) == ["c"]
    assert small_classes(dataset, least=21) == ["a", "b", "c"]


def test_the_same_image_twice_is_found(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", {f"{path}": JPEG + path.encode() for path in many(40)})
    dataset = open_dataset(root)
    of = {split: [e for e in dataset.of(split) if e.label == 0] for split in ("train", "validation")}
    across = [of["train"][0].path, of["validation"][0].path]
    harmless = [of["train"][1].path, of["train"][2].path]
    torn = ["a/new.jpg", "b/new.jpg"]
    same = dict.fromkeys(across, JPEG + b"across") | dict.fromkeys(harmless, JPEG + b"harmless")
    dataset = open_dataset(fill(root, same | dict.fromkeys(torn, JPEG + b"torn")))

    keys, unreadable = content_keys(dataset)
    assert unreadable == []
    assert keys["a/new.jpg"] == content_key(JPEG + b"torn")
    duplicates = find_duplicates(dataset.examples, keys)
    assert sorted(sorted(e.path for e in group) for group in duplicates) == sorted([sorted(across), torn])

    write_duplicates(duplicates, dataset, tmp_path / "duplicates.csv")
    with (tmp_path / "duplicates.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["group"] for row in rows} == {"1", "2"}
    assert {(row["path"], row["label"]) for row in rows if row["path"] in torn} == {
        ("a/new.jpg", "a"),
        ("b/new.jpg", "b"),
    }
    assert {row["split"] for row in rows if row["path"] in across} == {"train", "validation"}


def test_content_keys_name_what_cannot_be_read(tmp_path: Path) -> None:
    dataset = open_dataset(fill(tmp_path, many(3)))
    (tmp_path / "a" / "1.jpg").unlink()
    reports = []
    keys, unreadable = content_keys(dataset, reports.append)
    assert unreadable == [Skipped("a/1.jpg", "cannot be read: No such file or directory")]
    assert len(keys) == 5
    assert (reports[-1].done, reports[-1].total) == (6, 6)


def test_written_tables_hold_everything(tmp_path: Path) -> None:
    odd = os.fsdecode(b'a/caf\xe9, "quoted".jpg')  # Latin-1 bytes, no UTF-8
    dataset = open_dataset(fill(tmp_path / "data", {odd: JPEG, "a/no.txt": b"x", "b/1.jpg": JPEG}))
    write_split(dataset, tmp_path / "split.csv")
    write_skipped(dataset, tmp_path / "skipped.csv")
    with (tmp_path / "split.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        assert [(row["path"], row["label"]) for row in csv.DictReader(file)] == [(odd, "a"), ("b/1.jpg", "b")]
    with (tmp_path / "skipped.csv").open(newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == ["a/no.txt"]


def test_stamps_change_with_the_file(tmp_path: Path) -> None:
    images = FolderImages(fill(tmp_path, {"a/1.jpg": JPEG}))
    before = images.stamp("a/1.jpg")
    assert before == images.stamp(str(tmp_path / "a" / "1.jpg"))
    os.utime(tmp_path / "a" / "1.jpg", ns=(1, 1))
    touched = images.stamp("a/1.jpg")
    (tmp_path / "a" / "1.jpg").unlink()
    assert images.stamp("a/1.jpg") is None
    (tmp_path / "a" / "1.jpg").write_bytes(JPEG + b"!")
    os.utime(tmp_path / "a" / "1.jpg", ns=(1, 1))
    assert len({before, touched, images.stamp("a/1.jpg")}) == 3
    with pytest.raises(FileNotFoundError):
        images.read("a/2.jpg")


def test_unlabeled_images_are_found_anywhere(tmp_path: Path) -> None:
    root = fill(tmp_path, {"1.png": b"\x89PNG", "x/y/2.jpg": JPEG, "x/notes.txt": b"x", ".h/3.jpg": JPEG})
    images, paths = unlabeled_images(root)
    assert paths == ["1.png", "x/y/2.jpg"]
    assert [images.read(path) for path in paths] == [b"\x89PNG", JPEG]
    with pytest.raises(DataError, match="no images; expected JPEG"):
        unlabeled_images(fill(tmp_path / "none", {"x.txt": b"x"}))
    with pytest.raises(DataError, match="no such folder"):
        unlabeled_images(tmp_path / "nowhere")
