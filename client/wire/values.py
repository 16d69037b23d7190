"""Tensors as Python lists, without NumPy: the byte strings that go in, the labels and scores that come back.

The rules are those of `tensors`, which does the same with arrays. A process that sends JPEG bytes and reads
labels needs no more than this.
"""

import math
import struct
from collections.abc import Collection, Sequence
from typing import Final, Generic, NamedTuple, TypeVar

from .tensor_pb2 import DataType, TensorProto

__all__ = [
    "DEFAULT_MAX_FILL_BYTES",
    "Flat",
    "TensorError",
    "bools",
    "check_count",
    "dtype_name",
    "floats",
    "read_varint",
    "shape_of",
    "strings",
    "strings_to_proto",
    "write_strings",
]

ItemT = TypeVar("ItemT")

DEFAULT_MAX_FILL_BYTES: Final = 64 * 2**20
"""The most memory that reading a tensor takes by repeating a value, in bytes."""

_STRING_BYTES: Final = 24  # of TensorFlow's tstring, beside its content
_LIST_ITEM_BYTES: Final = 8  # a pointer; what it points to is shared

# Looking a name up in the enum takes as long as all else that is done with it here.
_FLOAT: Final = DataType.DT_FLOAT
_DOUBLE: Final = DataType.DT_DOUBLE
_NAMES: Final = {
    DataType.DT_HALF: "float16",
    DataType.DT_FLOAT: "float32",
    DataType.DT_DOUBLE: "float64",
    DataType.DT_BFLOAT16: "bfloat16",
    DataType.DT_INT8: "int8",
    DataType.DT_INT16: "int16",
    DataType.DT_INT32: "int32",
    DataType.DT_INT64: "int64",
    DataType.DT_UINT8: "uint8",
    DataType.DT_UINT16: "uint16",
    DataType.DT_UINT32: "uint32",
    DataType.DT_UINT64: "uint64",
    DataType.DT_BOOL: "bool",
    DataType.DT_COMPLEX64: "complex64",
    DataType.DT_COMPLEX128: "complex128",
    DataType.DT_STRING: "string",
}
# Of one value in tensor_content, as `struct` calls it.
_FLOAT_CODES: Final = {DataType.DT_HALF: "e", DataType.DT_FLOAT: "f", DataType.DT_DOUBLE: "d"}
_STRINGS: Final = (DataType.DT_STRING,)
_BOOLS: Final = (DataType.DT_BOOL,)


class TensorError(ValueError):
    """A tensor that cannot be encoded, or a TensorProto whose parts contradict each other."""


class Flat(NamedTuple, Generic[ItemT]):
    """A tensor's values in row-major order, and its shape."""

    values: list[ItemT]
    shape: tuple[int, ...]


def dtype_name(data_type: int) -> str:
    """The NumPy-like name of a DataType: "float32", "string", ...; the enum's own name if it has none."""
    for number, name in _NAMES.items():
        if number == data_type:
            return name
    return next((name for name, number in DataType.items() if number == data_type), f"DataType {data_type}")


# Writing


def strings_to_proto(values: Sequence[bytes]) -> TensorProto:
    """A string tensor of shape [len(values)]."""
    proto = TensorProto()
    write_strings(values, proto)
    return proto


def write_strings(values: Sequence[bytes], proto: TensorProto) -> None:
    """The same, into an empty TensorProto, such as the entry of a request's map: a message saved.

    request = PredictRequest()
    write_strings(images, request.inputs["image_bytes"])
    """
    proto.dtype = DataType.DT_STRING
    proto.tensor_shape.dim.add(size=len(values))
    proto.string_val.extend(values)


# Reading


def strings(proto: TensorProto, *, max_fill_bytes: int = DEFAULT_MAX_FILL_BYTES) -> Flat[bytes]:
    """Read a tensor of strings.

    max_fill_bytes: as for `tensors.to_array`; a string counts its own bytes and 24 more.
    Raises TensorError for another dtype, an unknown or negative dimension, or content that does not have the
    shape's number of values.
    """
    _check_dtype(proto, _STRINGS)
    shape = shape_of(proto)
    count = math.prod(shape)
    if proto.tensor_content:
        return Flat(_unpack_strings(proto.tensor_content, count), shape)
    values = list(proto.string_val)
    last = values[-1] if values else b""
    item_bytes = _STRING_BYTES + len(last)
    return Flat(_filled("string_val", values, last, shape, count, item_bytes, max_fill_bytes), shape)


