"""The client: calls to a model server from any number of threads."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from types import TracebackType
from typing import Any, Final, Self

import grpc
import numpy as np
import numpy.typing as npt

from .batching import split
from .calls import Caller, checked_timeout_s
from .errors import (
    ClientError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    InvalidImageError,
    ModelMismatchError,
    NotFoundError,
    RetryError,
)
from .images import ImageInput, encode_image
from .results import (
    ModelMetadata,
    Prediction,
    PredictResult,
    Signature,
    TensorSpec,
    VersionState,
    VersionStatus,
)
from .retry import RetryPolicy
from .wire import (
    Code,
    GetModelMetadataRequest,
    GetModelStatusRequest,
    ModelSpec,
    ModelVersionStatus,
    PredictRequest,
    PredictResponse,
    SignatureDef,
    TensorInfo,
)
from .wire.contract import (
    CLASSIFY_OUTPUTS,
    EMBED_OUTPUTS,
    FEATURES,
    IMAGE_BYTES,
    SERVING_DEFAULT,
)
from .wire.methods import (
    GET_MODEL_METADATA,
    GET_MODEL_STATUS,
    PREDICT,
    SIGNATURE_DEF_FIELD,
    unpack_signature_def_map,
)
from .wire.tensors import TensorError, dtype_name, to_array, to_proto

__all__ = ["Client"]

_POLL_S: Final = 0.1
_POLL_TIMEOUT_S: Final = 2.0


class Client:
    """A client of one model on one server; a context manager, safe to use from many threads.

    target: a gRPC address: "host:port", "dns:///name:port", "unix:/path".
    model: the model's name.
    version: always ask this version; by default the server chooses, the latest as a rule.
    version_label: always ask the version with this label; excludes `version`.
    timeout_s: the time for a call, where the call itself gives none.
    max_batch_images, max_batch_bytes: the largest request that `classify_many` and `embed` send; a single
        image above `max_batch_bytes` travels alone.
    max_in_flight: how many requests one call of `classify_many` or `embed` keeps under way.
    max_attempts: how often a request is sent while the server is UNAVAILABLE; 1 means never again.
    credentials: grpc.ssl_channel_credentials() and the like; None means no encryption.
    metadata: sent with every request, names in lower case.

    Nothing is connected before the first call. Every `timeout_s` is the total for its call, waiting and
    retries included. Every failure is a ClientError (see `errors`).
    Raises ValueError for arguments out of range.
    """

    def __init__(
        self,
        target: str,
        model: str,
        *,
        version: int | None = None,
        version_label: str | None = None,
        timeout_s: float = 60.0,
        max_batch_images: int = 32,
        max_batch_bytes: int = 16 * 2**20,
        max_in_flight: int = 4,
        max_attempts: int = 5,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Mapping[str, str | bytes] | None = None,
    ) -> None:
        if not target:
            raise ValueError("expected a target such as localhost:8500, got an empty one")
        if not model:
            raise ValueError("expected the model's name, got an empty one")
        if version is not None and version_label is not None:
            raise ValueError(f"expected version or version_label, got both: {version}, {version_label!r}")
        for name, value in (
            ("max_batch_images", max_batch_images),
            ("max_batch_bytes", max_batch_bytes),
            ("max_in_flight", max_in_flight),
        ):
            if value < 1:
                raise ValueError(f"expected {name} of 1 or more, got {value}")
        self._target = target
        self._model = model
        self._version = version
        self._version_label = version_label
        self._timeout_s = checked_timeout_s(timeout_s)
        self._max_batch_images = max_batch_images
        self._max_batch_bytes = max_batch_bytes
        self._max_in_flight = max_in_flight
        self._calls = Caller(
            target,
            model,
            policy=replace(RetryPolicy(), max_attempts=max_attempts),
            credentials=credentials,
            metadata=metadata,
        )

    def __repr__(self) -> str:
        return f"Client({self._target!r}, {self._model!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls under way end with ClosedError. A second time does nothing."""
        self._calls.close()

    def classify(self, image: ImageInput, *, timeout_s: float | None = None) -> Prediction:
        """The model's answer for one image (see `images.encode_image` for what counts as one).

        Raises InvalidImageError if the image cannot be read or decoded, ModelMismatchError if the model's
        `serving_default` does not map `image_bytes` to `classes`, `scores` and `valid`.
        """
        deadline = self._deadline(timeout_s)
        request = self._image_request(SERVING_DEFAULT, CLASSIFY_OUTPUTS, [encode_image(image)])
        try:
            response = self._calls.call(PREDICT, request, deadline)
        except (InvalidArgumentError, FailedPreconditionError) as exc:
            self._explain_mismatch(exc, SERVING_DEFAULT, CLASSIFY_OUTPUTS, deadline)
            raise
        row = self._predictions(response, 1)[0]
        if row is None:
            raise self._undecodable()
        return row

    def classify_many(
        self, images: Iterable[ImageInput], *, timeout_s: float | None = None
    ) -> list[Prediction | InvalidImageError]:
        """The answers for many images, in their order; a bad image is an InvalidImageError in its place.

        Images are taken from the iterable as they are sent, so paths may outnumber what memory holds.
        Raises any other ClientError for the call as a whole; ModelMismatchError as `classify` does.
        """
        results: list[Prediction | InvalidImageError | None] = []

        def bad(index: int, error: InvalidImageError) -> None:
            results[index] = error

        rows = self._image_calls(
            images, SERVING_DEFAULT, CLASSIFY_OUTPUTS, self._deadline(timeout_s), results, bad
        )
        with closing(rows):
            for indexes, response in rows:
                for index, row in zip(indexes, self._predictions(response, len(indexes)), strict=True):
                    results[index] = self._undecodable(index) if row is None else row
        return [result for result in results if result is not None]

    def embed(
        self, images: Iterable[ImageInput], *, timeout_s: float | None = None
    ) -> npt.NDArray[np.float32]:
        """The feature vectors of many images: float32 [N, D], in their order; [0, 0] for no images.

        Raises InvalidImageError naming every bad image (`indexes`), ModelMismatchError if the model has no
        signature `features` from `image_bytes` to `features` and `valid`.
        """
        results: list[npt.NDArray[np.float32] | None] = []
        errors: dict[int, InvalidImageError] = {}
        rows = self._image_calls(
            images,
            FEATURES,
            EMBED_OUTPUTS,
            self._deadline(timeout_s),
            results,
            errors.__setitem__,
        )
        with closing(rows):
            for indexes, response in rows:
                features, valid = self._outputs(response, EMBED_OUTPUTS, len(indexes))
                if features.ndim != 2 or features.dtype != np.float32:
                    raise self._mismatch(
                        f"expected features of float32 [N, D], got {features.dtype} {list(features.shape)}"
                    )
                for row, index in enumerate(indexes):
                    if valid[row]:
                        results[index] = features[row]
                    else:
                        errors[index] = self._undecodable(index)
        if errors:
            bad = tuple(sorted(errors))
            raise InvalidImageError(
                f"expected images that can be read and decoded, got {len(bad)} bad of {len(results)}, "
                f"counted from 0: {', '.join(map(str, bad[:20]))}{', ...' if len(bad) > 20 else ''}; "
                f"the first: {errors[bad[0]]}",
                target=self._target,
                model=self._model,
                indexes=bad,
            ) from errors[bad[0]]
        vectors = [vector for vector in results if vector is not None]
        return np.stack(vectors) if vectors else np.zeros((0, 0), np.float32)

    def predict(
        self,
        inputs: Mapping[str, npt.ArrayLike],
        *,
        signature: str = SERVING_DEFAULT,
        outputs: Sequence[str] | None = None,
        timeout_s: float | None = None,
    ) -> PredictResult:
        """Call any signature of any model: arrays in, arrays out, by name.

        inputs: in the dtypes that the signature has (`wire.tensors.to_proto` says what is taken; a list of
            Python numbers is int64 or float64).
        outputs: the names wanted; by default all.
        Raises InvalidArgumentError for inputs that cannot be encoded or that the server refuses.
        """
        deadline = self._deadline(timeout_s)
        request = PredictRequest(model_spec=self._spec(signature), output_filter=outputs or ())
        for name, value in inputs.items():
            try:
                request.inputs[name].CopyFrom(to_proto(value))
            except TensorError as exc:
                raise InvalidArgumentError(
                    f"input {name!r}: {exc}", target=self._target, model=self._model
                ) from exc
        response = self._calls.call(PREDICT, request, deadline)
        return PredictResult(
            {name: self._array(response, name) for name in response.outputs},
            response.model_spec.version.value,
        )

    def status(self, *, timeout_s: float | None = None) -> tuple[VersionStatus, ...]:
        """Every version of the model that the server knows, latest first; only `version` where one is given.

        Raises NotFoundError if the server knows none.
        """
        return self._status(self._deadline(timeout_s), retry=True)

    def metadata(self, *, timeout_s: float | None = None) -> ModelMetadata:
        """The version that answers this client and its signatures.

        Raises NotFoundError if there is none.
        """
        return self._read_metadata(self._deadline(timeout_s), retry=True)

    def wait_until_ready(self, timeout_s: float = 30.0) -> int:
        """Wait until the model can answer, also while the server cannot be reached; returns the version.

        That is the `version` or the version with the `version_label` of this client, or else the latest
        AVAILABLE one.
        Raises DeadlineExceededError, saying what was seen last.
        """
        deadline = time.monotonic() + checked_timeout_s(timeout_s)
        while True:
            poll_deadline = min(deadline, time.monotonic() + _POLL_TIMEOUT_S)
            cause: ClientError | None = None
            try:
                versions = self._status(poll_deadline, retry=False)
                available = [item.version for item in versions if item.state is VersionState.AVAILABLE]
                if available and self._version_label is not None:
                    # A label has no state of its own; metadata resolves it as Predict does.
                    return self._read_metadata(poll_deadline, retry=False).version
                if available:
                    return max(available)
                seen = "; ".join(_version_line(item) for item in versions) or "no versions"
            except (RetryError, NotFoundError, InvalidArgumentError) as exc:
                # A server that starts may not know the model or its label yet.
                cause, seen = exc, str(exc)
            if time.monotonic() + _POLL_S >= deadline:
                wanted = ""
                if self._version is not None:
                    wanted = f", version {self._version},"
                elif self._version_label is not None:
                    wanted = f", label {self._version_label!r},"
                raise DeadlineExceededError(
                    f"model {self._model!r}{wanted} at {self._target} was not ready within {timeout_s:g} s; "
                    f"last seen: {seen}",
                    code=cause.code if cause else None,
                    target=self._target,
                    model=self._model,
                    details=cause.details if cause else seen,
                ) from cause
            self._calls.pause(_POLL_S)

    # Requests and answers

    def _spec(self, signature: str = "") -> ModelSpec:
        spec = ModelSpec(name=self._model, signature_name=signature)
        if self._version is not None:
            spec.version.value = self._version
        elif self._version_label is not None:
            spec.version_label = self._version_label
        return spec

    def _image_request(
        self, signature: str, outputs: Sequence[str], images: Sequence[bytes]
    ) -> PredictRequest:
        request = PredictRequest(model_spec=self._spec(signature), output_filter=outputs)
        request.inputs[IMAGE_BYTES].CopyFrom(to_proto(images))
        return request

    def _image_calls(
        self,
        images: Iterable[ImageInput],
        signature: str,
        outputs: Sequence[str],
        deadline: float,
        results: list[Any],
        bad: Callable[[int, InvalidImageError], None],
    ) -> Generator[tuple[list[int], PredictResponse], None, None]:
        """Yield (indexes, answer) as answers come; appends a None to `results` for every image taken."""
        if isinstance(images, (bytes, bytearray, memoryview, str)) or not isinstance(images, Iterable):
            raise self._wrong_images(f"one {type(images).__name__}")
        if isinstance(images, np.ndarray) and images.ndim < 3:
            raise self._wrong_images(f"one array {list(images.shape)}")
        if isinstance(images, np.ndarray) and images.ndim == 3 and images.shape[2] in (1, 3):
            raise self._wrong_images(f"an array {list(images.shape)} that may be one image")

        def encoded() -> Iterator[tuple[int, bytes]]:
            for index, image in enumerate(images):
                results.append(None)
                try:
                    content = encode_image(image)
                except InvalidImageError as exc:
                    exc.target, exc.model, exc.indexes = self._target, self._model, (index,)
                    bad(index, exc)
                else:
                    yield index, content

        def requests() -> Iterator[tuple[list[int], PredictRequest]]:
            for batch in split(encoded(), self._max_batch_images, self._max_batch_bytes):
                contents = [content for _, content in batch]
                yield [index for index, _ in batch], self._image_request(signature, outputs, contents)

        try:
            yield from self._calls.call_many(PREDICT, requests(), deadline, max_in_flight=self._max_in_flight)
        except (InvalidArgumentError, FailedPreconditionError) as exc:
            self._explain_mismatch(exc, signature, outputs, deadline)
            raise

    def _wrong_images(self, got: str) -> InvalidArgumentError:
        return InvalidArgumentError(
            f"expected an iterable of images, got {got}: put a single image into a list",
            target=self._target,
            model=self._model,
        )

    def _predictions(self, response: PredictResponse, count: int) -> list[Prediction | None]:
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

    def _undecodable(self, index: int | None = None) -> InvalidImageError:
        which = "the image" if index is None else f"image {index}"
        return InvalidImageError(
            f"{which} cannot be decoded: expected a whole JPEG, PNG, GIF or BMP within the model's limits",
            target=self._target,
            model=self._model,
            indexes=() if index is None else (index,),
        )

    def _mismatch(self, message: str) -> ModelMismatchError:
        return ModelMismatchError(
            f"model {self._model!r} at {self._target}: {message}; predict() calls any model",
            target=self._target,
            model=self._model,
        )

    def _explain_mismatch(
        self, error: ClientError, signature: str, outputs: Sequence[str], deadline: float
    ) -> None:
        """Raise ModelMismatchError from `error` if the model's signatures say that it is one."""
        try:
            signatures = self._read_metadata(deadline, retry=False).signatures
        except ClientError:
            return  # then the server's own words have to do
        found = signatures.get(signature)
        if found is None:
            mismatch = self._mismatch(
                f"expected signature {signature}, got only {', '.join(sorted(signatures)) or 'none'}"
            )
        elif set(found.inputs) != {IMAGE_BYTES} or not set(outputs) <= set(found.outputs):
            mismatch = self._mismatch(
                f"expected signature {signature} with input {IMAGE_BYTES} and outputs {', '.join(outputs)}, "
                f"got inputs {', '.join(sorted(found.inputs)) or 'none'} and "
                f"outputs {', '.join(sorted(found.outputs)) or 'none'}"
            )
        else:
            return
        mismatch.code, mismatch.details = error.code, error.details
        raise mismatch from error

    def _status(self, deadline: float, *, retry: bool) -> tuple[VersionStatus, ...]:
        request = GetModelStatusRequest(model_spec=ModelSpec(name=self._model))
        if self._version is not None:
            request.model_spec.version.value = self._version
        response = self._calls.call(GET_MODEL_STATUS, request, deadline, retry=retry)
        versions = [_version_status(item) for item in response.model_version_status]
        return tuple(sorted(versions, key=lambda item: item.version, reverse=True))

    def _read_metadata(self, deadline: float, *, retry: bool) -> ModelMetadata:
        request = GetModelMetadataRequest(model_spec=self._spec(), metadata_field=[SIGNATURE_DEF_FIELD])
        response = self._calls.call(GET_MODEL_METADATA, request, deadline, retry=retry)
        try:
            signatures = unpack_signature_def_map(response.metadata[SIGNATURE_DEF_FIELD])
        except ValueError as exc:
            raise self._unreadable("metadata", exc) from exc
        return ModelMetadata(
            self._model,
            response.model_spec.version.value,
            {name: _signature(item) for name, item in signatures.signature_def.items()},
        )

    def _deadline(self, timeout_s: float | None) -> float:
        return time.monotonic() + (self._timeout_s if timeout_s is None else checked_timeout_s(timeout_s))


def _version_status(item: ModelVersionStatus) -> VersionStatus:
    states = {number: name for name, number in ModelVersionStatus.State.items()}
    codes = {number: name for name, number in Code.items()}
    return VersionStatus(
        item.version,
        VersionState(states.get(item.state, "UNKNOWN")),
        codes.get(item.status.error_code, str(int(item.status.error_code))),
        item.status.error_message,
    )


def _version_line(item: VersionStatus) -> str:
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
