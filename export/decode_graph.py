"""decode.pb: `training.preprocess.decode_image` by itself, for engines other than TensorFlow.

A frozen GraphDef without variables: the placeholder "image_bytes" (string scalar, one encoded image) and the
output "pixels" (uint8 [side_px, side_px, 3]). It fails with InvalidArgumentError where `decode_image` does.
"""

from pathlib import Path

import tensorflow as tf

from graftserve.training.files import write_atomically
from graftserve.training.preprocess import Preprocess, decode_image

from .goldens import EXTRA

__all__ = ["DECODE_FILE", "decode_graph", "write_decode_graph"]

DECODE_FILE = f"{EXTRA}/decode.pb"


def decode_graph(preprocess: Preprocess) -> tf.compat.v1.GraphDef:
    """The graph; see the module."""
    with tf.Graph().as_default() as graph, tf.device("/device:CPU:0"):
        image_bytes = tf.compat.v1.placeholder(tf.string, [], "image_bytes")
        tf.identity(decode_image(image_bytes, preprocess), "pixels")
    return graph.as_graph_def()


def write_decode_graph(folder: Path, preprocess: Preprocess) -> None:
    """Write decode.pb into a version's folder, which has assets.extra."""
    with write_atomically(folder / DECODE_FILE, "wb") as file:
        file.write(decode_graph(preprocess).SerializeToString(deterministic=True))
