"""The APIs' methods on arrays and our errors; neither gRPC nor HTTP.

Source: tensorflow_serving/model_servers/{prediction_service_impl,get_model_status_impl,server_core}.cc and
tensorflow_serving/servables/tensorflow/{predict_impl,get_model_metadata_impl}.cc.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from graftserve.client.wire import SignatureDefMap

from .errors import Code, ServingError
from .manager import AspiredVersionsManager, ServableState
from .predict import InputReader, predict
from .servable import Array, ServableId

__all__ = ["ModelServiceImpl", "ModelSpec", "Prediction", "PredictionServiceImpl"]


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and which version of it, a request means. No version and no label: the highest."""

    name: str
    version: int | None = None
    version_label: str | None = None
    signature_name: str = ""


@dataclass(frozen=True)
class Prediction:
    """id: the version that answered."""

    id: ServableId
    signature_name: str
    outputs: dict[str, Array]


class PredictionServiceImpl:
    """Predict and GetModelMetadata. Thread-safe."""

    def __init__(self, manager: AspiredVersionsManager) -> None:
        self._manager = manager

    def predict(
        self,
        spec: ModelSpec | None,
        read_inputs: InputReader,
        output_filter: Sequence[str] = (),
        deadline_s: float | None = None,
    ) -> Prediction:
        """Run one request.

        spec: None if the request has none.
        deadline_s: when the answer is of no more use, on time.monotonic's clock; a request that is past it
            is not computed.
        Raises ServingError.
        """
        name, version = _resolve(spec)
        with self._manager.handle(name, version) as handle:
            timeout_s = None
            if deadline_s is not None:
                timeout_s = deadline_s - time.monotonic()
                if timeout_s <= 0:
                    raise ServingError(
                        Code.DEADLINE_EXCEEDED, "Deadline exceeded before the request could run"
                    )
            signature_name = spec.signature_name if spec is not None else ""
            signature_name, outputs = predict(
                handle.servable, signature_name, read_inputs, output_filter, timeout_s
            )
            return Prediction(handle.id, signature_name, outputs)

    def get_model_metadata(
        self, spec: ModelSpec | None, metadata_fields: Sequence[str]
    ) -> tuple[ServableId, SignatureDefMap]:
        """The version meant and its signatures. Raises ServingError."""
        if spec is None:
            raise _missing_spec()
        if not metadata_fields:
            raise ServingError(
                Code.INVALID_ARGUMENT, "GetModelMetadataRequest must specify at least one metadata_field"
            )
        for field in metadata_fields:
            if field != "signature_def":
                raise ServingError(Code.INVALID_ARGUMENT, f"Metadata field {field} is not supported")
        with self._manager.handle(*_resolve(spec)) as handle:
            return handle.id, handle.servable.signature_def_map


class ModelServiceImpl:
    """GetModelStatus. Thread-safe."""

    def __init__(self, manager: AspiredVersionsManager) -> None:
        self._manager = manager

    def get_model_status(self, spec: ModelSpec | None) -> list[ServableState]:
        """The states of the version meant, or of all versions, highest first. Raises ServingError."""
        if spec is None:
            raise _missing_spec()
        states = self._manager.states(spec.name)
        if spec.version is not None:
            states = [state for state in states if state.id.version == spec.version]
            if not states:
                raise ServingError(
                    Code.NOT_FOUND, f"Could not find version {spec.version} of model {spec.name}"
                )
        if not states:
            raise ServingError(Code.NOT_FOUND, f"Could not find any versions of model {spec.name}")
        return states


def _resolve(spec: ModelSpec | None) -> tuple[str, int | None]:
    if spec is None:
        raise _missing_spec()
    if not spec.name:
        raise ServingError(Code.INVALID_ARGUMENT, "ModelSpec has no name specified.")
    if spec.version_label is not None:
        # There is no way to set a label, so every one of them is unknown.
        raise ServingError(
            Code.INVALID_ARGUMENT, f"Unrecognized servable version label: {spec.version_label}"
        )
    return spec.name, spec.version


def _missing_spec() -> ServingError:
    return ServingError(Code.INVALID_ARGUMENT, "Missing ModelSpec")
