"""JSON predict requests as arrays, and arrays as JSON answers.

    {"instances": [row, ...]}           -> {"predictions": [row, ...]}    row form
    {"inputs": {"name": tensor, ...}}   -> {"outputs": ...}               column form

The signature's dtypes say what a JSON value becomes; a value of another kind is an error, never rounded or
cut. Bytes are `{"b64": "..."}` in requests, and in answers for outputs whose name ends in `_bytes`. NaN,
Infinity and -Infinity are read and written.
Source: tensorflow_serving/util/json_tensor.cc and its messages.
"""

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from graftserve.client.wire import DataType
from graftserve.client.wire.tensors import TensorError, dtype_name

from .errors import Code, ServingError, invalid
from .servable import Array, Signature

__all__ = [
    "decode_inputs",
    "decode_string",
    "encode_outputs",
    "is_base64",
    "is_row_form",
    "json_name",
    "lossy",
    "parse_document",
    "show",
    "to_json",
]

_BYTES_SUFFIX = "_bytes"
_MAX_SHOWN = 200  # characters of an offending value in a message

_INTEGERS: dict[int, type[np.integer[Any]]] = {
    DataType.DT_INT8: np.int8,
    DataType.DT_INT16: np.int16,
    DataType.DT_INT32: np.int32,
    DataType.DT_INT64: np.int64,
    DataType.DT_UINT8: np.uint8,
    DataType.DT_UINT16: np.uint16,
    DataType.DT_UINT32: np.uint32,
    DataType.DT_UINT64: np.uint64,
}
_FLOATS: dict[int, type[np.floating[Any]]] = {
    DataType.DT_HALF: np.float16,
    DataType.DT_FLOAT: np.float32,
    DataType.DT_DOUBLE: np.float64,
}
_TYPE_NAMES = {
    "float32": "float",
    "float64": "double",
    "float16": "half",
}  # TensorFlow's where NumPy's differ
_JSON_NAMES = {
    type(None): "Null",
    dict: "Object",
    list: "Array",
    str: "String",
    int: "Number",
    float: "Number",
}


def parse_document(body: bytes) -> tuple[dict[str, Any], str]:
    """A request's JSON object, and the signature that it names; empty if none.

    Raises ServingError (INVALID_ARGUMENT).
    """
    if not body:
        raise invalid("JSON Parse error: The document is empty")
    try:
        document = json.loads(body)
    except json.JSONDecodeError as exc:
        raise invalid(f"JSON Parse error: {exc.msg} at offset: {exc.pos}") from exc
    except RecursionError as exc:
        raise invalid("JSON Parse error: Expected fewer levels of lists and objects in each other") from exc
    except ValueError as exc:  # not Unicode, or an integer of thousands of digits
        raise invalid(f"JSON Parse error: {exc}") from exc
    if not isinstance(document, dict):
        raise invalid(f"JSON Value: {show(document)} Is not object")
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        raise invalid(
            f"JSON Value: {show(document)} not formatted correctly. "
            "'signature_name' key must be a string value."
        )
    decode_string(name)  # refuses half of a surrogate pair
    return document, name


def decode_inputs(document: Mapping[str, Any], signature: Signature) -> dict[str, Array]:
    """A predict request's arrays by input name. Raises ServingError (INVALID_ARGUMENT)."""
    if not signature.inputs:
        raise invalid(f"Failed to get input map for signature: {signature.name}")
    if is_row_form(document):
        if "inputs" in document:
            raise invalid(
                f"JSON Value: {show(document)} Not formatted correctly expecting only one of 'inputs' or "
                "'instances' keys to exist "
            )
        instances = document["instances"]
        if not isinstance(instances, list):
            raise invalid(f"JSON Value: {show(document)} Excepting 'instances' to be an list/array")
        if not instances:
            raise invalid(f"JSON Value: {show(document)} No values in 'instances' array")
        return _decode_rows(instances, signature)
    if "inputs" not in document:
        raise invalid("Missing 'inputs' or 'instances' key")
    return _decode_columns(document["inputs"], signature)


