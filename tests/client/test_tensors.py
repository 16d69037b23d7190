"""Arrays to TensorProto and back, alone and against TensorFlow."""

import sys

import numpy as np
import pytest

from graftserve.client.wire import DataType, TensorProto, TensorShapeProto
from graftserve.client.wire.tensors import TensorError, dtype_name, to_array, to_proto, write_typed

ml_dtypes = pytest.importorskip("ml_dtypes")

NUMBERS = {
    DataType.DT_HALF: np.float16,
    DataType.DT_FLOAT: np.float32,
    DataType.DT_DOUBLE: np.float64,
    DataType.DT_BFLOAT16: ml_dtypes.bfloat16,
    DataType.DT_INT8: np.int8,
    DataType.DT_INT16: np.int16,
    DataType.DT_INT32: np.int32,
    DataType.DT_INT64: np.int64,
    DataType.DT_UINT8: np.uint8,
    DataType.DT_UINT16: np.uint16,
    DataType.DT_UINT32: np.uint32,
    DataType.DT_UINT64: np.uint64,
    DataType.DT_BOOL: np.bool_,
    DataType.DT_COMPLEX64: np.complex64,
    DataType.DT_COMPLEX128: np.complex128,
}
# A value that needs the type: its sign, its width, its imaginary part.
EXTREMES = {
    np.float16: [-65504, 2**-24, np.inf],
    np.float32: [-3.4e38, 1e-45, np.nan],
    np.float64: [-1.7e308, 5e-324, np.nan],
    ml_dtypes.bfloat16: [-3.3e38, 1e-40, np.inf],
    np.bool_: [True, False, True],
    np.complex64: [1 - 2j, 3e38j, -0.5],
    np.complex128: [1 - 2j, 1e300j, -0.5],
}
SHAPES = [(), (1,), (6,), (2, 3), (0,), (0, 5), (3, 0), (1, 2, 3, 1)]

by_type = pytest.mark.parametrize(
    ("data_type", "dtype"), NUMBERS.items(), ids=[dtype_name(number) for number in NUMBERS]
)


def shape_proto(*sizes):
    return TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in sizes])


def sample(dtype, shape=(3,)):
    values = EXTREMES[dtype] if dtype in EXTREMES else [np.iinfo(dtype).min, np.iinfo(dtype).max, 1]
    return np.resize(np.array(values, dtype), shape)


def same(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert a.tobytes() == b.tobytes()


# Numbers


@by_type
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers_come_back_bit_for_bit(data_type, dtype, shape):
    array = sample(dtype, shape)
    proto = TensorProto.FromString(to_proto(array).SerializeToString())
    assert proto.dtype == data_type
    same(to_array(proto), array)


@by_type
def test_tensorflow_reads_what_we_write(data_type, dtype, tensorflow, serving_apis):
    for shape in SHAPES:
        array = sample(dtype, shape)
        theirs = serving_apis.TensorProto.FromString(to_proto(array).SerializeToString())
        same(tensorflow.make_ndarray(theirs), array)
        same(tensorflow.io.parse_tensor(theirs.SerializeToString(), theirs.dtype).numpy(), array)


@by_type
def test_we_read_what_tensorflow_writes(data_type, dtype, tensorflow):
    for shape in SHAPES:
        array = sample(dtype, shape)
        theirs = tensorflow.make_tensor_proto(array)
        same(to_array(TensorProto.FromString(theirs.SerializeToString())), array)


FIELDS = {
    "float_val": [DataType.DT_FLOAT],
    "double_val": [DataType.DT_DOUBLE],
    "int_val": [
        DataType.DT_INT8,
        DataType.DT_INT16,
        DataType.DT_INT32,
        DataType.DT_UINT8,
        DataType.DT_UINT16,
    ],
    "int64_val": [DataType.DT_INT64],
    "uint32_val": [DataType.DT_UINT32],
    "uint64_val": [DataType.DT_UINT64],
    "bool_val": [DataType.DT_BOOL],
    "half_val": [DataType.DT_HALF, DataType.DT_BFLOAT16],
    "scomplex_val": [DataType.DT_COMPLEX64],
    "dcomplex_val": [DataType.DT_COMPLEX128],
}


@pytest.mark.parametrize("given", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("field", "data_type"),
    [(field, item) for field, items in FIELDS.items() for item in items],
    ids=[dtype_name(item) for items in FIELDS.values() for item in items],
)
def test_typed_fields_repeat_their_last_value_as_tensorflow_does(
    field, data_type, given, tensorflow, serving_apis
):
    array = sample(NUMBERS[data_type])
    if field == "half_val":
        values = array.view(np.uint16).tolist()[:given]
    elif array.dtype.kind == "c":
        values = array.view(array.real.dtype).tolist()[: 2 * given]
    else:
        values = array.tolist()[:given]
    proto = TensorProto(dtype=data_type, tensor_shape=shape_proto(3), **{field: values})
    expected = array.copy()
    expected[given:] = array[given - 1] if given else 0
    same(to_array(proto), expected)
    same(tensorflow.io.parse_tensor(proto.SerializeToString(), data_type).numpy(), expected)


def test_numbers_in_tensor_content_are_a_read_only_view():
    array = to_array(to_proto(np.float32([1, 2])))
    assert not array.flags.writeable
    assert not array.flags.owndata


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">f4").reshape(2, 3),
        np.arange(6, dtype=">i8").reshape(2, 3),
        np.arange(6, dtype=np.float32).reshape(3, 2).T,
        np.arange(24, dtype=np.int16).reshape(4, 6)[::2, ::-2],
        np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3)),
        np.broadcast_to(np.float32(7), (2, 3)),
    ],
    ids=["big-endian float", "big-endian int", "transposed", "strided", "fortran", "broadcast"],
)
def test_any_byte_order_and_layout(array):
    np.testing.assert_array_equal(to_array(to_proto(array)), array)
    assert to_array(to_proto(array)).dtype == array.dtype.newbyteorder("=")


