"""The one decode function, against Pillow on real photographs of every kind."""

import io
import resource

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from graftserve.training.images import HEAD_BYTES, image_format
from graftserve.training.preprocess import Preprocess, decode_image, explain_failure

CROP = Preprocess(224)
SQUASH = Preprocess(224, "squash")


def reference(encoded: bytes, preprocess: Preprocess) -> np.ndarray:
    """The same crop and scale by Pillow: its BILINEAR is a triangle filter, antialiased."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB")
    width, height = image.size
    if preprocess.resize == "crop":
        kept = min(width, height) * preprocess.crop_fraction
        box = ((width - kept) / 2, (height - kept) / 2, (width + kept) / 2, (height + kept) / 2)
    else:
        box = (0, 0, width, height)
    side = preprocess.side_px
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box=box))


def decode(encoded: bytes, preprocess: Preprocess) -> np.ndarray:
    return decode_image(tf.constant(encoded), preprocess).numpy()


def difference(encoded: bytes, preprocess: Preprocess) -> np.ndarray:
    return np.abs(decode(encoded, preprocess).astype(int) - reference(encoded, preprocess))


@pytest.mark.parametrize("preprocess", [CROP, SQUASH, Preprocess(299), Preprocess(64, "crop", 1.0)])
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "BMP", "GIF", "WEBP"])
@pytest.mark.parametrize("photo", ["chelsea", "coffee", "rocket"])
def test_agrees_with_pillow(photos, encode, photo: str, image_format: str, preprocess: Preprocess) -> None:
    encoded = encode(photos[photo], image_format)
    reduced = image_format == "JPEG" and preprocess.side_px == 64
    if reduced:  # decoded at half the size: a box filter of two pixels before the triangle
        assert difference(encoded, preprocess).mean() < 3
    else:
        assert difference(encoded, preprocess).max() <= 2


def test_a_large_photo_is_decoded_reduced_and_stays_close(photos, encode) -> None:
    large = Image.fromarray(photos["coffee"]).resize((4000, 3000), Image.Resampling.LANCZOS)
    assert difference(encode(large, quality=92), CROP).mean() < 0.6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("preprocess", [CROP, SQUASH])
def test_exif_orientation_is_applied(photos, encode, orientation: int, preprocess: Preprocess) -> None:
    image = Image.fromarray(photos["chelsea"])
    exif = image.getexif()
    exif[0x010F], exif[0x0112], exif[0x0132] = "maker", orientation, "2026:01:01 00:00:00"
    encoded = encode(image, exif=exif)
    assert difference(encoded, preprocess).max() <= 2
    if orientation > 1:
        assert np.abs(decode(encoded, preprocess).astype(int) - decode(encode(image), preprocess)).max() > 50


def big_endian_exif(orientation: int) -> bytes:
    entry = bytes.fromhex("01120003000000010000")[:8] + orientation.to_bytes(2) + b"\0\0"
    return b"Exif\0\0MM\0*" + (8).to_bytes(4) + (1).to_bytes(2) + entry + b"\0\0\0\0"


def test_big_endian_exif(photos, encode) -> None:
    encoded = encode(photos["chelsea"], exif=big_endian_exif(6))
    assert Image.open(io.BytesIO(encoded)).getexif()[0x0112] == 6
    assert difference(encoded, CROP).max() <= 2


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01",
        big_endian_exif(0),
        big_endian_exif(9),
    ],
)
def test_damaged_exif_is_no_orientation(photos, encode, exif: bytes) -> None:
    damaged = decode(encode(photos["chelsea"], exif=exif), CROP)
    np.testing.assert_array_equal(damaged, decode(encode(photos["chelsea"]), CROP))


@pytest.mark.parametrize(
    ("mode", "image_format"),
    [
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("L", "PNG"),
        ("LA", "PNG"),
        ("RGBA", "PNG"),
        ("P", "PNG"),
        ("1", "PNG"),
        ("L", "WEBP"),
        ("LA", "WEBP"),
    ],
)
def test_every_colour_mode_decodes(photos, encode, mode: str, image_format: str) -> None:
    image = Image.fromarray(photos["coffee"]).convert(mode)
    assert decode(encode(image, image_format), CROP).shape == (224, 224, 3)


def test_cmyk_and_progressive_agree_with_pillow(photos, encode) -> None:
    image = Image.fromarray(photos["coffee"])
    assert difference(encode(image, progressive=True), CROP).max() <= 2
    assert difference(encode(image.convert("CMYK"), quality=95), CROP).mean() < 2


def test_sixteen_bit_png(photos, encode) -> None:
    grey = np.asarray(Image.fromarray(photos["coffee"]).convert("L"))
    sixteen = decode(encode(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"), CROP)
    np.testing.assert_array_equal(sixteen, decode(encode(grey, "PNG"), CROP))


@pytest.mark.parametrize("size", [(1, 1), (3, 5000), (5000, 3), (224, 224), (7, 7)])
def test_extreme_sizes(encode, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (200, 100, 50))
    pixels = decode(encode(image, "PNG"), CROP)
    assert np.abs(pixels.astype(int) - (200, 100, 50)).max() <= 1


def test_a_gif_gives_its_first_frame(encode) -> None:
    red, blue = Image.new("RGB", (50, 50), "red"), Image.new("RGB", (50, 50), "blue")
    animated = encode(red, "GIF", save_all=True, append_images=[blue])
    np.testing.assert_array_equal(decode(animated, CROP)[0, 0], (255, 0, 0))


def with_alpha(pixels: np.ndarray) -> Image.Image:
    """Opaque on the left, half transparent in the middle, invisible on the right."""
    image = Image.fromarray(pixels).convert("RGBA")
    alpha = np.repeat([255, 100, 0], [150, 150, image.width - 300]).astype(np.uint8)
    image.putalpha(Image.fromarray(np.tile(alpha, (image.height, 1))))
    return image


@pytest.mark.parametrize("preprocess", [CROP, SQUASH])
@pytest.mark.parametrize(
    "options",
    [{}, {"lossless": True}, {"lossless": True, "exact": True}, {"quality": 60, "alpha_quality": 50}],
)
@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("animated", [False, True])
def test_every_kind_of_webp_agrees_with_pillow(
    photos, encode, preprocess: Preprocess, options: dict, alpha: bool, animated: bool
) -> None:
    image = with_alpha(photos["chelsea"]) if alpha else Image.fromarray(photos["chelsea"])
    more = {"save_all": True, "append_images": [image.rotate(180)]} if animated else {}
    encoded = encode(image, "WEBP", **options, **more)
    assert getattr(Image.open(io.BytesIO(encoded)), "n_frames", 1) == 1 + animated
    assert difference(encoded, preprocess).max() <= 2


def test_webp_decodes_in_a_graph(photos, encode) -> None:
    graph = tf.function(lambda image: decode_image(image, CROP), [tf.TensorSpec([], tf.string)])
    for image in (photos["chelsea"], with_alpha(photos["chelsea"])):
        for more in ({}, {"save_all": True, "append_images": [Image.new("RGBA", (451, 300))]}):
            encoded = encode(image, "WEBP", **more)
            np.testing.assert_array_equal(graph(tf.constant(encoded)), decode(encoded, CROP))


def test_the_orientation_of_a_webp_is_not_applied(photos, encode) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(photos["chelsea"], "WEBP", exif=exif)
    assert turned[12:16] == b"VP8X"
    np.testing.assert_array_equal(decode(turned, CROP), decode(encode(photos["chelsea"], "WEBP"), CROP))


def webp(chunk: bytes, content: bytes) -> bytes:
    body = b"WEBP" + chunk + len(content).to_bytes(4, "little") + content
    return b"RIFF" + len(body).to_bytes(4, "little") + body


def claimed_webp(width: int, height: int, flags: int = 0) -> bytes:
    sides = [(side - 1).to_bytes(3, "little") for side in (width, height)]
    return webp(b"VP8X", bytes([flags, 0, 0, 0]) + b"".join(sides))


def test_a_webp_larger_than_it_claims_is_refused(photos, encode) -> None:
    still = encode(photos["chelsea"], "WEBP")
    body = claimed_webp(10, 10)[12:] + still[12:]
    encoded = b"RIFF" + (4 + len(body)).to_bytes(4, "little") + b"WEBP" + body
    assert "WebP" in str(explain_failure(encoded, CROP))
    fitting = encoded.replace(claimed_webp(10, 10)[12:], claimed_webp(451, 300)[12:])
    np.testing.assert_array_equal(decode(fitting, CROP), decode(still, CROP))


def claimed_png(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + width.to_bytes(4) + height.to_bytes(4) + b"\x08\x02\0\0\0"


def claimed_jpeg(encoded: bytes, width: int, height: int) -> bytes:
    start = encoded.index(b"\xff\xc0") + 5
    return encoded[:start] + height.to_bytes(2) + width.to_bytes(2) + encoded[start + 4 :]


def test_what_is_no_image_is_refused_with_a_reason(photos, encode) -> None:
    jpeg = encode(photos["chelsea"])
    for content, reason in [
        (b"", "empty"),
        (b"hello", "Unknown image format"),
        (jpeg[:100], "JPEG"),
        (jpeg[: len(jpeg) // 2], "JPEG"),
        (encode(photos["chelsea"], "PNG")[:5000], "PNG"),
        (claimed_png(65500, 65500), "Image too large: expected at most 100000000 pixels"),
        (claimed_png(2**31, 1), "its header gives no size"),
        (claimed_jpeg(jpeg, 65500, 65500), "Image too large"),
        (b"GIF89a" + b"\xff\xff\xff\xff", "Image too large"),
        (b"BM", "its header gives no size"),
        (encode(photos["chelsea"], "WEBP")[:5000], "WebP"),
        (encode(photos["chelsea"], "WEBP", lossless=True)[:5000], "WebP"),
        (
            encode(photos["chelsea"], "WEBP", save_all=True, append_images=[Image.new("RGB", (451, 300))])[
                :5000
            ],
            "WebP",
        ),
        (b"RIFF\0\0\0\0WEBP", "its header gives no size"),
        (b"RIFF\0\0\0\0WAVEfmt ", "Unknown image format"),
        (webp(b"ABCD", bytes(20)), "its header gives no size"),
        (claimed_webp(2**24, 2**24), "Image too large"),
        (claimed_webp(10_001, 10_000), "Image too large"),
        (claimed_webp(10_001, 10_000, flags=0x02), "Image too large"),
        (claimed_webp(10_000, 10_000), "WebP"),
        (webp(b"VP8L", b"\x2f\xff\xff\xff\xff"), "Image too large"),
        (webp(b"VP8 ", b"\0\0\0\x9d\x01\x2a\xff\x3f\xff\x3f"), "Image too large"),
    ]:
        failure = explain_failure(content, CROP)
        assert failure is not None
        assert reason in str(failure)
        assert "\n" not in str(failure)
    assert explain_failure(jpeg, CROP) is None


def test_format_is_told_by_content(photos, encode) -> None:
    for name in ("JPEG", "PNG", "GIF", "BMP", "WEBP"):
        assert image_format(encode(photos["chelsea"], name)[:HEAD_BYTES]) == name.lower()
    assert image_format(b"RIFF") is None
    assert image_format(b"RIFF\0\0\0\0WAVE") is None
    assert image_format(b"") is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"side_px": 0}, "side_px: expected at least 1, got 0"),
        ({"side_px": 8, "resize": "zoom"}, "resize: expected one of crop, squash"),
        ({"side_px": 8, "crop_fraction": 1.5}, r"crop_fraction: expected a number in \(0, 1\]"),
        ({"side_px": 8, "max_pixels": 63}, "max_pixels: expected at least 64"),
    ],
)
def test_settings_are_checked(values, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocess(**values)


def test_settings_survive_json() -> None:
    assert Preprocess.from_dict(SQUASH.to_dict()) == SQUASH
    with pytest.raises(ValueError, match="revision: expected 1, got 99"):
        Preprocess.from_dict(SQUASH.to_dict() | {"revision": 99})
    with pytest.raises(ValueError, match="colour"):
        Preprocess.from_dict(SQUASH.to_dict() | {"colour": 1})


def segments(encoded: bytes) -> list[bytes]:
    """A JPEG's marker segments up to the first quantisation table, and the rest as the last item."""
    parts, offset = [encoded[:2]], 2
    while encoded[offset + 1] != 0xDB:
        length = int.from_bytes(encoded[offset + 2 : offset + 4])
        parts.append(encoded[offset : offset + 2 + length])
        offset += 2 + length
    return [*parts, encoded[offset:]]


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2) + content