def is_row_form(document: Mapping[str, Any]) -> bool:
    """Whether a predict request gives `instances`, so that the answer is `predictions`."""
    return "instances" in document


def encode_outputs(outputs: Mapping[str, Array], *, row_form: bool) -> bytes:
    """The answer's JSON. One output stands for itself, several become an object (of each row, or of all).

    Strings that are not UTF-8 are written as `{"b64": ...}` whatever the output's name.
    Raises ServingError (INVALID_ARGUMENT) if the outputs' first axes differ, in row form.
    """
    if not outputs:
        raise invalid("Cannot convert empty tensor map to JSON")
    if row_form:
        sizes = {name: array.shape[0] if array.ndim else None for name, array in outputs.items()}
        expected = next(iter(sizes.values()))
        for name, size in sizes.items():
            if size is None:
                raise invalid(f"Tensor name: {name} has no shape information ")
            if size != expected:
                raise invalid(
                    f"Tensor name: {name} has inconsistent batch size: {size} expecting: {expected}"
                )
    values = {name: to_json(name, array) for name, array in outputs.items()}
    answer: dict[str, Any]
    if len(values) == 1:
        answer = {"predictions" if row_form else "outputs": next(iter(values.values()))}
    elif row_form:
        rows = zip(*values.values(), strict=True)
        answer = {"predictions": [dict(zip(values, row, strict=True)) for row in rows]}
    else:
        answer = {"outputs": values}
    return json.dumps(answer, ensure_ascii=False, separators=(", ", ": ")).encode()


def _decode_rows(instances: list[Any], signature: Signature) -> dict[str, Array]:
    inputs = signature.inputs
    if not _is_named(instances[0]):
        if len(inputs) > 1:
            raise invalid(
                "instances is a plain list, but expecting list of objects as multiple input tensors required "
                "as per tensorinfo_map"
            )
        for index, row in enumerate(instances):
            if _is_named(row):
                raise invalid(f"Expecting value/list but got object at item {index} of input list")
        ((name, spec),) = inputs.items()
        return {name: _decode_batch(instances, spec.data_type, "")}
    for index, row in enumerate(instances):
        if not _is_named(row):
            raise invalid(f"Expecting object but got list at item {index} of input list")
        for name in row:
            if name not in inputs:
                decode_string(name)
                raise invalid(
                    f"Failed to process element: {index} key: {name} of 'instances' list. Error: "
                    f"INVALID_ARGUMENT: JSON object: does not have named input: {name}"
                )
        if row.keys() != inputs.keys():
            raise invalid(
                f"Failed to process element: {index} of 'instances' list. JSON object: {show(row)} keys "
                f"must be equal to: {','.join(sorted(inputs))}"
            )
    return {
        name: _decode_batch([row[name] for row in instances], spec.data_type, f" key: {name}")
        for name, spec in inputs.items()
    }


def _decode_batch(rows: list[Any], data_type: int, key: str) -> Array:
    try:
        return _decode_tensor(rows, data_type)
    except ServingError:
        # Say which row is to blame, in the real server's words for a row by itself.
        index = _first_bad_row(rows, data_type)
        try:
            array = _decode_tensor(rows[index], data_type)
            first = _decode_tensor(rows[0], data_type)
            if array.size != first.size:
                raise invalid(f"Expecting tensor size: {first.size} but got: {array.size}")
            if array.shape != first.shape:
                raise invalid(f"Expecting shape {_shape(first)} but got: {_shape(array)}")
        except ServingError as exc:
            raise invalid(
                f"Failed to process element: {index}{key} of 'instances' list. Error: {exc}"
            ) from exc
        raise