@pytest.mark.parametrize(
    ("value", "dtype", "shape"),
    [
        (7, np.int64, ()),
        (0.5, np.float64, ()),
        (True, np.bool_, ()),
        ([1, 2], np.int64, (2,)),
        ([[1.5], [2.5]], np.float64, (2, 1)),
        ([], np.float64, (0,)),
        (np.float32(3), np.float32, ()),
        ([np.float32([1, 2]), np.float32([3, 4])], np.float32, (2, 2)),
        (np.zeros(2, np.longlong), np.int64, (2,)),
    ],
)
def test_numbers_and_lists_get_numpys_dtype(value, dtype, shape):
    array = to_array(to_proto(value))
    assert array.dtype == dtype
    assert array.shape == shape
    np.testing.assert_array_equal(array, value)


def test_any_non_zero_byte_is_true():
    proto = TensorProto(dtype=DataType.DT_BOOL, tensor_shape=shape_proto(3), tensor_content=b"\x00\x01\x02")
    assert to_array(proto).tobytes() == b"\x00\x01\x01"


# Strings

NASTY = [b"", b"\0", b"a\0\0", b"\xff\xd8\xff", "größe".encode(), b"x" * 300]


@pytest.mark.parametrize("shape", [(6,), (2, 3), (6, 1, 1)], ids=str)
def test_strings_come_back_with_their_trailing_nuls(shape):
    array = np.array(NASTY, object).reshape(shape)
    result = to_array(TensorProto.FromString(to_proto(array).SerializeToString()))
    assert result.dtype == object
    assert result.shape == shape
    assert result.ravel().tolist() == NASTY


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"a\0", b"a\0"),
        ("ä", "ä".encode()),
        ([b"a\0", b"b"], [b"a\0", b"b"]),
        ([b"a", "b"], [b"a", b"b"]),
        ([["a\0"], [b"bc"]], [[b"a\0"], [b"bc"]]),
        ((b"a",), [b"a"]),
        (np.array([b"a", b"bc"]), [b"a", b"bc"]),
        (np.array(["ä", "bc"]), ["ä".encode(), b"bc"]),
        ([np.array([b"a"]), np.array(["bc"])], [[b"a"], [b"bc"]]),
        (np.array([bytearray(b"a\0"), memoryview(b"b")], object), [b"a\0", b"b"]),
        (np.array(b"a\0", object), b"a\0"),
        (np.zeros((0, 2), object), []),
    ],
)
def test_strings_in_every_form(value, expected):
    assert to_array(to_proto(value)).tolist() == expected