def floats(proto: TensorProto, *, max_fill_bytes: int = DEFAULT_MAX_FILL_BYTES) -> Flat[float]:
    """Read a tensor of float16, float32 or float64. An item of the list counts 8 bytes.

    Raises TensorError as `strings` does.
    """
    _check_dtype(proto, _FLOAT_CODES)
    shape = shape_of(proto)
    count = math.prod(shape)
    content, code = proto.tensor_content, _FLOAT_CODES[proto.dtype]
    if content:
        _check_content(content, shape, count, struct.calcsize(f"<{code}"), proto.dtype)
        return Flat(list(struct.unpack(f"<{count}{code}", content)), shape)
    values: list[float]
    if proto.dtype == _FLOAT:
        field, values = "float_val", list(proto.float_val)
    elif proto.dtype == _DOUBLE:
        field, values = "double_val", list(proto.double_val)
    else:
        field, bits = "half_val", [value & 0xFFFF for value in proto.half_val]
        values = list(struct.unpack(f"<{len(bits)}e", struct.pack(f"<{len(bits)}H", *bits)))
    last = values[-1] if values else 0.0
    return Flat(_filled(field, values, last, shape, count, _LIST_ITEM_BYTES, max_fill_bytes), shape)


def bools(proto: TensorProto, *, max_fill_bytes: int = DEFAULT_MAX_FILL_BYTES) -> Flat[bool]:
    """Read a tensor of bool. An item of the list counts 8 bytes.

    Raises TensorError as `strings` does.
    """
    _check_dtype(proto, _BOOLS)
    shape = shape_of(proto)
    count = math.prod(shape)
    content = proto.tensor_content
    if content:
        _check_content(content, shape, count, 1, proto.dtype)
        return Flat([byte != 0 for byte in content], shape)
    values = list(proto.bool_val)
    last = values[-1] if values else False
    return Flat(_filled("bool_val", values, last, shape, count, _LIST_ITEM_BYTES, max_fill_bytes), shape)


# What `tensors` shares


def shape_of(proto: TensorProto) -> tuple[int, ...]:
    """The shape. Raises TensorError for one that is unknown as a whole or in part."""
    if proto.tensor_shape.unknown_rank:
        raise TensorError("expected a tensor with a shape, got one of unknown rank")
    shape = tuple(dim.size for dim in proto.tensor_shape.dim)
    if any(size < 0 for size in shape):
        raise TensorError(f"expected dimensions of zero or more, got shape {list(shape)}")
    return shape


def check_count(
    field: str, shape: tuple[int, ...], count: int, given: int, fill_bytes: int, max_fill_bytes: int
) -> None:
    """Raise TensorError if a typed field holds too many values, or too few to be filled up."""
    if given > count:
        raise TensorError(f"expected at most {count} values in {field} for shape {list(shape)}, got {given}")
    if given < count and fill_bytes > max_fill_bytes:
        raise TensorError(
            f"expected {count} values in {field} for shape {list(shape)}, got {given}; repeating the last "
            f"one would take {fill_bytes} bytes, more than the {max_fill_bytes} allowed"
        )


def read_varint(content: bytes, position: int, max_bits: int) -> tuple[int, int]:
    """A base-128 varint and the position after it.

    Raises ValueError if it does not end within the content or takes more than `max_bits`, rounded up to whole
    groups of 7. Source: https://protobuf.dev/programming-guides/encoding/#varints.
    """
    value = shift = 0
    while True:
        if position >= len(content) or shift >= max_bits:
            raise ValueError(f"expected a varint of at most {max_bits} bits")
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _check_dtype(proto: TensorProto, expected: Collection[int]) -> None:
    if proto.dtype not in expected:
        names = " or ".join(dtype_name(data_type) for data_type in expected)
        raise TensorError(f"expected a tensor of {names}, got {dtype_name(proto.dtype)}")


def _check_content(
    content: bytes, shape: tuple[int, ...], count: int, item_bytes: int, data_type: int
) -> None:
    if len(content) != count * item_bytes:
        raise TensorError(
            f"expected {count * item_bytes} bytes of tensor_content for shape {list(shape)} of "
            f"{dtype_name(data_type)}, got {len(content)}"
        )


def _filled(
    field: str,
    values: list[ItemT],
    last: ItemT,
    shape: tuple[int, ...],
    count: int,
    item_bytes: int,
    max_fill_bytes: int,
) -> list[ItemT]:
    given = len(values)
    if given != count:
        check_count(field, shape, count, given, count * item_bytes, max_fill_bytes)
        values += [last] * (count - given)
    return values


def _unpack_strings(content: bytes, count: int) -> list[bytes]:
    """`count` varint lengths, then the bytes (tensorflow/core/platform, EncodeStringList)."""
    # Every length takes a byte at least, so the loop below is bounded by the content.
    if count > len(content):
        raise TensorError(
            f"expected the lengths of {count} strings in tensor_content, got {len(content)} bytes"
        )
    lengths: list[int] = []
    position = 0
    for _ in range(count):
        try:
            length, position = read_varint(content, position, 32)
        except ValueError as exc:
            raise TensorError(f"expected varint string lengths in tensor_content: {exc}") from exc
        lengths.append(length)
    if position + sum(lengths) != len(content):
        raise TensorError(
            f"expected {position + sum(lengths)} bytes of tensor_content for {count} strings, "
            f"got {len(content)}"
        )
    strings: list[bytes] = []
    for length in lengths:
        strings.append(content[position : position + length])
        position += length
    return strings
