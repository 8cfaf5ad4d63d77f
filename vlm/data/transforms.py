"""From a picture to uint8 pixels, for training or evaluation, and from those to floats."""

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import Literal

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from vlm.data.decode import decode_image, read_header, to_rgb

Pixels = UInt8[np.ndarray, "H W 3"]
Box = tuple[float, float, float, float]  # left, top, right, bottom
WholeBox = tuple[int, int, int, int]

_GREY = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's "L"
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_WHITE = (255, 255, 255)  # what transparency is put on, too


@dataclass(frozen=True)
class TrainTransform:
    """A random resized crop, then what else is switched on; the caller brings the random numbers.

    The crop follows torchvision's `RandomResizedCrop`. A JPEG is decoded at the smallest DCT scale
    that leaves the crop `image_size` pixels a side.

    Args:
        image_size: S, pixels a side.
        min_scale: Smallest share of the picture's area that a crop keeps.
        max_aspect: A crop's width over height is between `1 / max_aspect` and `max_aspect`.
        horizontal_flip: Probability; left and right matter to captions.
        color_jitter: Brightness, contrast and saturation each change by a factor within 1 +- this.
        rotate_degrees: Largest turn to either side; what comes in from outside is white.
        erase: Probability that a rectangle of 2% to 33% becomes noise (arXiv 1708.04896).
    """

    image_size: int
    _: KW_ONLY
    min_scale: float = 0.9
    max_aspect: float = 4 / 3
    horizontal_flip: float = 0.0
    color_jitter: float = 0.0
    rotate_degrees: float = 0.0
    erase: float = 0.0

    def __call__(self, image: bytes | Pixels, draws: Iterator[float]) -> UInt8[np.ndarray, "S S 3"]:
        """The pixels of one visit; `image` is encoded, or decoded as by `decode_image`.

        Raises:
            BadSample: The picture cannot be decoded.
        """
        source, box = self.load(image, draws)
        if self.rotate_degrees:
            degrees = self.rotate_degrees * (2 * next(draws) - 1)
            pixels = _crop_turned(source, box, self.image_size, degrees)
        else:
            pixels = _crop(source, box, self.image_size)
        if self.horizontal_flip and next(draws) < self.horizontal_flip:
            pixels = cv2.flip(pixels, 1)
        if self.color_jitter:
            pixels = _jitter_colors(pixels, self.color_jitter, draws)
        if self.erase and next(draws) < self.erase:
            _erase(pixels, draws)
        return pixels

    def can_reuse(self, width: int, height: int) -> bool:
        """Whether a decoded picture can stand in for its bytes: no crop is decoded reduced."""
        return min(width, height) < 2 * self.image_size

    def load(self, image: bytes | Pixels, draws: Iterator[float]) -> tuple[Pixels, WholeBox]:
        """The picture, perhaps reduced, and the crop in its coordinates.

        Raises:
            BadSample: The picture cannot be decoded.
        """
        if isinstance(image, np.ndarray):
            height, width = image.shape[:2]
            box = random_crop(width, height, draws, self.min_scale, self.max_aspect)
            return image, _whole_pixels(box, width, height)
        encoded = read_header(image)
        width, height = encoded.size
        box = random_crop(width, height, draws, self.min_scale, self.max_aspect)
        shrink = int(min(box[2] - box[0], box[3] - box[1])) // self.image_size
        pixels = encoded.pixels(shrink=shrink)
        x, y = pixels.shape[1] / width, pixels.shape[0] / height
        box = box[0] * x, box[1] * y, box[2] * x, box[3] * y
        return pixels, _whole_pixels(box, pixels.shape[1], pixels.shape[0])


