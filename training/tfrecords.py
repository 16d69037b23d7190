"""Images in TFRecord shards: an index in memory, the images themselves stay on disk.

A record is a tf.train.Example with the keys that TF-Slim's scripts write: image/encoded, image/class/label,
image/class/text and image/filename. The shards' names say the split where each has one, as in
train-00000-of-00008.tfrecord or flowers_validation_00000-of-00005.tfrecord.
"""

import errno
import os
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tensorflow as tf
from google.protobuf.message import DecodeError

from .crc32c import masked_crc32c
from .errors import DataError
from .images import HEAD_BYTES, why_no_image
from .listing import SPLIT_NAMES, Listed, Listing, Skipped

__all__ = ["ENCODED", "FILENAME", "FORMAT", "HEIGHT", "LABEL", "TEXT", "WIDTH", "ShardImages", "list_shards"]

ENCODED, FORMAT, FILENAME = "image/encoded", "image/format", "image/filename"
HEIGHT, WIDTH = "image/height", "image/width"
LABEL, TEXT = "image/class/label", "image/class/text"

_HEADER_BYTES, _FOOTER_BYTES = 12, 4  # length uint64 and its checksum; then, after the data, the data's
_GZIP = b"\x1f\x8b"
_SPLIT = re.compile(r"(?:.+_)?(train|validation|val|test)[-_.].*")
_KEYS_SHOWN = 8


@dataclass(frozen=True)
class _Records:
    """Where each record's data begin in a shard, and how many bytes they are."""

    offsets: "array[int]" = field(default_factory=lambda: array("Q"))
    lengths: "array[int]" = field(default_factory=lambda: array("Q"))


class ShardImages:
    """The images of shards in one folder, as an ImageStore.

    A path is shard/index, or shard/index/name where the record has a name. Nothing stays open between reads.
    """

    def __init__(self, folder: Path, records: Mapping[str, _Records]) -> None:
        self._folder = folder.absolute()
        self._records = records

    def read(self, path: str) -> bytes:
        """See ImageStore; the record's checksum is verified."""
        shard, offset, length = self._find(path)
        with open(shard, "rb", buffering=0) as file:
            stored = os.pread(file.fileno(), length + _FOOTER_BYTES, offset)
        data, checksum = stored[:length], stored[length:]
        if masked_crc32c(data) != int.from_bytes(checksum, "little") or len(stored) != length + _FOOTER_BYTES:
            raise OSError(errno.EIO, "the record is damaged, or was changed meanwhile", path)
        return _bytes(tf.train.Example.FromString(data).features.feature, ENCODED)

    def stamp(self, path: str) -> str | None:
        """The shard's absolute file, size, time of change and inode, and where the record stands in it."""
        try:
            shard, offset, length = self._find(path)
            status = shard.stat()
        except OSError:
            return None
        return f"{shard}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}|{offset}|{length}"

    def _find(self, path: str) -> tuple[Path, int, int]:
        name, index = path.split("/", 2)[:2]
        if name not in self._records:
            raise FileNotFoundError(errno.ENOENT, "no such shard", path)
        records = self._records[name]
        return self._folder / name, records.offsets[int(index)], records.lengths[int(index)]


