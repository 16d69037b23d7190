"""NumPy arrays to TensorProto and back.

Numbers are written to `tensor_content` (little-endian, row-major) and read from there or from
the typed fields (`float_val`, `int_val`, ...). Strings are written to `string_val` and read from
there or from TensorFlow's packed form of `tensor_content`: one varint length per string, then the
bytes of all of them.

A typed field that holds fewer values than the shape asks for repeats its last value, and an empty
one means zeros (for strings: empty strings), as in TensorFlow.
One that holds more is an error here, where TensorFlow silently drops what is too much.
Source of these rules: tensorflow/core/framework/tensor.proto and tensor.cc (Tensor::FromProto).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .tensor_pb2 import DataType, TensorProto, TensorShapeProto

__all__ = [
    "DEFAULT_MAX_FILL_BYTES",
    "TensorError",
    "Value",
    "dtype_name",
    "to_array",
    "to_proto",
    "write_typed",
]

Value = npt.ArrayLike
"""What `to_proto` takes: an array, a number, bytes, str, or (nested) lists of those."""

DEFAULT_MAX_FILL_BYTES: Final = 64 * 2**20
"""The largest array that `to_array` fills by repeating a value, in bytes."""


_PART: Final = 2**16  # values
_STRING_BYTES: Final = 24  # of TensorFlow's tstring, beside its content


class TensorError(ValueError):
    """A tensor that cannot be encoded, or a TensorProto whose parts contradict each other."""


@dataclass(frozen=True)
class _Number:
    """How numbers of one type travel."""

    data_type: DataType
    stored: np.dtype[Any]  # little-endian, as in tensor_content
    field: str
    field_dtype: type[np.generic]  # of one value in the typed field


def _number(
    data_type: DataType, dtype: type[np.generic], field: str, field_dtype: type[np.generic]
) -> _Number:
    return _Number(data_type, np.dtype(dtype).newbyteorder("<"), field, field_dtype)


_NUMBERS: Final = (
    _number(DataType.DT_FLOAT, np.float32, "float_val", np.float32),
    _number(DataType.DT_DOUBLE, np.float64, "double_val", np.float64),
    _number(DataType.DT_HALF, np.float16, "half_val", np.int32),
    _number(DataType.DT_INT8, np.int8, "int_val", np.int32),
    _number(DataType.DT_INT16, np.int16, "int_val", np.int32),
    _number(DataType.DT_INT32, np.int32, "int_val", np.int32),
    _number(DataType.DT_INT64, np.int64, "int64_val", np.int64),
    _number(DataType.DT_UINT8, np.uint8, "int_val", np.int32),
    _number(DataType.DT_UINT16, np.uint16, "int_val", np.int32),
    _number(DataType.DT_UINT32, np.uint32, "uint32_val", np.uint32),
    _number(DataType.DT_UINT64, np.uint64, "uint64_val", np.uint64),
    _number(DataType.DT_BOOL, np.bool_, "bool_val", np.bool_),
    _number(DataType.DT_COMPLEX64, np.complex64, "scomplex_val", np.float32),
    _number(DataType.DT_COMPLEX128, np.complex128, "dcomplex_val", np.float64),
)
_BY_DATA_TYPE: Final = {int(number.data_type): number for number in _NUMBERS}
# Kind and size, not the dtype itself: `long` and `long long` are two dtypes of the same bits.
_BY_KIND_AND_SIZE: Final = {(number.stored.kind, number.stored.itemsize): number for number in _NUMBERS}

# Their typed fields hold the values' bits or halves.
_WITHOUT_PLAIN_FIELD: Final = frozenset({DataType.DT_HALF, DataType.DT_COMPLEX64, DataType.DT_COMPLEX128})


def dtype_name(data_type: int) -> str:
    """The NumPy-like name of a DataType: "float32", "string", ...; the enum's own name if it has none."""
    number = _BY_DATA_TYPE.get(data_type)
    if number is not None:
        return number.stored.name
    if data_type == DataType.DT_STRING:
        return "string"
    if data_type == DataType.DT_BFLOAT16:
        return "bfloat16"
    return next((name for name, value in DataType.items() if value == data_type), f"DataType {data_type}")


