"""The LiteRT engine: versions that `graftserve export` wrote, answered on a CPU without TensorFlow's kernels.

Beside its SavedModel such a version has the network alone as network.tflite, what turns an encoded image
into the network's pixels as decode.pb, and golden images with what the original model says of them. Here one
worker thread for each CPU takes images, first come first served, decodes one, and runs the network on it in
a single-threaded interpreter of its own: side by side these give the best throughput and the lowest latency,
and no image waits for a batch to fill. The answers are those of the SavedModel's signatures. What is not
known here, and everything once LiteRT has failed, is answered by a fallback: the SavedModel in TensorFlow.

A version may also have the network in 8-bit integers, as network.int8.tflite: twice as fast, with answers
that differ as much as its golden images tell.
"""

import hashlib
import json
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import config_pb2, saved_model_pb2

from graftserve.client.wire import DataType, Example, SignatureDefMap
from graftserve.client.wire.contract import (
    CLASSIFY,
    EXAMPLES,
    FEATURES,
    IMAGE_BYTES,
    IMAGES,
    INT8_TOLERANCE,
    PIXELS,
    SERVING_DEFAULT,
)

from .cancellation import on_cancel
from .errors import Code, ServingError, timed_out
from .flags import schedulable_cpus
from .loader import signature_def_map_of, signatures_of
from .memory import release
from .servable import Array, Servable, Signature

__all__ = ["CONTRACT_FILE", "TOLERANCE", "LiteRtServable", "can_load", "has_int8"]

_log = logging.getLogger(__name__)

CONTRACT_FILE = "assets.extra/contract.json"
"""Where an exported version says what it promises."""

TOLERANCE = 1e-4
"""How far a probability of a golden image may be from the original model's."""

_DECODE = "assets.extra/decode.pb"
_GOLDENS = "assets.extra/goldens"
_LABELS = "assets/labels.txt"
_MANIFEST = "assets.extra/manifest.sha256"
_NETWORK = "assets.extra/network.tflite"
_INT8_NETWORK = "assets.extra/network.int8.tflite"
_SAVED_MODEL = "saved_model.pb"
_GOLDENS_FILE = f"{_GOLDENS}/goldens.json"
_FILES = (CONTRACT_FILE, _DECODE, _GOLDENS_FILE, _LABELS, _MANIFEST, _NETWORK, _SAVED_MODEL)

_CONTRACT_FORMAT = 2
_TAG = "serve"
_INPUTS = {SERVING_DEFAULT: IMAGE_BYTES, FEATURES: IMAGE_BYTES, PIXELS: IMAGES, CLASSIFY: EXAMPLES}
_PROBABILITIES = "probabilities"
_MADE_FROM = {"classes": _PROBABILITIES, "scores": _PROBABILITIES}
_ENCODED = "image/encoded"
_MOST_UNBATCHED = 1024  # images that one request may bring where the contract has no batching

_Reader = Callable[[Array, int], Array | None]


def can_load(path: Path) -> bool:
    """Whether the version in `path` has the files that LiteRT needs; none of them is read."""
    return all((path / name).is_file() for name in _FILES)


def has_int8(path: Path) -> bool:
    """Whether the version in `path`, which `can_load`, has the network in int8, too."""
    return (path / _INT8_NETWORK).is_file()


