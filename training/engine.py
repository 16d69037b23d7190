"""What runs a backbone: TensorFlow, or LiteRT, TensorFlow's own runtime, which is faster on a CPU.

A converted network is kept in the cache, with a few images and what Keras says of them: whoever takes it from
there runs those first. In LiteRT one single-threaded interpreter for each core, an image at a time, is the
fastest arrangement; a network on several threads waits for the slowest of them after every operation.
"""

import io
import logging
import os
import queue
import threading
import zipfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from .cache import describe_entry, mark_used, write_entry_file
from .errors import TrainingError
from .images import content_key
from .network import freeze, freeze_function
from .quiet import quiet

__all__ = ["AGREEMENT", "ENGINES", "Engine", "acceptable_engines", "core_count", "extract", "open_engine"]

_log = logging.getLogger(__name__)

ENGINES = ("auto", "tensorflow", "litert")
"""What may be asked for: one of the two, or what suits the machine."""

AGREEMENT = 1e-4
"""How far LiteRT may be from Keras, as a share of the largest feature.

Float32 rounding comes to between 2e-7 and 2e-6 on nine backbones of the table; a kernel that computes in 16
bits, or pads otherwise, to 1e-3 and more.
"""

_WORTH_PREPARING = 256  # images: EfficientNet-Lite0's conversion pays off at 230, its freezing at 210
_CPU_BATCH = 8  # in TensorFlow on a CPU batches of 4 to 8 are the fastest
_GPU_BATCH = 64
_LITERT_BATCH = 4  # run one by one: it only spares the threads some waking
_DECODERS = 8

_Item = TypeVar("_Item")
_Pixels = npt.NDArray[np.uint8]
_Features = npt.NDArray[np.float32]
_Lane = Callable[[Sequence[_Pixels]], _Features]


@dataclass(frozen=True)
class Engine:
    """What computes features.

    lanes: to be called side by side, each by one thread at a time, with n images uint8 [side_px, side_px, 3];
        give float32 [n, D].
    batch_images: the n that suits them.
    """

    name: str
    lanes: tuple[_Lane, ...]
    batch_images: int


def open_engine(
    choice: str,
    backbone: keras.Model,
    image_count: int,
    samples: Callable[[], _Pixels],
    entry: Path,
    meta: Mapping[str, Any],
) -> Engine:
    """What is to run the backbone over `image_count` images.

    "auto" is TensorFlow where there is a GPU, or as long as there were too few images to be worth converting
    the network; else LiteRT, or, with a warning, TensorFlow if LiteRT cannot be had or disagrees with Keras.
    samples: gives some of the images to compare a new conversion on, uint8 [n, side_px, side_px, 3]; n is 0
        only if none can be decoded.
    entry, meta: the converted network's place in the cache and what describes it.
    Raises TrainingError if "litert" was asked for and cannot be had.
    """
    if choice == "tensorflow" or (choice == "auto" and tf.config.list_logical_devices("GPU")):
        return _open_tensorflow(backbone, image_count)
    try:
        with quiet():
            network = stored = _read_network(entry)
            if network is None:
                if choice == "auto" and image_count < _WORTH_PREPARING:
                    return _open_tensorflow(backbone, image_count)
                if not len(pixels := samples()):
                    return _open_tensorflow(backbone, image_count)
                network = _convert(backbone, pixels)
                network.check()
            engine = _open_litert(network, min(core_count(), image_count))
    except Exception as error:  # the converter and the interpreter raise whatever they met
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if choice == "litert":
            raise TrainingError(
                f"engine litert: cannot run {backbone.name}: {reason}; choose auto or tensorflow"
            ) from error
        _log.warning("%s runs in TensorFlow, which is slower here than LiteRT: %s", backbone.name, reason)
        return _open_tensorflow(backbone, image_count)
    if stored is None:
        network.write(entry, meta)
    return engine


def acceptable_engines(choice: str) -> tuple[str, ...]:
    """The engines whose rows suit a choice: either for "auto", since they agree.

    Raises ValueError for a choice that there is none of.
    """
    if choice not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {choice!r}")
    return tuple(name for name in ENGINES if name != "auto" and choice in ("auto", name))


def extract(
    engine: Engine, load: Callable[[_Item], _Pixels | None], items: Iterable[_Item]
) -> Generator[tuple[list[_Item], _Features], None, None]:
    """Features of the items, a batch at a time, in their order: the items and float32 [n, D].

    load: decodes an item to uint8 [side_px, side_px, 3], or gives None to leave it out; called from several
    threads, while the engine computes.
    """
    free: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
    for lane in engine.lanes:
        free.put(lane)

    def compute(pixels: Sequence[_Pixels]) -> _Features:
        lane = free.get()
        try:
            return lane(pixels)
        finally:
            free.put(lane)

    batches_ahead = 2 * len(engine.lanes)
    decoded: deque[tuple[_Item, Future[_Pixels | None]]] = deque()
    computed: deque[tuple[list[_Item], Future[_Features]]] = deque()
    decoders = ThreadPoolExecutor(max(_DECODERS, core_count()), "decode")
    computers = ThreadPoolExecutor(len(engine.lanes), "compute")

    def batches() -> Iterator[tuple[list[_Item], list[_Pixels]]]:
        batch: list[tuple[_Item, _Pixels]] = []
        remaining = iter(items)
        while True:
            for item in remaining:
                decoded.append((item, decoders.submit(load, item)))
                if len(decoded) >= batches_ahead * engine.batch_images + _DECODERS:
                    break
            if not decoded:
                break
            item, future = decoded.popleft()
            if (pixels := future.result()) is not None:
                batch.append((item, pixels))
            if len(batch) == engine.batch_images:
                yield [item for item, _ in batch], [pixels for _, pixels in batch]
                batch = []
        if batch:
            yield [item for item, _ in batch], [pixels for _, pixels in batch]

    try:
        for batch_items, pixels in batches():
            computed.append((batch_items, computers.submit(compute, pixels)))
            if len(computed) > batches_ahead:
                batch_items, future = computed.popleft()
                yield batch_items, future.result()
        while computed:
            batch_items, future = computed.popleft()
            yield batch_items, future.result()
    finally:  # after an interrupt, what has not begun never does
        decoders.shutdown(cancel_futures=True)
        computers.shutdown(cancel_futures=True)


