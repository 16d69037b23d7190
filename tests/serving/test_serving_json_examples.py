"""JSON classify and regress requests become tf.Examples, and results become JSON."""

import json
import math
import struct
from typing import Any

import numpy as np
import pytest

from graftserve.client import wire
from graftserve.serving.errors import Code, ServingError
from graftserve.serving.json_examples import (
    encode_classifications,
    encode_regressions,
    parse_examples_body,
)

MAX_FLOAT = float(np.finfo(np.float32).max)


def parse(document: Any) -> tuple[str, wire.Input]:
    return parse_examples_body(document if isinstance(document, bytes) else json.dumps(document).encode())


def parse_feature(content: Any) -> wire.Feature:
    """content: what stands for the feature in the document, as Python values or as JSON itself."""
    text = content.encode() if isinstance(content, str) else json.dumps(content).encode()
    _, given = parse(b'{"examples": [{"f": ' + text + b"}]}")
    (example,) = given.example_list.examples
    assert set(example.features.feature) == {"f"}
    return example.features.feature["f"]


def error(document: Any) -> str:
    with pytest.raises(ServingError) as caught:
        parse(document)
    assert caught.value.code == Code.INVALID_ARGUMENT
    return caught.value.message


def test_tensorflow_reads_what_was_written() -> None:
    import tensorflow as tf

    name, given = parse(
        {
            "signature_name": "classify",
            "examples": [
                {
                    "age": 7,
                    "tall": True,
                    "sizes": [1.5, 2.25],
                    "name": "Ünal",
                    "raw": {"b64": "AP8="},
                    "none": [],
                },
                {"age": 8, "tall": False, "sizes": [0.5, -1e-3], "name": "b", "raw": "text"},
            ],
        }
    )
    assert name == "classify"
    rows = [example.SerializeToString() for example in given.example_list.examples]
    got = tf.io.parse_example(
        rows,
        {
            "age": tf.io.FixedLenFeature([], tf.int64),
            "tall": tf.io.FixedLenFeature([], tf.int64),
            "sizes": tf.io.FixedLenFeature([2], tf.float32),
            "name": tf.io.FixedLenFeature([], tf.string),
            "raw": tf.io.FixedLenFeature([], tf.string),
            "none": tf.io.FixedLenFeature([], tf.float32, -1.0),
        },
    )
    assert {key: value.numpy().tolist() for key, value in got.items()} == {
        "age": [7, 8],
        "tall": [1, 0],
        "sizes": [[1.5, 2.25], np.array([0.5, -1e-3], np.float32).tolist()],
        "name": ["Ünal".encode(), b"b"],
        "raw": [b"\x00\xff", b"text"],
        "none": [-1, -1],
    }


def test_a_context_goes_beside_the_examples() -> None:
    name, given = parse({"context": {"user": "me"}, "examples": [{"x": 1}, {}]})
    assert name == ""
    assert given.WhichOneof("kind") == "example_list_with_context"
    assert given.example_list_with_context.context.features.feature["user"].bytes_list.value == [b"me"]
    first, second = given.example_list_with_context.examples
    assert first.features.feature["x"].int64_list.value == [1]
    assert not second.features.feature
    _, without = parse({"context": {}, "examples": [{"x": 1}]})
    assert without.WhichOneof("kind") == "example_list_with_context"


@pytest.mark.parametrize(
    ("content", "kind", "values"),
    [
        ("5", "int64_list", [5]),
        ("[5, -0, true, false]", "int64_list", [5, 0, 1, 0]),
        ("[-9223372036854775808, 9223372036854775807]", "int64_list", [-(2**63), 2**63 - 1]),
        ("5.0", "float_list", [5]),
        ("[1e0, 2.5]", "float_list", [1, 2.5]),
        ("[Infinity, -Infinity, 0.5]", "float_list", [math.inf, -math.inf, 0.5]),
        (repr(MAX_FLOAT), "float_list", [MAX_FLOAT]),
        (f"-{MAX_FLOAT!r}", "float_list", [-MAX_FLOAT]),
        ('"text"', "bytes_list", [b"text"]),
        ('["", "\\u65e5", "\\ud83d\\ude00"]', "bytes_list", [b"", "日".encode(), "😀".encode()]),
        ('["a", {"b64": "AP8"}, {"b64": "_-8="}]', "bytes_list", [b"a", b"\x00\xff", b"\xff\xef"]),
    ],
)
def test_values_have_the_kind_that_json_shows(content: str, kind: str, values: list[Any]) -> None:
    feature = parse_feature(content)
    assert feature.WhichOneof("kind") == kind
    assert list(getattr(feature, kind).value) == values


