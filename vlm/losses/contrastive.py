"""Contrastive losses over a global batch, dense or in tiles, on any number of ranks.

A rank computes its rows of the similarity matrix, once: pictures against all texts. The direction
from texts to pictures is the same matrix down its columns, whose sums the ranks add up. So only
texts are gathered, and half of the products of the usual two directions are needed.

Where a rank's rows do not fit into the byte budget, they are computed in tiles, and again in the
backward pass: memory is that of a tile whatever the batch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vlm.losses.pairs import TILE_BYTES, Pairs
from vlm.losses.tiles import Gradients, Sums, logits_by_tile


def info_nce(
    image_features: Float[Tensor, "B D"],
    all_text_features: Float[Tensor, "G D"],
    logit_scale: Float[Tensor, ""],
    pairs: Pairs,
    *,
    label_smoothing: float = 0.0,
    tile_bytes: int = TILE_BYTES,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE; this rank's share of the global batch's loss, whose sum is the loss.

    CLIP (arXiv 2103.00020, figure 3), with several positives a row (SupCon, 2004.11362, equation
    2). With m_ij the matches and t_ij = m_ij / sum_j m_ij,
    L = 1/2 sum over both directions of
    1/n_valid sum_i valid_i (logsumexp_j s_ij - sum_j t_ij s_ij), columns limited to valid ones.
    Without duplicates it is the cross-entropy of CLIP.

    All ranks must call it together. Its gradient is that of the sum over ranks.

    Args:
        image_features: This rank's rows, L2-normalised.
        all_text_features: The whole batch's, likewise, in rank order.
        logit_scale: Inverse temperature, exponentiated.
        pairs: What matches what.
        label_smoothing: Share of the target that is spread evenly over a row's columns.
        tile_bytes: Of logits that may exist at a time.
    """
    share: Tensor = _InfoNCE.apply(  # type: ignore[no-untyped-call]  # torch's own
        image_features, all_text_features, logit_scale, pairs, label_smoothing, tile_bytes
    )
    return share


def sigmoid_loss(
    image_features: Float[Tensor, "B D"],
    all_text_features: Float[Tensor, "G D"],
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""],
    pairs: Pairs,
    *,
    tile_bytes: int = TILE_BYTES,
) -> Float[Tensor, ""]:
    """SigLIP's loss (arXiv 2303.15343, equation 1); this rank's share, as `info_nce`.

    L = 1/n_valid sum over valid i, j of softplus(-z_ij (s_ij + bias)), z_ij = 1 for matches, else
    -1. Every pair counts once, so one pass gives the loss and the gradient.
    """
    share: Tensor = _Sigmoid.apply(  # type: ignore[no-untyped-call]  # torch's own
        image_features, all_text_features, logit_scale, logit_bias, pairs, tile_bytes
    )
    return share


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        pairs: Pairs,
        smoothing: float,
        tile_bytes: int,
    ) -> Tensor:
        by_tile = []
        columns = None
        for tile, logits, room in logits_by_tile(image, text, scale, pairs, tile_bytes):
            by_tile.append(Sums.of(logits, room, tile, 1, smoothing))
            here = Sums.of(logits, room, tile, 0, smoothing)
            columns = here if columns is None else columns.plus(here)
        rows = Sums.joined(by_tile)
        assert columns is not None
        columns = columns.over_ranks()
        mine = slice(pairs.offset, pairs.offset + len(image))
        losses = rows.losses(smoothing) + columns.losses(smoothing)[mine]
        ctx.pairs, ctx.smoothing, ctx.tile_bytes = pairs, smoothing, tile_bytes
        ctx.rows, ctx.columns = rows.finite(), columns.finite()
        ctx.kept = logits if len(by_tile) == 1 else None
        ctx.save_for_backward(image, text, scale)
        return torch.where(pairs.valid[mine], losses, 0).sum() / (2 * pairs.num_valid)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        image, text, scale = ctx.saved_tensors
        gradients = Gradients(image, text, scale)
        tiles = logits_by_tile(image, text, scale, ctx.pairs, ctx.tile_bytes, ctx.kept)
        for tile, logits, room in tiles:
            rows, columns = ctx.rows[tile.rows], ctx.columns
            counted = logits.isfinite() if ctx.smoothing else None
            of_logits = logits if ctx.kept is None else torch.empty_like(logits)  # [t, G]
            chunks = (torch.split(t, len(room)) for t in (logits, of_logits, rows.logsumexp))
            for part, found, by_row in zip(*chunks, strict=True):
                by_column = torch.sub(part, columns.logsumexp, out=room[: len(part)]).exp_()
                torch.sub(part, by_row[:, None], out=found).exp_().add_(by_column)
            wanted = 1 / rows.count[tile.targets[0]] + 1 / columns.count[tile.targets[1]]
            wanted = torch.where(ctx.pairs.valid[tile.targets[1]], wanted, 0)
            of_logits.index_put_(tile.targets, (ctx.smoothing - 1) * wanted, accumulate=True)
            if counted is not None:
                evenly = 1 / rows.width[:, None] + 1 / columns.width
                of_logits -= ctx.smoothing * torch.where(counted, evenly, 0)
            gradients.add(of_logits, tile)
        sums = gradients.all(upstream[0] / (2 * ctx.pairs.num_valid))
        return (*sums, None, None, None)


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor,
        pairs: Pairs,
        tile_bytes: int,
    ) -> Tensor:
        gradients = Gradients(image, text, scale)
        total, of_bias = torch.zeros_like(scale), torch.zeros_like(scale)
        for tile, logits, _ in logits_by_tile(image, text, scale, pairs, tile_bytes):
            margins = logits.add_(bias)  # [t, G]
            positive = margins[tile.targets]
            margins[tile.targets] = torch.where(positive.isfinite(), -positive, positive)
            total += F.softplus(margins).sum()
            if any(ctx.needs_input_grad):
                of_logits = margins.sigmoid_()
                of_logits[tile.targets] *= -1
                of_bias += of_logits.sum()
                gradients.add(of_logits, tile)
        found = gradients.all(torch.ones_like(scale) / pairs.num_valid)
        ctx.gradients = (*found, of_bias / pairs.num_valid)
        return total / pairs.num_valid

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (*(gradient * upstream[0] for gradient in ctx.gradients), None, None)