def random_crop(
    width: int, height: int, draws: Iterator[float], min_scale: float, max_aspect: float
) -> Box:
    """A box of random area and aspect in the picture, drawn as by `RandomResizedCrop`."""
    log_aspect = math.log(max_aspect)
    for _ in range(10):
        area = width * height * (min_scale + (1 - min_scale) * next(draws))
        ratio = math.exp(log_aspect * (2 * next(draws) - 1))
        x, y = next(draws), next(draws)
        crop_width, crop_height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if crop_width <= width and crop_height <= height:
            left, top = x * (width - crop_width), y * (height - crop_height)
            return left, top, left + crop_width, top + crop_height
    crop_width = min(width, height * max_aspect)  # the largest allowed, in the middle
    crop_height = min(height, width * max_aspect)
    left, top = (width - crop_width) / 2, (height - crop_height) / 2
    return left, top, left + crop_width, top + crop_height


def _whole_pixels(box: Box, width: int, height: int) -> WholeBox:
    """The box rounded to whole pixels of the picture, of one at least."""
    left, top = min(round(box[0]), width - 1), min(round(box[1]), height - 1)
    right, bottom = min(round(box[2]), width), min(round(box[3]), height)
    return left, top, max(right, left + 1), max(bottom, top + 1)


def _crop(pixels: Pixels, box: WholeBox, size: int) -> UInt8[np.ndarray, "S S 3"]:
    """The crop resized: reduced by mixing two pixels a side, to no less than a half each time.

    On photographs that is within 2 grey levels of Pillow's bicubic on average, in a tenth of the
    time (benchmarks/loader.py).
    """
    left, top, right, bottom = box
    crop = pixels[top:bottom, left:right]
    while max(crop.shape[:2]) > 2 * size:
        height, width = (max(size, -(-side // 2)) for side in crop.shape[:2])
        crop = cv2.resize(crop, (width, height), interpolation=cv2.INTER_LINEAR)
    how = cv2.INTER_CUBIC if max(crop.shape[:2]) < size else cv2.INTER_LINEAR
    return cv2.resize(crop, (size, size), interpolation=how)


def _crop_turned(
    pixels: Pixels, box: WholeBox, size: int, degrees: float
) -> UInt8[np.ndarray, "S S 3"]:
    """The crop turned about its middle and resized in one interpolation; reduced first if large."""
    left, top, right, bottom = box
    factor = max(1, int(min(right - left, bottom - top)) // size)
    if factor > 1:
        reduced = (-(-pixels.shape[1] // factor), -(-pixels.shape[0] // factor))
        pixels = cv2.resize(pixels, reduced, interpolation=cv2.INTER_AREA)
    # source pixels per target pixel
    x, y = (right - left) / (size * factor), (bottom - top) / (size * factor)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    a, b, d, e = x * cos, -x * sin, y * sin, y * cos
    middle_x, middle_y = (left + right) / (2 * factor), (top + bottom) / (2 * factor)
    half = (size - 1) / 2  # a pixel's coordinates are those of its middle
    matrix = np.array(
        [
            [a, b, middle_x - 0.5 - (a + b) * half],
            [d, e, middle_y - 0.5 - (d + e) * half],
        ]
    )
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(pixels, matrix, (size, size), flags=how, borderValue=_WHITE)


def _jitter_colors(
    pixels: UInt8[np.ndarray, "S S 3"], strength: float, draws: Iterator[float]
) -> UInt8[np.ndarray, "S S 3"]:
    """Brightness, contrast and saturation as one colour matrix, clipped once.

    brightness (contrast x + (1 - contrast) mean), where x = saturation rgb + (1 - saturation) grey.
    """
    brightness, contrast, saturation = (1 + strength * (2 * next(draws) - 1) for _ in range(3))
    mean = sum(map(operator.mul, _GREY, cv2.mean(pixels)))
    own = brightness * contrast * saturation
    grey = [brightness * contrast * (1 - saturation) * weight for weight in _GREY]
    shift = brightness * (1 - contrast) * mean
    matrix = [[grey[j] + own * (i == j) for j in range(3)] + [shift] for i in range(3)]
    return cv2.transform(pixels, np.array(matrix))


def _erase(pixels: UInt8[np.ndarray, "S S 3"], draws: Iterator[float]) -> None:
    """Fill a random rectangle with noise, in place."""
    size = len(pixels)
    area = size * size * (0.02 + (1 / 3 - 0.02) * next(draws))
    ratio = math.exp(math.log(3.3) * (2 * next(draws) - 1))
    height = min(size, max(1, round(math.sqrt(area * ratio))))
    width = min(size, max(1, round(math.sqrt(area / ratio))))
    top, left = (int(next(draws) * (size - side + 1)) for side in (height, width))
    noise = np.random.default_rng(int(next(draws) * 2**32))
    rectangle = pixels[top : top + height, left : left + width]
    rectangle[:] = noise.integers(256, size=rectangle.shape, dtype=np.uint8)


@dataclass(frozen=True)
class EvalTransform:
    """The picture at the model's size, bit-equal to open_clip's transform before `ToTensor`.

    Args:
        image_size: S, pixels a side.
        resize_mode: "shortest": the shorter side becomes S, then a centre crop; "squash": both
            sides become S; "longest": the longer side becomes S, the rest is black.
        interpolation: Of the resize; with antialiasing, as Pillow does it.
    """

    image_size: int
    resize_mode: Literal["shortest", "squash", "longest"] = "shortest"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    def __call__(self, image: bytes | Image.Image) -> UInt8[Tensor, "3 S S"]:
        """The pixels of an encoded or an opened picture.

        Raises:
            BadSample: The bytes cannot be decoded.
        """
        picture = decode_image(image) if isinstance(image, bytes) else to_rgb(image)
        picture = picture.resize(self._resized(*picture.size), _FILTERS[self.interpolation])
        pixels = np.array(self._crop_or_pad(picture))
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def place(self, box: Box, width: int, height: int) -> Box:
        """Where a box of a picture comes to lie, in pixels of the result; it may reach outside."""
        new_width, new_height = self._resized(width, height)
        x, y = new_width / width, new_height / height
        left, top = _margin(new_width, self.image_size), _margin(new_height, self.image_size)
        return box[0] * x - left, box[1] * y - top, box[2] * x - left, box[3] * y - top

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after resizing, rounded as torchvision and timm (longest) do."""
        size = self.image_size
        if self.resize_mode == "squash":
            return size, size
        if self.resize_mode == "longest":
            ratio = max(width / size, height / size)
            return max(1, round(width / ratio)), max(1, round(height / ratio))
        longest = int(size * max(width, height) / min(width, height))
        return (size, longest) if width <= height else (longest, size)

    def _crop_or_pad(self, picture: Image.Image) -> Image.Image:
        """The middle S x S pixels; the odd pixel of a pad goes to the right and the bottom."""
        size = self.image_size
        if picture.size == (size, size):
            return picture
        left, top = (_margin(side, size) for side in picture.size)
        return picture.crop((left, top, left + size, top + size))


def _margin(side: int, size: int) -> int:
    """Pixels cut off before the middle `size` of `side`; negative where they are added."""
    return round((side - size) / 2) if side >= size else -((size - side) // 2)


def normalize(
    images: UInt8[Tensor, "*B 3 H W"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "*B 3 H W"]:
    """`(images / 255 - mean) / std` in float32, on the images' device and in their memory format.

    Computed as one scale and one shift: within 1e-6 of torchvision's `ToTensor` and `Normalize`.
    """
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), images.device)
    return (images * scale).add_(shift)


@lru_cache(maxsize=16)
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Float[Tensor, "3 1 1"], Float[Tensor, "3 1 1"]]:
    """Kept on the device: a copy for each batch would wait for the device's queue."""
    std_64 = torch.tensor(std, dtype=torch.float64).view(3, 1, 1)
    mean_64 = torch.tensor(mean, dtype=torch.float64).view(3, 1, 1)
    return (1 / (255 * std_64)).float().to(device), (-mean_64 / std_64).float().to(device)