def to_proto(value: Value) -> TensorProto:
    """Encode an array, a number, bytes, str, or (nested) lists of those.

    Dtypes: float16/32/64, bfloat16 (of ml_dtypes), (u)int8 to (u)int64, bool, complex64/128 in any
    byte order and memory layout; strings as bytes, str (sent as UTF-8), object arrays of them,
    `S` and `U` arrays (NumPy itself has dropped trailing NULs from those: prefer object arrays).
    Lists of Python numbers get NumPy's dtype: int64 or float64.
    Raises TensorError for any other dtype, mixed or ragged lists.
    """
    if isinstance(value, (bytes, str)):
        return _strings_to_proto([value], ())
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(item, bytes) for item in value):
            return _strings_to_proto(value, (len(value),))  # a list of images needs no array
        array = _list_to_array(value)
    else:
        array = np.asarray(value)
    dtype = array.dtype
    if dtype.kind in "OSU":
        return _strings_to_proto(array.ravel().tolist(), array.shape)
    if dtype.name == "bfloat16":
        data_type, stored = DataType.DT_BFLOAT16, dtype
    else:
        number = _BY_KIND_AND_SIZE.get((dtype.kind, dtype.itemsize))
        if number is None:
            raise TensorError(
                f"expected numbers, bool, bytes or str, got an array of dtype {dtype}: convert it first"
            )
        data_type, stored = number.data_type, number.stored
    content = array.astype(stored, copy=False).tobytes()
    return TensorProto(dtype=data_type, tensor_shape=_shape_to_proto(array.shape), tensor_content=content)


def write_typed(array: npt.NDArray[Any], proto: TensorProto) -> None:
    """Write an array into an empty TensorProto, numbers in the typed field (`float_val`, ...).

    TensorFlow Serving answers in typed fields unless it is told otherwise, and clients read them directly.
    Dtypes without a plain typed field (half, bfloat16, complex) go to `tensor_content`.
    Raises TensorError as `to_proto` does.
    """
    number = _BY_KIND_AND_SIZE.get((array.dtype.kind, array.dtype.itemsize))
    if number is None or number.data_type in _WITHOUT_PLAIN_FIELD:
        proto.CopyFrom(to_proto(array))
        return
    proto.dtype = number.data_type
    for size in array.shape:
        proto.tensor_shape.dim.add(size=size)
    if not array.shape:
        proto.tensor_shape.SetInParent()
    field = getattr(proto, number.field)
    flat = array.ravel()
    # In parts: a list of Python numbers takes nine times the memory of the array.
    for start in range(0, flat.size, _PART):
        field.extend(flat[start : start + _PART].tolist())


def to_array(proto: TensorProto, *, max_fill_bytes: int = DEFAULT_MAX_FILL_BYTES) -> npt.NDArray[Any]:
    """Decode a tensor; strings become an object array of bytes, with trailing NULs kept.

    Numbers in `tensor_content` are not copied: the array is a read-only view of it (call `.copy()` to
    write). Other arrays own their memory.
    max_fill_bytes: the largest array to make by repeating the last value of a typed field that is too
        short, so that a message of a few bytes cannot claim gigabytes. A string counts its own bytes and 24
        more: each of them gets its own copy where TensorFlow takes them.
    Raises TensorError for an unknown dtype, an unknown or negative dimension, or content that does not
    have the shape's number of values.
    """
    shape = _shape_of(proto)
    count = math.prod(shape)
    if proto.dtype == DataType.DT_STRING:
        return _strings_to_array(proto, shape, count, max_fill_bytes)
    stored, field, field_dtype = _storage(proto.dtype)
    content = proto.tensor_content
    if content:
        if len(content) != count * stored.itemsize:
            raise TensorError(
                f"expected {count * stored.itemsize} bytes of tensor_content for shape {list(shape)} of "
                f"{stored.name}, got {len(content)}"
            )
        if stored.kind == "b":
            # Any non-zero byte is true; NumPy's bool knows only 0 and 1.
            return _reshape(np.frombuffer(content, np.uint8) != 0, shape)
        return _reshape(np.frombuffer(content, stored), shape)
    values = getattr(proto, field)
    parts = 2 if stored.kind == "c" else 1
    if len(values) % parts:
        raise TensorError(f"expected pairs of real and imaginary parts in {field}, got {len(values)} values")
    given = len(values) // parts
    _check_count(field, shape, count, given, count * stored.itemsize, max_fill_bytes)
    # The copies narrow int_val and half_val to the dtype's width, as TensorFlow does.
    flat = np.array(values, field_dtype)
    if field == "half_val":
        flat = flat.astype("<u2").view(stored)
    elif parts == 2:
        flat = flat.view(stored)
    elif flat.dtype != stored:
        flat = flat.astype(stored)
    if given < count:
        filled = np.zeros(count, stored)
        if given:
            filled[:given] = flat
            filled[given:] = flat[-1]
        flat = filled
    return _reshape(flat, shape)