def core_count() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _open_tensorflow(backbone: keras.Model, image_count: int) -> Engine:
    gpus = [device.name for device in tf.config.list_logical_devices("GPU")]
    # Several GPUs would fetch variables from the first one for every batch; constants are on each of them.
    frozen = len(gpus) > 1 or (not gpus and image_count >= _WORTH_PREPARING)
    made: list[Callable[[tf.Tensor], Any]] = []
    lock = threading.Lock()

    def network(pixels: tf.Tensor) -> tf.Tensor:
        with lock:  # made for the first image, since there may be none: tracing takes seconds
            if not made:
                made.append(freeze(backbone) if frozen else _traced(backbone))
        return made[0](pixels)[0]

    def lane_on(device: str) -> _Lane:
        def lane(pixels: Sequence[_Pixels]) -> _Features:
            with tf.device(device):
                features = network(tf.constant(np.stack(pixels)))
            return np.asarray(features, np.float32)

        return lane

    lanes = tuple(lane_on(device) for device in gpus or ["/device:CPU:0"])
    return Engine("tensorflow", lanes, _GPU_BATCH if gpus else _CPU_BATCH)


def _traced(backbone: keras.Model) -> Callable[[tf.Tensor], Any]:
    """What `freeze` gives, on the backbone's variables."""
    (pixels,) = backbone.inputs
    spec = tf.TensorSpec((None, *pixels.shape[1:]), pixels.dtype)
    function = tf.function(lambda batch: (backbone(batch, training=False),))
    traced: Callable[[tf.Tensor], Any] = function.get_concrete_function(spec)
    return traced


@dataclass(frozen=True)
class _Network:
    """model: a .tflite file's content, for one image. pixels, features: images, and Keras's rows of them."""

    model: bytes
    pixels: _Pixels
    features: _Features

    def check(self) -> None:
        """Raise TrainingError if LiteRT does not say of the images what Keras said."""
        difference = float(np.abs(_litert_lane(self.model)(list(self.pixels)) - self.features).max())
        largest = float(np.abs(self.features).max())
        if not difference <= AGREEMENT * largest:  # also when either is not a number
            raise TrainingError(
                f"LiteRT disagrees with Keras: features up to {largest:.3g} differ by {difference:.1e}, "
                f"expected at most {AGREEMENT:.0e} of that"
            )

    def write(self, entry: Path, meta: Mapping[str, Any]) -> None:
        """Into the cache; the model last, so that it is there with what it is checked on, or not at all."""
        described = io.BytesIO()
        digest = np.frombuffer(content_key(self.model), np.uint8)
        np.savez(described, digest=digest, pixels=self.pixels, features=self.features)
        describe_entry(entry, meta)
        write_entry_file(entry / "check.npz", described.getbuffer())
        write_entry_file(entry / "network.tflite", self.model)


def _read_network(entry: Path) -> _Network | None:
    """The converted network of the cache; None if it is not there, damaged, or disagrees on this machine."""
    try:
        model = (entry / "network.tflite").read_bytes()
        with np.load(entry / "check.npz") as described:
            network = _Network(model, described["pixels"], described["features"])
            whole = described["digest"].tobytes() == content_key(model)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if not whole:
        return None
    try:
        network.check()
    except TrainingError as error:
        _log.debug("%s is not used: %s", entry, error)
        return None
    mark_used(entry)
    return network


def _convert(backbone: keras.Model, pixels: _Pixels) -> _Network:
    # Frozen first, which takes a third of the time that converting the Keras model does.
    function = freeze_function(backbone, batch_size=1)
    model = tf.lite.TFLiteConverter.from_concrete_functions([function], tf.Module()).convert()
    return _Network(model, pixels, np.asarray(backbone(pixels, training=False), np.float32))


def _open_litert(network: _Network, lane_count: int) -> Engine:
    return Engine("litert", tuple(_litert_lane(network.model) for _ in range(lane_count)), _LITERT_BATCH)


def _litert_lane(model: bytes) -> _Lane:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=model, num_threads=1)
    interpreter.allocate_tensors()
    (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()

    def lane(pixels: Sequence[_Pixels]) -> _Features:
        features = np.empty((len(pixels), *target["shape"][1:]), np.float32)
        for row, image in enumerate(pixels):
            interpreter.set_tensor(source["index"], image[None])
            interpreter.invoke()
            features[row] = interpreter.get_tensor(target["index"])[0]
        return features

    return lane