class LiteRtServable:
    """A version in LiteRT; `load` makes one. `run` may be called from many threads at once.

    engine: what answers: "litert" or "litert_int8", or "tensorflow" once LiteRT has failed.
    """

    def __init__(
        self,
        path: Path,
        engine: str,
        contract: "_Contract",
        networks: Sequence["_Network"],
        decoder: "_Decoder",
        images: "_ImageQueue",
        fallback: "_Fallback",
        on_image: Callable[[float], None] | None,
    ) -> None:
        self.engine = engine
        self.signatures = contract.signatures
        self.signature_def_map = contract.signature_def_map
        self._path = path
        self._contract = contract
        self._decoder = decoder
        self._images = images
        self._fallback = fallback
        self._on_image = on_image
        self._failing = threading.Lock()
        self._readers: Mapping[str, _Reader] = {
            SERVING_DEFAULT: self._read_image,
            FEATURES: self._read_image,
            PIXELS: lambda rows, row: rows[row : row + 1],
            CLASSIFY: self._read_example,
        }
        self._threads = [
            threading.Thread(target=self._work, args=(network,), name=f"litert-{number}", daemon=True)
            for number, network in enumerate(networks)
        ]
        for thread in self._threads:
            thread.start()

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        int8: bool = False,
        workers: int | None = None,
        max_queued_images: int,
        fallback: Callable[[], Servable],
        session_config: config_pb2.ConfigProto | None = None,
        on_image: Callable[[float], None] | None = None,
    ) -> "LiteRtServable":
        """Load the version in `path`, and compare what it says of the golden images with the original model.

        int8: take the network in 8-bit integers.
        workers: images computed at the same time; None: one for each CPU that this process may use.
        max_queued_images: images that may wait for a worker, of all requests together.
        fallback: loads the SavedModel; called when it is first needed.
        session_config: how TensorFlow's Sessions are made; the first one sets the threads for all.
        on_image: told of each image how many seconds it waited for a worker; called by the workers.
        Raises ServingError: DATA_LOSS (a file is missing or damaged), FAILED_PRECONDITION (LiteRT cannot run
        the network, or gives other answers).
        """
        files = _Files(path)
        contract = _read_contract(files)
        images, expected, tolerance = _read_goldens(files, contract, int8)
        model = files.read(_INT8_NETWORK if int8 else _NETWORK)
        networks = [_Network(model, contract) for _ in range(workers or schedulable_cpus())]
        decoder = _Decoder(files.read(_DECODE), session_config)
        servable = cls(
            *(path, "litert_int8" if int8 else "litert", contract, networks, decoder),
            *(_ImageQueue(max_queued_images), _Fallback(fallback), on_image),
        )
        try:
            servable._check_goldens(images, expected, tolerance)
        except BaseException:
            servable.close()
            raise
        return servable

    def run(
        self,
        signature: Signature,
        inputs: Mapping[str, Array],
        outputs: Sequence[str],
        timeout_s: float | None,
    ) -> list[Array]:
        """See `servable.Servable.run`. Input arrays are read while it runs, and not changed.

        Raises ServingError, among others UNAVAILABLE: too many images are waiting.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        if self.engine == "tensorflow" or not self._contract.offers(signature.name, outputs):
            return self._fallback.run(signature, inputs, outputs, deadline_s)
        rows = self._contract.check_rows(signature, inputs)
        call = _Call(rows, self._readers[signature.name], self._contract.widths_for(outputs))
        try:
            self._compute(call, deadline_s)
        except ServingError:
            raise
        except Exception as exc:  # the interpreter raises whatever it met
            self._give_up(exc)
            return self._fallback.run(signature, inputs, outputs, deadline_s)
        return self._contract.answer(call, outputs)

    def close(self) -> None:
        """Stop the workers; free the interpreters, the decoder and the fallback."""
        self._images.close()
        for thread in self._threads:
            thread.join()
        self._decoder.close()
        self._fallback.close()
        release()

    def _read_image(self, rows: Array, row: int) -> Array | None:
        return self._decoder.decode(rows[row, ...])

    def _read_example(self, rows: Array, row: int) -> Array | None:
        image_bytes = _image_in(rows[row])
        return None if image_bytes is None else self._decoder.decode(np.array(image_bytes, object))

    def _compute(self, call: "_Call", deadline_s: float | None) -> None:
        """Raises whatever a worker met; ServingError (UNAVAILABLE, DEADLINE_EXCEEDED, CANCELLED)."""
        if not len(call.rows):
            return
        if not on_cancel(lambda: call.computed.put(_gone())):
            raise _gone()
        self._images.put(call)
        try:
            for _ in call.rows:
                error = call.computed.get(timeout=_remaining_s(deadline_s))
                if error is not None:
                    raise error
        except queue.Empty:
            self._images.drop(call)
            raise timed_out() from None
        except BaseException:
            self._images.drop(call)
            raise

    def _work(self, network: "_Network") -> None:
        while self._compute_next(network):  # its own function: a worker that waits holds no image
            pass

    def _compute_next(self, network: "_Network") -> bool:
        """Compute the image that has waited longest; False if there will be no more."""
        image = self._images.get()
        if image is None:
            return False
        call, row = image
        error = None
        try:
            if self._on_image is not None:
                self._on_image(time.monotonic() - call.queued_s)
            pixels = call.read(call.rows, row)
            if pixels is not None:
                network.run(pixels)
                for name, values in call.values.items():
                    values[row] = network.output(name)
                call.valid[row] = True
        except Exception as exc:
            error = exc
        call.computed.put(error)
        return True

    def _check_goldens(self, images: Array, expected: Array, tolerance: float) -> None:
        call = _Call(images, self._read_image, self._contract.widths_for([_PROBABILITIES]))
        try:
            self._compute(call, None)
        except Exception as exc:
            raise _cannot_run(_one_line(exc)) from exc
        difference = float(np.abs(call.values[_PROBABILITIES] - expected).max())
        if not (call.valid.all() and difference <= tolerance):  # also when it is no number
            raise _cannot_run(
                f"the golden images' probabilities differ by {difference:.1e} from the original model's, "
                f"expected at most {tolerance:.0e}"
            )

    def _give_up(self, error: Exception) -> None:
        with self._failing:
            if self.engine == "tensorflow":
                return
            self.engine = "tensorflow"
        _log.warning("%s: LiteRT failed, TensorFlow answers from now on: %s", self._path, _one_line(error))


@dataclass(frozen=True)
class _Contract:
    """What a version promises.

    outputs: of each signature that LiteRT answers. labels: object [C], bytes. top_k: at most C.
    widths: of the network's outputs. most_images: in one request.
    """

    signatures: Mapping[str, Signature]
    signature_def_map: SignatureDefMap
    outputs: Mapping[str, frozenset[str]]
    labels: Array
    top_k: int
    side_px: int
    widths: Mapping[str, int]
    most_images: int

    def offers(self, signature_name: str, outputs: Sequence[str]) -> bool:
        return self.outputs.get(signature_name, frozenset()).issuperset(outputs or [""])

    def widths_for(self, outputs: Sequence[str]) -> dict[str, int]:
        """The network's outputs that these are made from."""
        names = {_MADE_FROM.get(output, output) for output in outputs}
        return {name: width for name, width in self.widths.items() if name in names}

    def check_rows(self, signature: Signature, inputs: Mapping[str, Array]) -> Array:
        """The images: object [N], bytes, or uint8 [N, side_px, side_px, 3]. Raises ServingError.

        Source of the first message: tensorflow/core/framework/function.cc.
        """
        name = _INPUTS[signature.name]
        rows, expected = inputs[name], signature.inputs[name].data_type
        given = tf.as_dtype(rows.dtype).as_datatype_enum
        if given != expected:
            raise ServingError(
                Code.INVALID_ARGUMENT,
                f"Expects arg[0] to be {_type_name(expected)} but {_type_name(given)} is provided",
            )
        shape = (self.side_px, self.side_px, 3) if name == IMAGES else ()
        if rows.ndim == 0 or rows.shape[1:] != shape:
            raise ServingError(
                Code.INVALID_ARGUMENT,
                f"{name}: expected the shape [{', '.join(['N', *map(str, shape)])}], got {list(rows.shape)}",
            )
        if len(rows) > self.most_images:
            raise ServingError(
                Code.INVALID_ARGUMENT,
                f"Too many images in one request: expected at most {self.most_images}, got {len(rows)}.",
            )
        return rows

    def answer(self, call: "_Call", outputs: Sequence[str]) -> list[Array]:
        """The named outputs; an image that cannot be read has zeros and empty classes.

        Equal scores come in the order of the labels, as tf.math.top_k has them.
        """
        values: dict[str, Array] = {**call.values, "valid": call.valid}
        if any(output in _MADE_FROM for output in outputs):
            probabilities = values[_PROBABILITIES]
            best = np.argsort(-probabilities, axis=1, kind="stable")[:, : self.top_k]
            values["scores"] = np.take_along_axis(probabilities, best, axis=1)
            values["classes"] = self.labels[best]
            values["classes"][~call.valid] = b""
        return [values[output] for output in outputs]


