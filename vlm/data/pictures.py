"""What users give as a picture: a path, encoded bytes, a PIL image, an array or a tensor."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from vlm.errors import ConfigError

Picture = str | Path | bytes | Image.Image | np.ndarray | Tensor


def each_picture(images: Picture | Iterable[Picture]) -> Iterable[Picture]:
    """Several pictures, also where one is given; 4-dimensional arrays are several."""
    if isinstance(images, np.ndarray | Tensor):
        return list(images) if images.ndim == 4 else [images]
    return [images] if isinstance(images, str | Path | bytes | Image.Image) else images


def opened(picture: Picture) -> bytes | Image.Image:
    """Encoded bytes or a PIL image, whatever was given.

    Raises:
        ConfigError: A file that can't be read, or an array of another type or shape.
    """
    if isinstance(picture, str | Path):
        try:
            return Path(picture).read_bytes()
        except OSError as error:
            raise ConfigError(f"{picture}: cannot read: {error.strerror}") from error
    if isinstance(picture, bytes | Image.Image):
        return picture
    array = picture.movedim(0, -1).cpu().numpy() if isinstance(picture, Tensor) else picture
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
        raise ConfigError(
            f"a picture must be uint8 [H, W, 3] (array) or [3, H, W] (tensor), not {array.dtype} "
            f"{tuple(picture.shape)}; preprocessed floats go to encode_image"
        )
    return Image.fromarray(array)
