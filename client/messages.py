"""What a client says and how it reads the answers: messages in and out, no I/O, no clocks.

Every way of calling shares it, so they cannot differ in what they send, accept or raise.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from .errors import (
    ClientError,
    FailedPreconditionError,
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
    DataType,
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
from .wire.encoding import Parts, predict_request, string_parts
from .wire.methods import SIGNATURE_DEF_FIELD, unpack_signature_def_map
from .wire.values import TensorError, bools, dtype_name, floats, strings

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Messages", "version_line"]

_STRING: Final = DataType.DT_STRING
_FLOAT_TYPES: Final = frozenset({DataType.DT_HALF, DataType.DT_FLOAT, DataType.DT_DOUBLE})


class Messages:
    """Requests about one model at one target, and what their answers mean. Immutable.

    Every failure is a ClientError that names target and model.
    """

    def __init__(self, target: str, model: str, version: int | None, version_label: str | None) -> None:
        self._target = target
        self._model = model
        self._version = version
        self._version_label = version_label

    # Requests, serialized

    def predict_header(self, signature: str, outputs: Sequence[str]) -> bytes:
        """A Predict without its inputs, asking for `outputs` only."""
        header = PredictRequest(model_spec=self._spec(signature), output_filter=outputs)
        return header.SerializeToString()

    def image_request(self, header: bytes, input_name: str, images: Sequence[bytes]) -> bytes:
        """A Predict for encoded images; header: of `predict_header`."""
        return self._predict_request(header, {input_name: string_parts(images)})

    def predict_request(
        self, inputs: "Mapping[str, npt.ArrayLike]", signature: str, outputs: Sequence[str]
    ) -> bytes:
        """A Predict for any model. Raises InvalidArgumentError for inputs that cannot be encoded."""
        from .wire.tensors import tensor_parts

        parts: dict[str, Parts] = {}
        for name, value in inputs.items():
            try:
                parts[name] = tensor_parts(value)
            except TensorError as exc:
                raise self._bad_input(name, exc) from exc
        return self._predict_request(self.predict_header(signature, outputs), parts)

    def arrays(self, inputs: "Mapping[str, npt.ArrayLike]") -> "dict[str, npt.NDArray[Any]]":
        """The inputs as arrays. Raises InvalidArgumentError for those that are none."""
        from .wire.tensors import as_array

        arrays = {}
        for name, value in inputs.items():
            try:
                arrays[name] = as_array(value)
            except TensorError as exc:
                raise self._bad_input(name, exc) from exc
        return arrays

    def status_request(self) -> bytes:
        """Asks for the state of the version meant, or of all."""
        request = GetModelStatusRequest(model_spec=ModelSpec(name=self._model))
        if self._version is not None:
            request.model_spec.version.value = self._version
        return request.SerializeToString()

    def metadata_request(self) -> bytes:
        """Asks for the signatures of the version that would answer."""
        request = GetModelMetadataRequest(model_spec=self._spec(), metadata_field=[SIGNATURE_DEF_FIELD])
        return request.SerializeToString()

    def check_images(self, images: Any) -> None:
        """Raise InvalidArgumentError for what was meant as one image, which an iteration would take apart."""
        dims = len(getattr(images, "shape", ()))
        if isinstance(images, (bytes, bytearray, memoryview, str)) or not (
            isinstance(images, Iterable) or hasattr(images, "__aiter__")
        ):
            got = f"one {type(images).__name__}"
        elif 0 < dims < 3:
            got = f"one array {list(images.shape)}"
        elif dims == 3 and images.shape[2] in (1, 3):
            got = f"an array {list(images.shape)} that may be one image"
        else:
            return
        raise InvalidArgumentError(
            f"expected an iterable of images, got {got}: put a single image into a list",
            target=self._target,
            model=self._model,
        )

    # Answers

    def predictions(
        self, response: PredictResponse, count: int, outputs: Sequence[str]
    ) -> list[Prediction | None]:
        """One per row; None where the image did not decode."""
        self._check_outputs(response, outputs)
        classes, scores = response.outputs["classes"], response.outputs["scores"]
        if classes.dtype != _STRING or scores.dtype not in _FLOAT_TYPES:
            raise self.not_fitting(
                f"expected classes of string and scores of float32, got {dtype_name(classes.dtype)} and "
                f"{dtype_name(scores.dtype)}"
            )
        try:
            labels, shape = strings(classes)
            values, scores_shape = floats(scores)
        except TensorError as exc:
            raise self._unreadable("the answer", exc) from exc
        self._check_rows("classes", shape, count)
        self._check_rows("scores", scores_shape, count)
        if len(shape) != 2 or shape != scores_shape or not shape[1]:
            raise self.not_fitting(
                f"expected classes and scores of one shape [N, K], got {list(shape)} and {list(scores_shape)}"
            )
        width = shape[1]
        version = response.model_spec.version.value
        predictions: list[Prediction | None] = []
        for row, valid in enumerate(self._valid(response, count, outputs)):
            if valid:
                begin, end = row * width, (row + 1) * width
                names = [label.decode("utf-8", "replace") for label in labels[begin:end]]
                top = tuple(zip(names, values[begin:end], strict=True))
                predictions.append(Prediction(top[0][0], top[0][1], top, version))
            else:
                predictions.append(None)
        return predictions

    def features(
        self, response: PredictResponse, count: int, outputs: Sequence[str]
    ) -> "list[npt.NDArray[np.float32] | None]":
        """A vector float32 [D] per row; None where the image did not decode."""
        self._check_outputs(response, outputs)
        features = self._array(response, "features")
        self._check_rows("features", features.shape, count)
        if features.ndim != 2 or features.dtype != "float32":
            raise self.not_fitting(
                f"expected features of float32 [N, D], got {features.dtype} {list(features.shape)}"
            )
        return [
            features[row] if valid else None
            for row, valid in enumerate(self._valid(response, count, outputs))
        ]

    def predict_result(self, response: PredictResponse) -> PredictResult:
        """All outputs as arrays, in the order of their names: a message has another in each process."""
        return PredictResult(
            {name: self._array(response, name) for name in sorted(response.outputs)},
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
            {name: _signature(item) for name, item in sorted(signatures.signature_def.items())},
        )

    def undecodable(self) -> InvalidImageError:
        """The error for an image that the server could not decode."""
        return InvalidImageError(
            "the image cannot be decoded: expected a whole JPEG, PNG, GIF, BMP or WebP within the model's "
            "limits",
            target=self._target,
            model=self._model,
        )

    def bad_image(self, error: ClientError) -> InvalidImageError:
        """The error for an image that was refused alone, by a model that says no more than that."""
        bad = InvalidImageError(
            f"the image was refused: {error.details}",
            code=error.code,
            target=self._target,
            model=self._model,
            details=error.details,
        )
        bad.__cause__ = error.__cause__
        return bad

    def not_fitting(self, message: str) -> ModelMismatchError:
        """The error for a model that is not what a method needs."""
        return ModelMismatchError(
            f"model {self._model!r} at {self._target}: {message}; predict() calls any model",
            target=self._target,
            model=self._model,
        )

    def wrong_inputs(
        self,
        metadata: ModelMetadata,
        error: ClientError,
        signature: str,
        inputs: "Mapping[str, npt.ArrayLike]",
        outputs: Sequence[str],
    ) -> ClientError | None:
        """What a refused Predict got wrong, judged by the model's signatures; None if they do not tell."""
        from .wire.tensors import describe

        found = metadata.signatures.get(signature)
        if found is None:
            return self._refusal(
                FailedPreconditionError,
                error,
                f"has no signature {signature!r}: it has {_names(metadata.signatures)}",
            )
        wrong: list[str] = []
        if set(inputs) != set(found.inputs):
            wrong.append(f"got inputs {_names(inputs)}")
        wrong += [
            f"got {name} as {_spec_text(spec)}"
            for name, spec in ((name, TensorSpec(*describe(value))) for name, value in inputs.items())
            if name in found.inputs and not _fits(spec, found.inputs[name])
        ]
        if missing := set(outputs) - set(found.outputs):
            wrong.append(f"got no outputs {_names(missing)}")
        if not wrong:
            return None
        expected = ", ".join(f"{name} {_spec_text(spec)}" for name, spec in sorted(found.inputs.items()))
        return self._refusal(
            InvalidArgumentError,
            error,
            f"signature {signature!r} takes {expected or 'nothing'} and gives {_names(found.outputs)}; "
            + "; ".join(wrong),
        )

    def _refusal(self, kind: type[ClientError], error: ClientError, message: str) -> ClientError:
        return kind(
            f"model {self._model!r} at {self._target}: {message} (the server says: {error.details})",
            code=error.code,
            target=self._target,
            model=self._model,
            details=error.details,
        )

    def _spec(self, signature: str = "") -> ModelSpec:
        spec = ModelSpec(name=self._model, signature_name=signature)
        if self._version is not None:
            spec.version.value = self._version
        elif self._version_label is not None:
            spec.version_label = self._version_label
        return spec

    def _bad_input(self, name: str, error: TensorError) -> InvalidArgumentError:
        return InvalidArgumentError(f"input {name!r}: {error}", target=self._target, model=self._model)

    def _predict_request(self, header: bytes, inputs: Mapping[str, Parts]) -> bytes:
        try:
            return predict_request(header, inputs)
        except TensorError as exc:
            raise InvalidArgumentError(str(exc), target=self._target, model=self._model) from exc

    def _check_outputs(self, response: PredictResponse, names: Sequence[str]) -> None:
        if any(name not in response.outputs for name in names):
            raise self.not_fitting(f"expected outputs {', '.join(names)}, got {_names(response.outputs)}")

    def _check_rows(self, name: str, shape: Sequence[int], count: int) -> None:
        if not shape or shape[0] != count:
            raise self.not_fitting(f"expected one row per image, {count}, got {name} of shape {list(shape)}")

    def _valid(self, response: PredictResponse, count: int, outputs: Sequence[str]) -> Sequence[bool]:
        if "valid" not in outputs:
            return [True] * count
        try:
            values, shape = bools(response.outputs["valid"])
        except TensorError as exc:
            raise self._unreadable("output 'valid'", exc) from exc
        self._check_rows("valid", shape, count)
        if len(shape) != 1:
            raise self.not_fitting(f"expected one valid per image, [{count}], got shape {list(shape)}")
        return values

    def _array(self, response: PredictResponse, name: str) -> "npt.NDArray[Any]":
        from .wire.tensors import to_array

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


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _spec_text(spec: TensorSpec) -> str:
    if spec.shape is None:
        return spec.dtype
    return f"{spec.dtype} [{', '.join('N' if size is None else str(size) for size in spec.shape)}]"


def _fits(given: TensorSpec, wanted: TensorSpec) -> bool:
    if given.dtype != wanted.dtype:
        return False
    if given.shape is None or wanted.shape is None:
        return True
    return len(given.shape) == len(wanted.shape) and all(
        size in (None, have) for have, size in zip(given.shape, wanted.shape, strict=True)
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
        {name: _tensor_spec(info) for name, info in sorted(item.inputs.items())},
        {name: _tensor_spec(info) for name, info in sorted(item.outputs.items())},
    )


def _tensor_spec(info: TensorInfo) -> TensorSpec:
    shape = None
    if not info.tensor_shape.unknown_rank:
        shape = tuple(dim.size if dim.size >= 0 else None for dim in info.tensor_shape.dim)
    return TensorSpec(dtype_name(info.dtype), shape)