class _Call:
    """A request under way.

    read: gives the pixels of one of the rows, uint8 [1, side_px, side_px, 3]; None if it holds no image.
    values: the network's outputs, float32 [N, width]; zeros where `valid` is false.
    computed: for each row that is done, None, or what went wrong.
    queued_s: since when it waits, on time.monotonic's clock.
    """

    def __init__(self, rows: Array, read: _Reader, widths: Mapping[str, int]) -> None:
        self.rows, self.read = rows, read
        self.values = {name: np.zeros((len(rows), width), np.float32) for name, width in widths.items()}
        self.valid = np.zeros(len(rows), np.bool_)
        self.computed: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self.queued_s = time.monotonic()


class _ImageQueue:
    """Images in the order in which they came: calls with the number of a row."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._images: deque[tuple[_Call, int]] = deque()
        self._changed = threading.Condition()
        self._is_closed = False

    def put(self, call: _Call) -> None:
        """All of a call's images. A call by itself always finds room. Raises ServingError (UNAVAILABLE)."""
        count = len(call.rows)
        with self._changed:
            waiting = len(self._images)
            if waiting and waiting + count > self._most:
                raise ServingError(
                    Code.UNAVAILABLE,
                    f"Too many images are waiting: {waiting}, with room for {self._most}, and {count} more "
                    "came. Try again later.",
                )
            self._images.extend((call, row) for row in range(count))
            self._changed.notify(count)

    def get(self) -> tuple[_Call, int] | None:
        """The oldest, once there is one; None once the queue is closed."""
        with self._changed:
            while not self._images and not self._is_closed:
                self._changed.wait()
            return None if self._is_closed else self._images.popleft()

    def drop(self, call: _Call) -> None:
        """Take the call's images out again, as far as they are still there."""
        with self._changed:
            left = [image for image in self._images if image[0] is not call]
            self._images.clear()
            self._images.extend(left)

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


