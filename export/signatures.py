"""The signatures of the model contract, from image bytes to answers, in one graph.

| signature         | input                            | outputs                                            |
|-------------------|----------------------------------|----------------------------------------------------|
| `serving_default` | `image_bytes` string[N]          | `classes` string [N, K], `scores` float32 [N, K]   |
|                   |                                  | descending, `probabilities` float32 [N, C],        |
|                   |                                  | `valid` bool [N]                                   |
| `features`        | `image_bytes` string[N]          | `features` float32 [N, D], `valid` bool [N]        |
| `pixels`          | `images` uint8[N, side, side, 3] | `classes`, `scores`, `probabilities`               |
| `classify`        | `inputs` string[N], tf.Example   | `classes`, `scores`, for TensorFlow Serving's      |
|                   |                                  | Classify API                                       |

A row whose bytes are no readable image has `valid` false, zero numbers and empty classes; its neighbours are
exact. Decoding runs in each request, in parallel and on the CPU; only the network is batched across requests,
those of all signatures together.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from graftserve.client.wire.contract import (
    CLASSIFY,
    EXAMPLES,
    FEATURES,
    IMAGE_BYTES,
    IMAGES,
    PIXELS,
    SERVING_DEFAULT,
    SIGNATURE_OUTPUTS,
)
from graftserve.training.preprocess import Preprocess, decode_image

from .batching import Batching, batch_network
from .network import FEATURES_OUTPUT, PROBABILITIES_OUTPUT, Network, SharedNetwork

__all__ = ["ServingModule", "available_outputs", "save_model"]

_DECODE_THREADS = 8  # for one request; decoding waits for nothing, so a few threads fill any CPU
_MOST_UNBATCHED = 1024  # images that one request may bring where no batcher says how many
_ENCODED = "image/encoded"  # as TF-Slim's shards and TensorFlow's object detection name it


class ServingModule(tf.Module):  # type: ignore[misc]
    """What `save_model` writes; `functions` maps the signatures' names to theirs.

    labels_file: one label a line, C lines; becomes assets/labels.txt.
    batching: None runs the network on each request by itself.
    top_k: K, at most C.
    outputs: the outputs of each signature that there is to be.
    """

    def __init__(
        self,
        network: Network,
        labels: Sequence[str],
        labels_file: Path,
        preprocess: Preprocess,
        batching: Batching | None,
        top_k: int,
        outputs: Mapping[str, Sequence[str]],
    ) -> None:
        super().__init__(name="graftserve")
        self.labels_asset = tf.saved_model.Asset(str(labels_file))
        self._labels = tuple(labels)
        self._preprocess = preprocess
        self._top_k = top_k
        self._widths = dict(network.widths)
        self._most = batching.max_request_images if batching else _MOST_UNBATCHED
        self.network = SharedNetwork(network)
        self._batched = batch_network(self.network.function, batching)

        side_px = preprocess.side_px
        encoded = tf.TensorSpec([None], tf.string, name=IMAGE_BYTES)
        pixels = tf.TensorSpec([None, side_px, side_px, 3], tf.uint8, name=IMAGES)
        methods: dict[str, tuple[Callable[[tf.Tensor], dict[str, tf.Tensor]], tf.TensorSpec]] = {
            SERVING_DEFAULT: (self._classify, encoded),
            FEATURES: (self._embed, encoded),
            PIXELS: (self._classify_pixels, pixels),
            CLASSIFY: (self._classify_examples, tf.TensorSpec([None], tf.string, name=EXAMPLES)),
        }
        self.functions = {
            name: tf.function(_only(methods[name][0], chosen), autograph=False).get_concrete_function(
                methods[name][1]
            )
            for name, chosen in outputs.items()
        }

    def _classify(self, image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        pixels, rows, valid = self._decode(image_bytes)
        row_count = tf.size(image_bytes)
        answers = self._answers(pixels)
        return {name: _scatter(values, rows, row_count) for name, values in answers.items()} | {
            "valid": valid
        }

    def _embed(self, image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        pixels, rows, valid = self._decode(image_bytes)
        features = self._run(pixels)[FEATURES_OUTPUT]
        return {"features": _scatter(features, rows, tf.size(image_bytes)), "valid": valid}

    def _classify_pixels(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        return self._answers(self._no_more_than_fit(images))

    def _classify_examples(self, inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        pixels, rows, _ = self._decode(inputs, _encoded_image)
        return {
            name: _scatter(values, rows, tf.size(inputs)) for name, values in self._answers(pixels).items()
        }

    def _answers(self, pixels: tf.Tensor) -> dict[str, tf.Tensor]:
        probabilities = self._run(pixels)[PROBABILITIES_OUTPUT]
        scores, indexes = tf.math.top_k(probabilities, self._top_k)
        classes = tf.gather(tf.constant(self._labels), indexes)
        return {"classes": classes, "scores": scores, "probabilities": probabilities}

    def _decode(
        self, rows: tf.Tensor, image_of: Callable[[tf.Tensor], tf.Tensor] = tf.identity
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        return _decode_rows(self._no_more_than_fit(rows), self._preprocess, image_of)

    def _no_more_than_fit(self, rows: tf.Tensor) -> tf.Tensor:
        """The rows, if the batcher takes as many: it would refuse them only after they were decoded."""
        message = f"Too many images in one request: expected at most {self._most}."
        with tf.control_dependencies(
            [tf.debugging.assert_less_equal(tf.shape(rows)[0], self._most, message)]
        ):
            return tf.identity(rows)

    def _run(self, pixels: tf.Tensor) -> dict[str, tf.Tensor]:
        """The network's outputs. Without a row the batcher is not asked: it would wait for one."""

        def some() -> list[tf.Tensor]:
            outputs = self._batched(pixels)
            return [
                tf.ensure_shape(output, [None, width])
                for output, width in zip(outputs, self._widths.values(), strict=True)
            ]

        def none() -> list[tf.Tensor]:
            return [tf.zeros([0, width]) for width in self._widths.values()]

        outputs = tf.cond(tf.shape(pixels)[0] > 0, some, none)
        return dict(zip(self._widths, tf.nest.flatten(outputs), strict=True))