def list_shards(shards: Sequence[Path]) -> Listing:
    """The images of the shards, which lie in one folder.

    Each shard is read once from end to end; of a record only its place, label and name are kept. Labels are
    the records' texts, or their integers where none has a text (they begin at 1 in some files), in the order
    of the integers. Raises DataError, with shard and byte, for a damaged or compressed shard, and for a
    record without a label, or with another kind of label than the first.
    """
    matches = [_SPLIT.fullmatch(shard.name) for shard in shards]
    splits = [SPLIT_NAMES[match[1]] if match and all(matches) else None for match in matches]
    records: dict[str, _Records] = {}
    listed: list[Listed] = []
    skipped: list[Skipped] = []
    places: dict[str, int] = {}
    label_key = None
    for shard, split in zip(shards, splits, strict=True):
        index = records[shard.name] = _Records()
        for offset, data in _read_records(shard):
            number = len(index.offsets)
            index.offsets.append(offset + _HEADER_BYTES)
            index.lengths.append(len(data))
            where = f"{shard}: record {number} at byte {offset}"
            features = _parse(data, where)
            key, label, place = _label(features, where)
            label_key = label_key or key
            if key != label_key:
                raise DataError(
                    f"{where}: labelled by {key}, the first record by {label_key}; expected one of them"
                )
            places[label] = min(place, places.get(label, place))
            path, name = f"{shard.name}/{number}", _text(features, FILENAME)
            if name:
                path = f"{path}/{name}"
            encoded = _bytes(features, ENCODED)
            if reason := why_no_image(encoded[:HEAD_BYTES]) if encoded else f"no {ENCODED} in the record":
                skipped.append(Skipped(path, reason))
            else:
                # A record without a name has nothing of its own but its place.
                listed.append(Listed(path, label, split, name or path))
    if not places:
        raise DataError(f"{shards[0].parent}: no records in {', '.join(shard.name for shard in shards)}")
    labels = sorted(places, key=lambda label: (places[label], label))
    return Listing(tuple(labels), tuple(listed), tuple(skipped), ShardImages(shards[0].parent, records))


def _read_records(shard: Path) -> Iterator[tuple[int, bytes]]:
    """Offset and data of each record. Checks the lengths' checksums; the data's are checked by `read`.

    Source: TensorFlow's core/lib/io/record_writer.h.
    """
    compressed = f"{shard}: compressed; expected plain TFRecord, as gunzip leaves it"
    if shard.suffix == ".gz":
        raise DataError(compressed)
    with shard.open("rb") as file:
        size, offset = os.fstat(file.fileno()).st_size, 0
        while offset < size:
            header = file.read(_HEADER_BYTES)
            length = int.from_bytes(header[:8], "little")
            checksum = int.from_bytes(header[8:], "little")
            if len(header) == _HEADER_BYTES and masked_crc32c(header[:8]) != checksum:
                if offset == 0 and header.startswith(_GZIP):
                    raise DataError(compressed)
                raise DataError(f"{shard}: damaged at byte {offset}, or no TFRecord file; write it anew")
            end = offset + _HEADER_BYTES + length + _FOOTER_BYTES
            if len(header) < _HEADER_BYTES or end > size:
                raise DataError(
                    f"{shard}: its last record, at byte {offset}, is cut off (the file ends at byte {size}); "
                    "copy or write it anew"
                )
            data = file.read(length)
            file.seek(_FOOTER_BYTES, os.SEEK_CUR)
            yield offset, data
            offset = end


def _parse(data: bytes, where: str) -> Mapping[str, tf.train.Feature]:
    try:
        features: Mapping[str, tf.train.Feature] = tf.train.Example.FromString(data).features.feature
    except DecodeError as error:
        raise DataError(f"{where}: no tf.train.Example") from error
    return features


def _bytes(features: Mapping[str, tf.train.Feature], key: str) -> bytes:
    """The feature's first value; empty where there is none."""
    values: Sequence[bytes] = features[key].bytes_list.value if key in features else []
    return values[0] if values else b""


def _text(features: Mapping[str, tf.train.Feature], key: str) -> str:
    return os.fsdecode(_bytes(features, key))


def _label(features: Mapping[str, tf.train.Feature], where: str) -> tuple[str, str, int]:
    """Which key gives the label, the label, and its integer (0 where there is none)."""
    text = _text(features, TEXT)
    integers: Sequence[int] = features[LABEL].int64_list.value if LABEL in features else []
    if not text and not integers:
        keys = sorted(features)
        raise DataError(
            f"{where}: no {TEXT} and no {LABEL}; expected one of them and {ENCODED}, got "
            f"{', '.join(keys[:_KEYS_SHOWN]) or 'nothing'}{', ...' if len(keys) > _KEYS_SHOWN else ''}"
        )
    integer = integers[0] if integers else 0
    return (TEXT, text, integer) if text else (LABEL, str(integer), integer)
