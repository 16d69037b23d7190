"""Rows on disk: whole or not there, whoever writes, reads, prunes or dies meanwhile."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from graftserve.training.cache import (
    RowStore,
    StampIndex,
    describe_entry,
    list_entries,
    mark_used,
    prune_entries,
    write_entry_file,
)

META = {"kind": "features", "backbone": "small", "engine": "tensorflow", "view": "plain"}
DAY_S = 24 * 3600.0


def open_store(*folders: Path, count: int = 3) -> RowStore:
    return RowStore(dict.fromkeys(folders, META), (count,), np.float32)


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def rows_of(numbers: list[int], count: int = 3) -> np.ndarray:
    return np.repeat(np.array(numbers, np.float32)[:, None], count, axis=1)


def test_rows_are_found_in_any_order_and_from_any_segment(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for start in (0, 10, 20):
        numbers = list(range(start, start + 10))
        store.add(tmp_path, [key(number) for number in numbers], rows_of(numbers))
    for reader in (store, open_store(tmp_path)):
        assert len(reader) == 30
        wanted = [25, 3, 29, 0, 14, 3]
        np.testing.assert_array_equal(reader.get([key(number) for number in wanted]), rows_of(wanted))
        np.testing.assert_array_equal(reader.find([key(7), key(30), key(8)]), [True, False, True])
        with pytest.raises(KeyError):
            reader.get([key(1), key(99)])


def test_keys_may_hold_and_end_in_zero_bytes(tmp_path: Path) -> None:
    keys = [b"\0" * 16, b"a" + b"\0" * 15, b"\0" * 15 + b"a", b"a" * 16, b"a\0b" + b"\0" * 13]
    store = open_store(tmp_path)
    store.add(tmp_path, keys, rows_of([0, 1, 2, 3, 4]))
    np.testing.assert_array_equal(store.get(keys[::-1]), rows_of([4, 3, 2, 1, 0]))
    assert not store.find([b"a\0a" + b"\0" * 13]).any()


def test_nothing_asked_for_is_nothing_found(tmp_path: Path) -> None:
    empty = open_store(tmp_path / "none")
    assert not empty.find([key(1)]).any()
    assert not (tmp_path / "none").exists()
    filled = open_store(tmp_path)
    filled.add(tmp_path, [key(1)], rows_of([1]))
    for store in (empty, filled):
        assert store.find([]).shape == (0,)
        assert store.get([]).shape == (0, 3)


def test_opening_reads_the_index_alone(tmp_path: Path) -> None:
    count = 100_000
    store = open_store(tmp_path, count=count)
    store.add(tmp_path, [key(number) for number in range(50)], rows_of(list(range(50)), count))
    (segment,) = tmp_path.glob("*.rows")
    code = (
        "import sys\nfrom pathlib import Path\nimport numpy as np\n"
        "from graftserve.training.cache import RowStore\n"
        "def rchar(): return int(open('/proc/self/io').readline().split()[1])\n"
        "def faulted(): return sum(int(line.split()[1]) for line in open('/proc/self/smaps')"
        " if line.startswith('Rss'))\n"
        f"RowStore({{Path({str(tmp_path / 'warm')!r}): {{}}}}, (1,), np.float32)\n"
        "read, resident = rchar(), faulted()\n"
        f"store = RowStore({{Path({str(tmp_path)!r}): {{}}}}, ({count},), np.float32)\n"
        "print(len(store), rchar() - read, (faulted() - resident) * 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rows, read_bytes, resident_bytes = map(int, done.stdout.split())
    assert rows == 50
    assert segment.stat().st_size > 20e6
    assert read_bytes < 1e6
    assert resident_bytes < 5e6


def test_an_entry_of_several_answers_for_each(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    open_store(one).add(one, [key(1), key(2)], rows_of([1, 2]))
    open_store(two).add(two, [key(3)], rows_of([3]))
    both = open_store(one, two)
    keys = [key(3), key(1), key(2)]
    np.testing.assert_array_equal(both.get(keys), rows_of([3, 1, 2]))
    np.testing.assert_array_equal(both.entry_numbers(keys), [1, 0, 0])


def test_what_others_add_is_seen_after_a_refresh(tmp_path: Path) -> None:
    reader, writer = open_store(tmp_path), open_store(tmp_path)
    writer.add(tmp_path, [key(1)], rows_of([1]))
    assert not reader.find([key(1)]).any()
    reader.refresh()
    assert reader.find([key(1)]).all()


_WRITER = """
import sys
from pathlib import Path
import numpy as np
from graftserve.training.cache import RowStore
folder, start = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
store = RowStore({folder: {"kind": "features"}}, (8,), np.float32)
for first in range(start, start + 600, 20):
    numbers = range(first, first + 20)
    keys = [number.to_bytes(16, "little") for number in numbers]
    store.add(folder, keys, np.repeat(np.array(numbers, np.float32)[:, None], 8, axis=1))
    store.refresh()
    assert store.find(keys).all()