def available_outputs(network: Network) -> dict[str, tuple[str, ...]]:
    """The signatures that a network can have, and all of their outputs."""
    return {
        name: outputs
        for name, outputs in SIGNATURE_OUTPUTS.items()
        if name != FEATURES or FEATURES_OUTPUT in network.widths
    }


def save_model(module: ServingModule, folder: Path) -> None:
    """Write the SavedModel into `folder`, which is there or not."""
    tf.saved_model.save(module, str(folder), signatures=module.functions)
    if CLASSIFY in module.functions:
        # Servers before 2.9, and later ones if told so, answer Classify only for a signature of this method.
        updater = tf.compat.v1.saved_model.signature_def_utils.MethodNameUpdater(str(folder))
        method = tf.compat.v1.saved_model.signature_constants.CLASSIFY_METHOD_NAME
        updater.replace_method_name(CLASSIFY, method, tags=tf.saved_model.SERVING)
        updater.save()


def _only(
    method: Callable[[tf.Tensor], dict[str, tf.Tensor]], outputs: Sequence[str]
) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
    def signature(rows: tf.Tensor) -> dict[str, tf.Tensor]:
        answers = method(rows)
        return {name: answers[name] for name in outputs}

    return signature


def _encoded_image(example: tf.Tensor) -> tf.Tensor:
    """The image (string scalar) in a serialized tf.Example (string scalar)."""
    feature = tf.io.FixedLenFeature([], tf.string)
    return tf.io.parse_single_example(example, {_ENCODED: feature})[_ENCODED]


def _decode_rows(
    encoded: tf.Tensor, preprocess: Preprocess, image_of: Callable[[tf.Tensor], tf.Tensor]
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Decode string [N]: pixels uint8 [M, side, side, 3] of the M readable rows, their indexes int64 [M]
    ascending, and valid bool [N].

    image_of: from a row to the encoded image in it. `tf.data` is what can drop a failing element inside a
    graph and keep the others.
    """
    side_px = preprocess.side_px
    with tf.device("/CPU:0"):
        row_count = tf.size(encoded, out_type=tf.int64)

        def decode(index: tf.Tensor, row: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            # Traced anew for each signature: as one function for all, a server took longer to prepare it.
            return index, decode_image(image_of(row), preprocess)

        decoded = (
            tf.data.Dataset.from_tensor_slices((tf.range(row_count), encoded))
            .map(decode, num_parallel_calls=_DECODE_THREADS)
            .ignore_errors(log_warning=False)
        )
        # One row that never fails, so that there is a batch even if every image is broken.
        sentinel = tf.data.Dataset.from_tensors((row_count, tf.zeros([side_px, side_px, 3], tf.uint8)))
        options = tf.data.Options()
        options.autotune.enabled = False
        options.experimental_optimization.apply_default_optimizations = False
        batch = decoded.concatenate(sentinel).batch(row_count + 1).with_options(options)
        indexes, pixels = batch.get_single_element()
        indexes, pixels = indexes[:-1], pixels[:-1]
        valid = tf.scatter_nd(indexes[:, None], tf.ones_like(indexes, tf.int32), row_count[None]) > 0
        return pixels, indexes, valid


def _scatter(values: tf.Tensor, rows: tf.Tensor, row_count: tf.Tensor) -> tf.Tensor:
    """Put values [M, W] at `rows` of [row_count, W]; zeros or empty strings elsewhere."""
    shape: Any = [tf.cast(row_count, tf.int64), values.shape[-1]]
    return tf.scatter_nd(rows[:, None], values, shape)
