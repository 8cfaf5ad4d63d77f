"""A heat map over a picture, in colours that grow lighter with relevance."""

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

# Viridis: even in lightness, and told apart with any colour vision
# (Smith and van der Walt 2015; Nunez, Anderton and Renslow, arXiv 1712.01662)
COLOURS = "viridis"
_DENSEST = 0.85  # how much of a pixel is heat where that is greatest; the rest is the picture
_FULL = 4.0  # times the even share, from which on a region may have the lightest colour


def draw_overlay(
    picture: UInt8[Tensor, "3 S S"], regions: Float[Tensor, "h w"], *, side: int
) -> Image.Image:
    """The picture in grey beneath a heat map.

    What has no more than the even share stays clear. The lightest colour is that of the largest
    share, unless all are below 4 times the even one: a map that is nearly even looks so.

    Args:
        picture: What was explained.
        regions: Shares that sum to 1.
        side: Pixels, at least; the picture is enlarged by a whole factor.
    """
    size = picture.shape[1] * -(-side // picture.shape[1])
    even = 1 / regions.numel()
    top = max(float(regions.max()), _FULL * even)
    small = Image.fromarray(((regions - even) / (top - even)).relu().float().numpy())  # mode F
    heat = np.asarray(small.resize((size, size), Image.Resampling.BILINEAR))
    grey = Image.fromarray(picture.permute(1, 2, 0).numpy()).convert("L")
    below = np.asarray(grey.resize((size, size), Image.Resampling.BICUBIC), np.float32)[..., None]
    colours = 255 * colormaps[COLOURS](heat)[..., :3]
    density = _DENSEST * np.minimum(1, 2 * heat)[..., None]
    return Image.fromarray((below + density * (colours - below)).round().astype(np.uint8))
