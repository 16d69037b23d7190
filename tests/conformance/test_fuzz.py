"""Requests that nobody in their right mind sends. Every one is answered as the caller's fault, in good time,
and the server is well afterwards.

Sixty of each kind in an ordinary run, a thousand with --slow.
"""

import json
import math
import re
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.better("any request")

_TIMEOUT_S = 30
_MAX_GROWTH_BYTES = 1.5e9
_SERVERS_FAULT = {"INTERNAL", "UNKNOWN", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "DATA_LOSS"}
_HTTP_STATUSES = {200, 400, 404, 413, 501}

PREDICTION = "/tensorflow.serving.PredictionService/"
MODEL = "/tensorflow.serving.ModelService/"
METHODS = [
    *(f"{PREDICTION}{name}" for name in ("Predict", "Classify", "Regress", "MultiInference")),
    f"{PREDICTION}GetModelMetadata",
    f"{MODEL}GetModelStatus",
]
SIZES = [0, 1, 2, 3, -1, -(2**63), 2**20, 2**31, 2**32 + 1, 2**40, 2**62, 2**63 - 1]
DTYPES = [*range(32), 101, 107, 119, 2**31 - 1, -1]
SIGNATURES = [
    "",
    "text",
    "echo",
    "add",
    "divide",
    "project",
    "scalar",
    "decode",
    "fail",
    "bad",
    "\0",
    "é" * 99,
]

Call = Callable[[str, bytes], str]


@pytest.fixture(scope="module")
def call(server: Any) -> Iterator[Call]:
    """call(method, message) is the code of the answer. A code that blames the server fails the test."""
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(server.grpc_address, options) as channel:
        stubs: dict[str, Any] = {}

        def call(method: str, message: bytes) -> str:
            stub = stubs.setdefault(method, channel.unary_unary(method))
            answer = stub.future(message, timeout=_TIMEOUT_S)
            code = str(answer.code().name)
            assert code not in _SERVERS_FAULT, f"{method}: {code}: {answer.details()}"
            return code

        yield call


@pytest.fixture(scope="module", autouse=True)
def _well_afterwards(request: pytest.FixtureRequest, kind: str) -> Iterator[None]:
    """The server answers as before, and has not grown out of bounds."""
    if kind != "graftserve":
        yield
        return
    rest_address = request.getfixturevalue("rest_address")
    before_bytes = resident_bytes(rest_address)
    yield
    status, answer = post(rest_address, "/v1/models/half_plus_two:predict", b'{"instances": [1.0]}')
    assert (status, json.loads(answer)) == (200, {"predictions": [2.5]})
    assert resident_bytes(rest_address) - before_bytes < _MAX_GROWTH_BYTES


def resident_bytes(rest_address: str) -> float:
    text = exchange(rest_address, b"GET /monitoring/prometheus/metrics HTTP/1.0\r\n\r\n").decode()
    (value,) = re.findall(r"^process_resident_memory_bytes (\S+)$", text, re.MULTILINE)
    return float(value)


def exchange(rest_address: str, content: bytes) -> bytes:
    """All that comes back for these bytes, on a connection of their own, until the server closes it."""
    host, _, port = rest_address.rpartition(":")
    received = []
    with socket.create_connection((host, int(port)), _TIMEOUT_S) as connection:
        try:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(1 << 20):
                received.append(part)
        except ConnectionError:  # it need not read all that it refuses
            pass
    return b"".join(received)


def post(rest_address: str, path: str, body: bytes) -> tuple[int, bytes]:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    answer = exchange(rest_address, head.encode() + body)
    status, _, rest = answer.partition(b"\r\n")
    assert status.startswith(b"HTTP/1.1 "), answer
    return int(status.split()[1]), rest.partition(b"\r\n\r\n")[2]


# gRPC


