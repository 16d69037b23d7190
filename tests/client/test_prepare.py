"""Photographs made small before they are sent."""

import io
import os
import pickle
import random
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from graftserve.client import InvalidImageError
from graftserve.client.headers import read_jpeg
from graftserve.client.prepare import Prepare


def decode(content):
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def pixels(image):
    if isinstance(image, bytes):
        image = decode(image)
    return np.asarray(image.convert("RGB"), np.float32)


def difference(one, other):
    """The mean distance of two images of one size, in steps of 0 to 255."""
    return np.abs(pixels(one) - pixels(other)).mean()


def skip_unless_written(image_format):
    Image.init()
    if image_format not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {image_format}")


def exif(orientation):
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def grown_mb(statement, content):
    """How much `statement` lets the peak of a process's memory grow."""
    # Not getrusage: on Linux its peak begins with that of the process that forked.
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs /proc")
    code = f"""
import contextlib, io, re, sys
import PIL.BmpImagePlugin, PIL.GifImagePlugin, PIL.PngImagePlugin, PIL.TiffImagePlugin, PIL.WebPImagePlugin
from graftserve.client import InvalidImageError
from graftserve.client.prepare import Prepare
peak_kb = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
buffer = io.BytesIO()
PIL.Image.new("RGB", (600, 600)).save(buffer, "JPEG")
Prepare(max_side_px=512)(buffer.getvalue())
content = sys.stdin.buffer.read()
before = peak_kb()
{statement}
print(peak_kb() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], input=content, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) / 2**10


@pytest.fixture(scope="module")
def photo(photos):
    return Image.fromarray(photos["coffee"])  # 600 x 400


@pytest.fixture(scope="module")
def camera_jpeg(photo, encode):
    """12 megapixels with a camera's metadata."""
    large = photo.resize((4032, 3024), Image.Resampling.BICUBIC)
    return encode(large, quality=92, exif=exif(6), comment=b"holiday")


# What is sent untouched


@pytest.mark.parametrize("options", [{}, {"max_side_px": 600}, {"max_side_px": 5000}])
def test_a_jpeg_that_fits_goes_byte_for_byte(photo, encode, options):
    content = encode(photo, exif=exif(6), comment=b"mine")
    assert Prepare(**options)(content) == content


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1"])
def test_a_png_that_fits_goes_byte_for_byte_unless_asked(photo, encode, mode):
    content = encode(photo.convert(mode), "PNG")
    assert Prepare(max_side_px=600)(content) == content
    assert decode(Prepare(max_side_px=600, keep_png=False)(content)).format == "JPEG"


def test_a_png_that_exif_turns_is_turned(photo, encode):
    content = encode(photo, "PNG", exif=exif(6))
    assert difference(Prepare(quality=95)(content), photo.transpose(Image.Transpose.ROTATE_270)) < 3


