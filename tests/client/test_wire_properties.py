"""Any array that Hypothesis thinks of, between this codec and TensorFlow's own, both ways."""

from types import SimpleNamespace

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from graftserve.client.wire import PredictRequest, TensorProto
from graftserve.client.wire.encoding import predict_request
from graftserve.client.wire.packed import read_packed
from graftserve.client.wire.tensors import TensorError, tensor_parts, to_array, to_proto, write_typed

SCALARS = [
    *("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "c8", "c16"),
]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
DTYPES = st.sampled_from(SCALARS).flatmap(
    lambda code: st.sampled_from([np.dtype(f"<{code}"), np.dtype(f">{code}")])
)


@st.composite
def layouts(draw, arrays):
    """The same array as others hold it: turned, strided, backwards, broadcast."""
    array = draw(arrays)
    how = draw(
        st.sampled_from(["as it is", "transposed", "every other", "backwards", "broadcast", "fortran"])
    )
    if how == "transposed":
        return array.T
    if how == "every other" and array.ndim:
        return array[..., ::2]
    if how == "backwards" and array.ndim:
        return array[::-1]
    if how == "broadcast":
        return np.broadcast_to(array, (2, *array.shape))
    if how == "fortran":
        return np.asfortranarray(array)
    return array


NUMBERS = layouts(hnp.arrays(DTYPES, SHAPES))
STRINGS = layouts(hnp.arrays(object, SHAPES, elements=st.binary(max_size=6), fill=st.nothing()))

thorough = settings(deadline=None, max_examples=300)


def same(result, array):
    """Equal in every bit but the byte order's."""
    assert result.shape == array.shape
    if array.dtype == object:
        assert result.ravel().tolist() == array.ravel().tolist()
        return
    native = array.astype(array.dtype.newbyteorder("="))
    assert result.dtype == native.dtype
    assert result.tobytes() == native.tobytes()


@thorough
@given(NUMBERS | STRINGS)
def test_tensorflow_reads_what_we_write(tensorflow, serving_apis, array):
    ours = to_proto(array)
    same(tensorflow.make_ndarray(serving_apis.TensorProto.FromString(ours.SerializeToString())), array)
    parsed = tensorflow.io.parse_tensor(ours.SerializeToString(), ours.dtype).numpy()
    if array.dtype == object:
        # A single string comes as bytes, and NumPy's own arrays of those drop trailing NULs.
        parsed = np.array(parsed, object)
    same(np.asarray(parsed), array)


@thorough
@given(NUMBERS | STRINGS)
def test_we_read_what_tensorflow_writes(tensorflow, array):
    native = array if array.dtype == object else array.astype(array.dtype.newbyteorder("="))
    theirs = tensorflow.make_tensor_proto(native, tensorflow.string if array.dtype == object else None)
    result = to_array(TensorProto.FromString(theirs.SerializeToString()))
    if array.dtype == object:
        same(result, array)
    else:
        # Single values travel in typed fields, as Python numbers, which do not keep every NaN's bits.
        assert result.dtype == native.dtype
        np.testing.assert_array_equal(result, native)


@thorough
@given(NUMBERS)
def test_typed_fields_hold_the_same(tensorflow, array):
    proto = TensorProto()
    write_typed(array, proto)
    back = TensorProto.FromString(proto.SerializeToString())
    same(to_array(back), array)
    same(tensorflow.io.parse_tensor(proto.SerializeToString(), proto.dtype).numpy(), array)


@thorough
@given(NUMBERS | STRINGS)
def test_requests_as_bytes_hold_the_same(array):
    request = PredictRequest.FromString(predict_request(PredictRequest(), {"x": tensor_parts(array)}))
    assert request.inputs["x"].SerializeToString() == to_proto(array).SerializeToString()
    same(to_array(request.inputs["x"]), array)


@settings(deadline=None, max_examples=1000)
@given(st.binary(max_size=40))
def test_bytes_of_any_kind_are_a_tensor_or_an_error(content):
    proto = TensorProto()
    try:
        proto.MergeFromString(content)
        array = to_array(proto)
    except (DecodeError, TensorError):
        return
    assert array.shape == tuple(dim.size for dim in proto.tensor_shape.dim)


UNKNOWN = pytest.mark.parametrize(
    "unknown",
    [
        b"\xf3\x01\x08\x05\xf4\x01",  # field 30: a group
        b"\xf0\x01\xff\x01",  # a varint
        b"\xf1\x0112345678",  # 64 bits
        b"\xf5\x011234",  # 32 bits
        b"\xf2\x01\x02\x2a\x00",  # bytes that look like float_val
    ],
    ids=["group", "varint", "fixed64", "fixed32", "bytes"],
)


@UNKNOWN
@pytest.mark.parametrize("dtype", ["f4", "f8", "?", "i4"])
def test_unknown_fields_change_nothing(unknown, dtype):
    array = np.array([0, 1, 1]).astype(dtype)
    proto = TensorProto()
    write_typed(array, proto)
    for content in (proto.SerializeToString() + unknown, unknown + proto.SerializeToString()):
        same(to_array(TensorProto.FromString(content)), array)


@UNKNOWN
def test_unknown_fields_are_no_values(unknown):
    proto = TensorProto.FromString(to_proto(np.zeros(2, np.float32)).SerializeToString() + unknown)
    proto.ClearField("tensor_content")
    assert to_array(proto).tolist() == [0, 0]


@UNKNOWN
def test_unknown_fields_may_come_first(unknown):
    """protobuf promises no order; that it writes them last is how it is made now."""
    array = np.float32([1, 2])
    proto = TensorProto()
    write_typed(array, proto)
    other = SimpleNamespace(SerializeToString=lambda: unknown + proto.SerializeToString())
    values = read_packed("float_val", other)
    is_group = unknown[0] & 7 == 3
    assert values is None if is_group else bytes(values) == array.tobytes()


@pytest.mark.parametrize("dtype", ["i4", "u8", "f4"])
def test_typed_fields_of_many_values(dtype):
    array = np.arange(150_000).astype(dtype)  # int_val and its kin are written in parts
    proto = TensorProto()
    write_typed(array, proto)
    same(to_array(proto), array)


def test_arrays_of_typed_fields_may_be_written_to():
    proto = TensorProto()
    write_typed(np.float32([1, 2]), proto)
    array = to_array(proto)
    array += 1
    assert array.tolist() == [2, 3]
    assert list(proto.float_val) == [1, 2]
