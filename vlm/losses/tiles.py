"""Logits of a rank's pictures and all texts, a tile at a time, and what is summed over them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.losses.pairs import Pairs, Tile
from vlm.runtime import distributed

ROOM_BYTES = 2**20  # of some rows of a tile on the CPU: half of what a core's second cache holds


def logits_by_tile(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    pairs: Pairs,
    tile_bytes: int,
    kept: Tensor | None = None,
) -> Iterator[tuple[Tile, Float[Tensor, "t G"], Float[Tensor, "c G"]]]:
    """Yields each tile, its logits, and room for some of their rows, which the next takes over.

    Memory that is asked for anew would cost page faults, and with glibc 2.36 grow without end. The
    room is small on the CPU, so that what is computed there stays in a core's cache: products want
    large tiles, and everything else small ones.

    Args:
        image: This rank's features.
        text: The whole batch's.
        scale: Inverse temperature.
        pairs: What counts.
        tile_bytes: Of a tile's logits.
        kept: The logits, if they are known.
    """
    memory = None
    for tile in pairs.tiles(len(image), image.element_size(), tile_bytes):
        height = tile.rows.stop - tile.rows.start
        if memory is None:  # the first tile is the highest
            few = max(1, ROOM_BYTES // (image.element_size() * len(text)))
            few = min(height, few) if image.device.type == "cpu" else height
            memory = image.new_empty(few + (0 if kept is not None else height), len(text))
        room, logits = memory[:few], kept
        if logits is None:
            logits = memory[few : few + height]
            _fill_logits(logits, image, text, scale, pairs, tile)
        yield tile, logits, room


def _fill_logits(
    logits: Tensor, image: Tensor, text: Tensor, scale: Tensor, pairs: Pairs, tile: Tile
) -> None:
    """s_ij; -inf where it does not count."""
    queries = scale * image[tile.rows]
    if pairs.all_valid:
        torch.mm(queries, text.T, out=logits)
    else:
        left_out = torch.zeros_like(text[:, 0]).masked_fill_(~pairs.valid, -torch.inf)
        torch.addmm(left_out, queries, text.T, out=logits)
        logits.masked_fill_(~pairs.mine(len(image))[tile.rows, None], -torch.inf)
    if tile.left_out is not None:
        logits.masked_fill_(tile.left_out, -torch.inf)


@dataclass(frozen=True)
class Sums:
    """Of each row, or of each column, of a tile or of all of them.

    Attributes:
        logsumexp: Of its logits.
        positive: Sum of its positives' logits.
        count: Number of them.
        total: Sum of all its logits; 0 without label smoothing.
        width: Number of them; 0 without label smoothing.
    """

    logsumexp: Tensor
    positive: Tensor
    count: Tensor
    total: Tensor
    width: Tensor

    @classmethod
    def of(cls, logits: Tensor, room: Tensor, tile: Tile, dim: int, smoothing: float) -> "Sums":
        """Along a dimension of a tile."""
        highest = logits.amax(dim, keepdim=True).nan_to_num_(neginf=0.0)
        total = _sum_exp(logits, highest, room, dim)
        nothing = logits.new_zeros(logits.shape[1 - dim])
        where, positive = tile.targets[1 - dim], logits[tile.targets]
        counts = logits.isfinite() if smoothing else None
        return cls(
            total.log_().add_(highest.squeeze(dim)),
            nothing.index_add(0, where, positive),
            nothing.index_add(0, where, torch.ones_like(positive)),
            nothing if counts is None else logits.where(counts, 0).sum(dim),
            nothing if counts is None else counts.sum(dim).to(logits.dtype),
        )

    @classmethod
    def joined(cls, parts: "list[Sums]") -> "Sums":
        """Of rows one after the other."""
        return cls(*(torch.cat(columns) for columns in zip(*map(_fields, parts), strict=True)))

    def plus(self, other: "Sums") -> "Sums":
        """Of the same columns, over more rows."""
        (mine, *sums), (theirs, *more) = _fields(self), _fields(other)
        added = (a + b for a, b in zip(sums, more, strict=True))
        return Sums(torch.logaddexp(mine, theirs), *added)

    def over_ranks(self) -> "Sums":
        """Of the same columns, over the rows of all ranks."""
        return Sums(*over_ranks(*_fields(self)))

    def losses(self, smoothing: float) -> Tensor:
        """The logsumexp less sum_j t_ij s_ij; anything where nothing counts."""
        wanted = self.positive / self.count
        if smoothing:
            wanted = (1 - smoothing) * wanted + smoothing * self.total / self.width
        return self.logsumexp - wanted

    def finite(self) -> "Sums":
        """With 0 for the logsumexp of nothing: exp(-inf - 0) is 0."""
        return Sums(self.logsumexp.nan_to_num(neginf=0.0), *_fields(self)[1:])

    def __getitem__(self, rows: slice) -> "Sums":
        return Sums(*(value[rows] for value in _fields(self)))


def _sum_exp(logits: Tensor, highest: Tensor, room: Tensor, dim: int) -> Tensor:
    """The sum of exp(logits - highest) along a dimension, some rows at a time."""
    parts = torch.split(logits, len(room))
    less = torch.split(highest, len(room)) if dim == 1 else [highest] * len(parts)
    sums = (
        torch.sub(part, high, out=room[: len(part)]).exp_().sum(dim)
        for part, high in zip(parts, less, strict=True)
    )
    if dim == 1:
        return torch.cat(list(sums))
    total = next(sums)
    for more in sums:
        total += more
    return total


def over_ranks(logsumexp: Tensor, *sums: Tensor) -> tuple[Tensor, ...]:
    """The logsumexp and the sums of all ranks' rows, from those of this rank's; equal shapes."""
    if distributed.world_size() == 1:
        return logsumexp, *sums
    highest = distributed.all_reduce_max(logsumexp.clone()).nan_to_num_(neginf=0.0)
    shares = (logsumexp - highest).exp()
    total, *added = distributed.all_reduce_sum(torch.stack([shares, *sums]))
    return total.log() + highest, *added


def _fields(sums: Sums) -> tuple[Tensor, ...]:
    return sums.logsumexp, sums.positive, sums.count, sums.total, sums.width


class Gradients:
    """What the gradients of tiles of logits add up to."""

    def __init__(self, image: Tensor, text: Tensor, scale: Tensor) -> None:
        self.image, self.text, self.scale = image, text, scale
        self.of_image, self.of_text = torch.empty_like(image), torch.zeros_like(text)
        self.of_scale = torch.zeros_like(scale)

    def add(self, of_logits: Float[Tensor, "t G"], tile: Tile) -> None:
        """A tile's."""
        image = self.image[tile.rows]
        self.of_image[tile.rows] = of_logits @ self.text
        self.of_scale += (image * self.of_image[tile.rows]).sum()
        self.of_text.addmm_(of_logits.T, image)

    def all(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those of image, text and scale, times the loss's weight; once."""
        scale = self.scale * weight
        return self.of_image.mul_(scale), self.of_text.mul_(scale), self.of_scale * weight