@pytest.mark.parametrize(
    "before",
    [
        segment(0xE0, b"JFIF\0\x01\x01\0\0\x01\0\x01\0\0"),
        segment(0xFE, b"a comment that says Exif\0 and means nothing"),
        segment(0xE2, b"ICC_PROFILE\0\x01\x01" + bytes(3000)),
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>"),
    ],
)
def test_other_segments_may_stand_before_exif(photos, encode, before: bytes) -> None:
    plain = segments(encode(photos["chelsea"]))
    encoded = b"".join([plain[0], before, segment(0xE1, big_endian_exif(6)), plain[-1]])
    assert Image.open(io.BytesIO(encoded)).getexif()[0x0112] == 6
    assert difference(encoded, CROP).max() <= 2


def test_ycck_agrees_with_pillow(photos, encode) -> None:
    """CMYK as YCCK, which Adobe's marker tells: the same planes, read as luma and chroma."""
    cmyk = encode(Image.fromarray(photos["coffee"]).convert("CMYK"), quality=95)
    place = cmyk.index(b"Adobe")
    assert cmyk[place + 11] == 0
    ycck = cmyk[: place + 11] + b"\x02" + cmyk[place + 12 :]
    image = Image.open(io.BytesIO(ycck))
    assert (image.mode, image.info["adobe_transform"]) == ("CMYK", 2)
    assert difference(ycck, CROP).mean() < 2


def test_sixteen_bit_rgb_png(photos) -> None:
    """Pillow writes none, so TensorFlow does."""
    encoded = tf.io.encode_png(photos["coffee"].astype(np.uint16) * 257).numpy()
    eight = tf.io.encode_png(photos["coffee"]).numpy()
    np.testing.assert_array_equal(decode(encoded, CROP), decode(eight, CROP))


def test_a_header_that_claims_too_much_costs_nothing(photos, encode) -> None:
    """65,500 x 65,500 pixels of RGB are 12.9 GB."""
    jpeg = encode(photos["chelsea"])
    for claimed in (claimed_png(65500, 65500), claimed_jpeg(jpeg, 65500, 65500)):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(20):
            with pytest.raises(tf.errors.InvalidArgumentError, match="Image too large"):
                decode(claimed, CROP)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