class _Network:
    """A .tflite file's content in an interpreter, for one thread at a time.

    Raises ServingError (FAILED_PRECONDITION) if LiteRT cannot be had or cannot load it, or it is not the
    network that the contract describes.
    """

    def __init__(self, model: bytes, contract: _Contract) -> None:
        try:
            from ai_edge_litert.interpreter import Interpreter

            self._interpreter = Interpreter(model_content=model, num_threads=1)
            self._interpreter.allocate_tensors()
            runner = self._interpreter.get_signature_runner(SERVING_DEFAULT)
            inputs, outputs = runner.get_input_details(), runner.get_output_details()
        except Exception as exc:
            raise _cannot_run(_one_line(exc)) from exc
        given = {name: detail["shape"].tolist() for name, detail in {**inputs, **outputs}.items()}
        expected = {PIXELS: [1, contract.side_px, contract.side_px, 3]}
        expected |= {name: [1, width] for name, width in contract.widths.items()}
        if given != expected:
            raise _cannot_run(f"expected inputs and outputs of the shapes {expected}, got {given}")
        self._input = inputs[PIXELS]["index"]
        self._outputs = {name: detail["index"] for name, detail in outputs.items()}

    def run(self, pixels: Array) -> None:
        """pixels: uint8 [1, side_px, side_px, 3]."""
        self._interpreter.set_tensor(self._input, pixels)
        self._interpreter.invoke()

    def output(self, name: str) -> Array:
        """Of the last run: float32 [width]."""
        values: Array = self._interpreter.get_tensor(self._outputs[name])[0]
        return values


