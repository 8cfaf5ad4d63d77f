"""Encoded bytes to an upright RGB picture: four formats, size checked before memory is spent.

Reasons of a `BadSample` from here, all there are:

    image.empty       no bytes
    image.format      not a JPEG, PNG, WebP or GIF, whatever the name says
    image.too_large   more pixels than `max_pixels`, by the header
    image.truncated   broken, and the file does not end as its format ends
    image.unreadable  broken in another way
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image, JpegImagePlugin, UnidentifiedImageError, WebPImagePlugin
from simplejpeg import decode_jpeg, decode_jpeg_header

from vlm.data.samples import BadSample

# of a format that is not registered yet, Image.open would import all 43 plugins to look for it
FORMATS = ("JPEG", "PNG", WebPImagePlugin.WebPImageFile.format, "GIF")
MAX_PIXELS = 89_478_485  # Pillow warns above; as RGB they take 256 MiB
_EXIF_ORIENTATION = 0x0112
_EXIF_SOURCES = frozenset(("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"))
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPPING = {5, 6, 7, 8}  # orientations that exchange width and height
_open_lock = threading.Lock()  # catch_warnings changes the whole process


def decode_image(
    data: bytes, *, min_size: int | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """The first frame as RGB: upright as EXIF says, transparency on white, 16 bits rounded to 8.

    Args:
        data: The encoded picture.
        min_size: The shorter side that is needed: a JPEG may come back reduced 2, 4 or 8 times,
            never below it. Without it the picture is exact.
        max_pixels: Larger pictures are refused by their header.

    Raises:
        BadSample: With one of the reasons above.
    """
    image = open_image(data, max_pixels=max_pixels)
    return load_rgb(image, data, shrink=min(image.size) // min_size if min_size else 1)


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture with its header read and its size checked, its pixels not decoded.

    Raises:
        BadSample: With one of the reasons above.
    """
    with _bad_samples(data), _open_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(BytesIO(data), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise BadSample("image.too_large", f"{image.size} is above {max_pixels} pixels")
        _orientation(image)  # parsed here, where its warnings are silenced
    return image


def header_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened picture, upright as far as its header tells."""
    width, height = image.size
    return (height, width) if _orientation(image) in _SWAPPING else (width, height)


def load_rgb(image: Image.Image, data: bytes, *, shrink: int = 1) -> Image.Image:
    """Decode an opened picture as `decode_image` does, a JPEG up to `shrink` times smaller.

    Raises:
        BadSample: With one of the reasons above.
    """
    with _bad_samples(data):
        if shrink > 1:
            image.draft("RGB", (image.width // shrink, image.height // shrink))
        return to_rgb(image)


@dataclass(frozen=True)
class Encoded:
    """A picture whose header was read and whose size was checked.

    Attributes:
        data: The bytes.
        size: Width and height, upright.
        opened: By Pillow; None where it was not needed.
        plain: An upright RGB or grey JPEG, which the faster decoder can read.
    """

    data: bytes
    size: tuple[int, int]
    opened: Image.Image | None
    plain: bool

    def pixels(self, *, shrink: int = 1) -> UInt8[np.ndarray, "H W 3"]:
        """As `load_rgb`, as an array; a plain JPEG straight into it, in 3/4 of Pillow's time.

        Raises:
            BadSample: With one of the reasons above.
        """
        if self.plain:
            scale = 1 << max(1, min(shrink, 8)).bit_length() - 1  # 3/8 and the like are slower
            width, height = (-(-side // scale) for side in self.size)
            with _bad_samples(self.data), suppress(ValueError):  # what it can't read, Pillow judges
                pixels: UInt8[np.ndarray, "H W 3"] = decode_jpeg(
                    self.data, min_height=height, min_width=width
                )
                return pixels
        opened = self.opened or open_image(self.data)
        return np.asarray(load_rgb(opened, self.data, shrink=shrink))


def read_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Encoded:
    """The picture before it is decoded, if it is a JPEG.

    The others are decoded for their size: a PNG's EXIF may follow its pixels.

    Raises:
        BadSample: With one of the reasons above.
    """
    size = _plain_jpeg_size(data)
    if size and not _may_be_turned(data) and size[0] * size[1] <= max_pixels:
        return Encoded(data, size, None, plain=True)
    opened = open_image(data, max_pixels=max_pixels)
    if not isinstance(opened, JpegImagePlugin.JpegImageFile):
        with _bad_samples(data):
            opened.load()
    plain = size == opened.size and _orientation(opened) == 1
    return Encoded(data, header_size(opened), opened, plain)


def _may_be_turned(data: bytes) -> bool:
    """Whether a JPEG has an APP1 segment, as EXIF and XMP are, before its pixels."""
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (b"\xe1", b"\xff"):
        if data[at + 1 : at + 2] == b"\xda":
            return False
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return True


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG that is RGB or grey, before EXIF orientation; else None."""
    if data.startswith(b"\xff\xd8"):
        with suppress(ValueError):
            height, width, colors, _ = decode_jpeg_header(data)
            if colors in ("YCbCr", "RGB", "Gray") and width and height:
                return width, height
    return None


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened picture as `decode_image` says; the picture itself if it is so already."""
    image.load()
    rgb = _on_white(image)
    turn = _TURNS.get(_orientation(image))
    return rgb if turn is None else rgb.transpose(turn)


def _on_white(image: Image.Image) -> Image.Image:
    """Any mode as RGB on white."""
    if image.mode.startswith("I"):
        return _grey16_to_rgb(image)
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(rgba, mask=rgba)
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey16_to_rgb(image: Image.Image) -> Image.Image:
    """65535 to 255, rounded; Pillow's own conversion cuts at 255 instead."""
    levels = ((np.arange(65536) * 255 + 32767) // 65535).astype(np.uint8)
    if "transparency" in image.info:
        levels[image.info["transparency"]] = 255
    return Image.fromarray(levels[np.asarray(image)]).convert("RGB")


def _orientation(image: Image.Image) -> int:
    """EXIF (or XMP) orientation, 1 to 8; 1 where it is absent or cannot be read."""
    if _EXIF_SOURCES.isdisjoint(image.info):
        return 1
    with suppress(Exception):  # a damaged EXIF block does not make the picture bad
        orientation = Image.Image.getexif(image).get(_EXIF_ORIENTATION, 1)
        return orientation if orientation in _TURNS else 1
    return 1


@contextmanager
def _bad_samples(data: bytes) -> Iterator[None]:
    """Turn whatever Pillow raises on damaged input into a `BadSample`."""
    try:
        yield
    except BadSample:
        raise
    except UnidentifiedImageError as error:  # its own text is the address of a buffer
        raise BadSample(_reason(data), "not a picture of a known format") from error
    except Image.DecompressionBombError as error:
        raise BadSample("image.too_large", str(error)) from error
    except (
        Exception
    ) as error:  # its decoders raise a dozen kinds, struct.error and MemoryError among them
        raise BadSample(_reason(data), f"{type(error).__name__}: {error}") from error


def _reason(data: bytes) -> str:
    """Why a picture could not be decoded."""
    if not data:
        return "image.empty"
    tail = data[-64:]  # some writers pad
    if data.startswith(b"\xff\xd8"):
        ends = b"\xff\xd9" in tail
    elif data.startswith(b"\x89PNG"):
        ends = b"IEND" in tail
    elif data.startswith(b"GIF8"):
        ends = b";" in tail
    elif data.startswith(b"RIFF") and b"WEBP".startswith(data[8:12]):
        ends = len(data) >= 8 + int.from_bytes(data[4:8], "little")
    else:
        return "image.format"
    return "image.unreadable" if ends else "image.truncated"
