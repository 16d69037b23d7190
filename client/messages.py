"""What a client says and how it reads the answers: messages in and out, no I/O, no clocks.

Every way of calling shares it, so they cannot differ in what they send, accept or raise.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import (
    ClientError,
    InternalError,
    InvalidArgumentError,
    InvalidImageError,
    ModelMismatchError,
)
from .results import (
    ModelMetadata,
    Prediction,
    PredictResult,
    Signature,
    TensorSpec,
    VersionState,
    VersionStatus,
)
from .wire import (
    Code,
    GetModelMetadataRequest,
    GetModelMetadataResponse,
    GetModelStatusRequest,
    GetModelStatusResponse,
    ModelSpec,
    ModelVersionStatus,
    PredictRequest,
    PredictResponse,
    SignatureDef,
    TensorInfo,
)
from .wire.contract import CLASSIFY_OUTPUTS, EMBED_OUTPUTS, IMAGE_BYTES
from .wire.methods import SIGNATURE_DEF_FIELD, unpack_signature_def_map
from .wire.tensors import TensorError, dtype_name, to_array, to_proto

__all__ = ["Messages", "version_line"]


class Messages:
    """Requests about one model at one target, and what their answers mean. Immutable.

    Every failure is a ClientError that names target and model.
    """

    def __init__(self, target: str, model: str, version: int | None, version_label: str | None) -> None:
        self._target = target
        self._model = model
        self._version = version
        self._version_label = version_label

    # Requests

    def image_request(
        self, signature: str, outputs: Sequence[str], images: Sequence[bytes]
    ) -> PredictRequest:
        """A Predict for encoded images, asking for `outputs` only."""
        request = PredictRequest(model_spec=self._spec(signature), output_filter=outputs)
        request.inputs[IMAGE_BYTES].CopyFrom(to_proto(images))
        return request

    def predict_request(
        self, inputs: Mapping[str, npt.ArrayLike], signature: str, outputs: Sequence[str] | None
    ) -> PredictRequest:
        """A Predict for any model. Raises InvalidArgumentError for inputs that cannot be encoded."""
        request = PredictRequest(model_spec=self._spec(signature), output_filter=outputs or ())
        for name, value in inputs.items():
            try:
                request.inputs[name].CopyFrom(to_proto(value))
            except TensorError as exc:
                raise InvalidArgumentError(
                    f"input {name!r}: {exc}", target=self._target, model=self._model
                ) from exc
        return request

    def status_request(self) -> GetModelStatusRequest:
        """Asks for the state of the version meant, or of all."""
        request = GetModelStatusRequest(model_spec=ModelSpec(name=self._model))
        if self._version is not None:
            request.model_spec.version.value = self._version
        return request

    def metadata_request(self) -> GetModelMetadataRequest:
        """Asks for the signatures of the version that would answer."""
        return GetModelMetadataRequest(model_spec=self._spec(), metadata_field=[SIGNATURE_DEF_FIELD])

    def check_images(self, images: Iterable[Any]) -> None:
        """Raise InvalidArgumentError for what was meant as one image, which an iteration would take apart."""
        if isinstance(images, (bytes, bytearray, memoryview, str)) or not isinstance(images, Iterable):
            got = f"one {type(images).__name__}"
        elif isinstance(images, np.ndarray) and images.ndim < 3:
            got = f"one array {list(images.shape)}"
        elif isinstance(images, np.ndarray) and images.ndim == 3 and images.shape[2] in (1, 3):
            got = f"an array {list(images.shape)} that may be one image"
        else:
            return
        raise InvalidArgumentError(
            f"expected an iterable of images, got {got}: put a single image into a list",
            target=self._target,
            model=self._model,
        )

    # Answers

    def predictions(self, response: PredictResponse, count: int) -> list[Prediction | None]:
        """One per row; None where the image did not decode."""
        classes, scores, valid = self._outputs(response, CLASSIFY_OUTPUTS, count)
        if classes.ndim != 2 or classes.shape != scores.shape or not classes.shape[1]:
            raise self._mismatch(
                f"expected classes and scores of one shape [N, K], got {list(classes.shape)} and "
                f"{list(scores.shape)}"
            )
        if classes.dtype != object or scores.dtype.kind != "f":
            raise self._mismatch(
                f"expected classes of string and scores of float32, got {classes.dtype} and {scores.dtype}"
            )
        version = response.model_spec.version.value
        predictions: list[Prediction | None] = []
        rows = zip(classes.tolist(), scores.tolist(), valid.tolist(), strict=True)
        for row_classes, row_scores, row_valid in rows:
            if row_valid:
                top = tuple(
                    (label.decode("utf-8", "replace"), score)
                    for label, score in zip(row_classes, row_scores, strict=True)
                )
                predictions.append(Prediction(top[0][0], top[0][1], top, version))
            else:
                predictions.append(None)
        return predictions

    def features(
        self, response: PredictResponse, count: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Features float32 [count, D], and which rows of them are of images that decoded."""
        features, valid = self._outputs(response, EMBED_OUTPUTS, count)
        if features.ndim != 2 or features.dtype != np.float32:
            raise self._mismatch(
                f"expected features of float32 [N, D], got {features.dtype} {list(features.shape)}"
            )
        return features, valid

    def predict_result(self, response: PredictResponse) -> PredictResult:
        """All outputs as arrays."""
        return PredictResult(
            {name: self._array(response, name) for name in response.outputs},
            response.model_spec.version.value,
        )

    def versions(self, response: GetModelStatusResponse) -> tuple[VersionStatus, ...]:
        """The states, latest version first."""
        versions = [_version_status(item) for item in response.model_version_status]
        return tuple(sorted(versions, key=lambda item: item.version, reverse=True))

    def metadata(self, response: GetModelMetadataResponse) -> ModelMetadata:
        """The signatures of the version that answered."""
        try:
            signatures = unpack_signature_def_map(response.metadata[SIGNATURE_DEF_FIELD])
        except ValueError as exc:
            raise self._unreadable("metadata", exc) from exc
        return ModelMetadata(
            self._model,
            response.model_spec.version.value,
            {name: _signature(item) for name, item in signatures.signature_def.items()},
        )

    def undecodable(self, index: int | None = None) -> InvalidImageError:
        """The error for an image that the server could not decode; index: its place in the call."""
        which = "the image" if index is None else f"image {index}"
        return InvalidImageError(
            f"{which} cannot be decoded: expected a whole JPEG, PNG, GIF, BMP or WebP within the model's "
            "limits",
            target=self._target,
            model=self._model,
            indexes=() if index is None else (index,),
        )

    def mismatch(
        self, metadata: ModelMetadata, error: ClientError, signature: str, outputs: Sequence[str]
    ) -> ModelMismatchError | None:
        """What `error` comes down to if the model's signatures are not those of the contract; else None."""
        found = metadata.signatures.get(signature)
        if found is None:
            mismatch = self._mismatch(
                f"expected signature {signature}, got only {', '.join(sorted(metadata.signatures)) or 'none'}"
            )
        elif set(found.inputs) != {IMAGE_BYTES} or not set(outputs) <= set(found.outputs):
            mismatch = self._mismatch(
                f"expected signature {signature} with input {IMAGE_BYTES} and outputs {', '.join(outputs)}, "
                f"got inputs {', '.join(sorted(found.inputs)) or 'none'} and "
                f"outputs {', '.join(sorted(found.outputs)) or 'none'}"
            )
        else:
            return None
        mismatch.code, mismatch.details = error.code, error.details
        return mismatch

    def _spec(self, signature: str = "") -> ModelSpec:
        spec = ModelSpec(name=self._model, signature_name=signature)
        if self._version is not None:
            spec.version.value = self._version
        elif self._version_label is not None:
            spec.version_label = self._version_label
        return spec

    def _outputs(self, response: PredictResponse, names: Sequence[str], count: int) -> list[npt.NDArray[Any]]:
        missing = [name for name in names if name not in response.outputs]
        if missing:
            raise self._mismatch(
                f"expected outputs {', '.join(names)}, got {', '.join(sorted(response.outputs)) or 'none'}"
            )
        arrays = [self._array(response, name) for name in names]
        for name, array in zip(names, arrays, strict=True):
            if array.ndim < 1 or array.shape[0] != count:
                raise self._mismatch(
                    f"expected one row per image, {count}, got {name} of shape {list(array.shape)}"
                )
        return arrays

    def _array(self, response: PredictResponse, name: str) -> npt.NDArray[Any]:
        try:
            return to_array(response.outputs[name])
        except TensorError as exc:
            raise self._unreadable(f"output {name!r}", exc) from exc

    def _unreadable(self, what: str, error: ValueError) -> InternalError:
        return InternalError(
            f"{what} of model {self._model!r} at {self._target} cannot be read: {error}",
            target=self._target,
            model=self._model,
            details=str(error),
        )

    def _mismatch(self, message: str) -> ModelMismatchError:
        return ModelMismatchError(
            f"model {self._model!r} at {self._target}: {message}; predict() calls any model",
            target=self._target,
            model=self._model,
        )


def _version_status(item: ModelVersionStatus) -> VersionStatus:
    states = {number: name for name, number in ModelVersionStatus.State.items()}
    codes = {number: name for name, number in Code.items()}
    return VersionStatus(
        item.version,
        VersionState(states.get(item.state, "UNKNOWN")),
        codes.get(item.status.error_code, str(int(item.status.error_code))),
        item.status.error_message,
    )


def version_line(item: VersionStatus) -> str:
    """A version's state for a message."""
    line = f"version {item.version} is {item.state}"
    return line if item.error_code == "OK" else f"{line} ({item.error_code}: {item.error_message})"


def _signature(item: SignatureDef) -> Signature:
    return Signature(
        {name: _tensor_spec(info) for name, info in item.inputs.items()},
        {name: _tensor_spec(info) for name, info in item.outputs.items()},
    )


def _tensor_spec(info: TensorInfo) -> TensorSpec:
    shape = None
    if not info.tensor_shape.unknown_rank:
        shape = tuple(dim.size if dim.size >= 0 else None for dim in info.tensor_shape.dim)
    return TensorSpec(dtype_name(info.dtype), shape)
