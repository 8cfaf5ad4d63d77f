"""Which picture belongs to which text, seen from a rank's rows of the global batch."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Duplicates = Literal["positive", "ignore", "negative"]
TILE_BYTES = 32 * 2**20  # of logits on the CPU
GPU_TILE_BYTES = 256 * 2**20  # kernels want large matrices; what is computed takes as much again


class Tile(NamedTuple):
    """Some of this rank's rows against all columns.

    Attributes:
        rows: Of this rank's features.
        targets: Rows (of the tile) and columns of the positives, one index tensor each.
        left_out: [t, G], duplicates that are no positives and no negatives; None if there are none.
    """

    rows: slice
    targets: tuple[Int[Tensor, " M"], Int[Tensor, " M"]]
    left_out: Bool[Tensor, "t G"] | None


@dataclass(frozen=True)
class Pairs:
    """The pairs of a global batch of G, of which this rank has B rows.

    Attributes:
        sample_ids: [G] in rank order.
        caption_ids: [G], a hash of each text after cleaning.
        valid: [G]; rows and columns that are not leave the loss.
        offset: First row of this rank.
        duplicates: What an equal sample or caption elsewhere in the batch is.
        distinct: No two valid samples are equal, nor have equal captions: nothing needs comparing.
        all_valid: Nothing needs masking.
        num_valid: What the loss is divided by; 1 at least.
        is_empty: None is valid: there is nothing to compare.
    """

    sample_ids: Tensor
    caption_ids: Tensor
    valid: Tensor
    offset: int = 0
    duplicates: Duplicates = "positive"

    distinct: bool = field(init=False)
    all_valid: bool = field(init=False)
    num_valid: int = field(init=False)
    is_empty: bool = field(init=False)

    def __post_init__(self) -> None:
        valid = int(self.valid.sum())
        ids = (self.sample_ids, self.caption_ids)
        distinct = all(len(torch.unique(each[self.valid])) == valid for each in ids)
        object.__setattr__(self, "distinct", distinct)
        object.__setattr__(self, "all_valid", valid == len(self.valid))
        object.__setattr__(self, "num_valid", max(1, valid))
        object.__setattr__(self, "is_empty", not valid)

    def mine(self, rows: int) -> Bool[Tensor, " B"]:
        """Which of this rank's rows are valid."""
        return self.valid[self.offset : self.offset + rows]

    def tiles(self, rows: int, item_bytes: int, tile_bytes: int) -> Iterator[Tile]:
        """Yields this rank's rows in groups whose logits fit into so many bytes, one row at least.

        Args:
            rows: B.
            item_bytes: Of one logit.
            tile_bytes: Of a tile's logits.
        """
        height = max(1, min(rows, tile_bytes // (item_bytes * len(self.valid))))
        for start in range(0, rows, height):
            yield self._tile(slice(start, min(start + height, rows)))

    def num_duplicates(self, rows: int, tile_bytes: int = TILE_BYTES) -> Int[Tensor, ""]:
        """Matches of this rank's rows beyond their own: what plain InfoNCE would push apart."""
        none = self.valid.new_zeros((), dtype=torch.long)
        if self.distinct:
            return none
        matches = (self._matches(tile.rows).sum() for tile in self.tiles(rows, 1, tile_bytes))
        return sum(matches, none) - self.mine(rows).sum()

    def _tile(self, rows: slice) -> Tile:
        each = torch.arange(rows.stop - rows.start, device=self.valid.device)
        own = (each, each + (self.offset + rows.start))
        if self.distinct or self.duplicates == "negative":
            return Tile(rows, own, None)
        matches = self._matches(rows)
        if self.duplicates == "positive":
            return Tile(rows, tuple(matches.nonzero().T), None)
        return Tile(rows, own, matches.index_put(own, torch.zeros_like(each, dtype=torch.bool)))

    def _matches(self, rows: slice) -> Bool[Tensor, "t G"]:
        """m_ij: both valid, and the same sample or the same caption."""
        mine = slice(self.offset + rows.start, self.offset + rows.stop)
        same = self.sample_ids[mine, None] == self.sample_ids
        same |= self.caption_ids[mine, None] == self.caption_ids
        return same & self.valid[mine, None] & self.valid
