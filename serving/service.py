"""The APIs' methods on arrays, messages and our errors; neither gRPC nor HTTP.

Source: tensorflow_serving/model_servers/{prediction_service_impl,model_service_impl,get_model_status_impl,
server_core}.cc and tensorflow_serving/servables/tensorflow/{predict_impl,get_model_metadata_impl,
classification_service,regression_service,multi_inference_helper}.cc.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from graftserve.client import wire

from .config import model_settings
from .core import ServerCore
from .errors import Code, ServingError
from .inference import classify, multi_inference, regress
from .manager import AspiredVersionsManager, Handle, ServableState
from .metrics import Call
from .predict import InputReader, predict
from .servable import Array, ServableId

__all__ = ["Answer", "ModelServiceImpl", "ModelSpec", "PredictionServiceImpl"]

ResultT = TypeVar("ResultT")

_VALID = "valid"  # the model contract's output that says which rows are images


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and which version of it, a request means. No version and no label: the highest."""

    name: str
    version: int | None = None
    version_label: str | None = None
    signature_name: str = ""


@dataclass(frozen=True)
class Answer(Generic[ResultT]):
    """id: the version that answered. signature_name: what it answered with; empty for several at once."""

    id: ServableId
    signature_name: str
    result: ResultT


class PredictionServiceImpl:
    """Predict, Classify, Regress, MultiInference and GetModelMetadata. Thread-safe.

    Each takes `spec`, which is None if the request has none; `deadline_s`, when the answer is of no more use,
    on time.monotonic's clock (a request past it is not computed); and `call`, which is filled in as things
    become known. Each raises ServingError.

    check_method_names: whether Classify and Regress want signatures made for them.
    """

    def __init__(
        self, core: ServerCore, manager: AspiredVersionsManager, *, check_method_names: bool = False
    ) -> None:
        self._core = core
        self._manager = manager
        self._check_method_names = check_method_names

    def predict(
        self,
        call: Call,
        spec: ModelSpec | None,
        read_inputs: InputReader,
        output_filter: Sequence[str] = (),
        deadline_s: float | None = None,
    ) -> Answer[dict[str, Array]]:
        """The named outputs, or all of them."""

        def run(handle: Handle, timeout_s: float | None) -> tuple[str, dict[str, Array]]:
            name = spec.signature_name if spec is not None else ""
            name, outputs = predict(handle.servable, name, read_inputs, output_filter, timeout_s)
            call.rows = _rows(outputs.values())
            valid = outputs.get(_VALID)
            if valid is not None and valid.dtype == np.bool_:
                call.valid_rows = int(np.count_nonzero(valid))
                call.invalid_rows = valid.size - call.valid_rows
            return name, outputs

        return self._answer(call, spec, deadline_s, run)

    def classify(
        self, call: Call, spec: ModelSpec | None, given: wire.Input, deadline_s: float | None = None
    ) -> Answer[wire.ClassificationResult]:
        """Classes with scores for each tf.Example."""

        def run(handle: Handle, timeout_s: float | None) -> tuple[str, wire.ClassificationResult]:
            name = spec.signature_name if spec is not None else ""
            name, result = classify(
                *(handle.servable, name, given),
                check_method_name=self._check_method_names,
                timeout_s=timeout_s,
            )
            call.rows = call.examples = len(result.classifications)
            return name, result

        return self._answer(call, spec, deadline_s, run)

    def regress(
        self, call: Call, spec: ModelSpec | None, given: wire.Input, deadline_s: float | None = None
    ) -> Answer[wire.RegressionResult]:
        """A value for each tf.Example."""

        def run(handle: Handle, timeout_s: float | None) -> tuple[str, wire.RegressionResult]:
            name = spec.signature_name if spec is not None else ""
            name, result = regress(
                *(handle.servable, name, given),
                check_method_name=self._check_method_names,
                timeout_s=timeout_s,
            )
            call.rows = call.examples = len(result.regressions)
            return name, result

        return self._answer(call, spec, deadline_s, run)

    def multi_inference(
        self,
        call: Call,
        tasks: Sequence[tuple[ModelSpec | None, wire.InferenceTask]],
        given: wire.Input,
        deadline_s: float | None = None,
    ) -> Answer[Sequence[wire.InferenceResult]]:
        """Several classifications and regressions of the same tf.Examples, by one model."""
        if not tasks:
            raise ServingError(Code.INVALID_ARGUMENT, "Inference request has no tasks")

        def run(handle: Handle, timeout_s: float | None) -> tuple[str, Sequence[wire.InferenceResult]]:
            results = multi_inference(
                *(handle.servable, [task for _, task in tasks], given),
                check_method_name=self._check_method_names,
                timeout_s=timeout_s,
            )
            for result in results:
                result.model_spec.version.value = handle.id.version
            first = results[0]
            call.rows = call.examples = len(
                first.classification_result.classifications or first.regression_result.regressions
            )
            return "", results

        return self._answer(call, tasks[0][0], deadline_s, run)

    def get_model_metadata(
        self, call: Call, spec: ModelSpec | None, metadata_fields: Sequence[str]
    ) -> Answer[wire.SignatureDefMap]:
        """The signatures of the version meant."""
        if spec is None:
            raise _missing_spec()
        if not metadata_fields:
            raise ServingError(
                Code.INVALID_ARGUMENT, "GetModelMetadataRequest must specify at least one metadata_field"
            )
        for field in metadata_fields:
            if field != "signature_def":
                raise ServingError(Code.INVALID_ARGUMENT, f"Metadata field {field} is not supported")
        with self._handle(call, spec) as handle:
            return Answer(handle.id, "", handle.servable.signature_def_map)

    def _answer(
        self,
        call: Call,
        spec: ModelSpec | None,
        deadline_s: float | None,
        run: Callable[[Handle, float | None], tuple[str, ResultT]],
    ) -> Answer[ResultT]:
        with self._handle(call, spec) as handle:
            timeout_s = None
            if deadline_s is not None:
                timeout_s = deadline_s - time.monotonic()
                if timeout_s <= 0:
                    raise ServingError(
                        Code.DEADLINE_EXCEEDED, "Deadline exceeded before the request could run"
                    )
            call.run_at_s = time.perf_counter()
            signature_name, result = run(handle, timeout_s)
            call.runtime_s = time.perf_counter() - call.run_at_s
            call.signature_name = signature_name
            return Answer(handle.id, signature_name, result)

    def _handle(self, call: Call, spec: ModelSpec | None) -> Handle:
        if spec is None:
            raise _missing_spec()
        call.model_name = spec.name
        handle = self._manager.handle(*_resolve(self._core, spec))
        call.version = handle.id.version
        call.engine = handle.servable.engine
        return handle