def _first_bad_row(rows: list[Any], data_type: int) -> int:
    """The index of the first row that is wrong in itself or unlike the first one; there is such a row.

    By halves: one by one, a large request would take minutes to be refused.
    """
    good, bad = 0, len(rows)  # as many rows are good together, or are not
    while bad - good > 1:
        middle = (good + bad) // 2
        try:
            _decode_tensor([*rows[: min(good, 1)], *rows[good:middle]], data_type)
            good = middle
        except ServingError:
            bad = middle
    return bad - 1


def _shape(array: Array) -> str:
    return f"[{','.join(map(str, array.shape))}]"


def _decode_columns(value: Any, signature: Signature) -> dict[str, Array]:
    inputs = signature.inputs
    if not _is_named(value):
        if len(inputs) > 1:
            raise invalid(
                "inputs is a plain value/list, but expecting an object as multiple input tensors required as "
                "per tensorinfo_map"
            )
        ((name, spec),) = inputs.items()
        return {name: _decode_tensor(value, spec.data_type)}
    for name in inputs:
        if name not in value:
            raise invalid(f"Missing named input: {name} in 'inputs' object.")
    return {name: _decode_tensor(value[name], spec.data_type) for name, spec in inputs.items()}


def _decode_tensor(value: Any, data_type: int) -> Array:
    # Level by level rather than by recursion: the checks run over whole levels in C, and no nesting is too
    # deep for the stack.
    shape: list[int] = []
    level: Sequence[Any] = [value]
    while level:
        kinds = set(map(type, level))
        if list not in kinds:
            break
        if len(kinds) > 1 or len(set(map(len, level))) > 1:
            raise _ragged(value)
        shape.append(len(level[0]))
        level = list(chain.from_iterable(level))
    try:
        return _decode_values(level, data_type).reshape(shape)
    except ValueError as exc:  # more dimensions than NumPy has
        raise invalid(f"Expected at most 64 levels of lists, got {len(shape)}") from exc


def _ragged(value: Any) -> ServingError:
    """The error for the first part of nested lists that does not fit the shape which the first ones set."""
    shape: list[int] = []
    first = value
    while isinstance(first, list):
        shape.append(len(first))
        first = first[0] if first else None
    rest: list[tuple[Any, int]] = [(value, 0)]
    while True:
        item, level = rest.pop()
        if not isinstance(item, list):
            if level != len(shape):
                return invalid(
                    f"JSON Value: {show(item)} found at incorrect level: {level + 1} in the JSON DOM. "
                    f"Expected at level: {len(shape)}"
                )
        elif level >= len(shape):
            return invalid(f"Encountered list at unexpected level: {level} expected < {len(shape)}")
        elif len(item) != shape[level]:
            return invalid(
                f"Encountered list at unexpected size: {len(item)} at level: {level} "
                f"expected size: {shape[level]}"
            )
        else:
            rest.extend((part, level + 1) for part in reversed(item))


def _decode_values(values: Sequence[Any], data_type: int) -> Array:
    if data_type in _FLOATS:
        return _decode_floats(values, _FLOATS[data_type], data_type)
    if data_type in _INTEGERS:
        dtype = _INTEGERS[data_type]
        _check_types(values, {int}, data_type)
        info = np.iinfo(dtype)
        for value in (min(values), max(values)) if values else ():
            if not info.min <= value <= info.max:
                raise _wrong_type(value, data_type)
        return np.array(values, dtype)
    if data_type == DataType.DT_BOOL:
        _check_types(values, {bool}, data_type)
        return np.array(values, np.bool_)
    if data_type == DataType.DT_STRING:
        _check_types(values, {str, dict}, data_type)
        array = np.empty(len(values), object)
        array[:] = [decode_string(value) for value in values]
        return array
    raise ServingError(
        Code.UNIMPLEMENTED,
        f"Conversion of JSON Value: {show(values[0] if values else [])} to type: {_type_name(data_type)}",
    )