def test_what_fits_needs_no_pillow(photo, encode, tmp_path):
    (tmp_path / "fits.jpg").write_bytes(encode(photo))
    (tmp_path / "fits.png").write_bytes(encode(photo, "PNG"))
    code = f"""
import os, sys
os.chdir({str(tmp_path)!r})
from graftserve.client.prepare import Prepare
prepare = Prepare(max_side_px=600)
print([prepare(name) == open(name, "rb").read() for name in ("fits.jpg", "fits.png")], "PIL" in sys.modules)
print(len(Prepare(max_side_px=64)("fits.jpg")) > 0, "PIL" in sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::ImportWarning", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout == "[True, True] False\nTrue True\n", result.stderr


# Shrinking


@pytest.mark.parametrize("max_side_px", [256, 512, 1024])
def test_a_cameras_photo_becomes_small(camera_jpeg, photo, max_side_px):
    content = Prepare(max_side_px=max_side_px)(camera_jpeg)
    image = decode(content)
    assert image.size == (max_side_px * 3 // 4, max_side_px)  # turned
    assert image.mode == "RGB"
    assert len(content) < len(camera_jpeg) / 6
    upright = photo.resize((max_side_px, max_side_px * 3 // 4), Image.Resampling.HAMMING).rotate(
        -90, expand=True
    )
    assert difference(image, upright) < 4


def test_nothing_but_pixels_is_sent(camera_jpeg, photo, encode):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for content in (
        camera_jpeg,
        encode(photo, exif=exif(3), icc_profile=profile, comment=b"mine", xmp=b"<x/>"),
        encode(photo, "WEBP", exif=exif(1), icc_profile=profile, xmp=b"<x/>"),
    ):
        assert read_jpeg(content).metadata if content[:2] == b"\xff\xd8" else True
        prepared = Prepare(max_side_px=128)(content)
        assert not read_jpeg(prepared).metadata
        assert not {"exif", "icc_profile", "comment", "xmp"} & decode(prepared).info.keys()


@pytest.mark.parametrize(
    ("size", "sent"),
    [((600, 400), (300, 200)), ((400, 600), (200, 300)), ((3000, 2), (300, 1)), ((301, 301), (300, 300))],
)
def test_the_longer_side_counts(size, sent):
    assert decode(Prepare(max_side_px=300)(Image.new("RGB", size))).size == sent


def test_small_images_are_not_enlarged(photo):
    assert decode(Prepare(max_side_px=5000)(photo)).size == photo.size


def test_shrinking_does_not_alias(encode):
    """Lines of one pixel turn grey; picking pixels would leave them black and white."""
    lines = np.zeros((2000, 2000), np.uint8)
    lines[::2] = 255
    for content in (encode(lines, "PNG"), encode(lines, "JPEG", quality=95), lines):
        sent = pixels(Prepare(max_side_px=200)(content))
        assert np.abs(sent - 127.5).max() < 12


def test_quality_costs_bytes(camera_jpeg):
    sizes = [len(Prepare(max_side_px=512, quality=quality)(camera_jpeg)) for quality in (30, 75, 90, 95)]
    assert sizes == sorted(set(sizes))


def test_a_large_jpeg_is_decoded_reduced(camera_jpeg):
    """Decoded in full it takes 48 MB, as the control shows; reduced to a quarter, a sixteenth of that."""
    in_full = "PIL.Image.open(io.BytesIO(content)).load()"
    assert grown_mb(in_full, camera_jpeg) > 44
    assert grown_mb("Prepare(max_side_px=512)(content)", camera_jpeg) < 15


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "PIL"])
def test_every_orientation_is_turned_as_pillow_turns_it(photo, encode, image_format, orientation):
    if image_format == "PIL":
        image = Image.open(io.BytesIO(encode(photo, quality=95, exif=exif(orientation))))
        wanted = ImageOps.exif_transpose(image.copy())
    else:
        image = encode(
            photo, image_format, exif=exif(orientation), **({"quality": 95} if image_format != "PNG" else {})
        )
        # Pillow itself turns a TIFF as it reads it.
        wanted = ImageOps.exif_transpose(decode(image))
    side_px = 300
    if wanted.width > wanted.height:
        wanted = wanted.resize((side_px, side_px * 2 // 3), Image.Resampling.HAMMING)
    else:
        wanted = wanted.resize((side_px * 2 // 3, side_px), Image.Resampling.HAMMING)
    sent = decode(Prepare(max_side_px=side_px, quality=95)(image))
    assert sent.size == wanted.size
    assert sent.getexif().get(0x0112, 1) == 1
    assert difference(sent, wanted) < 3
    others = [
        turned
        for turned in (wanted, *(wanted.transpose(turn) for turn in Image.Transpose))
        if turned.size == wanted.size
    ]
    assert sum(difference(sent, turned) < 10 for turned in others) == 1  # no other turn looks alike


@pytest.mark.parametrize(
    "damage", [b"", b"II", b"XX*\0\0\0\0\0", b"II*\0\xff\xff\xff\x7f", b"MM\0*\0\0\0\x08\xff\xff\x01"]
)
def test_damaged_exif_is_as_good_as_none(photo, encode, damage):
    content = encode(photo, exif=b"Exif\0\0" + damage)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sent = Prepare(max_side_px=300)(content)
    assert decode(sent).size == (300, 200)


@pytest.mark.parametrize("value", [0, 9, 300])
def test_an_orientation_out_of_range_is_none(photo, encode, value):
    assert decode(Prepare(max_side_px=300)(encode(photo, exif=exif(value)))).size == (300, 200)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_the_server_sees_the_same_picture_either_way(photo, encode, orientation):
    """Untouched it is turned by the server, prepared by the client."""
    pytest.importorskip("tensorflow")
    from graftserve.training.preprocess import Preprocess, decode_images

    content = encode(photo, quality=95, exif=exif(orientation))
    sent = Prepare(max_side_px=500, quality=95)(content)
    assert sent != content
    untouched, prepared = decode_images([content, sent], Preprocess(224)).numpy().astype(np.float32)
    assert np.abs(untouched - prepared).mean() < 3


# Formats


@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("WEBP", {"quality": 95}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"big_tiff": True}),
        ("JPEG2000", {}),
        ("AVIF", {"quality": 95}),
    ],
)
def test_other_formats_become_jpeg(photo, encode, image_format, options):
    skip_unless_written(image_format)
    content = encode(photo, image_format, **options)
    assert difference(Prepare(quality=95)(content), photo) < (8 if image_format == "GIF" else 4)
    assert decode(Prepare(max_side_px=150)(content)).size == (150, 100)


@pytest.mark.parametrize("mode", ["P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_colour_modes_become_rgb(photo, mode):
    image = photo.quantize(256).convert("PA") if mode == "PA" else photo.convert("RGB")
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.applyTransform(image, ImageCms.buildTransform(srgb, lab, "RGB", "LAB"))
    elif mode == "P":
        image = image.quantize(256, dither=Image.Dither.NONE)
    elif mode != "PA":
        image = image.convert(mode)
    sent = decode(Prepare(quality=95)(image))
    assert sent.mode == "RGB"
    assert difference(sent, image) < 4


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grey_modes_become_grey(photo, mode):
    sent = decode(Prepare(quality=95)(photo.convert(mode)))
    assert sent.mode == "L"
    assert difference(sent, photo.convert(mode)) < 4


def test_a_palette_with_transparency_gives_no_warning(photo, encode):
    image = photo.quantize(64)
    content = encode(image, "PNG", transparency=bytes(range(64)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sent = Prepare(quality=95, keep_png=False)(content)
    assert difference(sent, image) < 4


def test_transparency_is_dropped_not_blended_as_on_the_server(photo, encode, tensorflow):
    image = photo.copy()
    image.putalpha(0)
    content = encode(image, "PNG")
    sent = Prepare(quality=95, keep_png=False)(content)
    assert difference(sent, photo) < 3
    server = tensorflow.io.decode_image(content, channels=3).numpy()
    assert np.abs(pixels(sent) - server).mean() < 3


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_of_16_bits_the_upper_8_are_kept_as_on_the_server(photo, encode, tensorflow, image_format):
    values = np.asarray(photo.convert("L"), np.uint16) * 256 + 77
    content = encode(Image.fromarray(values), image_format)
    sent = Prepare(quality=95, keep_png=False)(content)
    assert decode(sent).mode == "L"
    assert difference(sent, photo.convert("L")) < 2
    if image_format == "PNG":
        server = tensorflow.io.decode_image(content, channels=3).numpy()
        assert np.abs(pixels(sent) - server).mean() < 2
    assert decode(Prepare(max_side_px=150)(content)).size == (150, 100)


def test_a_colour_png_of_16_bits(photo, encode):
    rows = (np.asarray(photo, np.uint16) * 256 + 55).astype(">u2")
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    content = png(
        chunk(b"IHDR", struct.pack(">IIBBBBB", 600, 400, 16, 2, 0, 0, 0)),
        chunk(b"IDAT", zlib.compress(lines)),
    )
    assert difference(Prepare(quality=95, keep_png=False)(content), photo) < 3


def test_a_cmyk_jpeg_becomes_rgb_even_where_it_fits(photo, encode, tensorflow):
    content = encode(photo.convert("CMYK"), quality=95)
    sent = Prepare()(content)
    assert decode(sent).mode == "RGB"
    assert difference(sent, photo) < 4
    server = tensorflow.io.decode_jpeg(content, channels=3).numpy()
    assert np.abs(pixels(sent) - server).mean() < 4
    assert decode(Prepare(max_side_px=150)(content)).size == (150, 100)


def test_a_grey_jpeg_stays_grey(photo, encode):
    sent = decode(Prepare(max_side_px=150)(encode(photo.convert("L"))))
    assert (sent.mode, sent.size) == ("L", (150, 100))


def test_a_progressive_jpeg(photo, encode):
    sent = Prepare(max_side_px=150, quality=95)(encode(photo, progressive=True, quality=95))
    assert difference(sent, photo.resize((150, 100), Image.Resampling.HAMMING)) < 4


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_of_several_frames_the_first_is_taken(photo, encode, image_format):
    negative = ImageOps.invert(photo)
    content = encode(photo, image_format, save_all=True, append_images=[negative])
    assert len(content) > 1.5 * len(encode(photo, image_format))
    sent = Prepare(max_side_px=300)(content)
    assert difference(sent, photo.resize((300, 200), Image.Resampling.HAMMING)) < 9


def test_of_a_pil_image_the_frame_at_hand_is_taken(photo, encode):
    image = Image.open(
        io.BytesIO(encode(photo, "TIFF", save_all=True, append_images=[ImageOps.invert(photo)]))
    )
    image.seek(1)
    assert difference(Prepare(quality=95)(image), ImageOps.invert(photo)) < 3


def test_heic_is_read_where_pillow_heif_is_registered(photo, encode):
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(photo).save(buffer, quality=95)
    # In a process of its own: what is registered stays so.
    code = """
