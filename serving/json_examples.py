"""JSON classify and regress requests as tf.Examples, and their results as JSON answers.

    {"examples": [{"feature": value or list, ...}, ...], "context": {...}, "signature_name": "..."}
    classify  -> {"results": [[["label", score], ...], ...]}
    regress   -> {"results": [value, ...]}

A feature's values are all of one kind: integers and true/false (int64), numbers with a point or an exponent,
NaN, Infinity, -Infinity (float32), or strings and `{"b64": "..."}` (bytes). No value is rounded to an integer
or cut. The features of `context` hold for every example that has none of that name.
Source: tensorflow_serving/util/json_tensor.cc and its messages.
"""

import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from graftserve.client import wire

from .errors import ServingError, invalid
from .json_tensor import (
    decode_string,
    is_base64,
    json_name,
    lossy,
    parse_document,
    show,
    to_json,
)

__all__ = ["encode_classifications", "encode_regressions", "parse_examples_body"]

_INT64, _FLOAT, _BYTES = "int64", "float", "bytes"
_KINDS = {bool: _INT64, int: _INT64, float: _FLOAT, str: _BYTES, dict: _BYTES}
_MIN_INT64, _MAX_INT64, _MAX_UINT64 = -(2**63), 2**63 - 1, 2**64 - 1
_MAX_FLOAT = float(np.finfo(np.float32).max)


def parse_examples_body(body: bytes) -> tuple[str, wire.Input]:
    """The signature's name, empty if none is given, and the examples.

    Raises ServingError (INVALID_ARGUMENT) if it is not JSON or not a classify or regress request.
    """
    document, signature_name = parse_document(body)
    return signature_name, _input(document)


def encode_classifications(result: wire.ClassificationResult) -> bytes:
    """The answer's JSON. Absent labels are "", absent scores 0.0.

    Raises ServingError (INVALID_ARGUMENT) if there are no results.
    """
    if not result.classifications:
        raise invalid("Cannot convert empty ClassificationResults to JSON")
    scores = iter(_floats(entry.score for row in result.classifications for entry in row.classes))
    return _answer([[[entry.label, next(scores)] for entry in row.classes] for row in result.classifications])


def encode_regressions(result: wire.RegressionResult) -> bytes:
    """The answer's JSON. Raises ServingError (INVALID_ARGUMENT) if there are no results."""
    if not result.regressions:
        raise invalid("Cannot convert empty RegressionResults to JSON")
    return _answer(_floats(entry.value for entry in result.regressions))


def _input(document: dict[str, Any]) -> wire.Input:
    given = wire.Input()
    target: wire.ExampleList | wire.ExampleListWithContext = given.example_list
    if "context" in document:
        _fill(given.example_list_with_context.context, document["context"])
        target = given.example_list_with_context
    if "examples" not in document:
        raise invalid(
            f"JSON Value: {show(document)} When method is classify, key 'examples' is expected and was not "
            "found"
        )
    examples = document["examples"]
    if not isinstance(examples, list):
        raise invalid(f"JSON Value: {show(document)} Expecting 'examples' value to be an list/array")
    if not examples:
        raise invalid(f"JSON Value: {show(document)} 'examples' value is an empty array")
    for value in examples:
        _fill(target.examples.add(), value)
    return given


def _fill(example: wire.Example, value: Any) -> None:
    if not isinstance(value, dict):
        raise invalid(f"Example must be JSON object but got JSON {json_name(value)}")
    for name, content in value.items():
        decode_string(name)
        values = content if isinstance(content, list) else [content]
        _fill_feature(example.features.feature[name], name, values)


def _fill_feature(feature: wire.Feature, name: str, values: list[Any]) -> None:
    kinds = {_KINDS.get(type_) for type_ in set(map(type, values))}
    if len(kinds) > 1 or None in kinds:
        raise _mixed(name, values)
    if kinds == {_FLOAT}:
        _check_floats(values)
        feature.float_list.value.extend(values)
    elif kinds == {_INT64}:
        _check_integers(name, values)
        feature.int64_list.value.extend(map(int, values))  # protobuf takes no bool
    elif kinds == {_BYTES}:
        for value in values:
            if isinstance(value, dict) and not is_base64(value):
                raise _unexpected(name, value)
        feature.bytes_list.value.extend(map(decode_string, values))


def _mixed(name: str, values: list[Any]) -> ServingError:
    """The error for the first value that is of no kind, or of another kind than the first one."""
    expected = _KINDS.get(type(values[0]))
    stray = next(value for value in values if expected is None or _KINDS.get(type(value)) != expected)
    if type(stray) not in _KINDS or (isinstance(stray, dict) and not is_base64(stray)):
        return _unexpected(name, stray)
    return invalid(f"Unexpected element type in feature: {name} expecting type: {expected}")


def _check_floats(values: list[float]) -> None:
    for value in values:
        if _MAX_FLOAT < abs(value) < math.inf:
            raise lossy(value, "float")


def _check_integers(name: str, values: list[int]) -> None:
    for value in (max(values), min(values)):
        if _MAX_INT64 < value <= _MAX_UINT64:
            raise invalid(f"Feature: {name} has uint64 element. Only int64 is supported.")
        if not _MIN_INT64 <= value <= _MAX_INT64:
            raise lossy(value, "int64")


def _unexpected(name: str, value: Any) -> ServingError:
    return invalid(f"Feature: {name} has element with unexpected JSON type: {json_name(value)}")


def _floats(values: Iterable[float]) -> list[float]:
    floats: list[float] = to_json("", np.fromiter(values, np.float32))
    return floats


def _answer(results: list[Any]) -> bytes:
    return json.dumps({"results": results}, ensure_ascii=False, separators=(", ", ": ")).encode()
