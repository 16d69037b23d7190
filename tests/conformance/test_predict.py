"""Predict over gRPC."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

REAL = (
    *("float16", "float32", "float64", "bfloat16", "int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64"),
)
COMPLEX = ("complex64", "complex128")


def test_half_plus_two_and_three(api: Any, prediction: Any, request_of: Any) -> None:
    for model, answer in {"half_plus_two": [2.5, 3.0, 4.5], "half_plus_three": [3.5, 4.0, 5.5]}.items():
        response = prediction.Predict(request_of(model, x=[1.0, 2.0, 5.0]), timeout=30)
        np.testing.assert_array_equal(api.tf.make_ndarray(response.outputs["y"]), answer)


def test_a_model_that_keras_exported(api: Any, prediction: Any, request_of: Any, ask: Any) -> None:
    _, answer = ask("/v1/models/keras/metadata")
    signature = answer["metadata"]["signature_def"]["signature_def"]["serving_default"]
    ((name, _),) = signature["inputs"].items()
    rows = np.array([[1, 2, 3], [0, 0, 0]], np.float32)
    response = prediction.Predict(request_of("keras", **{name: rows}), timeout=30)
    ((output, proto),) = response.outputs.items()
    assert output in signature["outputs"]
    np.testing.assert_array_equal(api.tf.make_ndarray(proto), [[3.5, 3.5], [0.5, 0.5]])


def test_the_answer_names_the_version_and_the_signature(prediction: Any, request_of: Any) -> None:
    response = prediction.Predict(request_of("text", text=[b"a\0b", b""]))
    assert list(response.outputs["length"].int_val) == [3, 0]  # typed fields, as there
    assert response.model_spec.name == "text"
    assert response.model_spec.version.value == 3
    assert response.model_spec.signature_name == "serving_default"
    response = prediction.Predict(request_of("text", "text", text=[b"a"], version=3))
    assert response.model_spec.signature_name == "text"


@pytest.mark.parametrize("packed", [True, False], ids=["tensor_content", "typed fields"])
@pytest.mark.parametrize("name", [*REAL, "bool", *COMPLEX])
def test_every_dtype_in_every_field(
    api: Any, prediction: Any, request_of: Any, name: str, packed: bool
) -> None:
    dtype = api.tf.as_dtype(name)
    values = np.array(numbers_of(dtype), dtype.as_numpy_dtype).reshape(2, -1)
    if packed:
        proto = api.TensorProto(
            dtype=dtype.as_datatype_enum,
            tensor_shape=api.tf.TensorShape(values.shape).as_proto(),
            tensor_content=values.tobytes(),
        )
    else:
        proto = typed(api, values, dtype)
        assert not proto.tensor_content
    response = prediction.Predict(request_of("dtypes", name, x=proto), timeout=30)
    got = api.tf.make_ndarray(response.outputs["y"])
    assert (got.dtype, got.shape) == (values.dtype, values.shape)
    assert got.tobytes() == values.tobytes()


def numbers_of(dtype: Any) -> list[Any]:
    """An even number of values, with those at the dtype's ends."""
    if dtype.name == "bool":
        return [True, False, False, True]
    if dtype.is_integer:
        return [0, 1, 2, 100, dtype.min, dtype.max]
    numbers: list[Any] = [0, 1, -1.5, 100, float("nan"), float("inf"), float("-inf"), 2]
    return [*numbers, complex(0.5, -2), complex(0, 1)] if dtype.name in COMPLEX else numbers


def typed(api: Any, values: Any, dtype: Any) -> Any:
    """values in the field that belongs to their dtype."""
    proto = api.TensorProto(
        dtype=dtype.as_datatype_enum, tensor_shape=api.tf.TensorShape(values.shape).as_proto()
    )
    flat, name = values.ravel(), dtype.name
    if name in ("float16", "bfloat16"):
        proto.half_val.extend(flat.view(np.uint16).tolist())
    elif name in COMPLEX:
        field = proto.scomplex_val if name == "complex64" else proto.dcomplex_val
        field.extend(flat.view(flat.real.dtype).tolist())
    else:
        own = {"float32": "float_val", "float64": "double_val", "int64": "int64_val", "bool": "bool_val"}
        own |= {"uint32": "uint32_val", "uint64": "uint64_val"}
        getattr(proto, own.get(name, "int_val")).extend(flat.tolist())
    return proto


