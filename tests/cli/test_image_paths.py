"""Which images arguments mean."""

import io
import os
import tracemalloc
from itertools import islice
from pathlib import Path

import pytest

from graftserve.cli.image_paths import ImagePaths, printable
from graftserve.cli.output import CommandError

JPEG, PNG, WEBP = b"\xff\xd8\xff\xe0", b"\x89PNG\r\n", b"RIFF\0\0\0\0WEBP"


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with images under strange names, and files that are none."""
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "b.jpg": JPEG,
        "a/2": PNG,
        "a/10.jpg": WEBP,
        "a/notes.jpg": b"text",
        "a/deep/down/x.gif": b"GIF89a",
        "a.bmp": b"BM",
        "c.tiff": b"II*\0",
        "d.avif": b"\0\0\0\x20ftypavif",
        "empty.jpg": b"",
        ".hidden.jpg": JPEG,
        ".cache/1.jpg": JPEG,
    }.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "photos"


def paths(*arguments: str, stdin: bytes = b"", **options: object) -> list[str]:
    return list(ImagePaths(arguments, io.BytesIO(stdin), **options))


IN_FOLDER = ["photos/a/10.jpg", "photos/a/2", "photos/a/deep/down/x.gif", "photos/a.bmp", "photos/b.jpg"]


def test_a_folder_gives_its_images_by_content_in_pathlibs_order(photos: Path) -> None:
    assert paths("photos") == paths("photos/") == IN_FOLDER
    assert sorted(map(Path, IN_FOLDER)) == list(map(Path, IN_FOLDER))


def test_what_is_passed_over_is_counted(photos: Path) -> None:
    found = ImagePaths(["photos"], io.BytesIO())
    assert len(list(found)) == 5
    assert found.passed_over == 4
    assert found.examples == ["photos/a/notes.jpg", "photos/c.tiff", "photos/d.avif", "photos/empty.jpg"]


def test_what_can_be_converted_is_an_image_where_it_is_converted(photos: Path) -> None:
    assert paths("photos", converted=True) == [*IN_FOLDER, "photos/c.tiff", "photos/d.avif"]


def test_links(photos: Path) -> None:
    (photos / "link.jpg").symlink_to("b.jpg")
    (photos / "folder").symlink_to("a")
    (photos / "itself").symlink_to("itself")
    (photos / "nowhere.jpg").symlink_to("none")
    os.mkfifo(photos / "pipe.jpg")
    # What cannot be read is asked about, so that it is reported.
    more = ["photos/itself", "photos/link.jpg", "photos/nowhere.jpg"]
    assert paths("photos") == [*IN_FOLDER, *more]


def test_a_folder_that_vanishes_meanwhile_is_missed(photos: Path) -> None:
    found = iter(ImagePaths(["photos"], io.BytesIO()))
    assert list(islice(found, 2)) == IN_FOLDER[:2]
    (photos / "a/deep/down/x.gif").unlink()
    (photos / "a/deep/down").rmdir()
    (photos / "a/deep").rmdir()
    assert next(found) == "photos/a/deep"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("photos/*.jpg", ["photos/b.jpg", "photos/empty.jpg"]),
        ("photos/**/*.jpg", ["photos/a/10.jpg", "photos/a/notes.jpg", "photos/b.jpg", "photos/empty.jpg"]),
        ("photos/a/?", ["photos/a/2"]),
        ("photos/a/[0-9]*", ["photos/a/10.jpg", "photos/a/2"]),
        ("photos/a/*", ["photos/a/10.jpg", "photos/a/2", "photos/a/notes.jpg"]),
    ],
)
def test_a_pattern_gives_the_files_that_match(photos: Path, pattern: str, expected: list[str]) -> None:
    assert paths(pattern) == expected


def test_a_file_may_be_called_like_a_pattern(photos: Path) -> None:
    (photos / "a[1].jpg").write_bytes(JPEG)
    assert paths("photos/a[1].jpg") == ["photos/a[1].jpg"]


def test_arguments_mix_in_their_order(photos: Path) -> None:
    got = paths("photos/none.jpg", "-", "photos/*.bmp", "photos/a", "photos/a/notes.jpg", stdin=b"x\ny\n")
    assert got == [
        *("photos/none.jpg", "x", "y", "photos/a.bmp"),
        *("photos/a/10.jpg", "photos/a/2", "photos/a/deep/down/x.gif", "photos/a/notes.jpg"),
    ]


def test_the_total_is_known_for_files_only(photos: Path) -> None:
    totals = [
        ImagePaths(arguments, io.BytesIO()).total
        for arguments in (["x", "y"], ["x", "photos"], ["x", "-"], ["x", "photos/*"])
    ]
    assert totals == [2, None, None, None]


@pytest.mark.parametrize(
    ("stdin", "separator", "expected"),
    [
        (b"", b"\n", []),
        (b"a b\nc", b"\n", ["a b", "c"]),
        (b"a\n\n \nb\n", b"\n", ["a", " ", "b"]),
        (b"*.jpg\n-\n", b"\n", ["*.jpg", "-"]),
        (b"a\nb\0c\0", b"\0", ["a\nb", "c"]),
        (b"\xff\xd8.jpg\n", b"\n", ["\udcff\udcd8.jpg"]),
        (b"x" * 70_000 + b"\ny\n", b"\n", ["x" * 70_000, "y"]),
    ],
)
def test_paths_on_stdin(stdin: bytes, separator: bytes, expected: list[str]) -> None:
    assert paths("-", stdin=stdin, separator=separator) == expected


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["none*.jpg"], b"", r"none\*\.jpg: no file matches"),
        (["-", "-"], b"", "expected one - for the paths on stdin"),
        (["-"], b"a\0b\0", "expected paths, one a line.*-0 takes"),
        (["-"], JPEG + b"\0\x10JFIF", "an image itself is not read from stdin"),
        (["-"], b"x" * 2**21, "expected paths, one a line"),
    ],
)
def test_what_is_none(tmp_path: Path, arguments: list[str], stdin: bytes, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        paths(*arguments, stdin=stdin)


def test_stdin_without_end_needs_no_memory() -> None:
    class Endless(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: bytearray) -> int:
            line = b"photos/1.jpg\n" * (len(buffer) // 13)
            buffer[: len(line)] = line
            return len(line)

    found = iter(ImagePaths(["-"], Endless()))
    assert next(found) == "photos/1.jpg"
    tracemalloc.start()
    try:
        assert sum(1 for _ in islice(found, 300_000)) == 300_000
        assert tracemalloc.get_traced_memory()[1] < 2 * 2**20
    finally:
        tracemalloc.stop()


def test_a_path_is_taken_when_it_is_there() -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb", buffering=0) as stdin, os.fdopen(writer, "wb", buffering=0) as producer:
        found = iter(ImagePaths(["-"], stdin))
        producer.write(b"a.jpg\n")
        assert next(found) == "a.jpg"
        producer.write(b"b.jpg\nc.j")
        assert next(found) == "b.jpg"


@pytest.mark.parametrize("done", range(6))
def test_what_is_done_is_skipped(photos: Path, done: int) -> None:
    found = ImagePaths(["photos"], io.BytesIO())
    found.skip(IN_FOLDER[:done])
    assert list(found) == IN_FOLDER[done:]


@pytest.mark.parametrize(
    ("done", "message"),
    [
        (
            [*IN_FOLDER, "photos/z.jpg"],
            r"expected photos/z\.jpg as image 6, which is done, got no more images",
        ),
        ([IN_FOLDER[0], "photos/a/1.jpg"], r"photos/a/1\.jpg as image 2.*got photos/a/2 in its place"),
    ],
)
def test_other_images_than_those_done_are_noticed(photos: Path, done: list[str], message: str) -> None:
    with pytest.raises(CommandError, match=message):
        ImagePaths(["photos"], io.BytesIO()).skip(done)


def test_a_name_that_is_not_utf8_is_printable() -> None:
    assert printable(os.fsdecode(b"\xe9t\xc3\xa9.jpg")) == "\ufffdté.jpg"
