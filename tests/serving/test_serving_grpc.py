"""The gRPC API, asked by TensorFlow Serving's own messages and stubs."""

import time
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

from graftserve.serving.app import Server
from graftserve.serving.errors import Code
from graftserve.serving.grpc_api import _STATUS


@pytest.fixture(scope="module")
def apis() -> Any:
    """TensorFlow Serving's modules, by name. Imported late: they bring TensorFlow with them."""
    from types import SimpleNamespace

    import tensorflow as tf
    from tensorflow.core.framework import tensor_pb2
    from tensorflow_serving.apis import (
        get_model_metadata_pb2,
        get_model_status_pb2,
        model_service_pb2_grpc,
        predict_pb2,
        prediction_service_pb2_grpc,
    )

    return SimpleNamespace(
        tf=tf,
        TensorProto=tensor_pb2.TensorProto,
        PredictRequest=predict_pb2.PredictRequest,
        MetadataRequest=get_model_metadata_pb2.GetModelMetadataRequest,
        SignatureDefMap=get_model_metadata_pb2.SignatureDefMap,
        StatusRequest=get_model_status_pb2.GetModelStatusRequest,
        PredictionStub=prediction_service_pb2_grpc.PredictionServiceStub,
        ModelStub=model_service_pb2_grpc.ModelServiceStub,
    )


@pytest.fixture
def stub(apis: Any, many_server: Server, channel_to: Callable[[Server], grpc.Channel]) -> Any:
    return apis.PredictionStub(channel_to(many_server))


@pytest.fixture
def model_stub(apis: Any, many_server: Server, channel_to: Callable[[Server], grpc.Channel]) -> Any:
    return apis.ModelStub(channel_to(many_server))


@pytest.fixture
def request_of(apis: Any) -> Callable[..., Any]:
    def make(signature: str = "", /, name: str = "text", version: int | None = None, **inputs: Any) -> Any:
        request = apis.PredictRequest()
        request.model_spec.name = name
        request.model_spec.signature_name = signature
        if version is not None:
            request.model_spec.version.value = version
        for key, value in inputs.items():
            proto = value if isinstance(value, apis.TensorProto) else apis.tf.make_tensor_proto(value)
            request.inputs[key].CopyFrom(proto)
        return request

    return make


def status_of(call: Callable[[], Any]) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code().name, caught.value.details()


def test_the_answer_names_the_version_and_the_signature(stub: Any, request_of: Any) -> None:
    response = stub.Predict(request_of(text=[b"a\0b", b""]))
    assert list(response.outputs["length"].int_val) == [3, 0]  # typed fields, as there
    assert response.model_spec.name == "text"
    assert response.model_spec.version.value == 3
    assert response.model_spec.signature_name == "serving_default"
    assert stub.Predict(request_of("text", text=[b"a"], version=3)).model_spec.signature_name == "text"


def test_dtypes_and_shapes_survive(apis: Any, stub: Any, request_of: Any) -> None:
    a, b = np.array([[1, 2], [2**40, -4]], np.int64), np.array([[0.5, -9.0], [0.0, 1e300]])
    response = stub.Predict(request_of("add", a=a, b=b))
    outputs = {name: apis.tf.make_ndarray(proto) for name, proto in response.outputs.items()}
    np.testing.assert_array_equal(outputs["sum"], a + b)
    np.testing.assert_array_equal(outputs["positive"], a + b > 0)
    np.testing.assert_array_equal(outputs["a"], a)
    assert (outputs["count"].shape, outputs["count"].item(), outputs["count"].dtype) == ((), 4, np.int32)


@pytest.mark.parametrize("value", [b"scalar\0", [[b"a", b"\xff"], [b"", b"d"]], np.empty((0, 3), object)])
def test_strings_of_any_rank_come_back_byte_for_byte(
    apis: Any, stub: Any, request_of: Any, value: Any
) -> None:
    proto = apis.tf.make_tensor_proto(value, dtype=apis.tf.string)
    response = stub.Predict(request_of("echo", raw=proto))
    got = apis.tf.make_ndarray(response.outputs["raw_bytes"])
    np.testing.assert_array_equal(got, apis.tf.make_ndarray(proto))
    assert got.shape == np.shape(value)


def test_tensor_content_and_a_repeated_last_value_are_read(apis: Any, stub: Any, request_of: Any) -> None:
    proto = apis.tf.make_tensor_proto(np.array([1, 2, 4], np.float32))
    assert proto.tensor_content
    assert list(stub.Predict(request_of("divide", x=proto)).outputs["y"].float_val) == [1.0, 0.5, 0.25]
    proto = apis.tf.make_tensor_proto([2.0], shape=[3])
    assert len(proto.float_val) == 1
    assert list(stub.Predict(request_of("divide", x=proto)).outputs["y"].float_val) == [0.5, 0.5, 0.5]


def test_output_filter(stub: Any, request_of: Any) -> None:
    request = request_of("echo", raw=[b"A"])
    request.output_filter.extend(["again", "text"])
    assert set(stub.Predict(request).outputs) == {"again", "text"}


def test_a_message_beyond_grpcs_usual_4_mib(stub: Any, request_of: Any) -> None:
    response = stub.Predict(request_of(text=[b"x" * (6 << 20)]))
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
def test_bad_requests_get_the_real_servers_words(
    stub: Any, request_of: Any, signature: str, inputs: dict[str, Any], code: str, message: str
) -> None:
    assert status_of(lambda: stub.Predict(request_of(signature, **inputs))) == (code, message)


