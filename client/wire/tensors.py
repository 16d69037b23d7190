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
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from .encoding import MAX_MESSAGE_BYTES, Parts, content_parts, string_parts
from .packed import read_packed, write_packed
from .tensor_pb2 import DataType, TensorProto
from .values import DEFAULT_MAX_FILL_BYTES, TensorError, check_count, dtype_name, shape_of, strings

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = [
    "DEFAULT_MAX_FILL_BYTES",
    "TensorError",
    "Value",
    "as_array",
    "describe",
    "dtype_name",
    "tensor_parts",
    "to_array",
    "to_proto",
    "write_tensor",
    "write_typed",
]

Value: TypeAlias = "npt.ArrayLike"
"""What `to_proto` takes: an array, a number, bytes, str, or (nested) lists of those."""

_PART: Final = 2**16  # values


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

# On the wire their values stand side by side as in an array; those of the others are varints.
_PACKED: Final[dict[str, np.dtype[Any]]] = {
    "float_val": np.dtype("<f4"),
    "scomplex_val": np.dtype("<f4"),
    "double_val": np.dtype("<f8"),
    "dcomplex_val": np.dtype("<f8"),
    "bool_val": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class _Tensor:
    """A tensor taken apart; content: strings, or the bytes of numbers as in tensor_content."""

    data_type: int
    shape: tuple[int, ...]
    content: Sequence[bytes] | memoryview


def to_proto(value: Value) -> TensorProto:
    """Encode an array, a number, bytes, str, or (nested) lists of those.

    Dtypes: float16/32/64, bfloat16 (of ml_dtypes), (u)int8 to (u)int64, bool, complex64/128 in any
    byte order and memory layout; strings as bytes, str (sent as UTF-8), object arrays of them,
    `S` and `U` arrays (NumPy itself has dropped trailing NULs from those: prefer object arrays).
    Lists of Python numbers get NumPy's dtype: int64 or float64.
    Raises TensorError for any other dtype, mixed or ragged lists, or more than 2 GiB.
    """
    proto = TensorProto()
    write_tensor(value, proto)
    return proto


def write_tensor(value: Value, proto: TensorProto) -> None:
    """As `to_proto`, into an empty TensorProto such as the entry of a request's map, which saves a copy.

    protobuf takes content as `bytes` only and keeps a copy of those. Where that is too much: `tensor_parts`
    makes no copy at all.
    """
    tensor = _take_apart(value)
    proto.dtype = tensor.data_type  # type: ignore[assignment]  # an int, as in every message
    proto.tensor_shape.SetInParent()
    for size in tensor.shape:
        proto.tensor_shape.dim.add(size=size)
    if isinstance(tensor.content, memoryview):
        if len(tensor.content) > MAX_MESSAGE_BYTES:
            raise TensorError(
                f"expected a tensor of at most {MAX_MESSAGE_BYTES} bytes, which is protobuf's limit, got "
                f"{len(tensor.content)}"
            )
        proto.tensor_content = tensor.content.tobytes()
    else:
        proto.string_val.extend(tensor.content)


def tensor_parts(value: Value) -> Parts:
    """As `to_proto`, for `encoding.predict_request`; the only copy is the one into the request.

    The parts are views of the array: serialize them before it changes. Another byte order or layout than
    little-endian and row-major takes a copy more.
    """
    tensor = _take_apart(value)
    if isinstance(tensor.content, memoryview):
        return content_parts(tensor.data_type, tensor.shape, tensor.content)
    return string_parts(tensor.content, tensor.shape)


def as_array(value: Value) -> "npt.NDArray[Any]":
    """What `to_proto` would encode, as an array; strings are objects. Raises TensorError for ragged lists."""
    if isinstance(value, (bytes, str)):
        return np.array(value, dtype=object)
    return _list_to_array(value) if isinstance(value, (list, tuple)) else np.asarray(value)


def describe(value: Value) -> tuple[str, tuple[int, ...]]:
    """The dtype's name and the shape that `to_proto` would give. Raises TensorError as it does."""
    tensor = _take_apart(value)
    return dtype_name(tensor.data_type), tensor.shape


def write_typed(array: "npt.NDArray[Any]", proto: TensorProto) -> None:
    """Write an array into an empty TensorProto, numbers in the typed field (`float_val`, ...).

    TensorFlow Serving answers in typed fields unless it is told otherwise, and clients read them directly.
    Dtypes without a plain typed field (half, bfloat16, complex) go to `tensor_content`.
    Raises TensorError as `to_proto` does.
    """
    number = _BY_KIND_AND_SIZE.get((array.dtype.kind, array.dtype.itemsize))
    if number is None or number.data_type in _WITHOUT_PLAIN_FIELD:
        write_tensor(array, proto)
        return
    proto.dtype = number.data_type
    proto.tensor_shape.SetInParent()
    for size in array.shape:
        proto.tensor_shape.dim.add(size=size)
    if number.field in _PACKED:
        write_packed(number.field, _bytes_of(array, number.stored), proto)
        return
    field = getattr(proto, number.field)
    flat = array.ravel()
    # In parts: a list of Python numbers takes nine times the memory of the array.
    for start in range(0, flat.size, _PART):
        field.extend(flat[start : start + _PART].tolist())


def to_array(proto: TensorProto, *, max_fill_bytes: int = DEFAULT_MAX_FILL_BYTES) -> "npt.NDArray[Any]":
    """Decode a tensor; strings become an object array of bytes, with trailing NULs kept.

    Numbers in `tensor_content` are not copied: the array is a read-only view of it (call `.copy()` to
    write). Other arrays own their memory.
    max_fill_bytes: the largest array to make by repeating the last value of a typed field that is too
        short, so that a message of a few bytes cannot claim gigabytes. A string counts its own bytes and 24
        more: each of them gets its own copy where TensorFlow takes them.
    Raises TensorError for an unknown dtype, an unknown or negative dimension, or content that does not
    have the shape's number of values.
    """
    if proto.dtype == DataType.DT_STRING:
        items, shape = strings(proto, max_fill_bytes=max_fill_bytes)
        objects = np.empty(len(items), object)
        objects[:] = items
        return _reshape(objects, shape)
    shape = shape_of(proto)
    count = math.prod(shape)
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
    check_count(field, shape, count, given, count * stored.itemsize, max_fill_bytes)
    flat = _typed_values(proto, field, field_dtype)
    # The copies narrow int_val and half_val to the dtype's width, as TensorFlow does.
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


def _take_apart(value: Value) -> _Tensor:
    if isinstance(value, (bytes, str)):
        return _strings([value], ())
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, bytes) for item in value):
        return _strings(value, (len(value),))  # a list of images needs no array
    array = as_array(value)
    dtype = array.dtype
    if dtype.kind in "OSU":
        return _strings(array.ravel().tolist(), array.shape)
    if dtype.name == "bfloat16":
        return _Tensor(DataType.DT_BFLOAT16, array.shape, _bytes_of(array, dtype.newbyteorder("<")))
    number = _BY_KIND_AND_SIZE.get((dtype.kind, dtype.itemsize))
    if number is None:
        raise TensorError(
            f"expected numbers, bool, bytes or str, got an array of dtype {dtype}: convert it first"
        )
    return _Tensor(number.data_type, array.shape, _bytes_of(array, number.stored))


