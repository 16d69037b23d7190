import json
from pathlib import Path

import pytest

from graftserve.training import DataError
from graftserve.training.dataset import open_dataset

JPEG = b"\xff\xd8\xff\xe0 looks like one"


@pytest.fixture
def photos_dir(tmp_path: Path) -> Path:
    for path in ("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg", "b/3, left.jpg"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(JPEG + path.encode())
    return tmp_path


def jsonl(*rows: object) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


CSV = """\ufeffpath, label ,split,photographer
a/1.jpg,cat,train,Ann
a/2.jpg,cat,val,"Ben, Bob"

b/1.jpg,dog,Train,
./b/2.jpg,dog,validation,
"b/3, left.jpg",dog,test,
"""
ROWS = [
    {"path": "a/1.jpg", "label": "cat", "split": "train", "photographer": {"name": "Ann"}},
    {"path": "a/2.jpg", "label": "cat", "split": "val"},
    {"path": "b/1.jpg", "label": "dog", "split": "train"},
    {"path": "b/2.jpg", "label": "dog", "split": "validation"},
    {"path": "b/3, left.jpg", "label": "dog", "split": "test"},
]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.csv", CSV),
        ("data.CSV", CSV),
        ("data.jsonl", "\ufeff\n" + jsonl(*ROWS)),
        ("data.ndjson", jsonl(*ROWS)),
    ],
)
def test_both_kinds_give_the_same(photos_dir: Path, name: str, content: str) -> None:
    dataset = open_dataset(write(photos_dir, name, content))
    assert dataset.labels == ("cat", "dog")
    assert [(e.path, dataset.labels[e.label], e.split) for e in dataset.examples] == [
        ("a/1.jpg", "cat", "train"),
        ("a/2.jpg", "cat", "validation"),
        ("b/1.jpg", "dog", "train"),
        ("b/2.jpg", "dog", "validation"),
        ("b/3, left.jpg", "dog", "test"),
    ]
    assert dataset.skipped == ()
    assert dataset.images.read("b/3, left.jpg") == JPEG + b"b/3, left.jpg"


def test_an_empty_split_is_the_hash_of_the_path(tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / label).mkdir()
        for index in range(100):
            (tmp_path / label / f"{index}.jpg").write_bytes(JPEG)
    by_folder = open_dataset(tmp_path).examples
    rows = [
        {"path": e.path, "label": e.path[0], "split": [None, "", " "][i % 3]} for i, e in enumerate(by_folder)
    ]
    assert open_dataset(write(tmp_path, "all.jsonl", jsonl(*rows))).examples == by_folder
    lines = ["path,label", *(f"{e.path},{e.path[0]}" for e in by_folder)]
    assert open_dataset(write(tmp_path, "all.csv", "\n".join(lines))).examples == by_folder


def test_the_hash_is_left_what_is_not_named(tmp_path: Path) -> None:
    """Rows that say train stay there where other rows are split by the hash."""
    rows = []
    for index in range(200):
        (tmp_path / f"{index}.jpg").write_bytes(JPEG)
        rows.append(
            {"path": f"{index}.jpg", "label": "ab"[index % 2], "split": "train" if index < 100 else ""}
        )
    dataset = open_dataset(write(tmp_path, "mixed.jsonl", jsonl(*rows)))
    assert {e.split for e in dataset.examples if int(e.path[:-4]) < 100} == {"train"}
    assert {e.split for e in dataset.examples if int(e.path[:-4]) >= 100} == {"train", "validation", "test"}