def _decode_floats(values: Sequence[Any], dtype: type[np.floating[Any]], data_type: int) -> Array:
    _check_types(values, {int, float}, data_type)
    name = _type_name(data_type)
    if int in set(map(type, values)):
        largest = 2 ** (np.finfo(dtype).nmant + 1) - 1
        for value in values:
            if type(value) is int and abs(value) > largest:
                raise lossy(value, name)
    wide = np.array(values, np.float64)
    with np.errstate(over="ignore"):
        array = wide.astype(dtype)
    overflown = np.isinf(array) & np.isfinite(wide)
    if overflown.any():
        raise lossy(float(wide[overflown][0]), name)
    return array


def decode_string(value: Any) -> bytes:
    """The bytes of a JSON string or of `{"b64": ...}`. Raises ServingError (INVALID_ARGUMENT)."""
    if isinstance(value, str):
        try:
            return value.encode()
        except UnicodeEncodeError as exc:
            raise invalid(f"JSON Value: {show(value)} is not valid Unicode: {exc.reason}") from exc
    if not is_base64(value):
        raise invalid(f"JSON Value: {show(value)} not formatted correctly for base64 data")
    text = value["b64"]
    try:
        # Padding may be left out, and the URL alphabet may be used.
        text = text.rstrip("=").translate({ord("-"): "+", ord("_"): "/"})
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as exc:
        raise invalid(f"Unable to base64 decode: {exc}") from exc


def to_json(name: str, array: Array) -> Any:
    """An output as lists of JSON values. name: ends in `_bytes` if its strings are to be `{"b64": ...}`."""
    if array.dtype.kind == "O":
        as_bytes = name.endswith(_BYTES_SUFFIX)
        flat = np.empty(array.size, object)
        flat[:] = [_encode_string(item, as_bytes) for item in array.ravel().tolist()]
        return flat.reshape(array.shape).tolist()
    if array.dtype.kind in "biu" or array.dtype == np.float64:
        return array.tolist()
    if array.dtype.kind == "f":
        # float(str(x)) has the fewest digits that still mean the same float32; float(x) has nine more.
        flat = np.array([float(text) for text in array.ravel().astype(np.str_).tolist()], np.float64)
        return flat.reshape(array.shape).tolist()
    raise invalid(f"Failed to write JSON value for tensor type: {array.dtype.name}")


def _encode_string(item: bytes, as_bytes: bool) -> Any:
    if not as_bytes:
        try:
            return item.decode()
        except UnicodeDecodeError:
            pass
    return {"b64": base64.b64encode(item).decode("ascii")}


def _check_types(values: Sequence[Any], allowed: set[type], data_type: int) -> None:
    if not set(map(type, values)) <= allowed:
        raise _wrong_type(next(value for value in values if type(value) not in allowed), data_type)


def is_base64(value: Any) -> bool:
    """Whether it is `{"b64": "..."}`."""
    return isinstance(value, dict) and value.keys() == {"b64"} and isinstance(value["b64"], str)


def _is_named(value: Any) -> bool:
    """Whether it is an object of inputs by name, not a value."""
    return isinstance(value, dict) and not is_base64(value)


def _type_name(data_type: int) -> str:
    try:
        name = dtype_name(data_type)
    except TensorError:
        return str(data_type)
    return _TYPE_NAMES.get(name, name)


def _wrong_type(value: Any, data_type: int) -> ServingError:
    return invalid(
        f"JSON Value: {show(value)} Type: {json_name(value)} is not of expected type: {_type_name(data_type)}"
    )


def lossy(value: float, name: str) -> ServingError:
    """The error for a number that the type cannot hold."""
    return invalid(f"Cannot convert JSON value: {show(value)} to {name} without loss of precision.")


def json_name(value: Any) -> str:
    """What the real server calls the kind of a JSON value: "True", "False", "Number", ..."""
    return str(value) if isinstance(value, bool) else _JSON_NAMES[type(value)]


def show(value: Any) -> str:
    """A value as JSON, cut for a message."""
    try:
        text = json.dumps(value)
    except RecursionError:  # what could just be read may still be too deep to be written
        return "..."
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."
