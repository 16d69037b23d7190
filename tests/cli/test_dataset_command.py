import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from graftserve.training.dataset import open_dataset

Graftserve = Callable[..., tuple[int, str, str]]


@pytest.fixture
def photos_dir(tmp_path: Path) -> Path:
    """Two classes in three splits; one image twice, one under two labels, one file that is no image."""
    root = tmp_path / "photos"
    for label, count in (("cat", 25), ("dog", 3)):
        for split in ("train", "test"):
            (root / split / label).mkdir(parents=True)
            for index in range(count):
                content = f"{split} {label} {index}".encode()
                (root / split / label / f"{index}.jpg").write_bytes(b"\xff\xd8\xff" + content)
    (root / "test" / "cat" / "again.jpg").write_bytes(b"\xff\xd8\xfftrain cat 7")
    (root / "train" / "dog" / "not_a_cat.jpg").write_bytes(b"\xff\xd8\xfftrain cat 9")
    (root / "train" / "dog" / "notes.txt").write_text("hello")
    return root


def test_info_shows_classes_and_what_is_wrong(graftserve: Graftserve, photos_dir: Path) -> None:
    status, out, err = graftserve("dataset", "info", photos_dir, "--validation-percent", "0")
    assert status == 0
    assert out == (
        "class  train  validation  test  total\n"
        "cat       25           0    26     51\n"
        "dog        4           0     3      7\n"
        "total     29           0    29     58\n"
        "\n"
        "classes with fewer than 20 images: 1\n"
        "  dog  7\n"
        "\n"
        "files passed over: 1\n"
        "  train/dog/notes.txt  not a JPEG, PNG, GIF, BMP or WebP image\n"
        "\n"
        "images in more than one split: 1\n"
        "  train/cat/7.jpg (train) = test/cat/again.jpg (test)\n"
        "\n"
        "images under more than one label: 1\n"
        "  train/cat/9.jpg (cat) = train/dog/not_a_cat.jpg (dog)\n"
    )
    assert err.startswith("reading images: 58/58, ")


def test_info_as_json(graftserve: Graftserve, photos_dir: Path) -> None:
    status, out, _ = graftserve("dataset", "info", photos_dir, "--validation-percent", "0", "--json")
    assert status == 0
    assert json.loads(out) == {
        "data": str(photos_dir),
        "classes": {
            "cat": {"train": 25, "validation": 0, "test": 26},
            "dog": {"train": 4, "validation": 0, "test": 3},
        },
        "skipped": [{"path": "train/dog/notes.txt", "reason": "not a JPEG, PNG, GIF, BMP or WebP image"}],
        "duplicates": [
            [
                {"path": "train/cat/7.jpg", "label": "cat", "split": "train"},
                {"path": "test/cat/again.jpg", "label": "cat", "split": "test"},
            ],
            [
                {"path": "train/cat/9.jpg", "label": "cat", "split": "train"},
                {"path": "train/dog/not_a_cat.jpg", "label": "dog", "split": "train"},
            ],
        ],
        "small_classes": ["dog"],
    }


def test_info_shows_the_first_of_many(graftserve: Graftserve, photos_dir: Path) -> None:
    for index in range(30):
        (photos_dir / "train" / "cat" / f"{index:02}.txt").write_text("hello")
    _, out, _ = graftserve("dataset", "info", photos_dir)
    assert "files passed over: 31\n  train/cat/00.txt  not a JPEG" in out
    assert (
        "  train/cat/19.txt  not a JPEG, PNG, GIF, BMP or WebP image\n  and 11 more; --json shows all\n"
        in out
    )


def test_info_on_files_needs_no_tensorflow(photos_dir: Path) -> None:
    code = (
        "import sys\nfrom graftserve.cli.app import _run\nstatus = _run(sys.argv[1:])\n"
        "print(status, sorted({'tensorflow', 'keras', 'numpy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "dataset", "info", str(photos_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_pack_and_look_into_it(graftserve: Graftserve, digits_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "packed"
    status, out, _ = graftserve("dataset", "pack", digits_dir, output, "--shards", "2", "--json")
    assert status == 0
    counts = {split: len(open_dataset(digits_dir).of(split)) for split in ("train", "validation", "test")}
    size_bytes = sum(path.stat().st_size for path in output.glob("*.tfrecord"))
    assert json.loads(out) == {
        "output": str(output),
        "images": counts,
        "shards": {"train": 2, "validation": 1, "test": 1},
        "size_bytes": size_bytes,
        "skipped": 0,
    }
    by_folder = json.loads(graftserve("dataset", "info", digits_dir, "--json")[1])
    packed = json.loads(graftserve("dataset", "info", output, "--json")[1])
    assert packed["classes"] == by_folder["classes"]

    status, out, err = graftserve("dataset", "pack", digits_dir, output)
    assert (status, out) == (1, "")
    assert (
        err
        == f"Error: {output}: holds shards already; replace them with --overwrite, or give another folder\n"
    )
    status, out, _ = graftserve("dataset", "pack", digits_dir, output, "--overwrite", "--test-percent", "0")
    assert status == 0
    assert f"{counts['train'] + counts['test']} train, {counts['validation']} validation, 0 test\n" in out
    assert out.endswith(f"next     graftserve train {output} --output runs/packed\n")


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["info"], 2, "Missing argument 'DATA'"),
        (["info", "none"], 1, "Error: none: no such folder or file"),
        (["info", "x", "--test-percent", "60", "--validation-percent", "50"], 2, "less than 100 together"),
        (["pack", "x"], 2, "Missing argument 'OUTPUT'"),
        (
            ["pack", "x", "y", "--shards", "3", "--shard-mb", "5"],
            2,
            "--shards and --shard-mb exclude each other",
        ),
        (["pack", "x", "y", "--shards", "0"], 2, "0 is not in the range x>=1"),
        (["pack", "none", "y"], 1, "Error: none: no such folder or file"),
    ],
)
def test_wrong_use(graftserve: Graftserve, args: list[str], status: int, message: str) -> None:
    got, _, err = graftserve("dataset", *args)
    assert got == status
    assert message in err