def test_nan_is_a_number_with_a_point() -> None:
    (value,) = parse_feature("[NaN]").float_list.value
    assert math.isnan(value)


def test_an_empty_list_is_a_feature_of_no_kind() -> None:
    assert parse_feature("[]").WhichOneof("kind") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("null", "Feature: f has element with unexpected JSON type: Null"),
        ("[10, null]", "Feature: f has element with unexpected JSON type: Null"),
        ("[null, 10]", "Feature: f has element with unexpected JSON type: Null"),
        ("[[1]]", "Feature: f has element with unexpected JSON type: Array"),
        ("[1, [2]]", "Feature: f has element with unexpected JSON type: Array"),
        ('{"test": 10}', "Feature: f has element with unexpected JSON type: Object"),
        ('[10, {"test": 10}]', "Feature: f has element with unexpected JSON type: Object"),
        ('{"b64": 10}', "Feature: f has element with unexpected JSON type: Object"),
        ('{"b64": "", "more": 1}', "Feature: f has element with unexpected JSON type: Object"),
        ("[10, 10.0]", "Unexpected element type in feature: f expecting type: int64"),
        ("[true, NaN]", "Unexpected element type in feature: f expecting type: int64"),
        ("[10.5, 10]", "Unexpected element type in feature: f expecting type: float"),
        ("[10.5, false]", "Unexpected element type in feature: f expecting type: float"),
        ('["a", 10]', "Unexpected element type in feature: f expecting type: bytes"),
        ('[10, {"b64": "AA"}]', "Unexpected element type in feature: f expecting type: int64"),
        ("9223372036854775808", "Feature: f has uint64 element. Only int64 is supported."),
        ("[1, 18446744073709551615]", "Feature: f has uint64 element. Only int64 is supported."),
        (
            "18446744073709551616",
            "Cannot convert JSON value: 18446744073709551616 to int64 without loss of precision.",
        ),
        (
            "[0, -9223372036854775809]",
            "Cannot convert JSON value: -9223372036854775809 to int64 without loss of precision.",
        ),
        ("[NaN, 3.5e38]", "Cannot convert JSON value: 3.5e+38 to float without loss of precision."),
        ("-1e300", "Cannot convert JSON value: -1e+300 to float without loss of precision."),
        ('{"b64": "A"}', "Unable to base64 decode"),
        ('"\\ud800"', 'JSON Value: "\\ud800" is not valid Unicode'),
    ],
)
def test_values_that_no_feature_can_hold(content: str, message: str) -> None:
    for place in ('{"examples": [{"f": %s}]}', '{"context": {"f": %s}, "examples": [{}]}'):
        assert error((place % content).encode()).startswith(message)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b"", "JSON Parse error: The document is empty"),
        (b'{"examples": [}', "JSON Parse error: Expecting value at offset: 14"),
        (b'{"examples": [{"f": 1}]} x', "JSON Parse error: Extra data at offset: 25"),
        (b'{"examples": [{"f": "\xff"}]}', "JSON Parse error: 'utf-8' codec can't decode"),
        (b'{"examples": [{"f": ' + b"9" * 5000 + b"}]}", "JSON Parse error: Exceeds the limit"),
        ([], "JSON Value: [] Is not object"),
        (
            {"signature_name": 5, "examples": [{}]},
            'JSON Value: {"signature_name": 5, "examples": [{}]} not formatted correctly. '
            "'signature_name' key must be a string value.",
        ),
        (b'{"signature_name": "\\ud800", "examples": [{}]}', 'JSON Value: "\\ud800" is not valid Unicode'),
        (b'{"examples": [{"\\udfff": 1}]}', 'JSON Value: "\\udfff" is not valid Unicode'),
        (
            {"instances": [1]},
            "JSON Value: {\"instances\": [1]} When method is classify, key 'examples' is expected and was "
            "not found",
        ),
        ({"examples": {}}, "JSON Value: {\"examples\": {}} Expecting 'examples' value to be an list/array"),
        ({"examples": []}, "JSON Value: {\"examples\": []} 'examples' value is an empty array"),
        ({"examples": [[{}]]}, "Example must be JSON object but got JSON Array"),
        ({"examples": [{}, "a"]}, "Example must be JSON object but got JSON String"),
        ({"examples": [True]}, "Example must be JSON object but got JSON True"),
        ({"examples": [7]}, "Example must be JSON object but got JSON Number"),
        ({"context": None, "examples": [{}]}, "Example must be JSON object but got JSON Null"),
    ],
)
def test_documents_that_are_no_request(document: Any, message: str) -> None:
    assert error(document).startswith(message)