def test_dtypes_and_shapes_survive(api: Any, prediction: Any, request_of: Any) -> None:
    a, b = np.array([[1, 2], [2**40, -4]], np.int64), np.array([[0.5, -9.0], [0.0, 1e300]])
    response = prediction.Predict(request_of("text", "add", a=a, b=b))
    outputs = {name: api.tf.make_ndarray(proto) for name, proto in response.outputs.items()}
    np.testing.assert_array_equal(outputs["sum"], a + b)
    np.testing.assert_array_equal(outputs["positive"], a + b > 0)
    np.testing.assert_array_equal(outputs["a"], a)
    assert (outputs["count"].shape, outputs["count"].item(), outputs["count"].dtype) == ((), 4, np.int32)


@pytest.mark.parametrize("value", [b"scalar\0", [[b"a", b"\xff"], [b"", b"d"]], np.empty((0, 3), object)])
def test_strings_of_any_rank_come_back_byte_for_byte(
    api: Any, prediction: Any, request_of: Any, value: Any
) -> None:
    proto = api.tf.make_tensor_proto(value, dtype=api.tf.string)
    response = prediction.Predict(request_of("text", "echo", raw=proto))
    got = api.tf.make_ndarray(response.outputs["raw_bytes"])
    np.testing.assert_array_equal(got, api.tf.make_ndarray(proto))
    assert got.shape == np.shape(value)


def test_the_signatures_shape_is_not_enforced(api: Any, prediction: Any, request_of: Any) -> None:
    for value in (np.float32(2), np.ones((2, 3), np.float32), np.empty((0,), np.float32)):
        response = prediction.Predict(request_of("half_plus_two", x=value))
        got = api.tf.make_ndarray(response.outputs["y"])
        np.testing.assert_array_equal(got, value / 2 + 2)
        assert got.shape == value.shape


def test_a_scalar_signature(api: Any, prediction: Any, request_of: Any) -> None:
    response = prediction.Predict(request_of("text", "scalar", x=np.float32(1.5)))
    assert api.tf.make_ndarray(response.outputs["y"]).shape == ()
    assert list(response.outputs["y"].float_val) == [3.0]


def test_an_input_with_a_default_may_be_left_out(prediction: Any, request_of: Any, failure: Any) -> None:
    response = prediction.Predict(request_of("defaults", x=[1.0, 2.0]))
    assert list(response.outputs["y"].float_val) == [3.0, 6.0]
    response = prediction.Predict(request_of("defaults", x=[1.0, 2.0], factor=np.float32(5)))
    assert list(response.outputs["y"].float_val) == [5.0, 10.0]
    assert failure(lambda: prediction.Predict(request_of("defaults", factor=np.float32(5)))) == (
        "INVALID_ARGUMENT",
        "Signature input alias: x(feed name: x:0) not found in request and no default value provided. "
        "Inputs expected to be in the request {factor}, or default input alias set: factor",
    )


def test_tensor_content_and_a_repeated_last_value_are_read(
    api: Any, prediction: Any, request_of: Any
) -> None:
    def divide(proto: Any) -> list[float]:
        return list(prediction.Predict(request_of("text", "divide", x=proto)).outputs["y"].float_val)

    proto = api.tf.make_tensor_proto(np.array([1, 2, 4], np.float32))
    assert proto.tensor_content
    assert divide(proto) == [1.0, 0.5, 0.25]
    proto = api.tf.make_tensor_proto([2.0], shape=[3])
    assert len(proto.float_val) == 1
    assert divide(proto) == [0.5, 0.5, 0.5]
    proto.float_val.insert(0, 4.0)
    assert divide(proto) == [0.25, 0.5, 0.5]
    strings = api.TensorProto(dtype=api.tf.string.as_datatype_enum, string_val=[b"abc"])
    strings.tensor_shape.dim.add(size=3)
    response = prediction.Predict(request_of("text", text=strings))
    assert list(response.outputs["length"].int_val) == [3, 3, 3]


@pytest.mark.better("no more than asked")
def test_more_values_than_the_shape_has_are_refused(
    api: Any, prediction: Any, request_of: Any, failure: Any
) -> None:
    proto = api.TensorProto(dtype=api.tf.float32.as_datatype_enum, float_val=[1, 2, 3])
    proto.tensor_shape.dim.add(size=2)
    assert failure(lambda: prediction.Predict(request_of("half_plus_two", x=proto))) == (
        "INVALID_ARGUMENT",
        "tensor parsing error: x",
    )


def test_output_filter(prediction: Any, request_of: Any) -> None:
    request = request_of("text", "echo", raw=[b"A"])
    request.output_filter.extend(["again", "text"])
    assert set(prediction.Predict(request).outputs) == {"again", "text"}