def test_paths_may_be_absolute_or_outside(photos_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "3.jpg"
    outside.write_bytes(JPEG + b"outside")
    rows = [
        {"path": str(photos_dir / "a" / "1.jpg"), "label": "cat"},
        {"path": str(outside), "label": "dog"},
        {"path": f"../{photos_dir.name}/b/1.jpg", "label": "dog"},
    ]
    dataset = open_dataset(write(photos_dir, "data.jsonl", jsonl(*rows)))
    assert [e.path for e in dataset.examples] == ["a/1.jpg", str(outside), f"../{photos_dir.name}/b/1.jpg"]
    assert [dataset.images.read(e.path) for e in dataset.examples] == [
        JPEG + b"a/1.jpg",
        JPEG + b"outside",
        JPEG + b"b/1.jpg",
    ]


def test_missing_files_and_second_mentions_are_skipped(photos_dir: Path) -> None:
    (photos_dir / "notes.txt").write_text("hello")
    text = "path,label\na/1.jpg,cat\nnone.jpg,cat\nb/1.jpg,dog\nnotes.txt,dog\n./a//1.jpg,cat\nb,dog\n"
    dataset = open_dataset(write(photos_dir, "data.csv", text))
    assert [e.path for e in dataset.examples] == ["a/1.jpg", "b/1.jpg"]
    assert {s.path: s.reason for s in dataset.skipped} == {
        "a/1.jpg": "listed again on line 6; counted once",
        "none.jpg": "cannot be read: No such file or directory",
        "notes.txt": "not a JPEG, PNG, GIF, BMP or WebP image",
        "b": "not a regular file",
    }


def test_numbers_are_labels(photos_dir: Path) -> None:
    rows = [{"path": "a/1.jpg", "label": 0}, {"path": "b/1.jpg", "label": 1}]
    assert open_dataset(write(photos_dir, "data.jsonl", jsonl(*rows))).labels == ("0", "1")


def test_file_names_need_no_utf8(tmp_path: Path) -> None:
    (tmp_path / "b.jpg").write_bytes(JPEG)
    Path(str(tmp_path).encode().decode() + "/caf\udce9.jpg").write_bytes(JPEG)
    dataset = open_dataset(write(tmp_path, "data.csv", b"path,label\ncaf\xe9.jpg,a\nb.jpg,b\n"))
    assert [e.path for e in dataset.examples] == ["caf\udce9.jpg", "b.jpg"]


GOOD = {"path": "a/1.jpg", "label": "cat"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "", "x.csv, line 1: no path and no label; expected path, label .* got nothing"),
        ("x.csv", "file,label\na/1.jpg,cat\n", "line 1: no path; expected path, label .* got file, label"),
        ("x.csv", "path,label\n", "no images listed"),
        ("x.csv", "path,label\na/1.jpg,cat\na/2.jpg, \n", "line 3: the label is empty"),
        ("x.csv", "path,label\n,cat\n", "line 2: path: expected the name of a file, got ''"),
        (
            "x.csv",
            "path,label\nb/3, left.jpg,dog\n",
            "line 2: expected 2 fields, got 3; put a field .* in quotes",
        ),
        ("x.csv", "path,label,split\na/1.jpg,cat,dev\n", "line 2: split: expected train, .* got 'dev'"),
        (
            "x.csv",
            "path,label\na/1.jpg,cat\nb/1.jpg,dog\na/../a/1.jpg,dog\n",
            "line 4: a/1.jpg is dog here and cat on line 2",
        ),
        (
            "x.csv",
            "path,label,split\na/1.jpg,cat,train\na/1.jpg,cat,test\n",
            r"line 3: a/1.jpg is cat \(test\) here and cat \(train\) on line 2",
        ),
        ("x.csv", "path,label\na/1.jpg,cat\n", r"one class only \(cat\)"),
        ("x.csv", "path,label\na/1.jpg,cat\nnone.jpg,dog\n", "no readable image in class dog"),
        (
            "x.csv",
            'path,label\na/1.jpg,"two\nlines"\nb/1.jpg,dog\n',
            r"label 'two\\nlines': expected printable",
        ),
        ("x.csv", b"path,label\na/1.jpg,caf\xe9\nb/1.jpg,dog\n", "expected printable text"),
        ("x.csv", "path,label\n" + "x" * 200_000 + ",cat\n", "line 2: no CSV: field larger than"),
        ("x.jsonl", jsonl(GOOD) + "{path: 1}\n", "line 2: no JSON: Expecting property name"),
        ("x.jsonl", jsonl(GOOD, ["a/1.jpg", "cat"]), "line 2: expected a JSON object, got "),
        ("x.jsonl", jsonl(GOOD, {"path": "a/2.jpg"}), "line 2: no label; expected path, .* got path"),
        ("x.jsonl", jsonl({"path": 1, "label": "cat"}), "line 1: path: expected text, got 1"),
        ("x.jsonl", jsonl({"path": "a/1.jpg", "label": True}), "line 1: label: expected text, got true"),
        ("x.jsonl", jsonl({**GOOD, "split": 0}), "line 1: split: expected text, got 0"),
        ("x.jsonl", '{"path": "a\\u0000.jpg", "label": "cat"}', "line 1: path: expected the name of a file"),
        ("x.jsonl", '{"path": "\\ud800.jpg", "label": "cat"}', "line 1: path: expected the name of a file"),
        ("x.jsonl", "\n\n", "no images listed"),
    ],
)
def test_errors_name_the_line(photos_dir: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(write(photos_dir, name, content))


def test_labels_of_a_model(photos_dir: Path) -> None:
    manifest = write(photos_dir, "data.jsonl", jsonl(*ROWS))
    dataset = open_dataset(manifest, labels=["dog", "bird", "cat"])
    assert [e.label for e in dataset.examples] == [0, 0, 0, 2, 2]
    with pytest.raises(DataError, match="class dog is not among the 2 that the model knows: bird, cat"):
        open_dataset(manifest, labels=["bird", "cat"])