class ModelServiceImpl:
    """GetModelStatus and HandleReloadConfigRequest. Thread-safe."""

    def __init__(self, core: ServerCore, manager: AspiredVersionsManager) -> None:
        self._core = core
        self._manager = manager

    def get_model_status(self, call: Call, spec: ModelSpec | None) -> list[ServableState]:
        """The states of the version meant, or of all versions, highest first. Raises ServingError."""
        if spec is None:
            raise _missing_spec()
        call.model_name = spec.name
        _, version = _resolve(self._core, spec)
        states = self._manager.states(spec.name)
        if version is not None:
            states = [state for state in states if state.id.version == version]
            if not states:
                raise ServingError(Code.NOT_FOUND, f"Could not find version {version} of model {spec.name}")
        if not states:
            raise ServingError(Code.NOT_FOUND, f"Could not find any versions of model {spec.name}")
        return states

    def reload(self, config: wire.ModelServerConfig, deadline_s: float | None = None) -> None:
        """Serve what `config` says instead; see `ServerCore.reload`. Raises ServingError."""
        if config.WhichOneof("config") != "model_config_list":
            raise ServingError(
                Code.INVALID_ARGUMENT,
                "ServerModelConfig type not supported by HandleReloadConfigRequest. Only ModelConfigList is "
                "currently supported",
            )
        self._core.reload(model_settings(config), deadline_s)


def _rows(outputs: Iterable[Array]) -> int | None:
    """What all outputs have as their first dimension."""
    sizes = {array.shape[:1] for array in outputs}
    return next(iter(sizes))[0] if len(sizes) == 1 and () not in sizes else None


def _resolve(core: ServerCore, spec: ModelSpec) -> tuple[str, int | None]:
    if not spec.name:
        raise ServingError(Code.INVALID_ARGUMENT, "ModelSpec has no name specified.")
    if spec.version_label is not None:
        return spec.name, core.resolve(spec.name, spec.version_label)
    return spec.name, spec.version


def _missing_spec() -> ServingError:
    return ServingError(Code.INVALID_ARGUMENT, "Missing ModelSpec")
