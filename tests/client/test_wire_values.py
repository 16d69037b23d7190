"""Tensors as lists and requests as bytes: the same as the arrays and the messages give."""

import math
import re
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftserve.client.wire import DataType, ModelSpec, PredictRequest, TensorProto, TensorShapeProto
from graftserve.client.wire.encoding import predict_request, string_parts, varint
from graftserve.client.wire.tensors import tensor_parts, to_array, to_proto, write_tensor
from graftserve.client.wire.values import (
    TensorError,
    bools,
    dtype_name,
    floats,
    read_varint,
    strings,
    strings_to_proto,
    write_strings,
)

READERS = {
    DataType.DT_STRING: strings,
    DataType.DT_HALF: floats,
    DataType.DT_FLOAT: floats,
    DataType.DT_DOUBLE: floats,
    DataType.DT_BOOL: bools,
}
FIELDS = {
    DataType.DT_STRING: ("string_val", st.binary(max_size=4)),
    DataType.DT_HALF: ("half_val", st.integers(-(2**31), 2**31 - 1)),
    DataType.DT_FLOAT: ("float_val", st.floats(width=32)),
    DataType.DT_DOUBLE: ("double_val", st.floats()),
    DataType.DT_BOOL: ("bool_val", st.booleans()),
}
ITEM_BYTES = {DataType.DT_HALF: 2, DataType.DT_FLOAT: 4, DataType.DT_DOUBLE: 8, DataType.DT_BOOL: 1}


def shape_proto(*sizes):
    return TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in sizes])


@st.composite
def protos(draw):
    """Of the readable types; half of them contradict themselves."""
    data_type = draw(st.sampled_from(sorted(READERS)))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    proto = TensorProto(dtype=data_type, tensor_shape=shape_proto(*shape))
    count = math.prod(shape)
    if draw(st.booleans()):
        exact = count * ITEM_BYTES.get(data_type, 1)
        size = draw(st.just(exact) | st.integers(0, 40))
        content = draw(st.binary(min_size=size, max_size=size))
        if data_type == DataType.DT_STRING and draw(st.booleans()):
            lengths = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
            content = bytes(lengths) + bytes(sum(lengths))
        proto.tensor_content = content
    else:
        field, items = FIELDS[data_type]
        size = draw(st.just(count) | st.integers(0, 6))
        getattr(proto, field).extend(draw(st.lists(items, min_size=size, max_size=size)))
    return proto


@settings(deadline=None, max_examples=500)
@given(protos())
def test_lists_are_the_arrays_or_both_are_refused(proto):
    reader = READERS[proto.dtype]
    try:
        array = to_array(proto)
    except TensorError as exc:
        with pytest.raises(TensorError, match=f"^{re.escape(str(exc))}$"):
            reader(proto)
        return
    values, shape = reader(proto)
    assert shape == array.shape
    expected = array.ravel().tolist()
    assert list(map(type, values)) == list(map(type, expected))
    # As text: NaN is not itself.
    assert list(map(repr, values)) == list(map(repr, expected))


@pytest.mark.parametrize(
    ("reader", "data_type", "message"),
    [
        (strings, DataType.DT_FLOAT, "expected a tensor of string, got float32"),
        (floats, DataType.DT_STRING, "expected a tensor of float16 or float32 or float64, got string"),
        (floats, DataType.DT_BFLOAT16, "got bfloat16"),
        (bools, DataType.DT_UINT8, "expected a tensor of bool, got uint8"),
        (bools, 101, "got DataType 101"),
    ],
)
def test_another_dtype_is_refused(reader, data_type, message):
    with pytest.raises(TensorError, match=message):
        reader(TensorProto(dtype=data_type))


@pytest.mark.parametrize(
    ("data_type", "name"),
    [
        (0, "DT_INVALID"),
        (1, "float32"),
        (7, "string"),
        (11, "DT_QINT8"),
        (101, "DataType 101"),
        (-1, "DataType -1"),
    ],
)
def test_names_of_dtypes(data_type, name):
    assert dtype_name(data_type) == name


