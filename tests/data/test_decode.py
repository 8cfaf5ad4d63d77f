"""Decoding: right pixels for every odd but valid picture, one of five reasons for every bad one."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from vlm.data import decode
from vlm.data.decode import decode_image
from vlm.data.samples import BadSample

REASONS = {"image.empty", "image.format", "image.too_large", "image.truncated", "image.unreadable"}


def gradient(width=40, height=24):
    """A smooth picture with no symmetry, kind to JPEG."""
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], 2)
    return Image.fromarray(rgb.astype(np.uint8))


def encoded(image, fmt, **options):
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return file.getvalue()


def pixels(data, **options):
    image = decode_image(data, **options)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def distance(data, reference):
    return np.abs(pixels(data) - np.asarray(reference).astype(int)).max()


def png_chunk(name, payload):
    return (
        struct.pack(">I", len(payload))
        + name
        + payload
        + struct.pack(">I", zlib.crc32(name + payload))
    )


def png(width, height, *, bits=8, color=0, rows=b"", before=b""):
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    data = png_chunk(b"IHDR", header) + before + png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + data + png_chunk(b"IEND", b"")


def exif_bytes(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


# --- odd but valid pictures: the right pixels ---------------------------------------------------


@pytest.mark.parametrize(("fmt", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_pictures_come_back_exactly(fmt, options):
    assert distance(encoded(gradient(), fmt, **options), gradient()) == 0


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpegs_come_back_closely(options):
    assert distance(encoded(gradient(), "JPEG", quality=95, **options), gradient()) <= 12


def test_a_jpeg_without_min_size_is_pillows_own():
    data = encoded(gradient(640, 480), "JPEG")
    assert distance(data, Image.open(io.BytesIO(data))) == 0


def test_cmyk_is_converted():
    data = encoded(gradient().convert("CMYK"), "JPEG", quality=98)
    assert distance(data, gradient()) <= 12


def test_16_bit_grey_is_scaled_and_rounded():
    values = np.array([[0, 30000, 65535]], dtype=np.uint16)
    assert pixels(encoded(Image.fromarray(values), "PNG"))[0, :, 0].tolist() == [0, 117, 255]


def test_16_bit_grey_with_a_transparent_value_is_white_there():
    rows = b"\0" + struct.pack(">3H", 0, 30000, 65535)
    data = png(3, 1, bits=16, rows=rows, before=png_chunk(b"tRNS", struct.pack(">H", 30000)))
    assert pixels(data)[0, :, 0].tolist() == [0, 255, 255]


def test_16_bit_rgb_keeps_its_high_byte():
    data = png(1, 1, bits=16, color=2, rows=b"\0" + struct.pack(">3H", 30000, 0, 65535))
    assert np.abs(pixels(data)[0, 0] - [117, 0, 255]).max() <= 1


def test_1_bit_is_black_and_white():
    values = np.arange(24).reshape(4, 6) % 3 == 0
    assert (
        pixels(encoded(Image.fromarray(values), "PNG"))[:, :, 1].tolist() == (values * 255).tolist()
    )


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_of_few_bits_is_scaled(bits):
    data = png(1, 1, bits=bits, rows=b"\0" + bytes([0xFF]))
    assert pixels(data).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("fmt", ["PNG", "WEBP"])
def test_alpha_is_composited_on_white(fmt):
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0] = [[200, 100, 0, 255], [200, 100, 0, 128], [200, 100, 0, 0]]
    options = {"lossless": True, "exact": True} if fmt == "WEBP" else {}
    row = pixels(encoded(Image.fromarray(rgba), fmt, **options))[0]
    assert row.tolist() == [[200, 100, 0], [227, 177, 127], [255, 255, 255]]


def test_grey_with_alpha_is_composited_on_white():
    grey_alpha = Image.fromarray(np.array([[[0, 255], [0, 128], [0, 0]]], dtype=np.uint8))
    assert grey_alpha.mode == "LA"
    assert pixels(encoded(grey_alpha, "PNG"))[0, :, 0].tolist() == [0, 127, 255]


@pytest.mark.parametrize("transparency", [1, b"\xff\x00"], ids=["one colour", "alpha a colour"])
def test_palette_transparency_is_white(transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    row = pixels(encoded(image, "PNG", transparency=transparency))[0]
    assert row.tolist() == [[10, 20, 30], [255, 255, 255]]


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_taken(fmt):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue", "lime")]
    options = {"lossless": True} if fmt == "WEBP" else {}
    data = encoded(frames[0], fmt, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert pixels(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(fmt, orientation):
    data = encoded(gradient(), fmt, exif=exif_bytes(orientation), quality=100)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert distance(data, expected) == 0
    assert decode.read_header(data).size == expected.size


def test_exif_after_the_pixels_of_a_png_is_found():
    before = png(2, 1, rows=b"\0\x00\xff")
    exif = png_chunk(b"eXIf", exif_bytes(6).removeprefix(b"Exif\0\0"))
    data = before[:-12] + exif + before[-12:]
    assert pixels(data)[:, :, 0].tolist() == [[0], [255]]


@pytest.mark.parametrize("exif", [b"Exif\0\0junk", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0"])
def test_damaged_exif_is_ignored(exif):
    data = encoded(gradient(), "JPEG", quality=95, exif=exif)
    assert distance(data, gradient()) <= 12


def test_exif_that_points_at_itself_is_survived():
    loop = b"Exif\0\0II*\0" + struct.pack("<IHHHIII", 8, 1, 0x8769, 4, 1, 8, 8)
    data = encoded(gradient(), "JPEG", quality=95, exif=loop)
    assert distance(data, gradient()) <= 12


def test_a_picture_of_several_jpegs_gives_its_first():
    data = encoded(gradient(), "MPO", save_all=True, append_images=[Image.new("RGB", (40, 24))])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert distance(data, gradient()) <= 24


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1)])
def test_extreme_sizes_are_read(size):
    assert decode_image(encoded(Image.new("RGB", size, "red"), "PNG")).size == size


def test_a_large_colour_profile_is_harmless():
    data = encoded(gradient(), "JPEG", quality=95, icc_profile=bytes(4_000_000))
    assert distance(data, gradient()) <= 12


# --- reduced decoding ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("min_size", "shorter"), [(480, 480), (479, 480), (240, 240), (121, 240), (60, 60), (7, 60)]
)
def test_a_jpeg_is_reduced_as_far_as_min_size_allows(min_size, shorter):
    data = encoded(gradient(640, 480), "JPEG", quality=95)
    image = decode_image(data, min_size=min_size)
    assert min(image.size) == shorter
    small = gradient(640, 480).resize(image.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(small)).max() <= 12


def test_other_formats_are_not_reduced():
    assert decode_image(encoded(gradient(64, 64), "PNG"), min_size=8).size == (64, 64)


# --- as an array --------------------------------------------------------------------------------

ODD_JPEGS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "rgb": {"keep_rgb": True},
    "restarts": {"restart_marker_rows": 1},
    "turned": {"exif": exif_bytes(6)},
}


def assert_pixels_equal(data, shrink):
    expected = decode.load_rgb(decode.open_image(data), data, shrink=shrink)
    assert np.array_equal(decode.read_header(data).pixels(shrink=shrink), np.asarray(expected))


@pytest.mark.parametrize("shrink", [0, 1, 2, 3, 5, 9])
@pytest.mark.parametrize("options", ODD_JPEGS.values(), ids=ODD_JPEGS)
def test_a_jpeg_as_an_array_is_pillows(options, shrink):
    assert_pixels_equal(encoded(gradient(107, 85), "JPEG", quality=95, **options), shrink)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize("shrink", [1, 2])
def test_a_jpeg_without_colour_or_of_four_inks_as_an_array_is_pillows(mode, shrink):
    assert_pixels_equal(encoded(gradient(107, 85).convert(mode), "JPEG"), shrink)


@pytest.mark.parametrize("fmt", ["PNG", "WEBP", "GIF", "MPO"])
def test_other_formats_as_an_array_are_pillows(fmt):
    assert_pixels_equal(encoded(gradient(), fmt), 1)


# --- bad pictures: one of the documented reasons ------------------------------------------------

JPEG = encoded(gradient(), "JPEG")
PNG = encoded(gradient(), "PNG")
WEBP = encoded(gradient(), "WEBP")
GIF = encoded(gradient(), "GIF")

BAD = {
    "nothing": (b"", "image.empty"),
    "text": (b"not a picture at all", "image.format"),
    "html": (b"<html><body>404 Not Found</body></html>", "image.format"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image.format"),
    "wav": (b"RIFF\x24\0\0\0WAVEfmt ", "image.format"),
    "tiff": (encoded(gradient(), "TIFF"), "image.format"),
    "bmp": (encoded(gradient(), "BMP"), "image.format"),
    "ppm": (encoded(gradient(), "PPM"), "image.format"),
    "eps": (encoded(gradient(), "EPS"), "image.format"),
    "psd": (b"8BPS\0\x01" + bytes(40), "image.format"),
    "fits": (b"SIMPLE  =                    T" + bytes(2880), "image.format"),
    "jpeg header": (JPEG[:2], "image.truncated"),
    "jpeg half": (JPEG[: len(JPEG) // 2], "image.truncated"),
    "jpeg without its last 10 bytes": (JPEG[:-10], "image.truncated"),
    "jpeg without its last 2 bytes": (JPEG[:-2], "image.truncated"),
    "png half": (PNG[: len(PNG) // 2], "image.truncated"),
    "webp half": (WEBP[: len(WEBP) // 2], "image.truncated"),
    "gif half": (GIF[: len(GIF) // 2], "image.truncated"),
    "png with a wrong crc": (PNG[:40] + b"\xff\xff" + PNG[42:], "image.unreadable"),
    "png of no width": (png(0, 10), "image.unreadable"),
    "jpeg of no height": (JPEG.replace(b"\x08\x00\x18\x00\x28", b"\x08\x00\x00\x00\x28"), None),
    "png of 2^31 - 1 pixels": (png(2**31 - 1, 1), "image.too_large"),
    "png of 10,000^2 pixels": (png(10_000, 10_000), "image.too_large"),
    "png of 50,000^2 pixels": (png(50_000, 50_000), "image.too_large"),
    "webp of 16,384^2 pixels": (
        b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\x3f\0" * 2 + bytes(8),
        "image.too_large",
    ),
    "png with an 80 MB comment": (
        png(
            1,
            1,
            rows=b"\0\0",
            before=png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000))),
        ),
        "image.unreadable",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures_have_a_documented_reason(name):
    data, reason = BAD[name]
    with pytest.raises(BadSample) as bad:
        decode_image(data)
    assert bad.value.reason in REASONS
    if reason is not None:
        assert bad.value.reason == reason
    assert bad.value.detail


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures_have_the_same_reason_as_pixels(name):
    data, _ = BAD[name]
    with pytest.raises(BadSample) as bad:
        decode_image(data)
    with pytest.raises(BadSample) as bad_as_pixels:
        decode.read_header(data).pixels()
    assert bad_as_pixels.value.reason == bad.value.reason


def test_reasons_are_those_of_the_modules_first_lines():
    assert decode.__doc__ is not None
    assert {word for word in decode.__doc__.split() if word.startswith("image.")} == REASONS


def test_the_pixel_cap_is_the_callers():
    assert decode_image(PNG, max_pixels=40 * 24).size == (40, 24)
    with pytest.raises(BadSample, match=r"image.too_large: .*above 959 pixels"):
        decode_image(PNG, max_pixels=40 * 24 - 1)


def test_mutated_pictures_decode_or_have_a_reason():
    rng = np.random.default_rng(0)
    originals = [JPEG, PNG, WEBP, GIF, encoded(gradient(), "JPEG", exif=exif_bytes(6))]
    outcomes = set()
    for round_number in range(400):
        data = bytearray(originals[round_number % len(originals)])
        for position in rng.integers(len(data), size=rng.integers(1, 6)):
            data[position] = rng.integers(256)
        try:
            assert decode_image(bytes(data), max_pixels=10**6).mode == "RGB"
            outcomes.add("decoded")
            decode.read_header(bytes(data), max_pixels=10**6).pixels()
        except BadSample as bad:
            outcomes.add(bad.reason)
    assert outcomes <= {"decoded", *REASONS}
    assert len(outcomes) >= 4