_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "float_val": st.floats(width=32),
    "double_val": st.floats(),
    "int_val": st.integers(-(2**31), 2**31 - 1),
    "int64_val": st.integers(-(2**63), 2**63 - 1),
    "uint32_val": st.integers(0, 2**32 - 1),
    "uint64_val": st.integers(0, 2**64 - 1),
    "half_val": st.integers(-(2**31), 2**31 - 1),
    "bool_val": st.booleans(),
    "string_val": st.binary(max_size=20),
    "scomplex_val": st.floats(width=32),
    "dcomplex_val": st.floats(),
}
# The number of each dtype that a signature of `dtypes` takes, and the field for it.
_DTYPES = {
    "float32": (1, "float_val"),
    "float64": (2, "double_val"),
    "float16": (19, "half_val"),
    "bfloat16": (14, "half_val"),
    "int8": (6, "int_val"),
    "int16": (5, "int_val"),
    "int32": (3, "int_val"),
    "int64": (9, "int64_val"),
    "uint8": (4, "int_val"),
    "uint16": (17, "int_val"),
    "uint32": (22, "uint32_val"),
    "uint64": (23, "uint64_val"),
    "bool": (10, "bool_val"),
    "string": (7, "string_val"),
    "complex64": (8, "scomplex_val"),
    "complex128": (18, "dcomplex_val"),
}
_TAKEN = {
    "text": [("text", "string")],
    "echo": [("raw", "string")],
    "decode": [("image_bytes", "string")],
    "add": [("a", "int64"), ("b", "float64")],
    "fail": [("message", "string")],
    **{name: [("x", "float32")] for name in ("divide", "project", "scalar")},
}


@st.composite
def tensors(draw: st.DrawFn, api: Any, dtype: str) -> Any:
    """TensorProtos for a dtype, whose parts contradict each other as often as not."""
    number, field = _DTYPES[dtype]
    proto = api.TensorProto(dtype=draw(st.just(number) | st.just(number) | st.sampled_from(DTYPES)))
    small = st.lists(st.integers(0, 3), max_size=3)
    for size in draw(small | small | st.lists(st.sampled_from(SIZES), max_size=4)):
        proto.tensor_shape.dim.add(size=size)
    proto.tensor_shape.unknown_rank = draw(st.integers(0, 9)) == 0
    if draw(st.integers(0, 2)) == 0:
        proto.tensor_content = draw(st.binary(max_size=40))
    for name in {field, *draw(st.sets(st.sampled_from(sorted(_FIELDS)), max_size=1))}:
        getattr(proto, name).extend(draw(st.lists(_FIELDS[name], max_size=4)))
    return proto


@st.composite
def predict_requests(draw: st.DrawFn, api: Any) -> bytes:
    request = api.PredictRequest()
    signature = draw(st.sampled_from(sorted({*_DTYPES, *_TAKEN})))
    taken = _TAKEN.get(signature, [("x", signature)])
    request.model_spec.name = "text" if signature in _TAKEN else "dtypes"
    request.model_spec.signature_name = signature
    for name, dtype in taken:
        request.inputs[name].CopyFrom(draw(tensors(api, dtype)))
    if draw(st.integers(0, 3)) == 0:
        change = draw(st.sampled_from(["model", "signature", "version", "more", "fewer", "filter"]))
        if change == "model":
            request.model_spec.name = draw(
                st.sampled_from(["text", "dtypes", "defaults", "keras", "nope", ""])
            )
        elif change == "signature":
            request.model_spec.signature_name = draw(st.sampled_from(SIGNATURES))
        elif change == "version":
            request.model_spec.version.value = draw(st.sampled_from(SIZES))
        elif change == "more":
            request.inputs[draw(st.sampled_from(["x", "\0", "é"]))].CopyFrom(draw(tensors(api, "string")))
        elif change == "fewer":
            del request.inputs[taken[0][0]]
        else:
            request.output_filter.extend(draw(st.lists(st.sampled_from(["y", "length", "\0"]), max_size=2)))
    return bytes(request.SerializeToString())


@st.composite
def damaged(draw: st.DrawFn, message: bytes) -> bytes:
    """A message after a few bit flips, cuts, insertions and repetitions."""
    content = bytearray(message)
    for _ in range(draw(st.integers(1, 6))):
        position = draw(st.integers(0, max(0, len(content) - 1)))
        change = draw(st.sampled_from(["flip", "cut", "insert", "repeat", "byte"]))
        if change == "flip" and content:
            content[position] ^= 1 << draw(st.integers(0, 7))
        elif change == "byte" and content:
            content[position] = draw(st.sampled_from([0, 0x7F, 0x80, 0xFF]))
        elif change == "cut":
            del content[position : position + draw(st.integers(1, 1 + len(content)))]
        elif change == "insert":
            content[position:position] = draw(st.binary(max_size=12))
        else:
            content += content[position : position + draw(st.integers(1, 64))] * draw(st.integers(1, 20))
    return bytes(content)


