"""Photographs made small before they are sent."""

import importlib
import io
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from .errors import InvalidImageError
from .headers import JPEG_START, PNG_START, JpegHeader, exif_orientation, read_jpeg, read_png
from .images import ImageInput, encode_image, pil_image, rgb_or_grey

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["DEFAULT_MAX_PIXELS", "Prepare"]

DEFAULT_MAX_PIXELS: Final = 100_000_000
"""100 megapixels, 300 MB of RGB: what exported models take at most, too."""

# How far averaging blocks of pixels, which is fast, may go before the filter does the rest: to twice the size
# wanted, Pillow's own choice for thumbnails. A JPEG is decoded as near to it as 1/2, 1/4 and 1/8 come: to
# leave more to the filter there took up to three times as long and kept answers no closer.
_REDUCING_GAP: Final = 2.0

# Told apart here and opened by Pillow's class for the format: Image.open warns of large images before anyone
# can look at their size, and tries formats (PostScript, for one) that nobody wants to get from strangers.
_PNG, _JPEG = ("PNG", "PngImagePlugin"), ("JPEG", "JpegImagePlugin")
_ISO_MEDIA: Final = (("AVIF", "AvifImagePlugin"), ("HEIF", ""))  # HEIF: where pillow-heif has registered it
_FORMATS: Final[tuple[tuple[int, bytes, tuple[tuple[str, str], ...]], ...]] = (
    (0, JPEG_START, (_JPEG,)),
    (0, PNG_START, (_PNG,)),
    (0, b"GIF8", (("GIF", "GifImagePlugin"),)),
    (8, b"WEBP", (("WEBP", "WebPImagePlugin"),)),
    (4, b"ftyp", _ISO_MEDIA),
    (0, b"BM", (("BMP", "BmpImagePlugin"),)),
    (0, b"II*\0", (("TIFF", "TiffImagePlugin"),)),
    (0, b"MM\0*", (("TIFF", "TiffImagePlugin"),)),
    (0, b"II+\0", (("TIFF", "TiffImagePlugin"),)),
    (0, b"MM\0+", (("TIFF", "TiffImagePlugin"),)),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", (("JPEG2000", "Jpeg2KImagePlugin"),)),
)
_ORIENTATION: Final = 0x0112
# How to turn what was stored with each EXIF orientation upright. Source: Exif 2.3, 4.6.4, Orientation.
_TURNS: Final = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_ADVICE: Final = {
    "AVIF": "AVIF needs Pillow 11.3 or newer",
    "HEIF": "HEIC needs pillow-heif: pip install pillow-heif, and call pillow_heif.register_heif_opener()",
}


