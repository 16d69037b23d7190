"""The REST API: JSON in, JSON out, over HTTP and through curl."""

import base64
import gzip
import json
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Ask = Callable[..., tuple[int, Any]]

PREDICT = "/v1/models/text:predict"


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        ({"instances": ["abc", ""]}, {"predictions": [3, 0]}),
        ({"instances": [{"text": "ä"}]}, {"predictions": [2]}),
        ({"instances": [{"b64": "YQBi"}, "c"]}, {"predictions": [3, 1]}),
        ({"inputs": ["abc", "d"]}, {"outputs": [3, 1]}),
        ({"inputs": {"text": ["abc", {"b64": "_-8"}]}}, {"outputs": [3, 2]}),
        (
            {"inputs": {"b64": "YQ=="}, "signature_name": "echo"},
            {"outputs": {"again": "a", "raw_bytes": {"b64": "YQ=="}, "text": "a"}},
        ),
        (
            {"signature_name": "echo", "instances": [["A"], ["B"]]},
            {
                "predictions": [
                    {"again": ["a"], "raw_bytes": [{"b64": "QQ=="}], "text": ["A"]},
                    {"again": ["b"], "raw_bytes": [{"b64": "Qg=="}], "text": ["B"]},
                ]
            },
        ),
        (
            {"signature_name": "add", "inputs": {"a": [[1, 2]], "b": [[0.5, -3]]}},
            {"outputs": {"sum": [[1.5, -1.0]], "positive": [[True, False]], "a": [[1, 2]], "count": 2}},
        ),
        ({"signature_name": "divide", "instances": [10.0, 3, 4]}, {"predictions": [0.1, 0.33333334, 0.25]}),
        ({"inputs": [], "signature_name": "divide"}, {"outputs": []}),
    ],
)
def test_predict(ask: Ask, body: Any, answer: Any) -> None:
    assert ask(PREDICT, body) == (200, answer)


def test_nan_and_infinity_both_ways(ask: Ask) -> None:
    status, answer = ask(
        PREDICT, b'{"signature_name": "divide", "instances": [NaN, Infinity, -Infinity, 0.0, -0.0]}'
    )
    assert status == 200
    assert repr(answer["predictions"]) == "[nan, 0.0, -0.0, inf, -inf]"