import sys, pillow_heif
from graftserve.client.prepare import Prepare
pillow_heif.register_heif_opener()
sys.stdout.buffer.write(Prepare(quality=95)(sys.stdin.buffer.read()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], input=buffer.getvalue(), capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert difference(done.stdout, photo) < 4


def test_heic_without_pillow_heif_says_what_to_install(monkeypatch):
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    content = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 64
    with pytest.raises(InvalidImageError, match="HEIC needs pillow-heif"):
        Prepare()(content)


def test_a_profile_is_dropped_not_applied(photo, encode):
    """As the server sees the pixels of a file that is sent untouched."""
    # The colours' primaries in another order: applied, red would be green.
    swapped = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = swapped.index(b"rXYZ"), swapped.index(b"gXYZ")
    swapped[red : red + 4], swapped[green : green + 4] = b"gXYZ", b"rXYZ"
    with_profile = encode(photo, quality=95, icc_profile=bytes(swapped))
    assert Prepare(max_side_px=300)(with_profile) == Prepare(max_side_px=300)(encode(photo, quality=95))


# Forms


def test_every_form_gives_the_same(photo, encode, tmp_path):
    content = encode(photo)
    path = tmp_path / "größe.jpg"
    path.write_bytes(content)
    prepare = Prepare(max_side_px=300)
    with path.open("rb") as file:
        forms = [bytearray(content), memoryview(content), path, os.fspath(path), file, io.BytesIO(content)]
        assert {prepare(form) for form in forms} == {prepare(content)}
    array = np.asarray(photo)
    assert prepare(array) == prepare(photo) == prepare(encode(photo, "PNG"))
    grey = np.asarray(photo.convert("L"))
    assert prepare(grey) == prepare(grey[..., None]) == prepare(photo.convert("L"))


def test_a_pil_image_is_left_as_it_is(photo, encode):
    image = Image.open(io.BytesIO(encode(photo, exif=exif(6))))
    Prepare(max_side_px=100)(image)
    assert image.size == photo.size
    assert image.getexif()[0x0112] == 6
    np.testing.assert_array_equal(np.asarray(image), np.asarray(decode(encode(photo))))


def test_many_threads_get_their_own_images(photos, encode):
    contents = [encode(image) for image in photos.values()]
    prepare = Prepare(max_side_px=200)
    alone = [prepare(content) for content in contents]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(prepare, contents * 20)) == alone * 20