def varint(value: int) -> bytes:
    content = b""
    while value > 0x7F:
        content += bytes([value & 0x7F | 0x80])
        value >>= 7
    return content + bytes([value])


@st.composite
def field_soup(draw: st.DrawFn, depth: int = 4) -> bytes:
    """Fields of any number and kind, some of them with lies about their length."""
    content = b""
    for _ in range(draw(st.integers(0, 5))):
        number, kind = draw(st.sampled_from([*range(1, 20), 2**28])), draw(st.integers(0, 7))
        content += varint(number << 3 | kind)
        if kind == 0:
            content += varint(draw(st.sampled_from([0, 1, 127, 2**31, 2**63, 2**64 - 1])))
        elif kind in (1, 5):
            content += draw(st.binary(min_size=8, max_size=8))[: 8 if kind == 1 else 4]
        elif kind == 2:
            inner = draw(field_soup(depth - 1) if depth else st.binary(max_size=9))
            lie = draw(st.sampled_from([0, 0, 0, 1, 2**20, 2**31, 2**62]))
            content += varint(len(inner) + lie) + inner
    return content


@pytest.fixture(scope="module")
def good_messages(api: Any, request_of: Any) -> list[tuple[str, bytes]]:
    """A request that is answered, for every method."""
    given_input = api.Input()
    features = given_input.example_list.examples.add().features
    features.feature["x"].float_list.value.extend([1, 2])
    classify, regress = api.ClassificationRequest(input=given_input), api.RegressionRequest(input=given_input)
    infer = api.MultiInferenceRequest(input=given_input)
    task = infer.tasks.add(method_name="tensorflow/serving/classify")
    metadata = api.GetModelMetadataRequest(metadata_field=["signature_def"])
    status = api.GetModelStatusRequest()
    regress.model_spec.signature_name = "regress"
    for spec in (*(request.model_spec for request in (classify, regress, metadata, status)), task.model_spec):
        spec.name = "examples"
    add = request_of("text", "add", a=np.ones((2, 2), np.int64), b=np.ones((2, 2)))
    echo = request_of("text", "echo", raw=[[b"a", b"\xff"], [b"", b"long" * 30]])
    messages = (add, classify, regress, infer, metadata, status)
    pairs = [(method, message.SerializeToString()) for method, message in zip(METHODS, messages, strict=True)]
    return [*pairs, (METHODS[0], echo.SerializeToString())]


def test_the_messages_to_be_damaged_are_good(call: Call, good_messages: list[tuple[str, bytes]]) -> None:
    assert {call(method, message) for method, message in good_messages} == {"OK"}


@given(data=st.data())
def test_damaged_messages(call: Call, good_messages: list[tuple[str, bytes]], data: st.DataObject) -> None:
    method, message = data.draw(st.sampled_from(good_messages))
    call(method, data.draw(damaged(message)))


@given(method=st.sampled_from(METHODS), message=field_soup())
def test_soups_of_fields(call: Call, method: str, message: bytes) -> None:
    call(method, message)


@given(data=st.data())
def test_tensors_that_contradict_themselves(call: Call, api: Any, data: st.DataObject) -> None:
    call(METHODS[0], data.draw(predict_requests(api)))


@settings(max_examples=25)
@given(message=field_soup() | st.binary(max_size=30))
def test_reloads_of_nonsense(call: Call, api: Any, models_dir: Path, message: bytes) -> None:
    from google.protobuf import text_format

    call(f"{MODEL}HandleReloadConfigRequest", message)
    good = api.ReloadConfigRequest()
    text_format.Parse((models_dir / "models.config").read_text(), good.config)
    assert call(f"{MODEL}HandleReloadConfigRequest", good.SerializeToString()) == "OK"


@pytest.mark.parametrize("method", [*METHODS, f"{MODEL}HandleReloadConfigRequest"])
def test_messages_nested_without_end(call: Call, method: str) -> None:
    groups = bytes([1 << 3 | 3]) * 100_000
    nested = b""
    for _ in range(2000):
        nested = b"\x0a" + varint(len(nested)) + nested
    for message in (groups, nested):
        assert call(method, message) in ("INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION")