def test_paths_are_case_insensitive_and_take_a_version(ask: Ask) -> None:
    assert ask("/V1/Models/text/VERSIONS/3:Predict", {"instances": ["a"]})[0] == 200
    assert ask("/v1/models/%74ext:predict", {"instances": ["a"]})[0] == 200
    assert ask("/v1/models/text/versions/4:predict", {"instances": ["a"]}) == (
        404,
        {"error": "Servable not found for request: Specific(text, 4)"},
    )
    assert ask("/v1/models/text/labels/stable:predict", {"instances": ["a"]}) == (
        400,
        {"error": "Unrecognized servable version label: stable"},
    )


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"", "JSON Parse error: The document is empty"),
        (b'{"instances": [1,}', "JSON Parse error: "),
        (b"\xff\xfe{", "JSON Parse error: "),
        (b"[1]", " Is not object"),
        ({}, "Missing 'inputs' or 'instances' key"),
        (
            {"instances": [1], "inputs": [1]},
            " Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist ",
        ),
        ({"instances": 1}, " Excepting 'instances' to be an list/array"),
        ({"instances": []}, " No values in 'instances' array"),
        (
            {"signature_name": 1, "instances": [1]},
            " not formatted correctly. 'signature_name' key must be a string value.",
        ),
        (
            {"signature_name": "zz", "instances": [1]},
            'Serving signature name: "zz" not found in signature def',
        ),
        (
            {"instances": ["a", 5]},
            "Failed to process element: 1 of 'instances' list. Error: INVALID_ARGUMENT: JSON Value: 5 Type: "
            "Number is not of expected type: string",
        ),
        (
            {"instances": ["a", ["b"]]},
            "Failed to process element: 1 of 'instances' list. Error: INVALID_ARGUMENT: Expecting shape [] "
            "but got: [1]",
        ),
        (
            {"instances": [["a"], ["b", "c"]]},
            "Failed to process element: 1 of 'instances' list. Error: INVALID_ARGUMENT: Expecting tensor "
            "size: 1 but got: 2",
        ),
        (
            {"instances": [[["a", "b"]], [["c"], ["d"]]]},
            "Failed to process element: 1 of 'instances' list. Error: INVALID_ARGUMENT: Expecting shape "
            "[1,2] but got: [2,1]",
        ),
        (
            {"inputs": [["a"], "b"]},
            'JSON Value: "b" found at incorrect level: 2 in the JSON DOM. Expected at level: 2',
        ),
        ({"inputs": ["a", ["b"]]}, "Encountered list at unexpected level: 1 expected < 1"),
        (
            {"inputs": [["a"], ["b", "c"]]},
            "Encountered list at unexpected size: 2 at level: 1 expected size: 1",
        ),
        ({"instances": ["a", {"text": "b"}]}, "Expecting value/list but got object at item 1 of input list"),
        ({"instances": [{"text": "b"}, "a"]}, "Expecting object but got list at item 1 of input list"),
        (
            {"instances": [{"txet": "b"}]},
            "Failed to process element: 0 key: txet of 'instances' list. Error: INVALID_ARGUMENT: JSON "
            "object: does not have named input: txet",
        ),
        ({"signature_name": "add", "instances": [{"a": [1, 2]}]}, " keys must be equal to: a,b"),
        ({"inputs": {"txet": ["b"]}}, "Missing named input: text in 'inputs' object."),
        ({"instances": [{"b64": "*"}]}, "Unable to base64 decode"),
        (
            {"signature_name": "add", "instances": [[1, 2]]},
            "instances is a plain list, but expecting list of objects as multiple input tensors required as "
            "per tensorinfo_map",
        ),
        (
            {"signature_name": "add", "inputs": [[1, 2]]},
            "inputs is a plain value/list, but expecting an object as multiple input tensors required as "
            "per tensorinfo_map",
        ),
        (
            {"signature_name": "add", "inputs": {"a": [[1, 2.0]], "b": [[1, 2]]}},
            "JSON Value: 2.0 Type: Number is not of expected type: int64",
        ),
        (
            {"signature_name": "add", "inputs": {"a": [[1, 2**63]], "b": [[1, 2]]}},
            "JSON Value: 9223372036854775808 Type: Number is not of expected type: int64",
        ),
        (
            {"signature_name": "add", "inputs": {"a": [[1, True]], "b": [[1, 2]]}},
            "JSON Value: true Type: True is not of expected type: int64",
        ),
        (
            {"signature_name": "divide", "instances": [1e39]},
            "Cannot convert JSON value: 1e+39 to float without loss of precision.",
        ),
        (
            {"signature_name": "divide", "instances": [2**24 + 1]},
            "Cannot convert JSON value: 16777217 to float without loss of precision.",
        ),
        (
            {"signature_name": "divide", "instances": [None]},
            "JSON Value: null Type: Null is not of expected type: float",
        ),
        pytest.param(
            b'{"instances": [1,}',
            "JSON Parse error: Expecting value at offset: 17",
            marks=pytest.mark.better("json words"),
        ),
        pytest.param(b"[1]", "JSON Value: [1] Is not object", marks=pytest.mark.better("json words")),
        pytest.param(b"[" * 100_000, "JSON Parse error: ", marks=pytest.mark.better("any request")),
        pytest.param(
            {"instances": ["\ud800"]}, "is not valid Unicode", marks=pytest.mark.better("any request")
        ),
        pytest.param(
            {"signature_name": "\ud800", "instances": ["a"]},
            "is not valid Unicode",
            marks=pytest.mark.better("any request"),
        ),
    ],
)
def test_bad_bodies_are_400_and_say_why(ask: Ask, body: Any, error: str) -> None:
    status, answer = ask(PREDICT, body)
    assert status == 400
    assert error in answer["error"]


def test_row_form_needs_outputs_of_one_length(ask: Ask) -> None:
    body = {"signature_name": "add", "instances": [{"a": [1, 2], "b": [1, 2]}]}
    assert ask(PREDICT, body) == (400, {"error": "Tensor name: count has no shape information "})


def test_unknown_paths(ask: Ask, http_request: Any) -> None:
    assert ask("/v1/modls/text") == (400, {"error": "Malformed request: GET /v1/modls/text"})
    assert ask(PREDICT) == (400, {"error": f"Malformed request: GET {PREDICT}"})
    assert ask(PREDICT, method="DELETE")[0] == 400
    assert ask("/v1/models") == (400, {"error": "Missing model name in request."})
    assert http_request("GET", "/nothing").status == 404
    assert ask("/v1/models/text:explain", {"instances": [1]})[0] == 400
    assert ask(f"/v1/models/text/versions/{2**63}")[1]["error"].startswith("Failed to convert version: ")


# JSON and dtypes: api_rest.md's table, "JSON mapping"

MAPPED = {
    "bool": [True, False],
    "string": ["Hello World!", "日本"],
    "int8": [-128, 127],
    "uint8": [0, 255],
    "int16": [-32768, 32767],
    "int32": [-(2**31), 2**31 - 1],
    "uint32": [0, 2**32 - 1],
    "int64": [-(2**63), 2**63 - 1],
    "uint64": [0, 2**64 - 1],
    "float32": [1.1, -10.0, 0.2, 1e-5, 3.4028235e38],
    "float64": [1.1, -10.0, 0.2, 1e300],
}