def test_it_can_be_pickled_and_compared():
    prepare = Prepare(max_side_px=512, quality=80)
    assert pickle.loads(pickle.dumps(prepare)) == prepare
    assert hash(prepare) == hash(Prepare(512, 80))
    with pytest.raises(AttributeError):
        prepare.quality = 3


@pytest.mark.parametrize(
    "options", [{"max_side_px": 0}, {"max_side_px": -1}, {"quality": 0}, {"quality": 96}, {"max_pixels": 0}]
)
def test_values_out_of_range(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        Prepare(**options)


# What is no image


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(*chunks):
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def bombs():
    """Headers that claim 12000 x 12000 pixels, of which Pillow only warns, and next to nothing else."""
    side_px = 12_000
    header = struct.pack(">IIBBBBB", side_px, side_px, 8, 2, 0, 0, 0)
    yield "png", png(chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(1000))))
    frame = b"\xff\xc0\0\x11\x08" + struct.pack(">HH", side_px, side_px) + b"\3\1\x22\0\2\x11\1\3\x11\1"
    yield "jpeg", b"\xff\xd8" + frame + b"\xff\xda\0\x0c\3\1\0\2\x11\3\x11\0\x3f\0" + bytes(100)
    yield (
        "gif",
        b"GIF89a"
        + struct.pack("<HHBBB", side_px, side_px, 0x80, 0, 0)
        + bytes(6)
        + (b"\x2c" + struct.pack("<HHHHB", 0, 0, side_px, side_px, 0) + b"\2\2\x4c\1\0\x3b"),
    )
    yield (
        "bmp",
        b"BM"
        + struct.pack("<IHHI", 154, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, side_px, side_px, 1, 24, 0, 0, 0, 0, 0, 0)
        + bytes(100),
    )
    yield (
        "webp",
        b"RIFF"
        + struct.pack("<I", 4 + 18 + 18)
        + b"WEBPVP8X"
        + struct.pack("<II", 10, 0)
        + (
            (side_px - 1).to_bytes(3, "little") * 2
            + b"VP8L"
            + struct.pack("<I", 10)
            + b"\x2f"
            + ((side_px - 1) | (side_px - 1) << 14).to_bytes(4, "little")
            + bytes(5)
        ),
    )
    entries = [
        (256, side_px),
        (257, side_px),
        (258, 8),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, side_px),
        (279, 9),
    ]
    yield (
        "tiff",
        b"II*\0"
        + struct.pack("<IH", 8, len(entries))
        + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
        + bytes(4),
    )