@pytest.mark.parametrize(
    ("reader", "proto", "limit_bytes"),
    [
        (strings, TensorProto(dtype=DataType.DT_STRING, string_val=[b"x" * 76]), 1000),
        (floats, TensorProto(dtype=DataType.DT_FLOAT, float_val=[1]), 80),
        (bools, TensorProto(dtype=DataType.DT_BOOL), 80),
    ],
    ids=["strings", "floats", "bools"],
)
def test_filling_up_is_bounded(reader, proto, limit_bytes):
    proto.tensor_shape.dim.add(size=10)
    assert len(reader(proto, max_fill_bytes=limit_bytes).values) == 10
    with pytest.raises(TensorError, match=f"would take {limit_bytes} bytes"):
        reader(proto, max_fill_bytes=limit_bytes - 1)
    proto.tensor_shape.dim[0].size = 2**60
    with pytest.raises(TensorError, match="would take"):
        reader(proto)


@pytest.mark.parametrize(
    ("reader", "data_type", "given", "values"),
    [
        (strings, DataType.DT_STRING, {"string_val": [b"a", b"b"]}, [b"a", b"b", b"b", b"b"]),
        (floats, DataType.DT_HALF, {"half_val": [0x3C00, 0x4000]}, [1.0, 2.0, 2.0, 2.0]),
        (floats, DataType.DT_FLOAT, {"float_val": [1, 2]}, [1.0, 2.0, 2.0, 2.0]),
        (floats, DataType.DT_DOUBLE, {"double_val": [1, 2]}, [1.0, 2.0, 2.0, 2.0]),
        (bools, DataType.DT_BOOL, {"bool_val": [False, True]}, [False, True, True, True]),
        (strings, DataType.DT_STRING, {}, [b""] * 4),
        (floats, DataType.DT_FLOAT, {}, [0.0] * 4),
        (bools, DataType.DT_BOOL, {}, [False] * 4),
    ],
)
def test_the_last_value_fills_up(reader, data_type, given, values):
    proto = TensorProto(dtype=data_type, tensor_shape=shape_proto(2, 2), **given)
    assert reader(proto) == (values, (2, 2))


def test_nothing_needs_to_fill_a_field_that_is_full():
    proto = TensorProto(dtype=DataType.DT_FLOAT, tensor_shape=shape_proto(2), float_val=[1, 2])
    assert floats(proto, max_fill_bytes=0).values == [1, 2]
    assert to_array(proto, max_fill_bytes=0).tolist() == [1, 2]


def test_64_mib_may_be_filled_by_default():
    items = 64 * 2**20 // 8
    assert len(bools(TensorProto(dtype=DataType.DT_BOOL, tensor_shape=shape_proto(items))).values) == items
    with pytest.raises(TensorError, match=f"more than the {64 * 2**20} allowed"):
        bools(TensorProto(dtype=DataType.DT_BOOL, tensor_shape=shape_proto(items + 1)))


@pytest.mark.parametrize(
    ("content", "values"),
    [
        (b"\0", [b""]),
        (b"\x01a", [b"a"]),
        (b"\0\0\0", [b"", b"", b""]),
        (b"\x02\x01\0abc", [b"ab", b"c", b""]),
        (b"\x80\x01\x02" + bytes(128) + b"ab", [bytes(128), b"ab"]),
        (b"\x80\x80\x01" + bytes(2**14), [bytes(2**14)]),
    ],
    ids=["empty", "one", "all empty", "three", "two bytes of length", "three bytes of length"],
)
def test_packed_strings(content, values):
    proto = TensorProto(dtype=DataType.DT_STRING, tensor_shape=shape_proto(len(values)))
    proto.tensor_content = content
    assert strings(proto).values == values


