"""Symmetric InfoNCE in which equal captions are positives.

CLIP (arXiv 2103.00020, figure 3), with several positives a row (SupCon, 2004.11362, equation 2).
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Duplicates = Literal["positive", "ignore", "negative"]


@dataclass(frozen=True)
class Pairs:
    """Which picture belongs to which text, seen from a rank's rows.

    Attributes:
        sample_ids: [G] of the whole batch, in rank order.
        caption_ids: [G], a hash of each text after cleaning.
        valid: [G]; rows and columns that are not leave the loss.
        offset: First row of this rank.
        duplicates: What an equal sample or caption elsewhere in the batch is.
    """

    sample_ids: Tensor
    caption_ids: Tensor
    valid: Tensor
    offset: int = 0
    duplicates: Duplicates = "positive"

    def matches(self, rows: int) -> Bool[Tensor, "B G"]:
        """m_ij: valid, and the same sample or the same caption."""
        mine = slice(self.offset, self.offset + rows)
        same = self.sample_ids[mine, None] == self.sample_ids
        same |= self.caption_ids[mine, None] == self.caption_ids
        return same & self.valid[mine, None] & self.valid


def info_nce(
    image_features: Float[Tensor, "B D"],
    text_features: Float[Tensor, "B D"],
    all_image_features: Float[Tensor, "G D"],
    all_text_features: Float[Tensor, "G D"],
    logit_scale: Float[Tensor, ""],
    pairs: Pairs,
) -> Float[Tensor, ""]:
    """This rank's share of the global batch's loss; the sum over ranks is the loss.

    With m_ij the matches and t_ij = m_ij / sum_j m_ij,
    L = 1/2 sum over both directions of
    1/n_valid sum_i valid_i (logsumexp_j s_ij - sum_j t_ij s_ij), columns limited to valid ones.
    Without duplicates it is the cross-entropy of CLIP.

    Args:
        image_features: This rank's rows, L2-normalised, as the three others.
        text_features: Likewise.
        all_image_features: The whole batch in rank order; the same tensor where there is one rank.
        all_text_features: Likewise.
        logit_scale: Inverse temperature, exponentiated.
        pairs: What matches what.
    """
    rows = len(image_features)
    valid = pairs.valid[pairs.offset : pairs.offset + rows]
    targets, columns = _targets(pairs, rows, image_features.dtype)
    directions = ((image_features, all_text_features), (text_features, all_image_features))
    total = image_features.new_zeros(())
    for queries, keys in directions:
        logits = logit_scale * queries @ keys.T  # [B, G]
        logits = logits.masked_fill(~columns, float("-inf"))
        positive = (targets * logits.masked_fill(targets == 0, 0.0)).sum(dim=1)
        per_row = torch.where(valid, logits.logsumexp(dim=1) - positive, 0.0)
        total = total + per_row.sum()
    return total / (2 * pairs.valid.sum().clamp(min=1))


def _targets(
    pairs: Pairs, rows: int, dtype: torch.dtype
) -> tuple[Float[Tensor, "B G"], Bool[Tensor, "B G"]]:
    """t_ij, and the columns in each row's denominator (all of them in rows that do not count)."""
    matches = pairs.matches(rows)
    index = torch.arange(pairs.offset, pairs.offset + rows, device=matches.device)
    own = F.one_hot(index, len(pairs.valid)).bool()
    valid = pairs.valid[pairs.offset : pairs.offset + rows, None]
    columns = (pairs.valid & valid) | ~valid
    if pairs.duplicates == "ignore":
        columns = columns & (own | ~matches)
    if pairs.duplicates != "positive":
        matches = own & matches
    targets = matches.to(dtype) / matches.sum(dim=1, keepdim=True).clamp(min=1)
    return targets, columns


def num_duplicates(pairs: Pairs, rows: int) -> Int[Tensor, ""]:
    """Matches beyond each row's own: the false negatives that plain InfoNCE would push apart."""
    mine = pairs.valid[pairs.offset : pairs.offset + rows]
    return pairs.matches(rows).sum() - mine.sum()
