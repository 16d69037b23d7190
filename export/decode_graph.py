"""decode.pb: `training.preprocess.decode_image` by itself, for engines other than TensorFlow.

A frozen GraphDef without variables: the placeholder "image_bytes" (string scalar, one encoded image) and the
output "pixels" (uint8 [side_px, side_px, 3]). It fails with InvalidArgumentError where `decode_image` does.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from google.protobuf.message import DecodeError

from graftserve.training.files import write_atomically
from graftserve.training.preprocess import Preprocess, decode_image

from .errors import VerificationError
from .goldens import EXTRA

__all__ = ["DECODE_FILE", "check_decode_graph", "decode_graph", "write_decode_graph"]

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


def check_decode_graph(folder: Path, images: Sequence[bytes], pixels: npt.NDArray[np.uint8]) -> None:
    """Compare what decode.pb makes of encoded images with their pixels, uint8 [N, side_px, side_px, 3].

    A version that has no such file passes. Raises VerificationError.
    """
    path = folder / DECODE_FILE
    if not path.exists():
        return
    graph = tf.Graph()
    try:
        with graph.as_default():
            tf.graph_util.import_graph_def(tf.compat.v1.GraphDef.FromString(path.read_bytes()), name="")
        with tf.compat.v1.Session(graph=graph) as session:
            decoded = [session.run("pixels:0", {"image_bytes:0": image}) for image in images]
    except (tf.errors.OpError, DecodeError, ValueError, KeyError) as error:
        raise VerificationError(f"{path}: damaged: {error}") from error
    if not all(map(np.array_equal, decoded, pixels)):
        raise VerificationError(f"{path}: gives other pixels than the version's own decoding")
