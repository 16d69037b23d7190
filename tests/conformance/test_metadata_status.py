"""Metadata, states of versions, and health, over gRPC and REST."""

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

Ask = Callable[..., tuple[int, Any]]


def test_metadata(api: Any, prediction: Any, failure: Any) -> None:
    request = api.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = "text"
    response = prediction.GetModelMetadata(request)
    assert (response.model_spec.name, response.model_spec.version.value) == ("text", 3)
    signatures = api.SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(signatures)
    signature = signatures.signature_def["add"]
    assert signature.method_name == "tensorflow/serving/predict"
    assert signature.inputs["a"].dtype == api.tf.int64.as_datatype_enum
    assert [dim.size for dim in signature.inputs["a"].tensor_shape.dim] == [-1, 2]

    def refused() -> tuple[str, str]:
        return failure(lambda: prediction.GetModelMetadata(request))  # type: ignore[no-any-return]

    request.metadata_field[:] = ["zzz"]
    assert refused() == ("INVALID_ARGUMENT", "Metadata field zzz is not supported")
    request.metadata_field[:] = []
    assert refused() == (
        "INVALID_ARGUMENT",
        "GetModelMetadataRequest must specify at least one metadata_field",
    )
    request.metadata_field[:] = ["signature_def"]
    request.model_spec.name = "nope"
    assert refused() == ("NOT_FOUND", "Servable not found for request: Latest(nope)")
    assert failure(lambda: prediction.GetModelMetadata(api.GetModelMetadataRequest())) == (
        "INVALID_ARGUMENT",
        "Missing ModelSpec",
    )


def test_metadata_keeps_defaults_and_every_dtype(api: Any, prediction: Any) -> None:
    def signatures_of(model: str) -> Any:
        request = api.GetModelMetadataRequest(metadata_field=["signature_def"])
        request.model_spec.name = model
        signatures = api.SignatureDefMap()
        assert prediction.GetModelMetadata(request).metadata["signature_def"].Unpack(signatures)
        return signatures.signature_def

    defaults = signatures_of("defaults")["serving_default"].defaults
    assert api.tf.make_ndarray(defaults["factor"]) == 3
    for name, signature in signatures_of("dtypes").items():
        assert api.tf.as_dtype(signature.inputs["x"].dtype).name == name
        assert signature.inputs["x"].tensor_shape.unknown_rank


def test_status(api: Any, model_service: Any, failure: Any) -> None:
    request = api.GetModelStatusRequest()
    assert failure(lambda: model_service.GetModelStatus(request)) == ("INVALID_ARGUMENT", "Missing ModelSpec")
    request.model_spec.name = "text"
    (state,) = model_service.GetModelStatus(request).model_version_status
    assert (state.version, state.state, state.status.error_code) == (3, state.AVAILABLE, 0)
    request.model_spec.version.value = 9
    assert failure(lambda: model_service.GetModelStatus(request)) == (
        "NOT_FOUND",
        "Could not find version 9 of model text",
    )
    request.model_spec.Clear()
    request.model_spec.name = "nope"
    assert failure(lambda: model_service.GetModelStatus(request)) == (
        "NOT_FOUND",
        "Could not find any versions of model nope",
    )


def test_status_and_metadata_over_rest(ask: Ask) -> None:
    state = {"version": "3", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    assert ask("/v1/models/text") == (200, {"model_version_status": [state]})
    assert ask("/v1/models/text/versions/3") == (200, {"model_version_status": [state]})
    assert ask("/V1/MODELS/text/Versions/3") == (200, {"model_version_status": [state]})
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
    assert ask("/v1/models/text/versions/3/metadata") == (200, answer)
    assert ask("/v1/models/text/versions/4/metadata") == (
        404,
        {"error": "Servable not found for request: Specific(text, 4)"},
    )


@pytest.mark.parametrize("service", ["", "ModelService", "PredictionService"])
def test_health_has_the_servers_and_its_services_names(channel: grpc.Channel, service: str) -> None:
    request = health_pb2.HealthCheckRequest(service=service)
    response = health_pb2_grpc.HealthStub(channel).Check(request, timeout=10)
    assert response.status == health_pb2.HealthCheckResponse.SERVING


def test_health_knows_no_other_names(channel: grpc.Channel, failure: Any) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service="other")
    assert failure(lambda: stub.Check(request, timeout=10))[0] == "NOT_FOUND"


@pytest.mark.better("model health")
def test_health_knows_each_model(channel: grpc.Channel) -> None:
    request = health_pb2.HealthCheckRequest(service="text")
    response = health_pb2_grpc.HealthStub(channel).Check(request, timeout=10)
    assert response.status == health_pb2.HealthCheckResponse.SERVING
