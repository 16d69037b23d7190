"""Every form of an image to bytes."""

import io
import os
import warnings

import numpy as np
import pytest
from PIL import Image

from graftserve.client import InvalidImageError
from graftserve.client.images import encode_image

PIXELS = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
CONTENT = b"\xff\xd8 as it is \x00"


def decode(content):
    assert content.startswith(b"\x89PNG")
    return np.asarray(Image.open(io.BytesIO(content)))


@pytest.mark.parametrize(
    "image",
    [CONTENT, bytearray(CONTENT), memoryview(CONTENT), io.BytesIO(CONTENT)],
    ids=["bytes", "bytearray", "memoryview", "BytesIO"],
)
def test_encoded_images_pass_untouched(image):
    content = encode_image(image)
    assert type(content) is bytes
    assert content == CONTENT


@pytest.mark.parametrize("form", [str, os.fspath, lambda path: path, lambda path: path.open("rb")])
def test_files_pass_untouched(tmp_path, form):
    path = tmp_path / "größe.jpg"
    path.write_bytes(CONTENT)
    image = form(path)
    assert encode_image(image) == CONTENT
    if hasattr(image, "close"):
        image.close()


def test_a_file_is_read_from_where_it_stands():
    file = io.BytesIO(b"header" + CONTENT)
    file.seek(6)
    assert encode_image(file) == CONTENT


@pytest.mark.parametrize(
    ("array", "pixels"),
    [
        (PIXELS, PIXELS),
        (PIXELS[..., 0], PIXELS[..., 0]),
        (PIXELS[..., :1], PIXELS[..., 0]),
        (PIXELS[::-1, ::2], PIXELS[::-1, ::2]),
        (PIXELS[:1, :1], PIXELS[:1, :1]),
    ],
    ids=["colour", "grey", "one channel", "strided", "one pixel"],
)
def test_arrays_lose_nothing(array, pixels):
    np.testing.assert_array_equal(decode(encode_image(array)), pixels)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pil_images_lose_nothing(mode):
    image = Image.fromarray(PIXELS).convert(mode)
    np.testing.assert_array_equal(decode(encode_image(image)), np.asarray(image))


@pytest.mark.parametrize(
    ("mode", "sent"),
    [
        ("RGBA", "RGB"),
        ("P", "RGB"),
        ("CMYK", "RGB"),
        ("YCbCr", "RGB"),
        ("HSV", "RGB"),
        ("LA", "L"),
        ("1", "L"),
    ],
)
def test_other_pil_modes_are_converted(mode, sent):
    image = Image.fromarray(PIXELS).convert(mode)
    np.testing.assert_array_equal(decode(encode_image(image)), np.asarray(image.convert(sent)))


def test_transparency_is_dropped_not_blended():
    image = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    np.testing.assert_array_equal(decode(encode_image(image)), np.full((2, 2, 3), [10, 20, 30]))


def test_a_palette_with_transparency_gives_no_warning():
    image = Image.fromarray(PIXELS).convert("P")
    image.info["transparency"] = b"\x00\x01"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(decode(encode_image(image)), np.asarray(image.convert("RGBA"))[..., :3])


def test_a_transparent_colour_stays_behind():
    image = Image.new("RGB", (2, 2), (10, 20, 30))
    image.info["transparency"] = (10, 20, 30)
    assert b"tRNS" not in encode_image(image)


def test_what_tensorflow_decodes_is_what_was_passed(tensorflow):
    decoded = tensorflow.io.decode_image(encode_image(PIXELS), channels=3).numpy()
    np.testing.assert_array_equal(decoded, PIXELS)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "bytes of length 0"),
        (bytearray(), "bytearray of length 0"),
        (io.BytesIO(), "at its end"),
        (io.StringIO("text"), "read\\(\\) gave str"),
        (None, "got NoneType"),
        (7, "got int"),
        ("", "No such file"),
        ("a\0b", "null"),
        (np.zeros((4, 5, 3), np.float32), r"got float32 \[4, 5, 3\]"),
        (np.zeros((4, 5, 4), np.uint8), r"got uint8 \[4, 5, 4\]"),
        (np.zeros((2, 4, 5, 3), np.uint8), r"got uint8 \[2, 4, 5, 3\]"),
        (np.zeros((0, 5, 3), np.uint8), r"got uint8 \[0, 5, 3\]"),
        (np.zeros(5, np.uint8), r"got uint8 \[5\]"),
        (np.array(None), "got object"),
        (Image.new("F", (2, 2)), "mode F"),
        (Image.new("I", (2, 2)), "mode I"),
        (Image.new("I;16", (2, 2)), "mode I;16"),
        (Image.new("RGB", (0, 2)), "size 0 x 2"),
    ],
)
def test_what_is_no_image(image, message):
    with pytest.raises(InvalidImageError, match=message):
        encode_image(image)


def test_a_missing_file_keeps_its_cause(tmp_path):
    with pytest.raises(InvalidImageError, match=r"nowhere\.jpg.*No such file") as caught:
        encode_image(tmp_path / "nowhere.jpg")
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_folder_and_an_empty_file(tmp_path):
    with pytest.raises(InvalidImageError, match="directory"):
        encode_image(tmp_path)
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(InvalidImageError, match=r"empty\.jpg"):
        encode_image(tmp_path / "empty.jpg")


def test_a_closed_file():
    file = io.BytesIO(CONTENT)
    file.close()
    with pytest.raises(InvalidImageError, match="closed"):
        encode_image(file)


def test_a_pil_image_of_a_truncated_file():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(buffer, "JPEG")
    with pytest.raises(InvalidImageError, match="pixels can be read"):
        encode_image(Image.open(io.BytesIO(buffer.getvalue()[:-500])))