def _list_to_array(value: Sequence[Any]) -> npt.NDArray[Any]:
    """np.asarray, but strings stay objects: an `S` array pads to the longest and drops trailing NULs."""
    leaf: Any = value
    while isinstance(leaf, (list, tuple)) and leaf:
        leaf = leaf[0]
    try:
        if not isinstance(leaf, (bytes, str)):
            array = np.asarray(value)
            if array.dtype.kind not in "SU" or isinstance(leaf, np.ndarray):
                return array
        return np.array(value, dtype=object)
    except ValueError as exc:
        raise TensorError(f"expected lists that form a rectangular array: {exc}") from exc


def _strings_to_proto(values: Iterable[Any], shape: tuple[int, ...]) -> TensorProto:
    proto = TensorProto(dtype=DataType.DT_STRING, tensor_shape=_shape_to_proto(shape))
    proto.string_val.extend([item if type(item) is bytes else _to_bytes(item) for item in values])
    return proto


def _to_bytes(item: object) -> bytes:
    if isinstance(item, str):
        return item.encode()
    if isinstance(item, (bytes, bytearray, memoryview)):
        return bytes(item)
    raise TensorError(
        f"expected bytes or str in an array of objects, got {type(item).__name__}: pass numbers as an array "
        "with a numeric dtype, and lists that are equally long"
    )


def _shape_to_proto(shape: tuple[int, ...]) -> TensorShapeProto:
    return TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in shape])


def _shape_of(proto: TensorProto) -> tuple[int, ...]:
    if proto.tensor_shape.unknown_rank:
        raise TensorError("expected a tensor with a shape, got one of unknown rank")
    shape = tuple(dim.size for dim in proto.tensor_shape.dim)
    if any(size < 0 for size in shape):
        raise TensorError(f"expected dimensions of zero or more, got shape {list(shape)}")
    return shape


def _storage(data_type: int) -> tuple[np.dtype[Any], str, type[np.generic]]:
    number = _BY_DATA_TYPE.get(data_type)
    if number is not None:
        return number.stored, number.field, number.field_dtype
    if data_type == DataType.DT_BFLOAT16:
        try:
            import ml_dtypes
        except ImportError as exc:
            raise TensorError(
                "expected a dtype of NumPy's own, got bfloat16: install ml_dtypes to read it"
            ) from exc
        return np.dtype(ml_dtypes.bfloat16), "half_val", np.int32
    raise TensorError(f"expected a tensor of numbers, bool or strings, got {dtype_name(data_type)}")


def _check_count(
    field: str, shape: tuple[int, ...], count: int, given: int, fill_bytes: int, max_fill_bytes: int
) -> None:
    if given > count:
        raise TensorError(f"expected at most {count} values in {field} for shape {list(shape)}, got {given}")
    if given < count and fill_bytes > max_fill_bytes:
        raise TensorError(
            f"expected {count} values in {field} for shape {list(shape)}, got {given}; repeating the last "
            f"one would take {fill_bytes} bytes, more than the {max_fill_bytes} allowed"
        )


def _strings_to_array(
    proto: TensorProto, shape: tuple[int, ...], count: int, max_fill_bytes: int
) -> npt.NDArray[Any]:
    if proto.tensor_content:
        values = _unpack_strings(proto.tensor_content, count)
    else:
        values = list(proto.string_val)
        given = len(values)
        if given != count:
            last = values[-1] if values else b""
            fill_bytes = count * (_STRING_BYTES + len(last))
            _check_count("string_val", shape, count, given, fill_bytes, max_fill_bytes)
            values += [last] * (count - given)
    flat = np.empty(count, object)
    flat[:] = values
    return _reshape(flat, shape)


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
        length = shift = 0
        while True:
            if position >= len(content) or shift > 28:
                raise TensorError("expected varint string lengths in tensor_content, got something else")
            byte = content[position]
            position += 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
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


def _reshape(flat: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    try:
        return flat.reshape(shape)
    except (ValueError, OverflowError) as exc:  # more dimensions, or larger ones, than NumPy has
        raise TensorError(f"expected a shape that NumPy can hold, got {list(shape)}: {exc}") from exc