class _Decoder:
    """decode.pb in a Session. `decode` may be called from many threads at once."""

    def __init__(self, graph_def: bytes, session_config: config_pb2.ConfigProto | None) -> None:
        config = config_pb2.ConfigProto()
        if session_config is not None:
            config.CopyFrom(session_config)
        config.device_count["GPU"] = 0
        # Two threads for one image cost half as much CPU again, and the other one has an image of its own.
        config.intra_op_parallelism_threads = 1
        graph = tf.Graph()
        self._session = tf.compat.v1.Session(graph=graph, config=config)
        try:
            with graph.as_default():
                tf.graph_util.import_graph_def(tf.compat.v1.GraphDef.FromString(graph_def), name="")
            options = config_pb2.CallableOptions(feed=["image_bytes:0"], fetch=["pixels:0"])
            options.run_options.inter_op_thread_pool = -1  # in the thread that calls
            self._call = self._session._make_callable_from_options(options)
        except Exception as exc:
            self._session.close()
            raise _cannot_run(f"{_DECODE}: {_one_line(exc)}") from exc

    def decode(self, image_bytes: Array) -> Array | None:
        """Pixels uint8 [1, side_px, side_px, 3] of an object array without axes; None if it is no image."""
        try:
            (pixels,) = self._call(image_bytes)
        except tf.errors.OpError:  # all that tf.data's ignore_errors passes over in the signature
            return None
        return pixels[None]  # type: ignore[no-any-return]

    def close(self) -> None:
        del self._call
        self._session.close()
        del self._session


class _Fallback:
    """The SavedModel, loaded once it is needed."""

    def __init__(self, load: Callable[[], Servable]) -> None:
        self._load = load
        self._loading = threading.Lock()
        self._servable: Servable | None = None

    def run(
        self,
        signature: Signature,
        inputs: Mapping[str, Array],
        outputs: Sequence[str],
        deadline_s: float | None,
    ) -> list[Array]:
        """See `servable.Servable.run`; deadline_s: on time.monotonic's clock."""
        servable = self._servable or self._loaded(deadline_s)
        timeout_s = _remaining_s(deadline_s)
        if timeout_s == 0:
            raise timed_out()
        return servable.run(signature, inputs, outputs, timeout_s)

    def close(self) -> None:
        if self._servable is not None:
            self._servable.close()
            self._servable = None

    def _loaded(self, deadline_s: float | None) -> Servable:
        timeout_s = _remaining_s(deadline_s)
        if not self._loading.acquire(timeout=-1 if timeout_s is None else timeout_s):
            raise timed_out()
        try:
            if self._servable is None:
                self._servable = self._load()
            return self._servable
        finally:
            self._loading.release()