@pytest.mark.parametrize(
    ("signature", "dtype", "field", "value", "shape"),
    [
        ("divide", "float32", "float_val", 1.0, [2**40]),
        ("divide", "float32", "float_val", None, [2**40]),
        ("divide", "float32", "float_val", 1.0, [2**62, 2**62]),
        ("divide", "float32", "float_val", 1.0, [2**62, 2**62, 0]),
        ("echo", "string", "string_val", b"a", [2**40]),
        ("echo", "string", "string_val", None, [2**40]),
        # Few enough strings to list, and terabytes when each has its own bytes.
        ("echo", "string", "string_val", b"a" * 2**20, [2**20]),
    ],
)
def test_a_shape_of_a_few_bytes_is_not_filled_with_terabytes(
    call: Call,
    api: Any,
    request_of: Any,
    signature: str,
    dtype: str,
    field: str,
    value: Any,
    shape: list[int],
) -> None:
    proto = api.TensorProto(dtype=api.tf.as_dtype(dtype).as_datatype_enum)
    for size in shape:
        proto.tensor_shape.dim.add(size=size)
    if value is not None:
        getattr(proto, field).append(value)
    request = request_of("text", signature, **{"x" if signature == "divide" else "raw": proto})
    assert call(METHODS[0], request.SerializeToString()) == "INVALID_ARGUMENT"


@pytest.mark.parametrize("shape", [[0], [0, 2**40], [3, 0, 5], [1] * 40, [2] * 8 + [1] * 60])
def test_odd_shapes_that_fit(call: Call, api: Any, request_of: Any, shape: list[int]) -> None:
    content = np.ones(math.prod(shape), np.float32).tobytes()
    proto = api.TensorProto(dtype=1, tensor_content=content)
    for size in shape:
        proto.tensor_shape.dim.add(size=size)
    request = request_of("dtypes", "float32", x=proto)
    assert call(METHODS[0], request.SerializeToString()) in ("OK", "INVALID_ARGUMENT")


def test_long_messages_in_every_script_are_cut(prediction: Any, request_of: Any, failure: Any) -> None:
    for letter in ("n", "é", "日", "😀"):
        request = request_of("text", letter * 3000, text=[b"a"])
        code, message = failure(lambda request=request: prediction.Predict(request, timeout=30))
        assert code == "FAILED_PRECONDITION"
        assert 1020 <= len(message.removesuffix("...TRUNCATED").encode()) <= 1024


# REST

_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from([2**63, -(2**63) - 1, 2**64, 10**400, 1e308, -0.0]),
    st.text(max_size=8),
    st.sampled_from(["\ud800", "\0", "x" * 100_000, "NaN"]),
    st.fixed_dictionaries({"b64": st.sampled_from(["YQ==", "YQ", "_-8", "*", "é", "A", "\ud800", "=" * 50])}),
    st.fixed_dictionaries({"b64": st.none() | st.integers()}),
)
_KEYS = st.sampled_from(["x", "text", "raw", "a", "b", "b64", "factor", "\ud800", "", "日"])
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KEYS, inner, max_size=3),
    max_leaves=12,
)
_DOCUMENTS = st.dictionaries(
    st.sampled_from(["instances", "inputs", "examples", "context"]), _VALUES | st.lists(_VALUES), max_size=2
)
_NAMES = [*SIGNATURES, *("string", "float32", "float16", "int8", "uint64", "bool", "bfloat16", "complex64")]
_PATHS = [
    f"/v1/models/{model}:{api}"
    for model in ("text", "dtypes", "examples", "defaults")
    for api in ("predict", "classify", "regress")
]


def check_answer(status: int, answer: bytes) -> None:
    assert status in _HTTP_STATUSES, answer
    parsed = json.loads(answer)
    assert set(parsed) <= {"error", "predictions", "outputs", "results"}
    assert (status == 200) != ("error" in parsed)


