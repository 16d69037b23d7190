"""TensorProto maps of a request as arrays, and arrays as the TensorProtos of a response."""

from collections.abc import Iterator, Mapping

import numpy as np

from graftserve.client.wire import DataType, TensorProto
from graftserve.client.wire.tensors import TensorError, to_array, to_proto

from .errors import Code, ServingError
from .servable import Array

__all__ = ["ProtoInputs", "to_field_proto"]


class ProtoInputs(Mapping[str, Array]):
    """Arrays by input name, each decoded when it is asked for.

    So a request that names the wrong signature or inputs costs no decoding and gets the error that
    TensorFlow Serving, which decodes last, would give. A tensor that cannot be decoded raises ServingError.
    """

    def __init__(self, protos: Mapping[str, TensorProto]) -> None:
        self._protos = protos

    def __getitem__(self, name: str) -> Array:
        try:
            return to_array(self._protos[name])
        except TensorError as exc:
            raise ServingError(Code.INVALID_ARGUMENT, f"tensor parsing error: {name}") from exc

    def __contains__(self, name: object) -> bool:
        return name in self._protos

    def __iter__(self) -> Iterator[str]:
        return iter(self._protos)

    def __len__(self) -> int:
        return len(self._protos)


# The dtypes of nearly every output, and the typed field each is written to.
_FIELDS = {
    np.dtype(np.float32): (DataType.DT_FLOAT, "float_val"),
    np.dtype(np.float64): (DataType.DT_DOUBLE, "double_val"),
    np.dtype(np.int8): (DataType.DT_INT8, "int_val"),
    np.dtype(np.int16): (DataType.DT_INT16, "int_val"),
    np.dtype(np.int32): (DataType.DT_INT32, "int_val"),
    np.dtype(np.int64): (DataType.DT_INT64, "int64_val"),
    np.dtype(np.uint8): (DataType.DT_UINT8, "int_val"),
    np.dtype(np.uint16): (DataType.DT_UINT16, "int_val"),
    np.dtype(np.uint32): (DataType.DT_UINT32, "uint32_val"),
    np.dtype(np.uint64): (DataType.DT_UINT64, "uint64_val"),
    np.dtype(np.bool_): (DataType.DT_BOOL, "bool_val"),
}


def to_field_proto(array: Array, proto: TensorProto) -> None:
    """Write an array into an empty TensorProto, numbers in the typed field (`float_val`, ...).

    TensorFlow Serving answers in typed fields unless it is told otherwise, and clients read them directly.
    Dtypes without a plain typed field (half, bfloat16, complex) go to `tensor_content`.
    """
    field = _FIELDS.get(array.dtype)
    if field is None:
        proto.CopyFrom(to_proto(array))
        return
    proto.dtype, name = field
    dims = proto.tensor_shape.dim
    for size in array.shape:
        dims.add(size=size)
    getattr(proto, name).extend(array.ravel().tolist())