@pytest.mark.parametrize(
    ("content", "count", "message"),
    [
        (b"\x01a", 3, "expected the lengths of 3 strings in tensor_content, got 2 bytes"),
        (b"\x01\x03a", 2, "expected 6 bytes of tensor_content for 2 strings, got 3"),
        (b"\x01ab", 1, "expected 2 bytes of tensor_content for 1 strings, got 3"),
        (b"a", 0, "expected 0 bytes of tensor_content for 0 strings, got 1"),
        (
            b"\x80",
            1,
            "expected varint string lengths in tensor_content: expected a varint of at most 32 bits",
        ),
        (b"\x80\x80\x80\x80\x80\x01", 1, "expected a varint of at most 32 bits"),
    ],
)
def test_packed_strings_that_contradict_themselves(content, count, message):
    proto = TensorProto(dtype=DataType.DT_STRING, tensor_shape=shape_proto(count), tensor_content=content)
    with pytest.raises(TensorError, match=message):
        strings(proto)


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**14, 2**28 - 1, 2**32 - 1, 2**35 - 1, 2**64 - 1])
def test_varints_come_back(value):
    written = varint(value)
    assert len(written) == max(1, math.ceil(value.bit_length() / 7))
    assert read_varint(b"?" + written + b"?", 1, 64) == (value, 1 + len(written))
    with pytest.raises(ValueError, match="at most 64 bits"):
        read_varint(written[:-1], 0, 64)
    if len(written) > 5:
        with pytest.raises(ValueError, match="at most 32 bits"):
            read_varint(written, 0, 32)
    else:
        assert read_varint(written, 0, 32) == (value, len(written))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (TensorShapeProto(unknown_rank=True), "got one of unknown rank"),
        (shape_proto(2, -1), r"dimensions of zero or more, got shape \[2, -1\]"),
    ],
    ids=["rank", "size"],
)
@pytest.mark.parametrize(("data_type", "reader"), READERS.items())
def test_shapes_that_are_not_known_are_refused(data_type, reader, shape, message):
    with pytest.raises(TensorError, match=message):
        reader(TensorProto(dtype=data_type, tensor_shape=shape))


def test_content_is_little_endian_whatever_the_machine():
    proto = TensorProto(dtype=DataType.DT_FLOAT, tensor_shape=shape_proto(2))
    proto.tensor_content = b"\x00\x00\x80\x3f" + struct.pack("<f", -2.5)
    assert floats(proto) == ([1.0, -2.5], (2,))


def test_strings_are_written_in_place():
    images = [b"\xff\xd8", b"", b"a\0\0"]
    request = PredictRequest()
    write_strings(images, request.inputs["image_bytes"])
    assert request.inputs["image_bytes"] == strings_to_proto(images) == to_proto(images)
    assert strings(strings_to_proto(images)) == (images, (3,))
    assert strings(strings_to_proto([])) == ([], (0,))


# Requests as bytes

VALUES = {
    "images": [b"\xff\xd8" * 100, b"", b"\0"],
    "one string": b"a\0",
    "text": np.array([["ä", "b"]], object),
    "no strings": np.zeros((0, 2), object),
    "floats": np.arange(300, dtype=np.float32).reshape(3, 100),
    "big-endian": np.arange(6, dtype=">i4").reshape(2, 3).T,
    "scalar": np.float64(0.5),
    "scalar zero": 0,
    "empty": np.zeros((3, 0), np.uint8),
    "bool": np.array([True, False]),
    "complex": np.complex64([1 - 2j]),
    "ünïcode" * 30: [1, 2],
    "": [0.5],
}


def test_a_request_as_bytes_is_the_message():
    request = PredictRequest(model_spec=ModelSpec(name="m", signature_name="s"), output_filter=["y", "z"])
    request.model_spec.version.value = 7
    serialized = predict_request(request, {name: tensor_parts(value) for name, value in VALUES.items()})
    assert not request.inputs, "the request itself stays as it was"
    for name, value in VALUES.items():
        write_tensor(value, request.inputs[name])
        # Presence is part of equality: a scalar has a shape, and no dimensions.
        assert request.inputs[name].HasField("tensor_shape")
    assert PredictRequest.FromString(serialized) == request
    assert len(serialized) == request.ByteSize()


def test_the_real_messages_read_it(serving_apis):
    images = [b"\xff\xd8" * 100, b"", b"\0"]
    request = PredictRequest(model_spec=ModelSpec(name="m"))
    serialized = predict_request(request, {"image_bytes": string_parts(images), "x": tensor_parts([1, 2])})
    theirs = serving_apis.PredictRequest.FromString(serialized)
    assert theirs.model_spec.name == "m"
    assert list(theirs.inputs["image_bytes"].string_val) == images
    assert [dim.size for dim in theirs.inputs["x"].tensor_shape.dim] == [2]


@pytest.mark.parametrize("length", [0, 1, 127, 128, 16383, 16384, 2**21])
def test_lengths_around_the_steps_of_varints(length):
    serialized = predict_request(PredictRequest(), {"x" * length: string_parts([b"y" * length])})
    assert strings(PredictRequest.FromString(serialized).inputs["x" * length]).values == [b"y" * length]


def test_more_than_protobuf_can_hold_is_refused():
    half = memoryview(bytes(2**30))  # zero pages that nobody touches
    with pytest.raises(TensorError, match="at most 2147483647 bytes"):
        predict_request(PredictRequest(), {"x": string_parts([half, half])})
