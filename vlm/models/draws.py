"""Random numbers that follow from a sample's visit alone, drawn on the device.

Neither the number of ranks nor micro-batches nor a resumption changes them.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def uniform(visits: Int[Tensor, " B"], num: int) -> Float[Tensor, "B N"]:
    """So many numbers in 0..1 for each visit."""
    return (integers(visits, num) & (2**24 - 1)).float() / 2**24


def integers(visits: Int[Tensor, " B"], num: int) -> Int[Tensor, "B N"]:
    """So many random integers for each visit."""
    numbers = torch.arange(num, device=visits.device)
    return _mixed(visits[:, None] + _mixed(numbers + 1))


def _mixed(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Murmur3's 64-bit finaliser: close numbers come out unrelated."""
    for multiplier in (-0xAE502812AA7333, -0x3B314601E57A13AD):  # as signed numbers
        x = (x ^ ((x >> 33) & 0x7FFFFFFF)) * multiplier  # a logical shift
    return x ^ ((x >> 33) & 0x7FFFFFFF)