"""


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "entry"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(folder), start],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for start in ("0", "400")  # 200 rows are written by both
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    while any(writer.poll() is None for writer in writers):  # one reader meanwhile
        reader = open_store(folder, count=8)
        numbers = [number for number in range(1000) if reader.find([key(number)])[0]]
        np.testing.assert_array_equal(reader.get([key(n) for n in numbers]), rows_of(numbers, 8))
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    everything = list(range(1000))
    reader = open_store(folder, count=8)
    assert len(reader) == 1000
    np.testing.assert_array_equal(reader.get([key(n) for n in everything]), rows_of(everything, 8))
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("damage", ["cut", "emptied", "garbage", "zeroed page", "one bit"])
def test_a_damaged_segment_is_as_if_it_were_not_there(tmp_path: Path, damage: str) -> None:
    store = open_store(tmp_path, count=3000)
    store.add(tmp_path, [key(1), key(2)], rows_of([1, 2], 3000))
    (segment,) = tmp_path.glob("*.rows")
    store.add(tmp_path, [key(3)], rows_of([3], 3000))
    content = bytearray(segment.read_bytes())
    if damage == "cut":
        del content[-100:]
    elif damage == "emptied":
        content.clear()
    elif damage == "garbage":
        content[:] = b"x" * len(content)
    elif damage == "zeroed page":
        content[8192:12288] = bytes(4096)
    else:
        content[15_000] ^= 1
    segment.write_bytes(content)
    again = open_store(tmp_path, count=3000)
    np.testing.assert_array_equal(again.find([key(1), key(2), key(3)]), [False, False, True])
    again.add(tmp_path, [key(1), key(2)], rows_of([1, 2], 3000))
    assert again.find([key(1), key(2), key(3)]).all()
    third = open_store(tmp_path, count=3000)
    np.testing.assert_array_equal(third.get([key(2), key(3)]), rows_of([2, 3], 3000))


def test_whatever_byte_is_changed_no_row_is_wrong(tmp_path: Path) -> None:
    open_store(tmp_path).add(tmp_path, [key(1), key(2)], rows_of([1, 2]))
    (segment,) = tmp_path.glob("*.rows")
    content = segment.read_bytes()
    for position in range(len(content)):
        changed = (content[position] ^ 1, 0xFF, ord("9"))[position % 3]
        segment.write_bytes(content[:position] + bytes([changed]) + content[position + 1 :])
        store = open_store(tmp_path)
        for number in (1, 2):
            if store.find([key(number)])[0]:
                np.testing.assert_array_equal(store.get([key(number)]), rows_of([number]))


def test_rows_of_another_shape_are_not_taken(tmp_path: Path) -> None:
    open_store(tmp_path, count=4).add(tmp_path, [key(1)], rows_of([1], 4))
    assert not open_store(tmp_path, count=3).find([key(1)]).any()
    assert open_store(tmp_path, count=4).find([key(1)]).all()


def test_what_killed_writers_leave_goes_after_a_day(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.add(tmp_path, [key(1)], rows_of([1]))
    for name, age_s in ((".old.rows.0123", 2 * DAY_S), (".new.rows.0123", 60)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    assert len(open_store(tmp_path)) == 1
    assert [path.name for path in tmp_path.glob(".*")] == [".new.rows.0123"]


_ON_A_FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from graftserve.cli.app import _describe
from graftserve.training.cache import RowStore
folder = Path(sys.argv[1])
store = RowStore({folder: {"kind": "features"}}, (1000,), np.float32)
store.add(folder, [b"a" * 16], np.ones((1, 1000), np.float32))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    store.add(folder, [bytes([n]) * 16 for n in range(100)], np.ones((100, 1000), np.float32))
except OSError as error:
    print(_describe(error))
assert len(RowStore({folder: {}}, (1000,), np.float32)) == 1
print(sorted(path.suffix for path in folder.iterdir()))
"""


