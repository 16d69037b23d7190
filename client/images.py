"""Images in any form to the encoded bytes that the model decodes."""

import io
import os
import sys
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from .errors import InvalidImageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

__all__ = ["ImageInput", "Readable", "encode_image", "pil_image", "rgb_or_grey"]


class Readable(Protocol):
    """A binary file or anything that reads like one."""

    def read(self) -> bytes:
        """Everything that is left."""


ImageInput: TypeAlias = (
    "bytes | bytearray | memoryview | str | os.PathLike[str] | Readable | Image.Image | npt.NDArray[np.uint8]"
)
"""What `encode_image` takes. A str is a path."""

# Level 1 is several times faster than the default 6, for a few percent more bytes.
_PNG_COMPRESS_LEVEL: Final = 1
_AS_THEY_ARE: Final = frozenset({"RGB", "L"})
_TO_RGB: Final = frozenset({"RGBA", "RGBX", "RGBa", "PA", "CMYK", "YCbCr", "LAB", "HSV"})
_TO_GREY: Final = frozenset({"1", "LA", "La"})


def encode_image(image: ImageInput) -> bytes:
    """The bytes to send for one image.

    bytes, bytearray, memoryview: already encoded (JPEG, PNG, GIF, BMP, WebP); sent untouched, the server
        decodes.
    str, os.PathLike: a file, sent untouched.
    An object with `read`: a file opened in binary mode, read from where it stands; sent untouched.
    PIL image: sent as PNG, which loses nothing: the server sees exactly the pixels passed. RGB and L as they
        are; other 8-bit modes (RGBA, P, CMYK, 1, LA, ...) by Pillow's `convert`, which drops transparency.
        An EXIF orientation is not applied (PIL.ImageOps.exif_transpose does that).
    uint8 array [H, W, 3] (RGB), [H, W] or [H, W, 1] (grey): sent as PNG, too.

    Raises InvalidImageError for anything else: a missing or unreadable file (the OSError is its cause), no
    bytes at all, another dtype or shape.
    """
    if isinstance(image, bytes):
        return _not_empty(image, "bytes")
    if isinstance(image, (bytearray, memoryview)):
        return _not_empty(bytes(image), type(image).__name__)
    if isinstance(image, (str, os.PathLike)):
        return _read_path(image)
    # Whoever holds a PIL image has imported PIL; nobody else needs to.
    pil = sys.modules.get("PIL.Image")
    if pil is not None and isinstance(image, pil.Image):
        return _encode_pil(image)
    if hasattr(image, "read"):
        return _read_file(image)
    if hasattr(image, "__array__"):
        return _encode_pil(pil_image(image))
    raise InvalidImageError(
        "expected an image as bytes, a path, a binary file, a PIL image or a uint8 array, "
        f"got {type(image).__name__}"
    )


def _not_empty(content: bytes, what: str) -> bytes:
    if not content:
        raise InvalidImageError(f"expected an encoded image, got {what} of length 0")
    return content


def _read_path(path: str | os.PathLike[str]) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read()
    # ValueError: a NUL in the path, as when bytes were decoded by mistake.
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise InvalidImageError(f"expected a readable image file at {os.fspath(path)!r}: {reason}") from exc
    return _not_empty(content, f"a file ({os.fspath(path)})")


def _read_file(file: Readable) -> bytes:
    try:
        content: Any = file.read()
    except (OSError, ValueError) as exc:  # ValueError: the file is closed, or is text that does not decode
        raise InvalidImageError(f"expected a file open for reading in binary mode: {exc}") from exc
    if not isinstance(content, (bytes, bytearray, memoryview)):
        raise InvalidImageError(
            f"expected a file opened in binary mode ('rb'), but read() gave {type(content).__name__}"
        )
    return _not_empty(bytes(content), "a file (is it at its end? then seek(0))")


def _encode_pil(image: "Image.Image") -> bytes:
    try:
        image = rgb_or_grey(image)
        buffer = io.BytesIO()
        # Pixels only: a transparent colour or a profile that Pillow carries along is none of the model's.
        image.save(
            buffer, "PNG", compress_level=_PNG_COMPRESS_LEVEL, transparency=None, icc_profile=None, exif=None
        )
    except (OSError, ValueError, SyntaxError) as exc:  # PIL reads the file only now; SyntaxError: broken PNG
        raise InvalidImageError(f"expected a PIL image whose pixels can be read: {exc}") from exc
    return buffer.getvalue()


def rgb_or_grey(image: "Image.Image") -> "Image.Image":
    """A PIL image of 8 bits a channel in mode RGB or L; transparency is dropped, as the server drops it.

    Raises InvalidImageError for 16 or 32 bits a channel and for an image without pixels, and whatever Pillow
    raises for a file that it reads only now.
    """
    if image.width < 1 or image.height < 1:
        raise InvalidImageError(f"expected an image with pixels, got size {image.width} x {image.height}")
    if image.mode == "P":
        # By way of RGBA: with transparency in the palette Pillow warns about the direct way.
        return image.convert("RGBA").convert("RGB")
    if image.mode in _TO_RGB:
        return image.convert("RGB")
    if image.mode in _TO_GREY:
        return image.convert("L")
    if image.mode not in _AS_THEY_ARE:
        # Which 8 of 16 or 32 bits matter, only the caller knows.
        raise InvalidImageError(
            f"expected a PIL image of 8 bits a channel, got mode {image.mode}: scale it to mode L or RGB"
        )
    return image


def pil_image(image: Any) -> "Image.Image":
    """A uint8 array [H, W, 3] (RGB), [H, W] or [H, W, 1] (grey) as a PIL image.

    Raises InvalidImageError for another dtype or shape.
    """
    # Whoever holds an array has imported NumPy, as a rule; nobody else needs to.
    import numpy as np

    array = np.asarray(image)
    grey = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1)
    if array.dtype != np.uint8 or not (grey or (array.ndim == 3 and array.shape[2] == 3)) or not array.size:
        raise InvalidImageError(
            "expected a uint8 array [H, W, 3] (RGB), [H, W] or [H, W, 1] with values 0 to 255, "
            f"got {array.dtype} {list(array.shape)}"
        )
    from PIL import Image

    pixels = array.reshape(array.shape[:2]) if grey else array
    return Image.fromarray(np.ascontiguousarray(pixels))
