"""The one function that turns image bytes into a network's input.

Training, the feature cache, the exported signatures and the goldens all call `decode_image`, so that what
a model learns from and what it is served are the same pixels.

In order: refuse by the header what would cost too much to decode; decode, a JPEG straight at 1/2, 1/4 or 1/8
of its size where that still leaves enough pixels; resize with antialiasing; turn as the EXIF orientation
says (last, on the small square: both ways of resizing treat the two axes alike).

The orientation is applied here and nowhere else, so clients send files as they are. Looking for it costs 0.1
of the 1 to 2 ms of a small photograph, and with the turn 0.3 of the 27 ms of a camera's 12 megapixels
(benchmarks/decode.py).
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import tensorflow as tf

from .errors import ImageError
from .images import HEAD_BYTES, SIGNATURES

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "Preprocess",
    "decode_image",
    "decode_images",
    "explain_failure",
    "image_decoder",
]

DEFAULT_MAX_PIXELS = 100_000_000
"""Largest image decoded: 100 megapixels, 300 MB of RGB; a tiny file can claim 65,500 x 65,500."""

_REVISION = 1  # raise it when the pixels that decode_image gives change: it is part of the cache's key

Resize = Literal["crop", "squash"]

_KINDS = tuple(SIGNATURES)
_JPEG, _WEBP, _UNKNOWN = _KINDS.index("jpeg"), _KINDS.index("webp"), len(_KINDS)
_ANYWHERE_EXIF = r"\C*Exif\x00\x00\C*"  # \C is any byte
_WEBP_ANIMATION, _WEBP_ALPHA = 0x02, 0x10  # flags of the VP8X chunk


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes pixels; recorded in the run and in the contract.

    side_px: side of the square that the network sees.
    resize: "crop" scales the shorter side to side_px / crop_fraction and keeps the middle;
        "squash" scales both sides to side_px, whatever the aspect.
    crop_fraction: (0, 1], the share of the shorter side that "crop" keeps (0.875 is the field's custom).
    max_pixels: images with more are refused before they are decoded.
    Raises ValueError if a value is out of its range.
    """

    side_px: int
    resize: Resize = "crop"
    crop_fraction: float = 0.875
    max_pixels: int = DEFAULT_MAX_PIXELS

    def __post_init__(self) -> None:
        if self.side_px < 1:
            raise ValueError(f"side_px: expected at least 1, got {self.side_px}")
        if self.resize not in get_args(Resize):
            raise ValueError(f"resize: expected one of {', '.join(get_args(Resize))}, got {self.resize!r}")
        if not 0.0 < self.crop_fraction <= 1.0:
            raise ValueError(f"crop_fraction: expected a number in (0, 1], got {self.crop_fraction}")
        if self.max_pixels < self.side_px**2:
            raise ValueError(f"max_pixels: expected at least {self.side_px**2}, got {self.max_pixels}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the revision of the decoding itself."""
        return asdict(self) | {"revision": _REVISION}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocess":
        """The inverse of `to_dict`; raises ValueError for another revision or unknown keys."""
        revision = values.get("revision")
        if revision != _REVISION:
            raise ValueError(f"preprocess revision: expected {_REVISION}, got {revision}; train again")
        try:
            return cls(**{key: value for key, value in values.items() if key != "revision"})
        except TypeError as error:
            raise ValueError(f"preprocess: {error}") from error


@tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
def decode_image(image_bytes: tf.Tensor, preprocess: Preprocess) -> tf.Tensor:
    """Pixels uint8 [side_px, side_px, 3], RGB, of one encoded image (string scalar).

    JPEG (grayscale and CMYK too), PNG, BMP, WebP, and the first frame of a GIF or an animated WebP, told
    apart by content. Alpha is dropped, as Pillow's convert("RGB") does. The EXIF orientation is applied in
    JPEG and passed over in WebP and PNG, which cameras do not write.
    Runs in graph mode and eagerly; raises tf.errors.InvalidArgumentError for bytes that are none of these,
    are truncated, or hold more than `max_pixels`.
    """
    kind = _sniff(image_bytes)
    is_jpeg = tf.equal(kind, _JPEG)
    height_px, width_px = _header_size(image_bytes, kind)
    pixel_count = tf.cast(height_px, tf.int64) * tf.cast(width_px, tf.int64)
    with tf.control_dependencies(
        [
            tf.debugging.assert_less(
                kind, _UNKNOWN, "Unknown image format: expected JPEG, PNG, GIF, BMP or WebP."
            ),
            tf.debugging.assert_positive(pixel_count, "Damaged image: its header gives no size."),
            tf.debugging.assert_less_equal(
                pixel_count,
                tf.constant(preprocess.max_pixels, tf.int64),
                f"Image too large: expected at most {preprocess.max_pixels} pixels.",
            ),
        ]
    ):
        image_bytes = tf.identity(image_bytes)

    image = tf.cond(
        is_jpeg,
        lambda: _decode_jpeg_reduced(image_bytes, tf.minimum(height_px, width_px), preprocess),
        lambda: tf.cond(
            tf.equal(kind, _WEBP),
            lambda: _decode_webp(image_bytes),
            lambda: tf.io.decode_image(image_bytes, channels=3, expand_animations=False),
        ),
    )
    image.set_shape([None, None, 3])
    image = _resize(image, preprocess)
    orientation = tf.cond(is_jpeg, lambda: _exif_orientation(image_bytes), lambda: tf.constant(1))
    return tf.ensure_shape(_orient(image, orientation), [preprocess.side_px, preprocess.side_px, 3])


@functools.cache
def image_decoder(preprocess: Preprocess) -> Callable[[tf.Tensor], tf.Tensor]:
    """`decode_image` as a graph on the CPU, for eager callers of many images; several threads may run it."""

    def decode(image_bytes: tf.Tensor) -> tf.Tensor:
        with tf.device("/device:CPU:0"):
            return decode_image(image_bytes, preprocess)

    graph = tf.function(decode, input_signature=[tf.TensorSpec([], tf.string)], autograph=False)
    concrete: Callable[[tf.Tensor], tf.Tensor] = graph.get_concrete_function()
    return concrete


def decode_images(images: Sequence[bytes], preprocess: Preprocess) -> tf.Tensor:
    """Pixels uint8 [N, side_px, side_px, 3] of N encoded images, eagerly; raises as `decode_image` does."""
    decode = image_decoder(preprocess)
    return tf.stack([decode(tf.constant(image)) for image in images])


def explain_failure(image_bytes: bytes, preprocess: Preprocess) -> ImageError | None:
    """Why `decode_image` refuses these bytes, in one line; None if it does not."""
    if not image_bytes:
        return ImageError("the file is empty")
    try:
        decode_image(tf.constant(image_bytes), preprocess)
    except (tf.errors.OpError, ValueError) as error:
        message = getattr(error, "message", None) or str(error)
        first_line = message.strip().splitlines()[0].partition("[Op:")[0]
        return ImageError((first_line.partition("}} ")[2] or first_line).rstrip(" ."))
    return None


def _needed_short_side_px(preprocess: Preprocess) -> int:
    """The shorter side below which decoding reduced would leave the network to enlarge pixels."""
    kept_fraction = preprocess.crop_fraction if preprocess.resize == "crop" else 1.0
    return math.ceil(preprocess.side_px / kept_fraction)


def _sniff(image_bytes: tf.Tensor) -> tf.Tensor:
    head = tf.strings.join([tf.strings.substr(image_bytes, 0, HEAD_BYTES), b"\0" * HEAD_BYTES])
    kind = tf.constant(_UNKNOWN)
    for candidate, parts in enumerate(SIGNATURES.values()):
        found = [tf.equal(tf.strings.substr(head, offset, len(part)), part) for offset, part in parts]
        kind = tf.where(tf.reduce_all(found), candidate, kind)
    return kind


def _integer(image_bytes: tf.Tensor, offset: int, size: int, *, big_endian: bool) -> tf.Tensor:
    """The unsigned integer at `offset`; 0 if the bytes end before it."""
    padded = tf.strings.join([tf.strings.substr(image_bytes, 0, offset + size), b"\0" * (offset + size)])
    values = tf.cast(tf.io.decode_raw(tf.strings.substr(padded, offset, size), tf.uint8), tf.int32)
    weights = [256**power for power in range(size)]
    return tf.reduce_sum(values * tf.constant(weights[::-1] if big_endian else weights, tf.int32))


def _header_size(image_bytes: tf.Tensor, kind: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Height and width (int32 scalars) as the header claims them, without decoding."""

    def jpeg() -> tuple[tf.Tensor, tf.Tensor]:
        shape = tf.io.extract_jpeg_shape(image_bytes)
        return shape[0], shape[1]

    def png() -> tuple[tf.Tensor, tf.Tensor]:  # IHDR is always the first chunk
        return _integer(image_bytes, 20, 4, big_endian=True), _integer(image_bytes, 16, 4, big_endian=True)

    def gif() -> tuple[tf.Tensor, tf.Tensor]:  # the logical screen, which holds every frame
        return _integer(image_bytes, 8, 2, big_endian=False), _integer(image_bytes, 6, 2, big_endian=False)

    def bmp() -> tuple[tf.Tensor, tf.Tensor]:  # BITMAPINFOHEADER; a negative height means top row first
        return (
            tf.abs(_integer(image_bytes, 22, 4, big_endian=False)),
            _integer(image_bytes, 18, 4, big_endian=False),
        )

    def unknown() -> tuple[tf.Tensor, tf.Tensor]:
        return tf.constant(1), tf.constant(1)

    sizes = {"jpeg": jpeg, "png": png, "gif": gif, "bmp": bmp, "webp": lambda: _webp_size(image_bytes)}
    height_px, width_px = tf.switch_case(kind, [*(sizes[name] for name in _KINDS), unknown])
    return height_px, width_px


def _webp_size(image_bytes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Height and width (int32 scalars) as the first chunk claims them; 0 for a chunk that there is none of.

    The decoder refuses a still image that is not of the size that VP8X claims, so the claim bounds it.
    Source: RFC 9649, 2.5 (lossy), 2.6 (lossless), 2.7 (VP8X) and 3.4; RFC 6386, 9.1.
    """
    chunk = _integer(image_bytes, 12, 4, big_endian=True)

    def side(offset: int, size: int, shift: int = 0, bits: int = 24) -> tf.Tensor:
        value = tf.bitwise.right_shift(_integer(image_bytes, offset, size, big_endian=False), shift)
        return tf.bitwise.bitwise_and(value, 2**bits - 1)

    by_chunk = {
        b"VP8X": lambda: (side(27, 3) + 1, side(24, 3) + 1),
        b"VP8L": lambda: (side(21, 4, 14, 14) + 1, side(21, 4, 0, 14) + 1),
        b"VP8 ": lambda: (side(28, 2, 0, 14), side(26, 2, 0, 14)),
    }
    height_px, width_px = tf.case(
        [(tf.equal(chunk, int.from_bytes(name)), size) for name, size in by_chunk.items()],
        default=lambda: (tf.constant(0), tf.constant(0)),
    )
    return height_px, width_px


def _decode_webp(image_bytes: tf.Tensor) -> tf.Tensor:
    """Pixels uint8 [h, w, 3]; of an animation, its first frame.

    TensorFlow wants to be asked for the channels that the file has, or to choose them. Of an animation it
    always writes four; if it may choose, and the file claims no alpha, it does so into room for three, past
    its end. So of an animation it must be asked for four, and the file made to claim them.
    """
    flags = _integer(image_bytes, 20, 1, big_endian=False)
    is_extended = tf.equal(tf.strings.substr(image_bytes, 12, 4), b"VP8X")
    is_animation = is_extended & tf.not_equal(tf.bitwise.bitwise_and(flags, _WEBP_ANIMATION), 0)

    def first_frame() -> tf.Tensor:
        with_alpha = tf.gather(
            [bytes([flags]) for flags in range(256)], tf.bitwise.bitwise_or(flags, _WEBP_ALPHA)
        )
        parts = [tf.strings.substr(image_bytes, 0, 20), with_alpha, tf.strings.substr(image_bytes, 21, -1)]
        return tf.io.decode_image(tf.strings.join(parts), channels=4, expand_animations=False)

    def still() -> tf.Tensor:
        return tf.io.decode_image(image_bytes, channels=0, expand_animations=False)

    return tf.cond(is_animation, first_frame, still)[..., :3]


def _decode_jpeg_reduced(
    image_bytes: tf.Tensor, short_side_px: tf.Tensor, preprocess: Preprocess
) -> tf.Tensor:
    """Decode in the DCT domain at the largest reduction that leaves at least the target's short side.

    Source: libjpeg's scaled decoding (libjpeg.txt, scale_num and scale_denom), which averages exactly over
    the 2, 4 or 8 pixels it merges, so the antialiased resize that follows loses nothing.
    """
    target_px = _needed_short_side_px(preprocess)
    reductions = (1, 2, 4, 8)

    def decode(reduction: int) -> tf.Tensor:
        return tf.io.decode_jpeg(
            image_bytes, channels=3, ratio=reduction, dct_method="INTEGER_ACCURATE", fancy_upscaling=True
        )

    enough = [tf.cast(short_side_px >= target_px * reduction, tf.int32) for reduction in reductions[1:]]
    return tf.switch_case(
        tf.add_n(enough), [lambda reduction=reduction: decode(reduction) for reduction in reductions]
    )


def _resize(image: tf.Tensor, preprocess: Preprocess) -> tf.Tensor:
    """uint8 [h, w, 3] to uint8 [side_px, side_px, 3]; bilinear, antialiased when it shrinks.

    One resampling crops and scales about the image's exact middle, between pixels where need be, so that
    turning the result is the same as turning the image.
    """
    side_px = preprocess.side_px
    height_px, width_px = tf.unstack(tf.shape(image)[:2])
    size_px = tf.cast([height_px, width_px], tf.float32)
    if preprocess.resize == "crop":
        kept_px = tf.fill([2], tf.reduce_min(size_px) * preprocess.crop_fraction)
    else:
        kept_px = size_px
    scale = side_px / kept_px
    translation = (side_px - size_px * scale) / 2
    rows = _scale_rows(tf.reshape(image, [height_px, width_px * 3]), side_px, scale[0], translation[0])
    columns = tf.transpose(tf.reshape(rows, [side_px, width_px, 3]), [1, 0, 2])
    scaled = _scale_rows(tf.reshape(columns, [width_px, side_px * 3]), side_px, scale[1], translation[1])
    resized = tf.cast(tf.round(scaled), tf.uint8)  # weights are positive with the sum 1: nothing to clip
    return tf.transpose(tf.reshape(resized, [side_px, side_px, 3]), [1, 0, 2])


def _scale_rows(rows: tf.Tensor, count: int, scale: tf.Tensor, translation: tf.Tensor) -> tf.Tensor:
    """Rows [h, K] resampled to float32 [count, K], along the first axis only.

    TensorFlow's kernel adds whole rows of K numbers to each other, but pixels within a row three numbers at a
    time: both axes as rows take less than half the time of one call for both.
    """
    resampled: tf.Tensor = tf.raw_ops.ScaleAndTranslate(
        images=rows[None, :, None, :],
        size=[count, 1],
        scale=tf.stack([scale, 1.0]),
        translation=tf.stack([translation, 0.0]),
        kernel_type="triangle",
        antialias=True,
    )[0, :, 0, :]
    return resampled


def _exif_orientation(image_bytes: tf.Tensor) -> tf.Tensor:
    """The EXIF orientation (1 to 8; int32 scalar) of a JPEG; 1 where there is none or it is damaged.

    Source: Exif 2.3, 4.5.4 (APP1, at the file's start) and 4.6.2 (a TIFF header, then IFD0 with entries of
    12 bytes); the tag is 0x0112, a SHORT.
    """
    # One regular expression tells that there is none, which is so for most images but a camera's.
    head_bytes = tf.strings.substr(image_bytes, 0, 65536)
    return tf.cond(
        tf.strings.regex_full_match(head_bytes, _ANYWHERE_EXIF),
        lambda: _parse_orientation(head_bytes),
        lambda: tf.constant(1),
    )


def _parse_orientation(head_bytes: tf.Tensor) -> tf.Tensor:
    head = tf.io.decode_raw(head_bytes, tf.uint8)
    length = tf.size(head)
    marker = {0: 0xFF, 1: 0xE1, **dict(enumerate(b"Exif\0\0", start=4))}  # 2 and 3 hold the length
    windows = tf.maximum(length - max(marker), 0)
    # Candidates first: comparing all bytes with all of the marker costs as much as decoding a small JPEG.
    candidates = tf.where(tf.equal(head[1 : windows + 1], marker[1]))[:, 0]
    is_marker = tf.ones_like(candidates, tf.bool)
    for index, byte in marker.items():
        is_marker &= tf.equal(tf.gather(head, candidates + index), byte)

    def parse() -> tf.Tensor:
        tiff = tf.cast(head[tf.cast(tf.boolean_mask(candidates, is_marker)[0], tf.int32) + 10 :], tf.int32)
        padded = tf.concat([tiff[:65536], tf.zeros([14], tf.int32)], axis=0)
        last = tf.size(padded) - 1
        big_endian = tf.equal(padded[0], ord("M"))

        def number(values: tf.Tensor, size: int) -> tf.Tensor:
            """Bytes [..., size] in the file's order to integers [...]."""
            powers = [256**power for power in range(size)]
            return tf.reduce_sum(values * tf.where(big_endian, powers[::-1], powers), axis=-1)

        ifd = tf.clip_by_value(number(padded[4:8], 4), 0, last - 2)
        count = tf.minimum(number(padded[ifd : ifd + 2], 2), 512)
        positions = ifd + 2 + 12 * tf.range(count)[:, None] + tf.range(12)[None, :]
        entries = tf.gather(padded, tf.minimum(positions, last))
        is_orientation = tf.equal(number(entries[:, 0:2], 2), 0x0112)
        values = tf.boolean_mask(number(entries[:, 8:10], 2), is_orientation)
        value = tf.concat([values, [1]], axis=0)[0]
        return tf.where((value >= 1) & (value <= 8), value, 1)

    return tf.cond(tf.reduce_any(is_marker), parse, lambda: tf.constant(1))


def _orient(image: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Turn pixels so that they stand as the orientation (1 to 8) says they were taken."""
    transpose, flip_rows, flip_columns = tf.image.transpose, tf.image.flip_up_down, tf.image.flip_left_right
    return tf.switch_case(
        orientation - 1,
        [
            lambda: image,
            lambda: flip_columns(image),
            lambda: flip_columns(flip_rows(image)),
            lambda: flip_rows(image),
            lambda: transpose(image),
            lambda: flip_columns(transpose(image)),
            lambda: flip_rows(flip_columns(transpose(image))),
            lambda: flip_rows(transpose(image)),
        ],
    )
