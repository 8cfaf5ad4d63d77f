"""Learning a teacher's similarities over a global batch, on any number of ranks."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.losses.pairs import TILE_BYTES, Pairs, Tile
from vlm.losses.tiles import Gradients, logits_by_tile, over_ranks
from vlm.runtime import distributed


class Teacher(NamedTuple):
    """What a teacher makes of the same batch; its D may be another.

    Attributes:
        image: [B, D], this rank's rows, L2-normalised.
        all_text: [G, D], the whole batch's, likewise.
        logit_scale: [], inverse temperature, exponentiated.
    """

    image: Tensor
    all_text: Tensor
    logit_scale: Tensor


def distillation_loss(
    image_features: Float[Tensor, "B D"],
    all_text_features: Float[Tensor, "G D"],
    logit_scale: Float[Tensor, ""],
    teacher: Teacher,
    pairs: Pairs,
    *,
    tile_bytes: int = TILE_BYTES,
) -> Float[Tensor, ""]:
    """Cross-entropy of the student's softmax under the teacher's; this rank's share of the loss.

    L = 1/2 sum over both directions of
    1/n_valid sum_i valid_i (logsumexp_j s_ij - sum_j q_ij s_ij), q_i the softmax of the teacher's
    row (CLIP-KD, arXiv 2307.12732, contrastive relational distillation; open_clip's
    `DistillClipLoss`). Its least value is the teacher's entropy. Samples that are not valid have no
    part; nor have, with `duplicates: ignore`, equal ones.

    All ranks must call it together. Its gradient is that of the sum over ranks; the teacher has
    none.

    Args:
        image_features: This rank's rows, L2-normalised.
        all_text_features: The whole batch's, likewise, in rank order.
        logit_scale: Inverse temperature, exponentiated.
        teacher: Its features of the same samples.
        pairs: What counts.
        tile_bytes: Of the student's logits that may exist at a time; the teacher's take as much.
    """
    share: Tensor = _Distillation.apply(  # type: ignore[no-untyped-call]  # torch's own
        image_features, all_text_features, logit_scale, teacher, pairs, tile_bytes
    )
    return share


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        teacher: Teacher,
        pairs: Pairs,
        tile_bytes: int,
    ) -> Tensor:
        taught = _Softmaxes.of(*teacher, pairs, tile_bytes)
        ours = _Softmaxes.of(image, text, scale, pairs, tile_bytes)
        of_rows, of_columns = torch.zeros_like(ours.rows), torch.zeros_like(ours.columns)
        for tile, logits, wanted in _both(image, text, scale, teacher, pairs, tile_bytes):
            logits.masked_fill_(wanted == -torch.inf, 0)
            of_rows[tile.rows] = (taught.by_rows(wanted, tile) * logits).sum(1)
            of_columns += (taught.by_columns(wanted) * logits).sum(0)
        of_columns = distributed.all_reduce_sum(of_columns)
        mine = slice(pairs.offset, pairs.offset + len(image))
        losses = ours.rows - of_rows + (ours.columns - of_columns)[mine]
        ctx.teacher, ctx.pairs, ctx.tile_bytes = teacher, pairs, tile_bytes
        ctx.taught, ctx.ours = taught, ours
        ctx.save_for_backward(image, text, scale)
        return torch.where(pairs.valid[mine], losses, 0).sum() / (2 * pairs.num_valid)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        image, text, scale = ctx.saved_tensors
        gradients = Gradients(image, text, scale)
        both = _both(image, text, scale, ctx.teacher, ctx.pairs, ctx.tile_bytes)
        for tile, logits, wanted in both:
            of_logits = ctx.ours.by_rows(logits, tile) + ctx.ours.by_columns(logits)
            of_logits -= ctx.taught.by_rows(wanted, tile) + ctx.taught.by_columns(wanted)
            gradients.add(of_logits, tile)
        return (*gradients.all(upstream[0] / (2 * ctx.pairs.num_valid)), None, None, None)


class _Softmaxes(NamedTuple):
    """The two softmaxes of a matrix of logits, by what they are divided by.

    Attributes:
        rows: [B], logsumexp along each row.
        columns: [G], logsumexp down each column, all ranks' rows together.
    """

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(
        cls, image: Tensor, text: Tensor, scale: Tensor, pairs: Pairs, tile_bytes: int
    ) -> "_Softmaxes":
        rows, columns = [], None
        for _, logits, _ in logits_by_tile(image, text, scale, pairs, tile_bytes):
            rows.append(logits.logsumexp(1))
            here = logits.logsumexp(0)
            columns = here if columns is None else torch.logaddexp(columns, here)
        assert columns is not None
        (columns,) = over_ranks(columns)
        return cls(torch.cat(rows).nan_to_num_(neginf=0.0), columns.nan_to_num_(neginf=0.0))

    def by_rows(self, logits: Tensor, tile: Tile) -> Tensor:
        return (logits - self.rows[tile.rows, None]).exp_()

    def by_columns(self, logits: Tensor) -> Tensor:
        return (logits - self.columns).exp_()


def _both(
    image: Tensor, text: Tensor, scale: Tensor, teacher: Teacher, pairs: Pairs, tile_bytes: int
) -> Iterator[tuple[Tile, Float[Tensor, "t G"], Float[Tensor, "t G"]]]:
    """Each tile with the student's logits and the teacher's."""
    student = logits_by_tile(image, text, scale, pairs, tile_bytes)
    taught = logits_by_tile(*teacher, pairs, tile_bytes)
    for (tile, logits, _), (_, wanted, _) in zip(student, taught, strict=True):
        yield tile, logits, wanted