def _strings(values: Iterable[Any], shape: tuple[int, ...]) -> _Tensor:
    items = [item if type(item) is bytes else _to_bytes(item) for item in values]
    return _Tensor(DataType.DT_STRING, shape, items)


def _bytes_of(array: "npt.NDArray[Any]", stored: np.dtype[Any]) -> memoryview:
    """The array's own memory if it has that dtype and is row-major; else that of a copy."""
    return np.asarray(array).astype(stored, order="C", copy=False).reshape(-1).view(np.uint8).data


def _typed_values(proto: TensorProto, field: str, field_dtype: type[np.generic]) -> "npt.NDArray[Any]":
    if field in _PACKED:
        packed = read_packed(field, proto)
        if packed is not None:
            return np.frombuffer(packed, _PACKED[field]).copy()
    values = getattr(proto, field)
    return np.fromiter(values, field_dtype, len(values))


def _list_to_array(value: Sequence[Any]) -> "npt.NDArray[Any]":
    """np.asarray, but strings stay objects: an `S` array pads to the longest and drops trailing NULs."""
    leaf: Any = value
    while isinstance(leaf, (list, tuple)) and leaf:
        leaf = leaf[0]
    try:
        if not isinstance(leaf, (bytes, str)):
            array = np.asarray(value)
            if array.dtype.kind not in "SU":
                return array
        return np.array(value, dtype=object)
    except ValueError as exc:
        raise TensorError(f"expected lists that form a rectangular array: {exc}") from exc


def _to_bytes(item: object) -> bytes:
    if isinstance(item, str):
        return item.encode()
    if isinstance(item, (bytes, bytearray, memoryview)):
        return bytes(item)
    raise TensorError(
        f"expected bytes or str in an array of objects, got {type(item).__name__}: pass numbers as an array "
        "with a numeric dtype, and lists that are equally long"
    )


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


def _reshape(flat: "npt.NDArray[Any]", shape: tuple[int, ...]) -> "npt.NDArray[Any]":
    try:
        return flat.reshape(shape)
    except (ValueError, OverflowError) as exc:  # more dimensions, or larger ones, than NumPy has
        raise TensorError(f"expected a shape that NumPy can hold, got {list(shape)}: {exc}") from exc