def test_a_message_beyond_grpcs_usual_4_mib(prediction: Any, request_of: Any) -> None:
    response = prediction.Predict(request_of("text", text=[b"x" * (6 << 20)]))
    assert list(response.outputs["length"].int_val) == [6 << 20]


@pytest.mark.parametrize(
    ("signature", "inputs", "code", "message"),
    [
        ("bad", {"text": [b"a"]}, "FAILED_PRECONDITION", 'Serving signature key "bad" not found.'),
        (
            "",
            {},
            "INVALID_ARGUMENT",
            "input size does not match signature: 0!=1 len({}) != len({text}). Sent extra: {}. "
            "Missing but required: {text}.",
        ),
        (
            "",
            {"text": [b"a"], "zzz": [1]},
            "INVALID_ARGUMENT",
            "input size does not match signature: 2!=1 len({text,zzz}) != len({text}). Sent extra: {zzz}. "
            "Missing but required: {}.",
        ),
        (
            "text",
            {"txet": [b"a"]},
            "INVALID_ARGUMENT",
            "Signature input alias: text(feed name: text_text:0) not found in request and no default value "
            "provided. Inputs expected to be in the request {txet}, or default input alias set: ",
        ),
        ("", {"text": [1.5]}, "INVALID_ARGUMENT", "Expects arg[0] to be string but float is provided"),
    ],
)
def test_bad_requests(
    prediction: Any,
    request_of: Any,
    failure: Any,
    signature: str,
    inputs: dict[str, Any],
    code: str,
    message: str,
) -> None:
    assert failure(lambda: prediction.Predict(request_of("text", signature, **inputs))) == (code, message)


def test_unknown_models_versions_and_labels(api: Any, prediction: Any, request_of: Any, failure: Any) -> None:
    def predict(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        return lambda: prediction.Predict(request_of(*args, **kwargs))

    assert failure(predict("nope")) == ("NOT_FOUND", "Servable not found for request: Latest(nope)")
    assert failure(predict("text", version=77)) == (
        "NOT_FOUND",
        "Servable not found for request: Specific(text, 77)",
    )
    assert failure(predict("text", label="stable", text=[b"a"])) == (
        "INVALID_ARGUMENT",
        "Unrecognized servable version label: stable",
    )
    assert failure(lambda: prediction.Predict(api.PredictRequest())) == (
        "INVALID_ARGUMENT",
        "Missing ModelSpec",
    )
    assert failure(predict("")) == ("INVALID_ARGUMENT", "ModelSpec has no name specified.")


def test_bad_output_filters_and_tensors(api: Any, prediction: Any, request_of: Any, failure: Any) -> None:
    request = request_of("text", text=[b"a"])
    request.output_filter.append("zz")
    assert failure(lambda: prediction.Predict(request)) == (
        "INVALID_ARGUMENT",
        "output tensor alias not found in signature: zz Outputs expected to be in the set {length}.",
    )
    request.output_filter[:] = ["length", "length"]
    assert failure(lambda: prediction.Predict(request)) == (
        "INVALID_ARGUMENT",
        "duplicate output tensor alias: length",
    )
    proto = api.TensorProto(dtype=api.tf.float32.as_datatype_enum, tensor_content=b"abc")
    proto.tensor_shape.dim.add(size=2)
    assert failure(lambda: prediction.Predict(request_of("text", "divide", x=proto))) == (
        "INVALID_ARGUMENT",
        "tensor parsing error: x",
    )


def test_a_wrong_inner_dimension_is_tensorflows_own_error(
    prediction: Any, request_of: Any, failure: Any
) -> None:
    wide = np.ones((1, 3), np.float32)
    code, message = failure(lambda: prediction.Predict(request_of("text", "project", x=wide)))
    assert code == "INVALID_ARGUMENT"
    assert "[1,3]" in message
    assert "MatMul" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"garbage that is no image", "Unknown image file format."),
        (b"", "Input is empty."),
        (b"\xff\xd8\xff\xe0 JPEG in its first bytes alone", "Invalid JPEG data or crop window."),
    ],
)
def test_images_that_cannot_be_decoded(
    prediction: Any, request_of: Any, failure: Any, content: bytes, message: str
) -> None:
    code, got = failure(
        lambda: prediction.Predict(request_of("text", "decode", image_bytes=[content]), timeout=30)
    )
    assert code == "INVALID_ARGUMENT"
    assert message in got