@pytest.mark.parametrize("kind", [name for name, _ in bombs()])
@pytest.mark.parametrize("options", [{}, {"max_side_px": 256, "keep_png": False}])
def test_bombs_are_refused_by_their_header(kind, options):
    content = dict(bombs())[kind]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(InvalidImageError, match=r"at most 100000000 pixels.*12000 x 12000"):
            Prepare(**options)(content)
    assert not seen


def test_a_bombs_header_costs_no_memory():
    """The pixels would take 576 MB."""
    statement = "with contextlib.suppress(InvalidImageError): Prepare(max_side_px=256)(content)"
    for content in dict(bombs()).values():
        assert grown_mb(statement, content) < 10


def test_max_pixels_is_counted_exactly(photo, encode):
    for content in (encode(photo), encode(photo, "PNG"), encode(photo, "WEBP"), photo, np.asarray(photo)):
        Prepare(max_side_px=100, max_pixels=240_000)(content)
        with pytest.raises(InvalidImageError, match=r"239999 pixels.*600 x 400"):
            Prepare(max_side_px=100, max_pixels=239_999)(content)


def test_a_large_image_within_the_limit_gives_no_warning(encode):
    """Pillow warns from 89 megapixels on; the limit here is 100."""
    content = encode(Image.new("L", (9_900, 9_900)), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(Prepare(max_side_px=64)(content)).size == (64, 64)


def test_a_truncated_jpeg(camera_jpeg):
    with pytest.raises(InvalidImageError, match=r"damaged or cut off.*truncated") as caught:
        Prepare(max_side_px=512)(camera_jpeg[: len(camera_jpeg) // 2])
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"Dear Sir or Madam,\n", r"expected an image \(JPEG.*got 19 bytes that begin with b'Dear Sir"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "expected an image"),
        (b"", "bytes of length 0"),
        (b"\xff\xd8\xff", "ends before its first scan"),
        (b"\xff\xd8\xff\xe0\0\4JF\xff\xda\0\2", "gives no size"),
        (b"\xff\xd8\xff\xc0\0\2\xff\xda\0\2", "frame header is too short"),
        (b"\x89PNG\r\n\x1a\n", "the PNG has no header"),
        (b"GIF89a", "damaged"),
        (b"RIFF\0\0\0\0WEBP", "damaged"),
        (b"II*\0\0\0\0\0", "damaged"),
        (b"BM", "damaged"),
        (None, "got NoneType"),
        ("a\0b", "null"),
        (np.zeros((4, 5, 3), np.float32), r"got float32 \[4, 5, 3\]"),
        (Image.new("F", (2, 2)), "mode F"),
        (Image.new("I", (2, 2)), "mode I"),
        (Image.new("RGB", (0, 2)), "size 0 x 2"),
        (Image.new("RGB", (70_000, 1)), "max|dimension|decoded"),
    ],
)
def test_what_is_no_image(image, message):
    with pytest.raises(InvalidImageError, match=message):
        Prepare()(image)


def test_a_bad_file_is_named(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("milk, eggs")
    for form in (path, os.fspath(path)):
        with pytest.raises(InvalidImageError, match=r"notes\.txt: expected an image"):
            Prepare()(form)
    with pytest.raises(InvalidImageError, match=r"nowhere\.jpg.*No such file"):
        Prepare()(tmp_path / "nowhere.jpg")


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "AVIF"])
def test_damaged_files_raise_nothing_else(photo, encode, image_format):
    skip_unless_written(image_format)
    content = encode(photo.resize((120, 80)), image_format)
    chance = random.Random(7)
    prepare = Prepare(max_side_px=64, keep_png=False)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 6)):
            damaged[chance.randrange(min(len(damaged), 400))] = chance.randrange(256)
        if chance.random() < 0.5:
            del damaged[chance.randrange(len(damaged)) :]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a damaged TIFF's tags
                sent = prepare(bytes(damaged))
        except InvalidImageError:
            refused += 1
        else:
            assert max(decode(sent).size) <= 64
    assert refused > 20
