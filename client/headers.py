"""What the first bytes of a JPEG or PNG file say, read without decoding anything and without Pillow.

Sources: ITU-T T.81 (JPEG), B.1.1 and B.2; Exif 2.3, 4.5.4 and 4.6.2; the PNG specification, third edition,
5.3 (chunks), 11.2.1 (IHDR) and eXIf.
"""

from dataclasses import dataclass
from typing import Final

__all__ = ["JPEG_START", "PNG_START", "JpegHeader", "PngHeader", "exif_orientation", "read_jpeg", "read_png"]

JPEG_START: Final = b"\xff\xd8\xff"
PNG_START: Final = b"\x89PNG\r\n\x1a\n"

_EXIF_START: Final = b"Exif\0\0"
_ORIENTATION: Final = 0x0112  # a SHORT

# Markers, each after a byte 0xFF.
_SOS: Final = 0xDA
_APP1: Final = 0xE1
_ALONE: Final = frozenset({0x01, *range(0xD0, 0xD9)})  # TEM, RST0 to RST7 and SOI: no length follows
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15 without DHT, JPG and DAC
# APP0 (JFIF) and APP14 (Adobe) say how the colours are coded; everything else that may be left out is about
# the picture: EXIF, XMP, profiles, thumbnails, further pictures, comments.
_METADATA: Final = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})


@dataclass(frozen=True)
class JpegHeader:
    """A JPEG file up to its first scan.

    width_px, height_px: as stored, before the orientation is applied.
    components: 1 for grey, 3 for colour, 4 for CMYK.
    orientation: EXIF's, 1 to 8; 1 where there is none or it is damaged.
    metadata: the (start, end) of segments that decoding does not need.
    """

    width_px: int
    height_px: int
    components: int
    orientation: int
    metadata: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PngHeader:
    """A PNG file's IHDR chunk, and the orientation (1 to 8) of its eXIf chunk; 1 where there is none."""

    width_px: int
    height_px: int
    orientation: int


def read_jpeg(content: bytes) -> JpegHeader:
    """Raises ValueError if there is no frame header before the first scan, or it gives no size."""
    width_px = height_px = components = 0
    orientation: int | None = None
    metadata: list[tuple[int, int]] = []
    position = 2
    while True:
        # Decoders pass over bytes between segments, and over the 0xFF that fill them up.
        position = content.find(b"\xff", position)
        if position < 0 or position + 4 > len(content):
            raise ValueError("the JPEG ends before its first scan")
        marker = content[position + 1]
        if marker in (0x00, 0xFF) or marker in _ALONE:
            position += 1 if marker == 0xFF else 2
            continue
        if marker == _SOS:
            break
        start, length = position + 4, int.from_bytes(content[position + 2 : position + 4])
        end = position + 2 + length
        if length < 2 or end > len(content):
            raise ValueError("the JPEG ends before its first scan")
        if marker in _FRAMES:
            if end - start < 6:
                raise ValueError("the JPEG's frame header is too short")
            height_px = int.from_bytes(content[start + 1 : start + 3])
            width_px = int.from_bytes(content[start + 3 : start + 5])
            components = content[start + 5]
        elif marker == _APP1 and orientation is None and content.startswith(_EXIF_START, start):
            orientation = exif_orientation(content[start:end])
        if marker in _METADATA:
            metadata.append((position, end))
        position = end
    if not (width_px and height_px):
        raise ValueError("the JPEG's header gives no size")
    return JpegHeader(width_px, height_px, components, orientation or 1, tuple(metadata))


def read_png(content: bytes) -> PngHeader:
    """Raises ValueError if the file does not begin with an IHDR chunk, or that gives no size."""
    if len(content) < 33 or content[12:16] != b"IHDR":
        raise ValueError("the PNG has no header")
    width_px, height_px = int.from_bytes(content[16:20]), int.from_bytes(content[20:24])
    if not (width_px and height_px):
        raise ValueError("the PNG's header gives no size")
    orientation, position = 1, len(PNG_START)
    # A chunk: the length of its data, its name, its data, four bytes of checksum.
    while position + 12 <= len(content):
        length, name = int.from_bytes(content[position : position + 4]), content[position + 4 : position + 8]
        if name == b"eXIf":
            orientation = exif_orientation(content[position + 8 : position + 8 + length])
            break
        position += 12 + length
    return PngHeader(width_px, height_px, orientation)


def exif_orientation(exif: bytes) -> int:
    """The orientation (1 to 8) in EXIF data, with or without "Exif" before it; 1 where there is none."""
    tiff = exif.removeprefix(_EXIF_START)
    if tiff[:4] not in (b"II*\0", b"MM\0*"):
        return 1
    little = tiff[:1] == b"I"

    def number(start: int, size: int) -> int:
        return int.from_bytes(tiff[start : start + size], "little" if little else "big")

    directory = number(4, 4)
    for entry in range(number(directory, 2)):
        start = directory + 2 + 12 * entry
        if start + 12 > len(tiff):
            break
        if number(start, 2) == _ORIENTATION:
            value = number(start + 8, 2)
            return value if 1 <= value <= 8 else 1
    return 1
