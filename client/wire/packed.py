"""Typed fields in one piece: `float_val` and its kin as buffers instead of Python numbers one by one.

A packed field on the wire is a length and then its values, little-endian: what an array holds. So it is read
from the serialized tensor and written by merging bytes, many times faster than by way of a list. Only
for values of fixed width, and bools, which take one byte each.
Source: https://protobuf.dev/programming-guides/encoding/#packed.
"""

from .encoding import varint
from .tensor_pb2 import TensorProto
from .values import read_varint

__all__ = ["read_packed", "write_packed"]

_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5


def write_packed(field: str, values: memoryview, proto: TensorProto) -> None:
    """Append to a typed field. values: one-dimensional, contiguous and of bytes."""
    if len(values):
        proto.MergeFromString(b"".join((_tag(field), varint(len(values)), values)))


def read_packed(field: str, proto: TensorProto) -> bytes | memoryview | None:
    """All values of a typed field; None if the message holds unknown groups, which have no length."""
    (wanted,) = _tag(field)
    serialized = proto.SerializeToString()
    position = 0
    while position < len(serialized):
        tag, position = read_varint(serialized, position, 32)
        kind = tag & 7
        if kind == _VARINT:
            _, position = read_varint(serialized, position, 64)
        elif kind == _FIXED64:
            position += 8
        elif kind == _FIXED32:
            position += 4
        elif kind == _DELIMITED:
            length, position = read_varint(serialized, position, 32)
            if tag == wanted:
                return memoryview(serialized)[position : position + length]
            position += length
        else:
            return None
    return b""


def _tag(field: str) -> bytes:
    return bytes([TensorProto.DESCRIPTOR.fields_by_name[field].number << 3 | _DELIMITED])