class _Files:
    """The files of a version, each compared with its sum before it is given to anyone: LiteRT and TensorFlow
    trust what they read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sums: dict[str, str] = {}
        for line in self._bytes(_MANIFEST).decode("utf-8", "surrogateescape").splitlines():
            digest, _, name = line.partition("  ")
            self._sums[name] = digest

    def read(self, name: str) -> bytes:
        """name: relative to the version. Raises ServingError (DATA_LOSS)."""
        content = self._bytes(name)
        if hashlib.sha256(content).hexdigest() != self._sums.get(name):
            raise _damaged(self.path / name, f"its sum is not the one in {_MANIFEST}")
        return content

    def _bytes(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as exc:
            raise _damaged(self.path / name, exc.strerror or str(exc)) from exc


def _read_contract(files: _Files) -> _Contract:
    with _damage_in(files, CONTRACT_FILE):
        document = json.loads(files.read(CONTRACT_FILE))
        if document["format"] != _CONTRACT_FORMAT:
            raise ValueError(f"format {_CONTRACT_FORMAT} expected, got {document['format']}")
        outputs = {
            name: frozenset(names) for name, names in document["signatures"].items() if name in _INPUTS
        }
        top_k, side_px = int(document["top_k"]), int(document["preprocess"]["side_px"])
        widths = {_PROBABILITIES: int(document["classes"])}
        if document["features"] is not None:
            widths["features"] = int(document["features"])
        batching = document["batching"]
        most_images = _MOST_UNBATCHED if batching is None else int(batching["max_request_images"])
    with _damage_in(files, _LABELS):
        labels = np.array(files.read(_LABELS).removesuffix(b"\n").split(b"\n"), object)
        if len(labels) != widths[_PROBABILITIES]:
            raise ValueError(f"{widths[_PROBABILITIES]} labels expected, got {len(labels)}")
    with _damage_in(files, _SAVED_MODEL):
        saved_model = saved_model_pb2.SavedModel.FromString(files.read(_SAVED_MODEL))
        (meta_graph,) = (graph for graph in saved_model.meta_graphs if _TAG in graph.meta_info_def.tags)
        signatures, signature_def_map = signatures_of(meta_graph), signature_def_map_of(meta_graph)
    return _Contract(signatures, signature_def_map, outputs, labels, top_k, side_px, widths, most_images)


def _read_goldens(files: _Files, contract: _Contract, int8: bool) -> tuple[Array, Array, float]:
    """The encoded images, object [n], the original model's probabilities, float32 [n, C], and how far from
    these an answer may be."""
    with _damage_in(files, _GOLDENS_FILE):
        document = json.loads(files.read(_GOLDENS_FILE))
        rows = document["goldens"]
        images = np.array([files.read(f"{_GOLDENS}/{row['file']}") for row in rows], object)
        probabilities = np.array([row["probabilities"] for row in rows], np.float32)
        expected = (max(1, len(images)), len(contract.labels))
        if probabilities.shape != expected:
            raise ValueError(f"probabilities {list(expected)} expected, got {list(probabilities.shape)}")
        tolerance = document["int8_difference"] + INT8_TOLERANCE if int8 else TOLERANCE
    return images, probabilities, tolerance


@contextmanager
def _damage_in(files: _Files, name: str) -> Iterator[None]:
    """What is raised while a file is understood, as ServingError (DATA_LOSS)."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, DecodeError) as exc:
        raise _damaged(files.path / name, _one_line(exc)) from exc


def _image_in(example: bytes) -> bytes | None:
    """The encoded image in a serialized tf.Example; None if it is not one, or has not exactly one image."""
    try:
        feature = Example.FromString(example).features.feature
    except DecodeError:
        return None
    values: Sequence[bytes] = feature[_ENCODED].bytes_list.value if _ENCODED in feature else ()
    return values[0] if len(values) == 1 else None


def _remaining_s(deadline_s: float | None) -> float | None:
    if deadline_s is None:
        return None
    return min(max(0.0, deadline_s - time.monotonic()), threading.TIMEOUT_MAX)


def _gone() -> ServingError:
    return ServingError(Code.CANCELLED, "The client has gone")


def _damaged(path: Path, reason: str) -> ServingError:
    return ServingError(Code.DATA_LOSS, f"{path}: damaged ({reason}); publish or pull the version again")


def _cannot_run(reason: str) -> ServingError:
    return ServingError(Code.FAILED_PRECONDITION, f"LiteRT cannot run the network: {reason}")


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _type_name(data_type: int) -> str:
    """As TensorFlow's messages have it."""
    return DataType.Name(data_type).removeprefix("DT_").lower()
