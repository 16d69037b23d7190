"""The REST API over real HTTP."""

import http.client
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from graftserve.serving.app import Server
from graftserve.serving.errors import Code
from graftserve.serving.rest_api import HTTP_STATUS

Ask = Callable[..., tuple[int, Any]]


@pytest.fixture
def ask(many_server: Server) -> Iterator[Ask]:
    """ask(path, body) gives the status and the parsed answer, over one connection that is kept open."""
    assert many_server.rest_port is not None
    connection = http.client.HTTPConnection("127.0.0.1", many_server.rest_port, timeout=30)

    def ask(path: str, body: Any = None, method: str | None = None) -> tuple[int, Any]:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method or ("GET" if data is None else "POST"), path, data)
        response = connection.getresponse()
        assert response.getheader("Content-Type") == "application/json"
        return response.status, json.loads(response.read())

    yield ask
    connection.close()


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
        (b'{"instances": [1,}', "JSON Parse error: Expecting value at offset: 17"),
        (b"\xff\xfe{", "JSON Parse error: "),
        (b"[" * 100_000, "JSON Parse error: "),
        (b"[1]", "JSON Value: [1] Is not object"),
        ({}, "Missing 'inputs' or 'instances' key"),
        ({"instances": [1], "inputs": [1]}, "expecting only one of 'inputs' or 'instances'"),
        ({"instances": 1}, "Expecting 'instances' to be an list/array"),
        ({"instances": []}, "No values in 'instances' array"),
        ({"signature_name": 1, "instances": [1]}, "'signature_name' key must be a string value."),
        (
            {"signature_name": "zz", "instances": [1]},
            'Serving signature name: "zz" not found in signature def',
        ),
        (
            {"instances": ["a", 5]},
            "Failed to process element: 1 of 'instances' list. Error: INVALID_ARGUMENT: JSON Value: 5 Type: "
            "Number is not of expected type: string",
        ),
        ({"instances": ["a", ["b"]]}, "Expecting shape [] but got: [1]"),
        ({"instances": [["a"], ["b", "c"]]}, "Expecting shape [1] but got: [2]"),
        ({"inputs": [["a"], "b"]}, 'JSON Value: "b" found at incorrect level: 2 in the JSON DOM'),
        (
            {"inputs": [["a"], ["b", "c"]]},
            "Encountered list at unexpected size: 2 at level: 1 expected size: 1",
        ),
        ({"instances": ["a", {"text": "b"}]}, "Expecting value/list but got object at item 1 of input list"),
        ({"instances": [{"text": "b"}, "a"]}, "Expecting object but got list at item 1 of input list"),
        ({"instances": [{"txet": "b"}]}, "keys must be equal to: text"),
        ({"inputs": {"txet": ["b"]}}, "Missing named input: text in 'inputs' object."),
        ({"instances": [{"b64": "*"}]}, "Unable to base64 decode"),
        ({"instances": ["\ud800"]}, "is not valid Unicode"),
        (
            {"signature_name": "add", "instances": [[1, 2]]},
            "expecting list of objects as multiple input tensors",
        ),
        ({"signature_name": "add", "inputs": [[1, 2]]}, "expecting an object as multiple input tensors"),
        (
            {"signature_name": "add", "inputs": {"a": [[1, 2.0]], "b": [[1, 2]]}},
            "JSON Value: 2.0 Type: Number is not of expected type: int64",
        ),
        (
            {"signature_name": "add", "inputs": {"a": [[1, 2**63]], "b": [[1, 2]]}},
            "is not of expected type: int64",
        ),
        (
            {"signature_name": "add", "inputs": {"a": [[1, True]], "b": [[1, 2]]}},
            "JSON Value: true Type: Boolean is not of expected type: int64",
        ),
        (
            {"signature_name": "divide", "instances": [1e39]},
            "Cannot convert JSON value: 1e+39 to float without loss",
        ),
        (
            {"signature_name": "divide", "instances": [2**24 + 1]},
            "Cannot convert JSON value: 16777217 to float",
        ),
        (
            {"signature_name": "divide", "instances": [None]},
            "JSON Value: null Type: Null is not of expected type: float",
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


def test_unknown_paths(ask: Ask) -> None:
    assert ask("/v1/modls/text") == (400, {"error": "Malformed request: GET /v1/modls/text"})
    assert ask(PREDICT) == (400, {"error": f"Malformed request: GET {PREDICT}"})
    assert ask(PREDICT, method="DELETE")[0] == 400
    assert ask("/v1/models") == (400, {"error": "Missing model name in request."})
    assert ask("/nothing")[0] == 404
    assert ask("/v1/models/text:explain", {"instances": [1]})[0] == 400
    assert ask(f"/v1/models/text/versions/{2**63}")[1]["error"].startswith("Failed to convert version: ")


def test_status_and_metadata(ask: Ask) -> None:
    state = {"version": "3", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    assert ask("/v1/models/text") == (200, {"model_version_status": [state]})
    assert ask("/v1/models/text/versions/3") == (200, {"model_version_status": [state]})
    assert ask("/v1/models/text/versions/4") == (404, {"error": "Could not find version 4 of model text"})
    assert ask("/v1/models/nope") == (404, {"error": "Could not find any versions of model nope"})
    status, answer = ask("/v1/models/text/metadata")
    assert status == 200
    assert answer["model_spec"] == {"name": "text", "signature_name": "", "version": "3"}
    signature = answer["metadata"]["signature_def"]["signature_def"]["add"]
    assert signature["method_name"] == "tensorflow/serving/predict"
    assert signature["inputs"]["a"] == {
        "name": "add_a:0",
        "dtype": "DT_INT64",
        "tensor_shape": {
            "dim": [{"size": "-1", "name": ""}, {"size": "2", "name": ""}],
            "unknown_rank": False,
        },
    }


def test_every_code_has_an_http_status() -> None:
    assert set(HTTP_STATUS) == set(Code)