def test_a_full_disk_names_the_cache_and_the_remedy(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _ON_A_FULL_DISK, str(tmp_path / "cache" / "entry")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said, left = done.stdout.splitlines()
    assert said == (
        f"{tmp_path / 'cache'}: File too large; make room with `graftserve cache prune --max-mb N`, or give "
        "another place with --cache-dir"
    )
    assert left == "['.json', '.rows']"


def make_entry(cache_dir: Path, name: str, rows: int, unused_days: float) -> Path:
    folder = cache_dir / name
    store = open_store(folder, count=1000)
    store.add(folder, [key(number) for number in range(rows)], rows_of(list(range(rows)), 1000))
    then_s = time.time() - unused_days * DAY_S
    os.utime(folder / "meta.json", (then_s, then_s))
    return folder


def test_entries_are_listed_by_when_they_were_used(tmp_path: Path) -> None:
    make_entry(tmp_path, "old", 10, 5)
    make_entry(tmp_path, "new", 20, 1)
    network = tmp_path / "network-1"
    describe_entry(network, {"kind": "network", "backbone": "small"})
    write_entry_file(network / "network.tflite", b"x" * 1000)
    outdated = tmp_path / ("0123456789abcdef" * 2)
    outdated.mkdir()
    (outdated / "1.npy").write_bytes(b"x" * 5000)
    os.utime(outdated, (1e9, 1e9))
    entries = list_entries(tmp_path)
    assert [entry.path.name for entry in entries] == ["network-1", "new", "old", outdated.name]
    assert [entry.kind for entry in entries] == ["network", "features", "features", "outdated"]
    assert [entry.rows for entry in entries] == [0, 20, 10, 0]
    assert entries[1].meta["engine"] == "tensorflow"
    assert entries[1].meta["created"].startswith("20")
    assert 80_000 < entries[1].size_bytes < 90_000
    assert 1000 < entries[0].size_bytes < 1500
    assert entries[3].size_bytes == 5000

    open_store(tmp_path / "old")
    assert list_entries(tmp_path)[0].path.name == "old"
    mark_used(tmp_path / "nothing")
    assert list_entries(tmp_path / "nothing") == []


def test_what_is_not_the_caches_is_left_alone(tmp_path: Path) -> None:
    make_entry(tmp_path, "entry", 1, 0)
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "meta.json").write_text(json.dumps({"kind": "album"}))
    (tmp_path / "notes").mkdir()
    (tmp_path / "file").write_text("x")
    now_s = time.time()
    removed = prune_entries(tmp_path, max_bytes=-1, now_s=now_s)
    assert [entry.path.name for entry in removed] == ["entry"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "notes", "photos"]


@pytest.mark.parametrize(
    ("limits", "gone"),
    [
        ({"unused_s": 4 * DAY_S}, ["a"]),
        ({"unused_s": 2 * DAY_S}, ["a", "b"]),
        ({"max_bytes": 200_000}, []),
        ({"max_bytes": 100_000}, ["a"]),
        ({"max_bytes": 50_000}, ["a", "b"]),
        ({"unused_s": 4 * DAY_S, "max_bytes": 50_000}, ["a", "b"]),
        ({"max_bytes": -1}, ["a", "b", "c"]),
        ({}, []),
    ],
)
def test_prune_takes_what_was_not_used_for_longest(tmp_path: Path, limits: dict, gone: list[str]) -> None:
    for name, unused_days in (("b", 3), ("a", 5), ("c", 1)):
        make_entry(tmp_path, name, 10, unused_days)  # 40 kB each
    now_s = time.time()
    for dry_run in (True, False):
        removed = prune_entries(tmp_path, **limits, now_s=now_s, dry_run=dry_run)
        assert [entry.path.name for entry in removed] == gone
        left = {"a", "b", "c"} - (set() if dry_run else set(gone))
        assert {path.name for path in tmp_path.iterdir()} == left


def test_a_reader_and_a_writer_survive_a_prune(tmp_path: Path) -> None:
    folder = make_entry(tmp_path, "entry", 10, 0)
    store = open_store(folder, count=1000)
    prune_entries(tmp_path, max_bytes=-1, now_s=time.time())
    assert not folder.exists()
    assert store.find([key(9)]).all()
    np.testing.assert_array_equal(store.get([key(9)]), rows_of([9], 1000))
    store.add(folder, [key(50)], rows_of([50], 1000))
    np.testing.assert_array_equal(store.get([key(9), key(50)]), rows_of([9, 50], 1000))
    assert len(open_store(folder, count=1000)) == 1
    assert list_entries(tmp_path)[0].kind == "features"


def test_what_a_killed_prune_leaves_goes_with_the_next(tmp_path: Path) -> None:
    make_entry(tmp_path, "entry", 1, 0).rename(tmp_path / ".removed-0123")
    assert list_entries(tmp_path / "nothing") == []
    prune_entries(tmp_path, now_s=time.time())
    assert list(tmp_path.iterdir()) == []


def test_stamps_stand_for_content(tmp_path: Path) -> None:
    index = StampIndex(tmp_path)
    assert index.keys(["a|1|2|3"]) == [None]
    index.add({"a|1|2|3": key(1), "b\udcff|1|2|3": key(2)})  # a name need not be UTF-8
    index.add({})
    for reader in (index, StampIndex(tmp_path)):
        assert reader.keys(["b\udcff|1|2|3", "c", "a|1|2|3"]) == [key(2), None, key(1)]


def test_a_cache_that_cannot_be_written_still_gives_the_stamps(tmp_path: Path) -> None:
    (tmp_path / "stamps").write_text("in the way")
    index = StampIndex(tmp_path)
    index.add({"a": key(1)})
    assert index.keys(["a"]) == [None]


@pytest.mark.parametrize(
    ("changed_ns", "settled"), [(0, True), (-1, False), (-1_999_999_999, False), (-2_000_000_000, True)]
)
def test_a_file_that_changed_just_before_is_not_trusted(changed_ns: int, settled: bool) -> None:
    read_at_ns = 1_800_000_000 * 10**9
    changed = read_at_ns + changed_ns if changed_ns else 5
    assert StampIndex.is_settled(f"/a/b.jpg|52000|{changed}|4711", read_at_ns) is settled
    assert StampIndex.is_settled(f"/a.tar|9|{changed}|4711|512|52000", read_at_ns) is settled