@pytest.mark.parametrize("name", MAPPED)
def test_dtypes_that_json_has(ask: Ask, name: str) -> None:
    values = MAPPED[name]
    for asked, answered in (("instances", "predictions"), ("inputs", "outputs")):
        status, answer = ask("/v1/models/dtypes:predict", {"signature_name": name, asked: [values, values]})
        assert (status, answer) == (200, {answered: [values, values]})
        assert list(map(type, answer[answered][0])) == list(map(type, values))
    status, answer = ask("/v1/models/dtypes:predict", {"signature_name": name, "inputs": values[0]})
    assert (status, answer) == (200, {"outputs": values[0]})


@pytest.mark.better("half and uint16 in JSON")
@pytest.mark.parametrize(("name", "values"), [("float16", [1.5, -0.1, 1000.0]), ("uint16", [0, 65535])])
def test_dtypes_that_json_could_have(ask: Ask, name: str, values: list[Any]) -> None:
    body = {"signature_name": name, "instances": values}
    status, answer = ask("/v1/models/dtypes:predict", body)
    assert (status, answer) == (200, {"predictions": values})


@pytest.mark.parametrize("name", ["bfloat16", "complex64", "complex128"])
def test_dtypes_that_json_has_not(ask: Ask, name: str) -> None:
    body = {"signature_name": name, "instances": [1.5]}
    status, answer = ask("/v1/models/dtypes:predict", body)
    assert status == 400
    assert f"UNIMPLEMENTED: Conversion of JSON Value: 1.5 to type: {name}" in answer["error"]
    status, answer = ask("/v1/models/dtypes:predict", {"signature_name": name, "inputs": 1.5})
    assert (status, answer["error"]) == (501, f"Conversion of JSON Value: 1.5 to type: {name}")


@pytest.mark.better("exact integers")
@pytest.mark.parametrize(("name", "value"), [("int8", 128), ("uint8", -1), ("int16", 40_000)])
def test_integers_that_the_dtype_cannot_hold(ask: Ask, name: str, value: int) -> None:
    status, answer = ask("/v1/models/dtypes:predict", {"signature_name": name, "inputs": [value]})
    assert status == 400
    assert f"JSON Value: {value} Type: Number is not of expected type: {name}" in answer["error"]


@pytest.mark.better("binary text")
def test_strings_that_are_not_text_are_base64_whatever_the_name(ask: Ask) -> None:
    body = {"signature_name": "string", "instances": [{"b64": "/w=="}, "a"]}
    assert ask("/v1/models/dtypes:predict", body) == (200, {"predictions": [{"b64": "/w=="}, "a"]})


def test_the_documents_own_examples(ask: Ask, http_request: Any) -> None:
    path = "/v1/models/half_plus_three:predict"
    assert ask(path, {"instances": [1.0, 2.0, 5.0]}) == (200, {"predictions": [3.5, 4.0, 5.5]})
    answer = http_request("POST", "/v1/models/half:predict", b'{"instances": [1.0,5.0]}')
    assert (answer.status, answer.headers["Content-Type"]) == (404, "application/json")
    assert json.loads(answer.body) == {"error": "Servable not found for request: Latest(half)"}
    # Several named inputs, row by row and column by column.
    rows = {"instances": [{"a": [1, 2], "b": [1.5, 0]}, {"a": [3, 4], "b": [-9, 1]}]}
    columns = {"inputs": {"a": [[1, 2], [3, 4]], "b": [[1.5, 0], [-9, 1]]}}
    _, answer = ask(PREDICT, {**columns, "signature_name": "add"})
    assert answer["outputs"]["sum"] == [[2.5, 2.0], [-6.0, 5.0]]
    assert ask(PREDICT, {**rows, "signature_name": "add"})[0] == 400  # `count` has no rows


def test_an_input_with_a_default_has_to_be_named_in_json(ask: Ask) -> None:
    path = "/v1/models/defaults:predict"
    assert ask(path, {"inputs": {"x": [1, 2], "factor": 5}}) == (200, {"outputs": [5.0, 10.0]})
    assert ask(path, {"inputs": {"x": [1, 2]}}) == (
        400,
        {"error": "Missing named input: factor in 'inputs' object."},
    )


def test_a_scalar_signature(ask: Ask) -> None:
    assert ask(PREDICT, {"signature_name": "scalar", "inputs": 1.5}) == (200, {"outputs": 3.0})