def test_the_models_own_errors_pass_through_and_long_ones_are_cut(
    prediction: Any, request_of: Any, failure: Any
) -> None:
    code, message = failure(
        lambda: prediction.Predict(request_of("text", "fail", message=np.array(b"1234" * 3, object)))
    )
    assert code == "INVALID_ARGUMENT"
    assert "[3]" in message
    code, message = failure(lambda: prediction.Predict(request_of("text", "n" * 3000, text=[b"a"])))
    assert code == "FAILED_PRECONDITION"
    assert len(message) == 1024 + len("...TRUNCATED")
    assert message.endswith("nnn...TRUNCATED")


@pytest.mark.better("any request")
def test_an_error_that_is_not_text_arrives(prediction: Any, request_of: Any, failure: Any) -> None:
    for content in (b"\xff\xfe\0", b"\xe6\x97\xa5" * 2000):
        message = np.array(content, object)
        code, _ = failure(
            lambda message=message: prediction.Predict(request_of("text", "complain", message=message))
        )
        assert code == "INVALID_ARGUMENT"


def test_the_deadline_ends_the_run_in_the_model(prediction: Any, request_of: Any, failure: Any) -> None:
    began_s = time.monotonic()
    endless = request_of("text", "spin", rounds=np.int32(2**31 - 1))
    code, _ = failure(lambda: prediction.Predict(endless, timeout=0.3))
    assert code == "DEADLINE_EXCEEDED"
    assert time.monotonic() - began_s < 5
    # The thread is free again: all of them would be needed if it were not.
    assert list(prediction.Predict(request_of("text", text=[b"a"])).outputs["length"].int_val) == [1]


def test_metrics_count_calls_under_the_real_servers_names(
    prediction: Any, request_of: Any, ask: Any, failure: Any, metrics: Callable[[], dict[str, float]]
) -> None:
    before = metrics()
    for _ in range(3):
        prediction.Predict(request_of("half_plus_two", x=[1.0]))
    failure(lambda: prediction.Predict(request_of("half_plus_two", x=[1])))
    ask("/v1/models/half_plus_two:predict", {"instances": [1]})
    after = metrics()

    def grown(name: str, labels: str) -> float:
        (series,) = {series for series in after if same_series(series, f":tensorflow:serving:{name}{labels}")}
        return after[series] - before.get(series, 0)

    model = 'model_name="half_plus_two"'
    assert grown("request_count", f'{{{model},status="OK"}}') == 4
    assert grown("request_count", f'{{{model},status="INVALID_ARGUMENT"}}') == 1
    labels = f'API="Predict",entrypoint="GRPC",{model}'
    assert grown("request_latency_count", f"{{{labels}}}") == 3
    assert 0 < grown("request_latency_sum", f"{{{labels}}}") < 60e6
    assert grown("request_latency_bucket", f'{{API="Predict",entrypoint="GRPC",le="+Inf",{model}}}') == 3
    assert grown("request_latency_count", f'{{API="Predict",entrypoint="REST",{model}}}') == 1
    assert grown("runtime_latency_count", f'{{API="Predict",{model},runtime="TF1"}}') == 4
    loads = [
        series
        for series in after
        if series.startswith(":tensorflow:cc:saved_model:load_attempt_count{") and "half_plus_two" in series
    ]
    assert [after[series] for series in loads if 'status="success"' in series] == [1]


def same_series(one: str, other: str) -> bool:
    """Whether they are one series, in whatever order the labels stand."""

    def parts(series: str) -> tuple[str, list[str]]:
        name, _, labels = series.rstrip("}").partition("{")
        return name, sorted(labels.split(","))

    return parts(one) == parts(other)


@pytest.mark.better("known names only")
def test_names_of_no_model_share_one_series(
    prediction: Any, request_of: Any, failure: Any, metrics: Callable[[], dict[str, float]]
) -> None:
    series = ':tensorflow:serving:request_count{model_name="(unknown)",status="NOT_FOUND"}'
    before = metrics()
    for name in ("x", "y", "z"):
        failure(lambda name=name: prediction.Predict(request_of(name, x=[1.0])))
    after = metrics()
    assert after[series] - before.get(series, 0) == 3
    assert not [name for name in after if 'model_name="x"' in name]


@pytest.mark.better("model state metric")
def test_a_versions_state_is_a_metric(metrics: Callable[[], dict[str, float]]) -> None:
    got = metrics()
    assert got['graftserve_model_state{model_name="text",state="AVAILABLE",version="3"}'] == 1
    assert got['graftserve_model_state{model_name="text",state="END",version="3"}'] == 0