def test_tensorflow_reads_our_strings_and_we_read_its(tensorflow):
    for array in (np.array(NASTY, object).reshape(2, 3), np.array(b"a\0", object), np.zeros((0, 2), object)):
        ours = to_proto(array).SerializeToString()
        parsed = np.asarray(tensorflow.io.parse_tensor(ours, tensorflow.string).numpy(), object)
        assert parsed.tolist() == array.tolist()
        theirs = tensorflow.io.serialize_tensor(tensorflow.constant(array, tensorflow.string)).numpy()
        assert to_array(TensorProto.FromString(theirs)).tolist() == array.tolist()
        theirs = tensorflow.make_tensor_proto(array, tensorflow.string).SerializeToString()
        assert to_array(TensorProto.FromString(theirs)).tolist() == array.tolist()


def test_packed_strings_read_as_tensorflow_reads_them(tensorflow):
    lengths = b"".join(bytes([n]) if n < 128 else bytes([n & 127 | 128, n >> 7]) for n in map(len, NASTY))
    proto = TensorProto(
        dtype=DataType.DT_STRING, tensor_shape=shape_proto(2, 3), tensor_content=lengths + b"".join(NASTY)
    )
    assert to_array(proto).ravel().tolist() == NASTY
    theirs = tensorflow.io.parse_tensor(proto.SerializeToString(), tensorflow.string).numpy()
    assert theirs.ravel().tolist() == NASTY


@pytest.mark.parametrize("given", [0, 1, 2])
def test_too_few_strings_repeat_the_last(given, tensorflow):
    values = [b"a", b"b"][:given]
    proto = TensorProto(dtype=DataType.DT_STRING, tensor_shape=shape_proto(2, 2), string_val=values)
    expected = (values + [values[-1] if values else b""] * 4)[:4]
    assert to_array(proto).ravel().tolist() == expected
    theirs = tensorflow.io.parse_tensor(proto.SerializeToString(), tensorflow.string).numpy()
    assert theirs.ravel().tolist() == expected


# What is refused


@pytest.mark.parametrize(
    "value",
    [
        np.array("2026-01-01", "datetime64[D]"),
        np.zeros(1, [("a", np.int32)]),
        np.zeros(1, np.longdouble),
        np.array([None]),
        np.array([1, b"a"], object),
        [b"a", 1],
        [1, b"a"],
        [[1, 2], [3]],
        [[b"a", b"b"], [b"c"]],
        [np.array([b"a"]), np.array([1])],
        {"a": 1},
        None,
    ],
    ids=str,
)
def test_values_that_are_no_tensor(value):
    if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.dtype.itemsize == 8:
        pytest.skip("long double is double here")
    with pytest.raises(TensorError, match="expected"):
        to_proto(value)


def test_more_than_protobuf_can_hold_is_refused():
    with pytest.raises(TensorError, match=r"at most 2147483647 bytes, .* got 2147483648"):
        to_proto(np.zeros(2**31, np.uint8))  # pages that nobody touches


def float_proto(*sizes, **content):
    return TensorProto(dtype=DataType.DT_FLOAT, tensor_shape=shape_proto(*sizes), **content)


def string_proto(*sizes, **content):
    return TensorProto(dtype=DataType.DT_STRING, tensor_shape=shape_proto(*sizes), **content)


