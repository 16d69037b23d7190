import gzip
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from graftserve.training import DataError, RunError
from graftserve.training.crc32c import masked_crc32c
from graftserve.training.dataset import Dataset, Skipped, open_dataset
from graftserve.training.pack import pack

JPEG = b"\xff\xd8\xff\xe0 looks like one"


def feature(value: Any) -> tf.train.Feature:
    if isinstance(value, int):
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))


def record(values: Mapping[str, Any]) -> bytes:
    features = tf.train.Features(feature={key: feature(value) for key, value in values.items()})
    return tf.train.Example(features=features).SerializeToString()


def image(label: int | None = None, text: bytes | None = None, name: bytes | None = None) -> bytes:
    values = {
        "image/encoded": JPEG + (name or b""),
        "image/class/label": label,
        "image/class/text": text,
        "image/filename": name,
    }
    return record({key: value for key, value in values.items() if value is not None})


def write(path: Path, records: list[bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for each in records:
            writer.write(each)
    return path


def named(count: int, prefix: str = "") -> list[bytes]:
    return [image(i % 2, [b"cat", b"dog"][i % 2], f"{prefix}{i}.jpg".encode()) for i in range(count)]


def found(dataset: Dataset) -> list[tuple[str, str, str]]:
    return [(e.path, dataset.labels[e.label], e.split) for e in dataset.examples]


@pytest.mark.parametrize("length", [0, 1, 8, 63, 64, 65, 511, 512, 513, 515, 516, 1024, 100_003])
def test_checksums_are_tensorflows(tmp_path: Path, length: int) -> None:
    data = np.random.default_rng(length).bytes(length)
    written = write(tmp_path / "x.tfrecord", [data]).read_bytes()
    assert masked_crc32c(written[:8]) == int.from_bytes(written[8:12], "little")
    assert masked_crc32c(data) == int.from_bytes(written[-4:], "little")


def test_the_checksum_of_the_standard() -> None:
    """RFC 3720, B.4: 32 bytes of zeros have the CRC 8A9136AA."""
    crc = 0x8A9136AA
    assert masked_crc32c(bytes(32)) == ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def test_every_record_is_found_and_read(tmp_path: Path) -> None:
    write(tmp_path / "s" / "b.tfrecords", [image(7, b"dog", b"x/3.jpg"), image(4, b"cat")])
    write(tmp_path / "s" / "a.tfrecord-00000-of-00002", [image(4, b"cat", b"x/1.jpg")])
    write(tmp_path / "s" / "a.tfrecord-00001-of-00002", [])
    write(tmp_path / "s" / ".hidden.tfrecord", [b"no example"])
    (tmp_path / "s" / "labels.txt").write_text("cat\ndog\n")
    dataset = open_dataset(tmp_path / "s")
    assert dataset.labels == ("cat", "dog")
    assert [(path, label) for path, label, _ in found(dataset)] == [
        ("a.tfrecord-00000-of-00002/0/x/1.jpg", "cat"),
        ("b.tfrecords/1", "cat"),
        ("b.tfrecords/0/x/3.jpg", "dog"),
    ]
    assert [dataset.images.read(e.path) for e in dataset.examples] == [
        JPEG + b"x/1.jpg",
        JPEG,
        JPEG + b"x/3.jpg",
    ]
    assert dataset.skipped == ()


def test_one_file_is_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x.tfrecord", named(4))
    write(tmp_path / "y.tfrecord", named(4))
    monkeypatch.chdir(tmp_path)
    dataset = open_dataset(Path("x.tfrecord"))
    monkeypatch.chdir("/")
    assert len(dataset.examples) == 4
    assert dataset.images.read("x.tfrecord/3/3.jpg") == JPEG + b"3.jpg"


@pytest.mark.parametrize(
    "names",
    [
        [
            "train-00000-of-00001.tfrecord",
            "validation-00000-of-00001.tfrecord",
            "test-00000-of-00001.tfrecord",
        ],
        ["train-00000-of-00001", "val-00000-of-00001", "test-00000-of-00001"],
        [
            "flowers_train_00000-of-00001.tfrecord",
            "flowers_validation_00000-of-00001.tfrecord",
            "my_test-1.tfrecord",
        ],
        ["train.tfrecord", "val.tfrecord", "test.tfrecord"],
    ],
)
def test_names_of_shards_say_the_split(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        write(tmp_path / name, named(2))
    assert {(path.split("/")[0], split) for path, _, split in found(open_dataset(tmp_path))} == set(
        zip(names, ("train", "validation", "test"), strict=True)
    )


def test_otherwise_the_name_of_the_image_is_hashed(tmp_path: Path) -> None:
    """As in a folder, whichever shard the image is in; without a name its place has to do."""
    folder = tmp_path / "folder"
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for index in range(40):
            (folder / label / f"{index}.jpg").write_bytes(JPEG)
    by_folder = {e.path: e.split for e in open_dataset(folder).examples}
    records = [image(0, path.split("/")[0].encode(), path.encode()) for path in by_folder]
    write(tmp_path / "s" / "train-1.tfrecord", records[:30])
    write(tmp_path / "s" / "rest.tfrecord", records[30:])
    assert {
        path.split("/", 2)[2]: split for path, _, split in found(open_dataset(tmp_path / "s"))
    } == by_folder

    write(tmp_path / "unnamed" / "x.tfrecord", [image(i % 2) for i in range(200)])
    unnamed = open_dataset(tmp_path / "unnamed")
    assert {split for _, _, split in found(unnamed)} == {"train", "validation", "test"}


def test_integers_are_labels_where_there_is_no_text(tmp_path: Path) -> None:
    dataset = open_dataset(write(tmp_path / "x.tfrecord", [image(10), image(9), image(1, b"")]))
    assert dataset.labels == ("1", "9", "10")


def test_labels_stand_in_the_order_of_their_integers(tmp_path: Path) -> None:
    dataset = open_dataset(
        write(tmp_path / "x.tfrecord", [image(2, b"ant"), image(1, b"bee"), image(3, b"cow")])
    )
    assert dataset.labels == ("bee", "ant", "cow")


def test_records_without_an_image_are_skipped(tmp_path: Path) -> None:
    odd = [
        record({"image/class/text": b"cat"}),
        record(
            {"image/class/text": b"cat", "image/encoded": b"RIFF....WAVEfmt ", "image/filename": b"a.wav"}
        ),
    ]
    dataset = open_dataset(write(tmp_path / "x.tfrecord", [*named(2), *odd]))
    assert dataset.skipped == (
        Skipped("x.tfrecord/2", "no image/encoded in the record"),
        Skipped("x.tfrecord/3/a.wav", "not a JPEG, PNG, GIF, BMP or WebP image"),
    )
    assert len(dataset.examples) == 2


@pytest.mark.parametrize("kept", [1, 11, 12, 13, 40, -5, -4, -1])
def test_a_record_cut_off_is_named(tmp_path: Path, kept: int) -> None:
    path = write(tmp_path / "x.tfrecord", named(2))
    whole = path.stat().st_size
    last = write(tmp_path / "y.tfrecord", named(3)).read_bytes()[whole:]
    path.write_bytes(path.read_bytes() + last[:kept])
    with pytest.raises(DataError, match=rf"x.tfrecord: its last record, at byte {whole}, is cut off"):
        open_dataset(path)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_damaged_length_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tfrecord", named(2))
    first = path.stat().st_size // 2
    for position in (first, first + 11):
        flip(path, position)
        with pytest.raises(DataError, match=rf"x.tfrecord: damaged at byte {first}, or no TFRecord file"):
            open_dataset(path)
        flip(path, position)
    assert len(open_dataset(path).examples) == 2


def test_damaged_data_fail_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tfrecord", named(3))
    content = path.read_bytes()
    flip(path, content.index(JPEG + b"1.jpg"))
    dataset = open_dataset(path, labels=["cat", "dog"])
    flip(path, content.index(JPEG + b"1.jpg"))
    flip(path, content.index(JPEG + b"2.jpg") + 8)
    with pytest.raises(OSError, match="the record is damaged, or was changed meanwhile"):
        dataset.images.read("x.tfrecord/2/2.jpg")
    assert dataset.images.read("x.tfrecord/0/0.jpg") == JPEG + b"0.jpg"
    os.truncate(path, 100)
    with pytest.raises(OSError, match="damaged, or was changed meanwhile"):
        dataset.images.read("x.tfrecord/0/0.jpg")
    path.unlink()
    with pytest.raises(FileNotFoundError):
        dataset.images.read("x.tfrecord/0/0.jpg")


def test_compressed_shards_are_refused(tmp_path: Path) -> None:
    content = write(tmp_path / "x.tfrecord", named(2)).read_bytes()
    for name in ("x.tfrecord", "x.tfrecord.gz", "x-00000-of-00001.gz"):
        (tmp_path / name).write_bytes(gzip.compress(content))
        with pytest.raises(DataError, match=rf"{name}: compressed; expected plain TFRecord"):
            open_dataset(tmp_path / name)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "no records in x.tfrecord"),
        ([b"no example"], "x.tfrecord: record 0 at byte 0: no tf.train.Example"),
        (
            [image(1), record({"image": JPEG, "label": 3})],
            r"record 1 at byte \d+: no image/class/text and no image/class/label; .* got image, label",
        ),
        (
            [image(1, b"cat"), image(2)],
            r"record 1 at byte \d+: labelled by image/class/label, the first record by image/class/text",
        ),
        ([image(1, b"cat")], r"one class only \(cat\)"),
        ([image(1, b"cat"), image(2, b"d\nog")], r"label 'd\\nog': expected printable"),
        ([image(1, b"cat"), image(2, b"caf\xe9")], "expected printable"),
    ],
)
def test_what_cannot_be_trained_on(tmp_path: Path, records: list[bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(write(tmp_path / "x.tfrecord", records))


def test_stamps_tell_records_apart_and_change_with_the_shard(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tfrecord", named(3))
    images = open_dataset(path).images
    stamps = [images.stamp(f"x.tfrecord/{i}/{i}.jpg") for i in range(3)]
    assert len(set(stamps)) == 3
    os.utime(path, ns=(1, 1))
    assert images.stamp("x.tfrecord/0/0.jpg") not in [*stamps, None]
    path.unlink()
    assert images.stamp("x.tfrecord/0/0.jpg") is None
    assert images.stamp("y.tfrecord/0") is None


@pytest.fixture(scope="module")
def digits(digits_dir: Path) -> Dataset:
    return open_dataset(digits_dir, validation_percent=20)


def contents(dataset: Dataset) -> dict[tuple[str, str, str], bytes]:
    """By name, label and split, whatever the source."""
    return {
        ("/".join(e.path.split("/")[-2:]), dataset.labels[e.label], e.split): dataset.images.read(e.path)
        for e in dataset.examples
    }


def test_packing_and_opening_gives_the_same(tmp_path: Path, digits: Dataset) -> None:
    packed = pack(digits, tmp_path / "packed", shards=3)
    counts = {split: len(digits.of(split)) for split in ("train", "validation", "test")}
    assert packed.images == counts
    assert packed.shards == {"train": 3, "validation": 1, "test": 1}
    assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == [
        "labels.txt",
        "skipped.csv",
        "test-00000-of-00001.tfrecord",
        *(f"train-{i:05}-of-00003.tfrecord" for i in range(3)),
        "validation-00000-of-00001.tfrecord",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
    assert (tmp_path / "packed" / "labels.txt").read_text().split() == list("0123456789")
    opened = open_dataset(tmp_path / "packed")
    assert opened.labels == digits.labels
    assert contents(opened) == contents(digits)


def test_packed_records_hold_what_others_expect(tmp_path: Path, digits: Dataset) -> None:
    pack(digits, tmp_path / "packed", shards=1)
    spec = {
        "image/encoded": tf.io.FixedLenFeature([], tf.string),
        "image/format": tf.io.FixedLenFeature([], tf.string),
        "image/filename": tf.io.FixedLenFeature([], tf.string),
        "image/height": tf.io.FixedLenFeature([], tf.int64),
        "image/width": tf.io.FixedLenFeature([], tf.int64),
        "image/class/label": tf.io.FixedLenFeature([], tf.int64),
        "image/class/text": tf.io.FixedLenFeature([], tf.string),
    }
    shard = str(tmp_path / "packed" / "train-00000-of-00001.tfrecord")
    rows = [tf.io.parse_single_example(each, spec) for each in tf.data.TFRecordDataset(shard)]
    names = [row["image/filename"].numpy().decode() for row in rows]
    assert sorted(names) == sorted(e.path for e in digits.of("train"))
    labels = [int(row["image/class/label"]) for row in rows]
    assert labels != sorted(labels)
    for name, row in zip(names, rows, strict=True):
        assert row["image/class/text"].numpy().decode() == name[0] == str(int(row["image/class/label"]))
        assert row["image/format"] == b"jpeg"
        pixels = tf.io.decode_jpeg(row["image/encoded"])
        assert pixels.shape[:2] == (int(row["image/height"]), int(row["image/width"]))


def test_packing_again_gives_the_same_bytes(tmp_path: Path, digits: Dataset) -> None:
    first = pack(digits, tmp_path / "1", shard_mb=0.05, workers=1)
    second = pack(digits, tmp_path / "2", shard_mb=0.05, workers=7)
    assert first == second
    assert first.shards["train"] > 2
    sizes = []
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()
        sizes.append(path.stat().st_size)
    assert first.size_bytes == sum(sizes) - sum(
        (tmp_path / "1" / n).stat().st_size for n in ("labels.txt", "skipped.csv")
    )
    assert max(sizes) < 75_000


def test_unreadable_files_are_listed(tmp_path: Path, encode: Any) -> None:
    photo = encode(np.zeros((20, 30, 3), np.uint8), "WEBP")
    for label in ("cat", "dog"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for index in range(3):
            (tmp_path / "data" / label / f"{index}.webp").write_bytes(photo)
    (tmp_path / "data" / "cat" / "damaged.jpg").write_bytes(JPEG)
    (tmp_path / "data" / "cat" / "notes.txt").write_bytes(b"hello")
    dataset = open_dataset(tmp_path / "data", validation_percent=0, test_percent=0)
    (tmp_path / "data" / "dog" / "1.webp").unlink()
    packed = pack(dataset, tmp_path / "packed")
    assert (tmp_path / "packed" / "skipped.csv").read_text().splitlines() == [
        "path,reason",
        'cat/notes.txt,"not a JPEG, PNG, GIF, BMP or WebP image"',
        "cat/damaged.jpg,damaged: its header cannot be read",
        "dog/1.webp,cannot be read: No such file or directory",
    ]
    assert len(packed.skipped) == 3
    assert packed.images == {"train": 5, "validation": 0, "test": 0}
    for path in (tmp_path / "data" / "dog").iterdir():
        path.unlink()
    with pytest.raises(
        DataError, match=r"none of the images to train on in class dog can be read \(cat/damaged"
    ):
        pack(dataset, tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "packed"]


def test_what_is_in_the_way_is_left_alone(tmp_path: Path, digits: Dataset) -> None:
    output = tmp_path / "packed"
    output.mkdir()
    pack(digits, output, shards=2)
    with pytest.raises(RunError, match="holds shards already; replace them with --overwrite"):
        pack(digits, output)
    pack(digits, output, shards=1, overwrite=True)
    assert sorted(path.name for path in output.glob("train-*")) == ["train-00000-of-00001.tfrecord"]
    (output / "thesis.txt").write_text("dear")
    with pytest.raises(RunError, match="exists and holds other files than shards"):
        pack(digits, output, overwrite=True)
    assert (output / "thesis.txt").read_text() == "dear"
    with pytest.raises(RunError, match=r"lies in .*, which could not be read afterwards"):
        pack(digits, digits.root / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_an_interrupt_leaves_nothing(tmp_path: Path, digits: Dataset) -> None:
    pack(digits, tmp_path / "packed", shards=1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "packed").iterdir()}

    def interrupt(report: Any) -> None:
        if report.done == 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(digits, tmp_path / "packed", shards=4, overwrite=True, listener=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "packed").iterdir()} == before