@given(path=st.sampled_from(_PATHS), document=_DOCUMENTS, name=st.none() | st.sampled_from(_NAMES) | _LEAVES)
def test_documents_of_any_form(rest_address: str, path: str, document: dict[str, Any], name: Any) -> None:
    if name is not None:
        document = document | {"signature_name": name}
    check_answer(*post(rest_address, path, json.dumps(document).encode()))


@given(data=st.data(), path=st.sampled_from(_PATHS))
def test_damaged_documents(rest_address: str, path: str, data: st.DataObject) -> None:
    document = (
        b'{"signature_name": "add", "inputs": {"a": [[1, 2]], "b": [[NaN, -1e5]]}, "examples": [{"x": 1}]}'
    )
    check_answer(*post(rest_address, path, data.draw(damaged(document))))


_DEPTH = 100_000


@pytest.mark.parametrize("path", ["/v1/models/text:predict", "/v1/models/examples:classify"])
@pytest.mark.parametrize(
    "body",
    [
        b"[" * _DEPTH,
        b'{"a":' * _DEPTH,
        b'{"instances": ' + b"[" * _DEPTH + b"]" * _DEPTH + b"}",
        b'{"inputs": ' + b"[" * 900 + b"1" + b"]" * 900 + b"}",
        b'{"inputs": ' + b"[" * 70 + b'"a"' + b"]" * 70 + b"}",
        b'{"examples": ' + b'[{"a":' * 900 + b"1" + b"}]" * 900 + b"}",
        b'{"instances": [' + b"9" * 100_000 + b"]}",
        b'{"instances": [1e999999, -1e999999]}',
        b'{"instances": ["a"], "instances": [1], "instances": ["a", {"b64": 1}]}',
        b'{"instances": ["\xff\xfe"]}',
        b'{"instances": ["\\ud800"]}',
        b'{"\\ud800": 1}',
        b'{"instances": [{"\\ud800": 1}]}',
        b'{"signature_name": "\\udfff", "instances": ["a"]}',
        b'\xef\xbb\xbf{"instances": ["a"], "examples": [{"x": [1.0, 2.0]}]}',
        '{"instances": ["a"]}'.encode("utf-16"),
        b'{"instances": ["' + b"x" * 2_000_000 + b'"], "examples": [' + b"{}, " * 10_000 + b"{}]}",
        b'{"instances": [[], [[]], [1, []]]}',
        b'{"examples": [{"x": {"b64": "' + b"A" * 1_000_001 + b'"}}]}',
        b'{"instances": ' + b"[" + b'["a"],' * 100_000 + b'["a", "b"]]}',
    ],
    ids=lambda body: body[:16].decode("latin-1"),
)
def test_documents_out_of_proportion(rest_address: str, path: str, body: bytes) -> None:
    check_answer(*post(rest_address, path, body))


_BODY = b'{"instances": ["a"]}'
_GOOD = b"POST /v1/models/text:predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (
    len(_BODY),
    _BODY,
)


