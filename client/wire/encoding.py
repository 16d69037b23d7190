"""Requests as bytes, each tensor copied once: from where it is into the request.

    parts = string_parts(images)                          # nothing copied yet
    serialized = predict_request(request, {"image_bytes": parts})

By way of messages the content is copied four times: protobuf takes `bytes` only, keeps a copy of its own, and
copies twice more to serialize it. What is small is written by protobuf here, too; only the content, its
length and the map's entries are put around it by hand.
Source of the format: https://protobuf.dev/programming-guides/encoding/.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Final, TypeAlias

from .prediction_pb2 import PredictRequest
from .tensor_pb2 import DataType, TensorProto, TensorShapeProto
from .values import TensorError

__all__ = ["MAX_MESSAGE_BYTES", "Parts", "content_parts", "predict_request", "string_parts", "varint"]

Parts: TypeAlias = Sequence[bytes | memoryview]
"""A serialized TensorProto in pieces: they are joined only when the request is. A memoryview is
one-dimensional, contiguous and of bytes."""

MAX_MESSAGE_BYTES: Final = 2**31 - 1
"""No protobuf may be larger (https://protobuf.dev/programming-guides/proto-limits/)."""


def _tag(message: type[PredictRequest] | type[TensorProto], field: str) -> bytes:
    # All fields written here are length-delimited, wire type 2, and have numbers below 16.
    return bytes([message.DESCRIPTOR.fields_by_name[field].number << 3 | 2])


_CONTENT: Final = _tag(TensorProto, "tensor_content")
_STRING: Final = _tag(TensorProto, "string_val")
_INPUT: Final = _tag(PredictRequest, "inputs")
_KEY: Final = b"\x0a"  # of a map's entry: field 1
_VALUE: Final = b"\x12"  # field 2


def string_parts(values: Sequence[bytes], shape: Iterable[int] | None = None) -> Parts:
    """A tensor of byte strings; shape: [len(values)] by default."""
    parts: list[bytes] = [_head(DataType.DT_STRING, (len(values),) if shape is None else shape)]
    for value in values:
        parts += (_STRING + varint(len(value)), value)
    return parts


def content_parts(data_type: int, shape: Iterable[int], content: bytes | memoryview) -> Parts:
    """A tensor with its values in `tensor_content`: little-endian, row-major. Its length is not checked."""
    head = _head(data_type, shape)
    if not len(content):
        return (head,)
    return (head + _CONTENT + varint(len(content)), content)


def predict_request(request: PredictRequest | bytes, inputs: Mapping[str, Parts]) -> bytes:
    """`request` with `inputs` added to its own, serialized; bytes are a request that is serialized already.

    Raises TensorError if that makes more than 2 GiB, which no server takes.
    """
    pieces: list[bytes | memoryview] = [
        request if isinstance(request, bytes) else request.SerializeToString()
    ]
    for name, parts in inputs.items():
        key = name.encode()
        value_bytes = sum(map(len, parts))
        before_value = _KEY + varint(len(key)) + key + _VALUE + varint(value_bytes)
        pieces.append(_INPUT + varint(len(before_value) + value_bytes) + before_value)
        pieces += parts
    total_bytes = sum(map(len, pieces))
    if total_bytes > MAX_MESSAGE_BYTES:
        raise TensorError(
            f"expected a request of at most {MAX_MESSAGE_BYTES} bytes, which is protobuf's limit, got "
            f"{total_bytes}: send it in parts"
        )
    return b"".join(pieces)


def varint(value: int) -> bytes:
    """A number below 2^64 in base 128, low groups first."""
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def _head(data_type: int, shape: Iterable[int]) -> bytes:
    return _head_of(int(data_type), tuple(shape))


@lru_cache(maxsize=256)
def _head_of(data_type: int, shape: tuple[int, ...]) -> bytes:
    dims = [TensorShapeProto.Dim(size=size) for size in shape]
    head = TensorProto(tensor_shape=TensorShapeProto(dim=dims))
    head.dtype = data_type  # type: ignore[assignment]  # an int, as in every message
    return head.SerializeToString()