@dataclass(frozen=True)
class Prepare:
    """Makes an image fit to be sent: small, upright, and in a format that every server decodes.

    `Client(..., prepare=Prepare(max_side_px=512))` uses it for every image; `Prepare(...)(image)` is the same
    by hand. It is immutable, safe to use from many threads, and can be pickled.

    max_side_px: the longer side of what is sent, in pixels; None leaves the size as it is. Twice the side of
        the network's input is a good choice. More is needed for long, narrow images: the shorter side should
        not be below what the network sees.
    quality: of the JPEG encoding, 1 to 95, where an image is encoded anew.
    max_pixels: an image with more is refused by its header, before it is decoded.
    keep_png: send PNG files that fit as they are, which loses nothing; False makes JPEG of them, too, which
        is several times smaller for photographs.

    Sent untouched, byte for byte, is a JPEG file in grey or colour of at most `max_side_px`, with its EXIF
    data, which the server reads; so is a PNG file (see `keep_png`) unless EXIF data turns it. These are not
    decoded here: where one is damaged, the server says so.

    All else becomes a JPEG in RGB or grey: larger files, CMYK, WebP, GIF, BMP, TIFF, JPEG 2000, AVIF and HEIC
    where Pillow reads them, PIL images, uint8 arrays. It is turned upright as its EXIF orientation says and
    shrunk with an antialiasing filter, and carries no metadata. As on the server, of 16 bits the
    upper 8 are kept, transparency is dropped, and of an animation the first frame is taken. Colour profiles
    are dropped, not applied: training and serving ignore them, so a photograph that was converted here would
    look other to the model than the same photograph sent as it is.

    Measured on 60 photographs of 12 megapixels with EfficientNet-Lite0 (benchmarks/prepare.py): 512 pixels of
    quality 90 were 5% of the bytes and a fifth of the server's decoding, for 1.7 times the work on both sides
    together. The first class stayed in 88% of all and wherever it had had a probability of 0.5 or more; its
    probability moved by 0.03 on average and 0.12 at most, with 256 pixels by 0.11 and 0.45.

    Raises ValueError for values out of range.
    """

    max_side_px: int | None = None
    quality: int = 90
    max_pixels: int = DEFAULT_MAX_PIXELS
    keep_png: bool = True

    def __post_init__(self) -> None:
        if self.max_side_px is not None and self.max_side_px < 1:
            raise ValueError(f"expected max_side_px of 1 or more, or None, got {self.max_side_px}")
        if not 1 <= self.quality <= 95:
            raise ValueError(f"expected a quality from 1 to 95, got {self.quality}")
        if self.max_pixels < 1:
            raise ValueError(f"expected max_pixels of 1 or more, got {self.max_pixels}")

    def __call__(self, image: ImageInput) -> bytes:
        """The bytes to send for one image, in any form that `images.encode_image` takes.

        Raises InvalidImageError for what is no image, is damaged, has more than `max_pixels`, or is in a
        format that Pillow cannot read here.
        """
        pil = sys.modules.get("PIL.Image")
        try:
            if pil is not None and isinstance(image, pil.Image):
                return self._from_pil(image)
            if hasattr(image, "__array__") and not hasattr(image, "read"):
                return self._from_pil(pil_image(image))
            return self._from_file(encode_image(image))
        except MemoryError:
            raise
        except Exception as exc:  # damaged files raise nearly anything in Pillow
            where = f"{os.fspath(image)}: " if isinstance(image, (str, os.PathLike)) else ""
            if isinstance(exc, InvalidImageError):
                if where:
                    exc.args = (f"{where}{exc}",)
                raise
            raise InvalidImageError(
                f"{where}expected an image that can be decoded, but it is damaged or cut off: {exc}"
            ) from exc

    def _from_pil(self, image: "Image.Image") -> bytes:
        self._check_pixels(*image.size)
        image.load()
        return self._encoded(image, image.getexif().get(_ORIENTATION, 1))

    def _from_file(self, content: bytes) -> bytes:
        jpeg: JpegHeader | None = None
        if content.startswith(JPEG_START):
            jpeg = read_jpeg(content)
            self._check_pixels(jpeg.width_px, jpeg.height_px)
            if jpeg.components in (1, 3) and self._fits(jpeg.width_px, jpeg.height_px):
                return content
            # Pillow parses metadata on opening, and warns where it is damaged.
            content = _without(content, jpeg.metadata)
        elif content.startswith(PNG_START):
            png = read_png(content)
            self._check_pixels(png.width_px, png.height_px)
            if self.keep_png and png.orientation == 1 and self._fits(png.width_px, png.height_px):
                return content
        with _open(content) as image:
            self._check_pixels(*image.size)
            if jpeg is None:
                image.load()  # a TIFF's orientation is applied by this
                return self._encoded(image, exif_orientation(image.info.get("exif") or b""))
            full_size = image.size
            reduced = image.draft(None, self._size(*full_size))
            image.load()
            return self._encoded(image, jpeg.orientation, full_size, reduced[1] if reduced else None)

    def _encoded(
        self,
        image: "Image.Image",
        orientation: int = 1,
        full_size: tuple[int, int] | None = None,
        box: tuple[float, float, float, float] | None = None,
    ) -> bytes:
        """full_size: width and height before a reduced decoding; box: the part of `image` that holds them."""
        from PIL import Image

        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
            image = _upper_byte(image)
        pixels = rgb_or_grey(image)
        size = self._size(*(full_size or image.size))
        if size != image.size:
            # Of Pillow's filters the one that changed answers the least; none is far off.
            pixels = pixels.resize(size, Image.Resampling.HAMMING, box, reducing_gap=_REDUCING_GAP)
        if orientation in _TURNS:
            pixels = pixels.transpose(Image.Transpose[_TURNS[orientation]])
        buffer = io.BytesIO()
        # Pillow would write on what it found in the file.
        pixels.save(buffer, "JPEG", quality=self.quality, exif=b"", icc_profile=None, xmp=b"", comment=None)
        return buffer.getvalue()

    def _fits(self, width_px: int, height_px: int) -> bool:
        return self._size(width_px, height_px) == (width_px, height_px)

    def _size(self, width_px: int, height_px: int) -> tuple[int, int]:
        longer_px = max(width_px, height_px)
        if self.max_side_px is None or longer_px <= self.max_side_px:
            return width_px, height_px
        scale = self.max_side_px / longer_px
        return max(1, round(width_px * scale)), max(1, round(height_px * scale))

    def _check_pixels(self, width_px: int, height_px: int) -> None:
        if width_px * height_px > self.max_pixels:
            raise InvalidImageError(
                f"expected an image of at most {self.max_pixels} pixels (max_pixels), "
                f"got {width_px} x {height_px}"
            )


def _open(content: bytes) -> "Image.Image":
    """Pillow's image, not decoded yet."""
    from PIL import Image

    candidates = next((found for at, start, found in _FORMATS if content.startswith(start, at)), ())
    reasons: list[str] = []
    for name, module in candidates:
        if module:
            with suppress(ImportError):  # this Pillow has no such module
                importlib.import_module(f"PIL.{module}")
        if name not in Image.OPEN:
            reasons.append(_ADVICE.get(name, f"this Pillow does not read {name}"))
            continue
        # Not the registered opener for JPEG: it would look for further pictures behind the first.
        opener: Any = (
            sys.modules["PIL.JpegImagePlugin"].JpegImageFile if name == "JPEG" else Image.OPEN[name][0]
        )
        try:
            image: Image.Image = opener(io.BytesIO(content), "")
        except Exception as exc:  # damaged files raise nearly anything in Pillow
            reasons.append(f"as {name}: {exc}")
            continue
        return image
    if candidates:
        raise InvalidImageError(
            "expected an image that can be opened, but it is damaged or in a format that Pillow cannot read "
            f"here: {'; '.join(reasons)}"
        )
    raise InvalidImageError(
        "expected an image (JPEG, PNG, WebP, GIF, BMP, TIFF, JPEG 2000, AVIF or HEIC), "
        f"got {len(content)} bytes that begin with {content[:12]!r}"
    )


def _without(content: bytes, parts: tuple[tuple[int, int], ...]) -> bytes:
    kept, position = [], 0
    view = memoryview(content)
    for start, end in parts:
        kept.append(view[position:start])
        position = end
    kept.append(view[position:])
    return b"".join(kept)


def _upper_byte(image: "Image.Image") -> "Image.Image":
    return image.convert("I").point([value >> 8 for value in range(65536)], "L")
