"""The signatures of the model contract, from image bytes to answers, in one graph.

| signature         | input                   | outputs                                                      |
|-------------------|-------------------------|--------------------------------------------------------------|
| `serving_default` | `image_bytes` string[N] | `classes` string [N, K], `scores` float32 [N, K] descending, |
|                   |                         | `probabilities` float32 [N, C], `valid` bool [N]             |
| `features`        | `image_bytes` string[N] | `features` float32 [N, D], `valid` bool [N]                  |

A row whose bytes are no readable image has `valid` false, zero numbers and empty classes; its neighbours are
exact. Decoding runs in each request, in parallel and on the CPU; only the network is batched across requests.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from graftserve.client.wire.contract import FEATURES, IMAGE_BYTES, SERVING_DEFAULT
from graftserve.training.network import freeze
from graftserve.training.preprocess import Preprocess, decode_image

from .batching import Batching, batch_network

__all__ = ["ServingModule"]

_DECODE_THREADS = 8  # for one request; decoding waits for nothing, so a few threads fill any CPU


class ServingModule(tf.Module):  # type: ignore[misc]
    """What `tf.saved_model.save` writes; `functions` maps the signatures' names to theirs.

    model: pixels uint8 [N, side, side, 3] to {"features", "probabilities"}.
    labels_file: one label a line, C lines; becomes assets/labels.txt.
    top_k: K, at most C.
    """

    def __init__(
        self,
        model: keras.Model,
        labels: Sequence[str],
        labels_file: Path,
        preprocess: Preprocess,
        batching: Batching,
        top_k: int,
    ) -> None:
        super().__init__(name="graftserve")
        self.labels_asset = tf.saved_model.Asset(str(labels_file))
        self._labels = tuple(labels)
        self._preprocess = preprocess
        self._top_k = top_k
        self._network = _by_name(model)
        self._feature_count = model.output["features"].shape[-1]
        self._batching = batching
        image_bytes = tf.TensorSpec([None], tf.string, name=IMAGE_BYTES)
        self.functions = {
            name: tf.function(method, autograph=False).get_concrete_function(image_bytes)
            for name, method in ((SERVING_DEFAULT, self._classify), (FEATURES, self._embed))
        }

    def _classify(self, image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        row_count = tf.size(image_bytes)
        pixels, rows, valid = self._decode(image_bytes)
        probabilities = self._run(pixels, "probabilities", len(self._labels))
        scores, indexes = tf.math.top_k(probabilities, self._top_k)
        classes = tf.gather(tf.constant(self._labels), indexes)
        return {
            "classes": _scatter(classes, rows, row_count),
            "scores": _scatter(scores, rows, row_count),
            "probabilities": _scatter(probabilities, rows, row_count),
            "valid": valid,
        }

    def _embed(self, image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        pixels, rows, valid = self._decode(image_bytes)
        features = self._run(pixels, "features", self._feature_count)
        return {"features": _scatter(features, rows, tf.size(image_bytes)), "valid": valid}

    def _decode(self, image_bytes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """`_decode_rows`, for no more images than the batcher takes: it would refuse them only afterwards."""
        most = self._batching.max_request_images
        message = f"Too many images in one request: expected at most {most}."
        with tf.control_dependencies([tf.debugging.assert_less_equal(tf.size(image_bytes), most, message)]):
            return _decode_rows(tf.identity(image_bytes), self._preprocess)

    def _run(self, pixels: tf.Tensor, output: str, width: int) -> tf.Tensor:
        """float32 [rows, width]. Without a row the batcher is not asked: it would wait for one."""

        def some() -> tf.Tensor:
            batched = batch_network(lambda rows: [self._network(rows)[output]], self._batching)
            return tf.ensure_shape(tf.nest.flatten(batched(pixels))[0], [None, width])

        return tf.cond(tf.shape(pixels)[0] > 0, some, lambda: tf.zeros([0, width]))


def _by_name(model: keras.Model) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
    frozen = freeze(model)
    names = sorted(model.output)  # the order in which TensorFlow flattens a dictionary
    return lambda pixels: dict(zip(names, frozen(pixels), strict=True))


def _decode_rows(image_bytes: tf.Tensor, preprocess: Preprocess) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Decode string [N]: pixels uint8 [M, side, side, 3] of the M readable rows, their indexes int64 [M]
    ascending, and valid bool [N].

    `tf.data` is what can drop a failing element inside a graph and keep the others.
    """
    side_px = preprocess.side_px
    with tf.device("/CPU:0"):
        row_count = tf.size(image_bytes, out_type=tf.int64)

        def decode(row: tf.Tensor, encoded: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return row, decode_image(encoded, preprocess)

        decoded = (
            tf.data.Dataset.from_tensor_slices((tf.range(row_count), image_bytes))
            .map(decode, num_parallel_calls=_DECODE_THREADS)
            .ignore_errors(log_warning=False)
        )
        # One row that never fails, so that there is a batch even if every image is broken.
        sentinel = tf.data.Dataset.from_tensors((row_count, tf.zeros([side_px, side_px, 3], tf.uint8)))
        options = tf.data.Options()
        options.autotune.enabled = False
        options.experimental_optimization.apply_default_optimizations = False
        batch = decoded.concatenate(sentinel).batch(row_count + 1).with_options(options)
        rows, pixels = batch.get_single_element()
        rows, pixels = rows[:-1], pixels[:-1]
        valid = tf.scatter_nd(rows[:, None], tf.ones_like(rows, tf.int32), row_count[None]) > 0
        return pixels, rows, valid


def _scatter(values: tf.Tensor, rows: tf.Tensor, row_count: tf.Tensor) -> tf.Tensor:
    """Put values [M, W] at `rows` of [row_count, W]; zeros or empty strings elsewhere."""
    shape: Any = [tf.cast(row_count, tf.int64), values.shape[-1]]
    return tf.scatter_nd(rows[:, None], values, shape)