@pytest.mark.parametrize("around", [b'{"examples": [{"f": %s}]}', b'{"examples": %s}', b'{"x": %s}', b"%s"])
@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_no_depth_escapes(around: bytes, opening: bytes, closing: bytes) -> None:
    # Near Python's own limit, too: there a document can be read, but not shown in a message.
    for depth in (2, *range(880, 1000, 3), 100_000):
        error(around % (opening * depth + b"1" + closing * depth))


def test_many_numbers_are_all_kept() -> None:
    values = np.random.default_rng(0).normal(size=20_000).astype(np.float32)
    feature = parse_feature([float(value) for value in values])
    np.testing.assert_array_equal(np.array(feature.float_list.value, np.float32), values)


def classifications(*rows: list[tuple[str, float]]) -> wire.ClassificationResult:
    result = wire.ClassificationResult()
    for row in rows:
        entry = result.classifications.add()
        for label, score in row:
            entry.classes.add(label=label, score=score)
    return result


def test_labels_and_scores_are_written_in_pairs() -> None:
    text = encode_classifications(classifications([("häufig", 0.1), ("", 3.0)], [], [('"', 1e-30)]))
    assert text.decode() == '{"results": [[["häufig", 0.1], ["", 3.0]], [], [["\\"", 1e-30]]]}'


def test_values_are_written_in_a_list() -> None:
    result = wire.RegressionResult(
        regressions=[wire.Regression(value=value) for value in (0.2, -7.0, 16777216)]
    )
    assert encode_regressions(result) == b'{"results": [0.2, -7.0, 16777216.0]}'


def test_numbers_come_back_as_they_were() -> None:
    bits = np.random.default_rng(1).integers(0, 2**32, 5000, np.uint32)
    values = np.concatenate([bits.view(np.float32), np.array([math.nan, math.inf, -math.inf], np.float32)])
    rows = [wire.Regression(value=value) for value in values.tolist()]
    text = encode_regressions(wire.RegressionResult(regressions=rows))
    back = np.array(json.loads(text)["results"], np.float64).astype(np.float32)
    np.testing.assert_array_equal(back, values)
    assert b"NaN, Infinity, -Infinity]" in text
    pairs = encode_classifications(
        classifications([(str(i), value) for i, value in enumerate(values.tolist())])
    )
    scores = np.array([score for _, score in json.loads(pairs)["results"][0]], np.float64).astype(np.float32)
    np.testing.assert_array_equal(scores, values)
    assert struct.pack("<f", scores[0]) == struct.pack("<f", values[0])


def test_nothing_is_no_answer() -> None:
    for encode, result, name in [
        (encode_classifications, wire.ClassificationResult(), "ClassificationResults"),
        (encode_regressions, wire.RegressionResult(), "RegressionResults"),
    ]:
        with pytest.raises(ServingError, match=f"Cannot convert empty {name} to JSON") as caught:
            encode(result)  # type: ignore[operator]
        assert caught.value.code == Code.INVALID_ARGUMENT