def _head(line: bytes, *headers: bytes) -> bytes:
    return b"\r\n".join([line, b"Host: x", *headers, b"", b""])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 5000,
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03",  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /v1/models/text HTTP/9.9\r\n\r\n",
        b"GET /v1/models/text\r\n\r\n",
        b"GET /v1/models/text HTTP/1.1\r\n\r\n",
        *(
            _head(method + b" /v1/models/text:predict HTTP/1.1")
            for method in (
                b"HEAD",
                b"PUT",
                b"PATCH",
                b"DELETE",
                b"OPTIONS",
                b"TRACE",
                b"BREW",
                b"GET",
                b"POST",
            )
        ),
        _head(b"CONNECT x:443 HTTP/1.1"),
        _head(b"OPTIONS * HTTP/1.1"),
        _head(b"GET http://x/v1/models/text HTTP/1.1"),
        _head(b"GET //v1//models HTTP/1.1"),
        _head(b"GET /v1/models/" + b"x" * 100_000 + b" HTTP/1.1"),
        _head(b"GET /v1/models/%00 HTTP/1.1"),
        _head(b"GET /v1/models/%ff%fe HTTP/1.1"),
        _head(b"GET /v1/models/%zz%2f%2e%2e HTTP/1.1"),
        _head(b"GET /v1/models/\xff\xfe HTTP/1.1"),
        _head(b"GET /v1/models/text/versions/" + b"9" * 5000 + b" HTTP/1.1"),
        _head(b"GET /v1/models/text/labels/%ff HTTP/1.1"),
        _head(b"GET /v1/models/text?a=b#c HTTP/1.1"),
        _head(b"GET /v1/models/text HTTP/1.1", b"A: " + b"x" * 1_000_000),
        _head(b"GET /v1/models/text HTTP/1.1", *[b"A: x"] * 5000),
        _head(b"GET /v1/models/text HTTP/1.1", b"no colon"),
        _head(b"GET /v1/models/text HTTP/1.1", b"Accept-Encoding: gzip;q=nonsense, ;;;"),
        _head(b"POST /v1/models/text:predict HTTP/1.1", b"Content-Length: -1") + _BODY,
        _head(b"POST /v1/models/text:predict HTTP/1.1", b"Content-Length: x") + _BODY,
        _head(b"POST /v1/models/text:predict HTTP/1.1", b"Content-Length: 999999999999999999") + _BODY,
        _head(b"POST /v1/models/text:predict HTTP/1.1", b"Content-Length: 900") + _BODY,
        _head(b"POST /v1/models/text:predict HTTP/1.1", b"Content-Length: 5", b"Content-Length: 6") + _BODY,
        _head(b"POST /v1/models/text:predict HTTP/1.1", b"Transfer-Encoding: chunked") + b"zz\r\n" + _BODY,
        _head(b"POST /v1/models/text:predict HTTP/1.1", b"Transfer-Encoding: chunked")
        + b"-5\r\nabcde\r\n0\r\n\r\n",
        _head(b"POST /v1/models/text:predict HTTP/1.1", b"Transfer-Encoding: chunked")
        + b"ffffffffffff\r\n"
        + _BODY,
        _head(b"POST /v1/models/text:predict HTTP/1.1", b"Transfer-Encoding: chunked") + b"5\r\nab",
        _head(b"POST /v1/models/text:predict HTTP/1.1", b"Transfer-Encoding: nonsense") + _BODY,
        _head(b"POST /v1/models/text:predict HTTP/1.1", b"Content-Encoding: br", b"Content-Length: 20")
        + _BODY,
        _head(b"POST /v1/models/text:predict HTTP/1.1", b"Expect: nonsense", b"Content-Length: 20") + _BODY,
        _GOOD + b"garbage that is no request\r\n\r\n",
        _GOOD + b"\0\xff" * 100,
        _GOOD + _GOOD + _GOOD,
        b"GET /v1/models/text HTTP/1.1\r\n goes on: with nothing\r\nHost: x\r\n\r\n",
        _head(b"GET /v1/models/text HTTP/1.1", b"A: x", b"\tand on"),
    ],
    ids=lambda content: content[:50].decode("latin-1"),
)
def test_bytes_that_are_hardly_http(rest_address: str, content: bytes) -> None:
    answer = exchange(rest_address, content)
    statuses = [int(status) for status in re.findall(rb"^HTTP/1\.[01] (\d+)", answer, re.MULTILINE)]
    assert all(status < 500 or status in (501, 505) for status in statuses), answer
    if content.startswith(_GOOD):
        assert statuses[0] == 200
    if b"Transfer-Encoding" in content:
        assert len(statuses) == 1, "what follows a body that is not understood is no request"
    assert statuses or not content.strip(b"\0") or b"HTTP" not in answer


@given(content=damaged(_GOOD))
def test_damaged_http(rest_address: str, content: bytes) -> None:
    answer = exchange(rest_address, content)
    for status in re.findall(rb"^HTTP/1\.[01] (\d+)", answer, re.MULTILINE):
        assert int(status) < 500 or int(status) in (501, 505), answer


def test_an_http2_door_that_gets_no_http2(server: Any) -> None:
    """gRPC's port, too: what is no HTTP/2 is closed, and calls go on."""
    host, _, port = server.grpc_address.rpartition(":")
    for content in (b"GET / HTTP/1.1\r\n\r\n", b"\0" * 10_000, struct.pack(">I", 2**31) * 100):
        with socket.create_connection((host, int(port)), _TIMEOUT_S) as connection:
            connection.sendall(content)
            try:
                while connection.recv(1 << 16):
                    pass
            except ConnectionError:
                pass
