"""Contrastive losses over a global batch, dense or in tiles, on any number of ranks.

A rank computes its rows of the similarity matrix, once: pictures against all texts. The direction
from texts to pictures is the same matrix down its columns, whose sums the ranks add up. So only
texts are gathered, and half of the products of the usual two directions are needed.

Where a rank's rows do not fit into the byte budget, they are computed in tiles, and again in the
backward pass: memory is that of a tile whatever the batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vlm.losses.pairs import TILE_BYTES, Pairs, Tile
from vlm.runtime import distributed


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
        for tile, logits, room in _tiles(image, text, scale, pairs, tile_bytes):
            by_tile.append(_Sums.of(logits, room, tile, 1, smoothing))
            here = _Sums.of(logits, room, tile, 0, smoothing)
            columns = here if columns is None else columns.plus(here)
        rows = _Sums.joined(by_tile)
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
        gradients = _Gradients(image, text, scale)
        tiles = _tiles(image, text, scale, ctx.pairs, ctx.tile_bytes, ctx.kept)
        for tile, logits, of_logits in tiles:  # [t, G], as all here
            rows, columns = ctx.rows[tile.rows], ctx.columns
            counted = logits.isfinite() if ctx.smoothing else None
            torch.sub(logits, rows.logsumexp[:, None], out=of_logits).exp_()
            of_logits += torch.sub(
                logits, columns.logsumexp, out=logits if ctx.kept is None else None
            ).exp_()
            wanted = 1 / rows.count[tile.targets[0]] + 1 / columns.count[tile.targets[1]]
            wanted = torch.where(ctx.pairs.valid[tile.targets[1]], wanted, 0)
            of_logits.index_put_(tile.targets, (ctx.smoothing - 1) * wanted, accumulate=True)
            if counted is not None:
                evenly = 1 / rows.width[:, None] + 1 / columns.width
                of_logits -= ctx.smoothing * torch.where(counted, evenly, 0)
            gradients.add(of_logits, tile)
        found = gradients.all(upstream[0] / (2 * ctx.pairs.num_valid))
        return (*found, None, None, None)


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
        gradients = _Gradients(image, text, scale)
        total, of_bias = torch.zeros_like(scale), torch.zeros_like(scale)
        for tile, logits, _ in _tiles(image, text, scale, pairs, tile_bytes):
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


def _tiles(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    pairs: Pairs,
    tile_bytes: int,
    kept: Tensor | None = None,
) -> Iterator[tuple[Tile, Float[Tensor, "t G"], Float[Tensor, "t G"]]]:
    """Yields each tile, its logits, and room of their shape, which the next tile takes over.

    Memory that is asked for anew would cost page faults, and with glibc 2.36 grow without end.

    Args:
        image: This rank's features.
        text: The whole batch's.
        scale: Inverse temperature.
        pairs: What counts.
        tile_bytes: Of a tile's logits.
        kept: The logits, if they are known.
    """
    room = None
    for tile in pairs.tiles(len(image), image.element_size(), tile_bytes):
        height = tile.rows.stop - tile.rows.start
        if kept is not None:
            yield tile, kept, torch.empty_like(kept)
            continue
        if room is None:
            room = image.new_empty(2, height, len(text))
        logits, free = room[:, :height]
        _fill_logits(logits, image, text, scale, pairs, tile)
        yield tile, logits, free


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
class _Sums:
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
    def of(cls, logits: Tensor, room: Tensor, tile: Tile, dim: int, smoothing: float) -> "_Sums":
        """Along a dimension of a tile."""
        highest = logits.amax(dim, keepdim=True).nan_to_num_(neginf=0.0)
        total = torch.sub(logits, highest, out=room).exp_().sum(dim)
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
    def joined(cls, parts: "list[_Sums]") -> "_Sums":
        """Of rows one after the other."""
        return cls(*(torch.cat(columns) for columns in zip(*map(_fields, parts), strict=True)))

    def plus(self, other: "_Sums") -> "_Sums":
        """Of the same columns, over more rows."""
        (mine, *sums), (theirs, *more) = _fields(self), _fields(other)
        added = (a + b for a, b in zip(sums, more, strict=True))
        return _Sums(torch.logaddexp(mine, theirs), *added)

    def over_ranks(self) -> "_Sums":
        """Of the same columns, over the rows of all ranks."""
        if distributed.world_size() == 1:
            return self
        highest = distributed.all_reduce_max(self.logsumexp.clone()).nan_to_num_(neginf=0.0)
        shares = (self.logsumexp - highest).exp()
        shares, *sums = distributed.all_reduce_sum(torch.stack([shares, *_fields(self)[1:]]))
        return _Sums(shares.log() + highest, *sums)

    def losses(self, smoothing: float) -> Tensor:
        """The logsumexp less sum_j t_ij s_ij; anything where nothing counts."""
        wanted = self.positive / self.count
        if smoothing:
            wanted = (1 - smoothing) * wanted + smoothing * self.total / self.width
        return self.logsumexp - wanted

    def finite(self) -> "_Sums":
        """With 0 for the logsumexp of nothing: exp(-inf - 0) is 0."""
        return _Sums(self.logsumexp.nan_to_num(neginf=0.0), *_fields(self)[1:])

    def __getitem__(self, rows: slice) -> "_Sums":
        return _Sums(*(value[rows] for value in _fields(self)))


def _fields(sums: _Sums) -> tuple[Tensor, ...]:
    return sums.logsumexp, sums.positive, sums.count, sums.total, sums.width


class _Gradients:
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