@pytest.mark.better("zero rows")
def test_no_rows_are_answered(ask: Ask) -> None:
    assert ask("/v1/models/half_plus_two:predict", {"inputs": []}) == (200, {"outputs": []})


def test_a_body_may_be_gzipped(http_request: Any) -> None:
    body = gzip.compress(json.dumps({"instances": ["abc"] * 1000}).encode())
    answer = http_request("POST", PREDICT, body, {"Content-Encoding": "gzip"})
    assert (answer.status, json.loads(answer.body)) == (200, {"predictions": [3] * 1000})


@pytest.mark.better("gzip of answers")
def test_an_answer_is_gzipped_where_it_is_accepted(http_request: Any) -> None:
    body = json.dumps({"instances": ["abc"] * 1000}).encode()
    zipped = gzip.compress(body)
    headers = {"Content-Encoding": "gzip", "Accept-Encoding": "deflate, gzip;q=0.5"}
    answer = http_request("POST", PREDICT, zipped, headers)
    assert (answer.status, answer.headers["Content-Encoding"]) == (200, "gzip")
    assert json.loads(gzip.decompress(answer.body)) == {"predictions": [3] * 1000}
    answer = http_request("POST", PREDICT, body, {"Accept-Encoding": "gzip;q=0"})
    assert "Content-Encoding" not in answer.headers
    assert json.loads(answer.body)["predictions"][0] == 3
    for broken, message in ((b"not gzip", "Expected a body in gzip: "), (zipped[:-9], "it ends too early")):
        answer = http_request("POST", PREDICT, broken, {"Content-Encoding": "gzip"})
        assert answer.status == 400
        assert message in json.loads(answer.body)["error"]


def test_a_body_may_come_in_chunks(rest_address: str) -> None:
    body = b'{"instances": ["abc"]}'
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:5], body[5:]))
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    host, _, port = rest_address.rpartition(":")
    with socket.create_connection((host, int(port)), 30) as connection:
        connection.sendall(head.encode() + chunks + b"0\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"predictions" in answer


# curl, as the documentation uses it


@pytest.fixture
def curl(rest_address: str) -> Callable[..., tuple[int, bytes]]:
    """curl(path, *arguments) gives the HTTP status and the body."""
    if shutil.which("curl") is None:
        pytest.skip("no curl on the PATH")

    def curl(path: str, *arguments: str) -> tuple[int, bytes]:
        command = ["curl", "--silent", "--show-error", "--max-time", "30", "--write-out", "\n%{http_code}"]
        url = f"http://{rest_address}{path}"
        output = subprocess.run([*command, *arguments, url], capture_output=True, check=True).stdout
        body, _, status = output.rpartition(b"\n")
        return int(status), body

    return curl


def test_curl(curl: Callable[..., tuple[int, bytes]], tmp_path: Path) -> None:
    def ask(path: str, *arguments: str) -> tuple[int, Any]:
        status, body = curl(path, *arguments)
        return status, json.loads(body)

    path = "/v1/models/half_plus_two"
    state = {"version": "123", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    assert ask(path) == (200, {"model_version_status": [state]})
    assert ask(f"{path}/metadata")[1]["model_spec"]["name"] == "half_plus_two"
    assert ask(f"{path}:predict", "-d", '{"instances": [1.0, 2.0, 5.0]}') == (
        200,
        {"predictions": [2.5, 3.0, 4.5]},
    )
    assert ask(f"{path}/versions/123:predict", "-d", '{"inputs": [1.0]}') == (200, {"outputs": [2.5]})
    picture = json.dumps({"instances": [{"b64": base64.b64encode(b"\xff\0").decode()}]})
    assert ask(PREDICT, "-d", picture) == (200, {"predictions": [2]})
    assert ask("/v1/models/nope:predict", "-d", "{}", "-X", "POST") == (
        404,
        {"error": "Servable not found for request: Latest(nope)"},
    )
    # Of more than a megabyte, with which curl waits until it is told to continue.
    large = tmp_path / "large.json"
    large.write_text(json.dumps({"instances": ["x" * 2_000_000]}))
    assert ask(PREDICT, "-d", f"@{large}") == (200, {"predictions": [2_000_000]})


@pytest.mark.better("gzip of answers")
def test_curl_reads_gzip(curl: Callable[..., tuple[int, bytes]]) -> None:
    body = json.dumps({"instances": ["abc"] * 1000})
    status, answer = curl(PREDICT, "--compressed", "-d", body, "-H", "Expect:")
    assert (status, json.loads(answer)) == (200, {"predictions": [3] * 1000})
    _, raw = curl(PREDICT, "-H", "Accept-Encoding: gzip", "-d", body)
    assert raw.startswith(b"\x1f\x8b")
