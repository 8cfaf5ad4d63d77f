"""From a picture to uint8 pixels, for training or evaluation, and from those to floats."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.random import Generator
from PIL import Image
from torch import Tensor

from vlm.data.decode import decode_image, load_rgb, open_image, to_rgb, upright_size

Box = tuple[float, float, float, float]  # left, top, right, bottom

_GREY = np.array([0.299, 0.587, 0.114])  # ITU-R 601, as Pillow's "L"
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_WHITE = (255, 255, 255)  # what transparency is put on, too


@dataclass(frozen=True)
class TrainTransform:
    """A random resized crop, then what else is switched on; the caller brings the random numbers.

    The crop follows torchvision's `RandomResizedCrop`, without rounding its box to whole pixels. A
    JPEG is decoded at the smallest DCT scale that leaves the crop `image_size` pixels a side.

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

    def __call__(self, image: bytes | Image.Image, rng: Generator) -> UInt8[Tensor, "3 S S"]:
        """The pixels of one visit; `image` is encoded, or an upright RGB picture.

        Raises:
            BadSample: The picture cannot be decoded.
        """
        picture, box = self._load(image, rng)
        if self.rotate_degrees:
            degrees = rng.uniform(-self.rotate_degrees, self.rotate_degrees)
            picture = _crop_turned(picture, box, self.image_size, degrees)
        else:
            size = (self.image_size, self.image_size)
            picture = picture.resize(size, Image.Resampling.BICUBIC, box, reducing_gap=2.0)
        if self.horizontal_flip and rng.random() < self.horizontal_flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.color_jitter:
            picture = _jitter_colors(picture, self.color_jitter, rng)
        pixels = np.array(picture)
        if self.erase and rng.random() < self.erase:
            _erase(pixels, rng)
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def can_reuse(self, picture: Image.Image) -> bool:
        """Whether a decoded picture can stand in for its bytes: no crop is decoded reduced."""
        return min(picture.size) < 2 * self.image_size

    def _load(self, image: bytes | Image.Image, rng: Generator) -> tuple[Image.Image, Box]:
        """The picture, perhaps reduced, and the crop in its coordinates."""
        if isinstance(image, Image.Image):
            return image, random_crop(*image.size, rng, self.min_scale, self.max_aspect)
        opened = open_image(image)
        width, height = upright_size(opened, image)
        left, top, right, bottom = random_crop(width, height, rng, self.min_scale, self.max_aspect)
        shrink = int(min(right - left, bottom - top)) // self.image_size
        picture = load_rgb(opened, image, shrink=shrink)
        x, y = picture.width / width, picture.height / height
        return picture, (
            left * x,
            top * y,
            min(right * x, picture.width),
            min(bottom * y, picture.height),
        )


def random_crop(
    width: int, height: int, rng: Generator, min_scale: float, max_aspect: float
) -> Box:
    """A box of random area and aspect in the picture, drawn as by `RandomResizedCrop`."""
    log_aspect = math.log(max_aspect)
    for _ in range(10):
        scale, aspect, x, y = rng.random(4).tolist()
        area = width * height * (min_scale + (1 - min_scale) * scale)
        ratio = math.exp(log_aspect * (2 * aspect - 1))
        crop_width, crop_height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if crop_width <= width and crop_height <= height:
            left, top = x * (width - crop_width), y * (height - crop_height)
            return left, top, left + crop_width, top + crop_height
    crop_width = min(width, height * max_aspect)  # the largest allowed, in the middle
    crop_height = min(height, width * max_aspect)
    left, top = (width - crop_width) / 2, (height - crop_height) / 2
    return left, top, left + crop_width, top + crop_height


def _crop_turned(picture: Image.Image, box: Box, size: int, degrees: float) -> Image.Image:
    """The crop turned about its middle and resized in one interpolation; reduced first if large."""
    left, top, right, bottom = box
    factor = max(1, int(min(right - left, bottom - top)) // size)
    if factor > 1:
        picture = picture.reduce(factor)
    # source pixels per target pixel
    x, y = (right - left) / (size * factor), (bottom - top) / (size * factor)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    a, b, d, e = x * cos, -x * sin, y * sin, y * cos
    middle_x, middle_y = (left + right) / (2 * factor), (top + bottom) / (2 * factor)
    matrix = (a, b, middle_x - (a + b) * size / 2, d, e, middle_y - (d + e) * size / 2)
    return picture.transform(
        (size, size),
        Image.Transform.AFFINE,
        matrix,
        Image.Resampling.BILINEAR,
        fillcolor=_WHITE,
    )


def _jitter_colors(picture: Image.Image, strength: float, rng: Generator) -> Image.Image:
    """Brightness, contrast and saturation as one colour matrix, clipped once.

    brightness (contrast x + (1 - contrast) mean), where x = saturation rgb + (1 - saturation) grey.
    """
    brightness, contrast, saturation = 1 + strength * (2 * rng.random(3) - 1)
    mean = _GREY @ picture.reduce(picture.size).getpixel((0, 0))
    matrix = np.empty((3, 4))
    matrix[:, :3] = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * _GREY)
    matrix[:, 3] = brightness * (1 - contrast) * mean
    return picture.convert("RGB", tuple(matrix.ravel().tolist()))


def _erase(pixels: UInt8[np.ndarray, "S S 3"], rng: Generator) -> None:
    """Fill a random rectangle with noise, in place."""
    size = len(pixels)
    area, aspect, x, y = rng.random(4).tolist()
    area = size * size * (0.02 + (1 / 3 - 0.02) * area)
    ratio = math.exp(math.log(3.3) * (2 * aspect - 1))
    height = min(size, max(1, round(math.sqrt(area * ratio))))
    width = min(size, max(1, round(math.sqrt(area / ratio))))
    top, left = int(y * (size - height + 1)), int(x * (size - width + 1))
    noise = rng.integers(256, size=(height, width, 3), dtype=np.uint8)
    pixels[top : top + height, left : left + width] = noise


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