@pytest.mark.parametrize(
    ("proto", "message"),
    [
        (float_proto(2, tensor_content=b"1234567"), "expected 8 bytes .* got 7"),
        (float_proto(0, tensor_content=b"1234"), "expected 0 bytes"),
        (float_proto(-1, float_val=[1]), r"got shape \[-1\]"),
        (float_proto(-1, -1, float_val=[1]), r"got shape \[-1, -1\]"),
        (float_proto(2, float_val=[1, 2, 3]), "at most 2 values in float_val .* got 3"),
        (float_proto(2**40, float_val=[1, 2, 3]), "expected 1099511627776 values .* got 3"),
        (float_proto(2**62, 2**62, float_val=[1]), "repeating the last one would take"),
        (float_proto(2**40), "got 0"),
        (float_proto(*[1] * 200, float_val=[1]), "shape that NumPy can hold"),
        (string_proto(2**40, string_val=[b"a"]), "expected 1099511627776 values"),
        (string_proto(2**40, tensor_content=b"\0\0"), "lengths of 1099511627776 strings"),
        (string_proto(1, string_val=[b"a", b"b"]), "at most 1 values in string_val"),
        (string_proto(1, tensor_content=b"\x80"), "varint"),
        (string_proto(1, tensor_content=b"\xff\xff\xff\xff\xff\xff\xff\x01"), "varint"),
        (string_proto(2, tensor_content=b"\x01\x05ab"), "expected 8 bytes .* got 4"),
        (string_proto(1, tensor_content=b"\x01ab"), "expected 2 bytes"),
        (TensorProto(dtype=DataType.DT_INVALID), "got DT_INVALID"),
        (TensorProto(dtype=DataType.DT_QINT8), "got DT_QINT8"),
        (TensorProto(dtype=DataType.DT_VARIANT), "got DT_VARIANT"),
        (TensorProto(dtype=101), "got DataType 101"),
        (
            TensorProto(dtype=DataType.DT_FLOAT, tensor_shape=TensorShapeProto(unknown_rank=True)),
            "unknown rank",
        ),
        (
            TensorProto(dtype=DataType.DT_COMPLEX64, tensor_shape=shape_proto(2), scomplex_val=[1, 2, 3]),
            "pairs",
        ),
    ],
)
def test_hostile_messages_are_refused_without_allocating(proto, message):
    with pytest.raises(TensorError, match=message):
        to_array(proto)


def test_a_shape_without_elements_may_be_as_wide_as_numpy_takes():
    assert to_array(float_proto(0, 2**40)).shape == (0, 2**40)
    with pytest.raises(TensorError, match="shape that NumPy can hold"):
        to_array(float_proto(0, 2**62, 2**62))


def test_the_limit_of_repetition_can_be_moved():
    proto = float_proto(100, float_val=[1])
    assert to_array(proto, max_fill_bytes=400).sum() == 100
    with pytest.raises(TensorError, match="more than the 399 allowed"):
        to_array(proto, max_fill_bytes=399)


def test_a_repeated_string_counts_its_bytes_each_time():
    proto = TensorProto(dtype=DataType.DT_STRING, string_val=[b"x" * 76])
    proto.tensor_shape.dim.add(size=10)
    assert to_array(proto, max_fill_bytes=1000).tolist() == [b"x" * 76] * 10
    with pytest.raises(TensorError, match="would take 1000 bytes, more than the 999 allowed"):
        to_array(proto, max_fill_bytes=999)


@pytest.mark.parametrize(
    "dtype", ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "c8"]
)
def test_typed_fields_hold_what_they_can(dtype):
    array = np.array([[0, 1], [1, 0]]).astype(dtype)
    proto = TensorProto()
    write_typed(array, proto)
    assert bool(proto.tensor_content) == (dtype in ("f2", "c8"))
    back = to_array(proto)
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


def test_bfloat16_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(TensorError, match="install ml_dtypes"):
        to_array(TensorProto(dtype=DataType.DT_BFLOAT16, tensor_shape=shape_proto(1), half_val=[0x3F80]))


@pytest.mark.parametrize(
    ("data_type", "field"),
    [(DataType.DT_COMPLEX64, "scomplex_val"), (DataType.DT_COMPLEX128, "dcomplex_val")],
)
def test_complex_numbers_are_pairs(data_type, field):
    proto = TensorProto(dtype=data_type, tensor_shape=shape_proto(3), **{field: [1, 2, 3, 4]})
    assert to_array(proto).tolist() == [1 + 2j, 3 + 4j, 3 + 4j]


def test_half_values_beyond_16_bits_are_narrowed_as_tensorflow_narrows_them():
    proto = TensorProto(dtype=DataType.DT_HALF, half_val=[0x10000 + 0x3C00, -(2**31) + 0x4000])
    proto.tensor_shape.dim.add(size=2)
    assert to_array(proto).tolist() == [1.0, 2.0]
