"""decode.pb says what the function says that it was made from."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from graftserve.export import VerificationError
from graftserve.export.decode_graph import DECODE_FILE, check_decode_graph, decode_graph, write_decode_graph
from graftserve.training.preprocess import Preprocess, decode_image

PREPROCESS = Preprocess(side_px=96)


@pytest.fixture(scope="module")
def decode() -> Iterator[Callable[[bytes], Any]]:
    graph = tf.Graph()
    with graph.as_default():
        tf.graph_util.import_graph_def(decode_graph(PREPROCESS), name="")
    session = tf.compat.v1.Session(graph=graph)
    yield lambda content: session.run("pixels:0", {"image_bytes:0": content})
    session.close()


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_the_same_pixels(
    decode: Any, photos: dict[str, Any], encode: Callable[..., bytes], image_format: str
) -> None:
    content = encode(photos["coffee"], image_format)
    pixels = decode(content)
    assert pixels.shape == (96, 96, 3)
    np.testing.assert_array_equal(pixels, decode_image(tf.constant(content), PREPROCESS).numpy())


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff\xe0 cut"])
def test_what_is_no_image_is_refused(decode: Any, content: bytes) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode(content)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: write_decode_graph(folder, Preprocess(side_px=95)), "gives other pixels than"),
        (lambda folder: (folder / DECODE_FILE).write_bytes(b"no graph"), "damaged: "),
    ],
)
def test_a_graph_that_does_not_fit_is_told(
    photos: dict[str, Any],
    encode: Callable[..., bytes],
    tmp_path: Path,
    write: Callable[[Path], object],
    message: str,
) -> None:
    images = [encode(photo) for photo in photos.values()]
    pixels = np.stack([decode_image(tf.constant(image), PREPROCESS).numpy() for image in images])
    check_decode_graph(tmp_path, images, pixels)  # there is none
    (tmp_path / DECODE_FILE).parent.mkdir()
    write_decode_graph(tmp_path, PREPROCESS)
    check_decode_graph(tmp_path, images, pixels)
    write(tmp_path)
    with pytest.raises(VerificationError, match=message):
        check_decode_graph(tmp_path, images, pixels)