def test_unknown_models_versions_and_labels(apis: Any, stub: Any, request_of: Any) -> None:
    assert status_of(lambda: stub.Predict(request_of(name="nope"))) == (
        "NOT_FOUND",
        "Servable not found for request: Latest(nope)",
    )
    assert status_of(lambda: stub.Predict(request_of(version=77))) == (
        "NOT_FOUND",
        "Servable not found for request: Specific(text, 77)",
    )
    request = request_of(text=[b"a"])
    request.model_spec.version_label = "stable"
    assert status_of(lambda: stub.Predict(request)) == (
        "INVALID_ARGUMENT",
        "Unrecognized servable version label: stable",
    )
    assert status_of(lambda: stub.Predict(apis.PredictRequest())) == ("INVALID_ARGUMENT", "Missing ModelSpec")
    assert status_of(lambda: stub.Predict(request_of(name=""))) == (
        "INVALID_ARGUMENT",
        "ModelSpec has no name specified.",
    )


def test_bad_output_filters_and_tensors(apis: Any, stub: Any, request_of: Any) -> None:
    request = request_of(text=[b"a"])
    request.output_filter.append("zz")
    assert status_of(lambda: stub.Predict(request)) == (
        "INVALID_ARGUMENT",
        "output tensor alias not found in signature: zz Outputs expected to be in the set {length}.",
    )
    request.output_filter[:] = ["length", "length"]
    assert status_of(lambda: stub.Predict(request)) == (
        "INVALID_ARGUMENT",
        "duplicate output tensor alias: length",
    )
    proto = apis.TensorProto(dtype=apis.tf.float32.as_datatype_enum, tensor_content=b"abc")
    proto.tensor_shape.dim.add(size=2)
    assert status_of(lambda: stub.Predict(request_of("divide", x=proto))) == (
        "INVALID_ARGUMENT",
        "tensor parsing error: x",
    )


def test_the_models_own_errors_pass_through_and_long_ones_are_cut(stub: Any, request_of: Any) -> None:
    code, message = status_of(lambda: stub.Predict(request_of("fail", message=b"1234" * 3)))
    assert code == "INVALID_ARGUMENT"
    assert "[3]" in message
    code, message = status_of(lambda: stub.Predict(request_of("n" * 3000, text=[b"a"])))
    assert code == "FAILED_PRECONDITION"
    assert len(message) == 1024 + len("...TRUNCATED")
    assert message.endswith("nnn...TRUNCATED")


def test_metadata(apis: Any, stub: Any) -> None:
    request = apis.MetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = "text"
    response = stub.GetModelMetadata(request)
    assert (response.model_spec.name, response.model_spec.version.value) == ("text", 3)
    signatures = apis.SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(signatures)
    signature = signatures.signature_def["add"]
    assert signature.method_name == "tensorflow/serving/predict"
    assert signature.inputs["a"].dtype == apis.tf.int64.as_datatype_enum
    assert [dim.size for dim in signature.inputs["a"].tensor_shape.dim] == [-1, 2]

    request.metadata_field[:] = ["zzz"]
    assert status_of(lambda: stub.GetModelMetadata(request)) == (
        "INVALID_ARGUMENT",
        "Metadata field zzz is not supported",
    )
    request.metadata_field[:] = []
    assert status_of(lambda: stub.GetModelMetadata(request)) == (
        "INVALID_ARGUMENT",
        "GetModelMetadataRequest must specify at least one metadata_field",
    )
    assert status_of(lambda: stub.GetModelMetadata(apis.MetadataRequest())) == (
        "INVALID_ARGUMENT",
        "Missing ModelSpec",
    )


def test_status(apis: Any, model_stub: Any) -> None:
    request = apis.StatusRequest()
    assert status_of(lambda: model_stub.GetModelStatus(request)) == ("INVALID_ARGUMENT", "Missing ModelSpec")
    request.model_spec.name = "text"
    (state,) = model_stub.GetModelStatus(request).model_version_status
    assert (state.version, state.state, state.status.error_code) == (3, state.AVAILABLE, 0)
    request.model_spec.version.value = 9
    assert status_of(lambda: model_stub.GetModelStatus(request)) == (
        "NOT_FOUND",
        "Could not find version 9 of model text",
    )
    request.model_spec.Clear()
    request.model_spec.name = "nope"
    assert status_of(lambda: model_stub.GetModelStatus(request)) == (
        "NOT_FOUND",
        "Could not find any versions of model nope",
    )


def test_the_deadline_ends_the_run_in_the_model(stub: Any, request_of: Any) -> None:
    began_s = time.monotonic()
    code, _ = status_of(lambda: stub.Predict(request_of("spin", rounds=2**31 - 1), timeout=0.3))
    assert code == "DEADLINE_EXCEEDED"
    assert time.monotonic() - began_s < 5
    # The thread is free again: all of them would be needed if it were not.
    assert list(stub.Predict(request_of(text=[b"a"])).outputs["length"].int_val) == [1]


def test_every_code_has_a_grpc_status() -> None:
    assert set(_STATUS) == set(Code)
