"""Hits and ranks in matrices of similarities, with their values under chance.

Numbers such as 1412.2306 in the docstrings are arXiv papers.
"""

from collections.abc import Iterator
from math import prod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TILE = (512, 1024)  # scores held at a time, 2 MiB: they are counted while the cache holds them


def top_k_hits(
    logits: Float[Tensor, "N C"], labels: Int[Tensor, " N"], k: int
) -> Bool[Tensor, " N"]:
    """Whether the true class is among the k largest logits (top-5 error: 1409.0575, 4.1).

    Which of several equal logits come first is `torch.topk`'s choice, as in open_clip's and
    CLIP_benchmark's own accuracy: ImageNet has two names that stand for two classes each, and these
    tie on every picture. The choice depends on how many are asked for: there it is five at once,
    wherever there are five classes. NaN hits nothing.
    """
    num_classes = logits.shape[1]
    found = logits.topk(min(num_classes, k if num_classes < 5 else max(k, 5))).indices[:, :k]
    return (found == labels[:, None]).any(dim=1) & ~logits.isnan().any(dim=1)


def top_k_accuracy(logits: Float[Tensor, "N C"], labels: Int[Tensor, " N"], k: int) -> float:
    """The share of `top_k_hits`, in 0..1."""
    return top_k_hits(logits, labels, k).double().mean().item()


def class_balanced_weights(labels: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """One weight a sample, so that each class present weighs 1: 1 / (samples of its class)."""
    return 1 / torch.bincount(labels).double()[labels]


def mean_per_class_recall(logits: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> float:
    """Accuracy averaged over the classes present (CLIP, 2103.00020, appendix A).

    The first of the largest logits counts, as in CLIP_benchmark.
    """
    weights = class_balanced_weights(labels)
    return ((weights * (logits.argmax(dim=1) == labels)).sum() / weights.sum()).item()


def positive_ranks(
    similarity: Float[Tensor, "Q N"], positives: Bool[Tensor, "Q N"]
) -> Int[Tensor, " Q"]:
    """The rank of each query's best positive, from 0.

    Rows are independent, so a large problem can be handed over in chunks of queries. Ties are
    pessimistic: every negative that scores as much as the best positive stands before it. So does
    every negative where a NaN makes the comparison void.

    Raises:
        ValueError: A query has no positive.
    """
    if not bool(positives.any(dim=1).all()):
        raise ValueError("every query needs at least one positive")
    best = similarity.masked_fill(~positives, -torch.inf).amax(dim=1, keepdim=True)
    return (~(similarity < best) & ~positives).sum(dim=1)


def best_ranks(
    rows: Float[Tensor, "M D"],
    columns: Float[Tensor, "N D"],
    pairs: Int[Tensor, "2 P"],
    *,
    tile: tuple[int, int] = TILE,
) -> tuple[Int[Tensor, " M"], Int[Tensor, " N"]]:
    """The rank, from 0, of the best partner of each row among the columns, and the other way round.

    What `positive_ranks` gives for `rows @ columns.T` and for its transpose, ties included, without
    that matrix: a tile of products is counted in both directions at once, and made a second time
    only where a pair lies in it. What has no partner has the last rank, the number of candidates.

    Args:
        rows: Features, on any device, which then does the work.
        columns: Features.
        pairs: The row and the column of every positive, each pair once.
        tile: How many rows and columns are multiplied at a time.
    """
    tiles = _Tiles(rows, columns, pairs, tile)
    best_of_rows, best_of_columns = (
        side.new_full((len(side),), -torch.inf) for side in (rows, columns)
    )
    for r, c, (i, j) in tiles.with_pairs():
        scores = (rows[r] @ columns[c].T)[i, j]
        best_of_rows[r].scatter_reduce_(0, i, scores, "amax")
        best_of_columns[c].scatter_reduce_(0, j, scores, "amax")
    # negatives: all that are no partners, counted down by those that score less than the best
    before_rows = len(columns) - pairs[0].bincount(minlength=len(rows))
    before_columns = len(rows) - pairs[1].bincount(minlength=len(columns))
    for r, c, (i, j) in tiles:
        scores = rows[r] @ columns[c].T
        scores[i, j] = torch.inf  # a positive is never counted
        below = torch.empty_like(scores)  # fp32: compared and summed in a fifth of bool's time
        before_rows[r] -= torch.lt(scores, best_of_rows[r, None], out=below).sum(dim=1).long()
        before_columns[c] -= torch.lt(scores, best_of_columns[c], out=below).sum(dim=0).long()
    return before_rows, before_columns


class _Tiles:
    """The tiles of a matrix with the pairs inside each, counted from its corner."""

    def __init__(
        self, rows: Tensor, columns: Tensor, pairs: Int[Tensor, "2 P"], tile: tuple[int, int]
    ) -> None:
        self.shape, self.tile = (len(rows), len(columns)), tile
        self.num_across = -(-len(columns) // tile[1])
        numbers = pairs[0] // tile[0] * self.num_across + pairs[1] // tile[1]
        numbers, order = numbers.sort()
        self.pairs = pairs[:, order]
        num_tiles = -(-len(rows) // tile[0]) * self.num_across
        self.ends = numbers.bincount(minlength=num_tiles).cumsum(0).tolist()

    def __iter__(self) -> Iterator[tuple[slice, slice, Int[Tensor, "2 p"]]]:
        return (self._tile(number) for number in range(len(self.ends)))

    def with_pairs(self) -> Iterator[tuple[slice, slice, Int[Tensor, "2 p"]]]:
        """Those tiles that a pair lies in."""
        begins = [0, *self.ends]
        return (self._tile(n) for n, end in enumerate(self.ends) if end > begins[n])

    def _tile(self, number: int) -> tuple[slice, slice, Int[Tensor, "2 p"]]:
        down, across = divmod(number, self.num_across)
        top, left = down * self.tile[0], across * self.tile[1]
        inside = self.pairs[:, self.ends[number - 1] if number else 0 : self.ends[number]]
        corner = inside.new_tensor([[top], [left]])
        slices = slice(top, top + self.tile[0]), slice(left, left + self.tile[1])
        return (*slices, inside - corner)


def recall_at_k(ranks: Int[Tensor, " Q"], k: int) -> float:
    """The share of queries with any positive among the first k (1412.2306, section 4.1).

    Args:
        ranks: From `positive_ranks`, so from 0.
        k: How many places count.
    """
    return (ranks < k).double().mean().item()


def median_rank(ranks: Int[Tensor, " Q"]) -> float:
    """The median place of the best positive, from 1 (1412.2306, section 4.1).

    The lower of the two middle ones where the number of queries is even.
    """
    return float(ranks.median()) + 1


def chance_recall_at_k(positive_counts: Int[Tensor, " Q"], num_targets: int, k: int) -> float:
    """The expected recall@k of a uniformly random ranking, exact.

    A query with p positives among N misses with probability C(N - p, k) / C(N, k): that k draws
    without replacement meet no positive (hypergeometric).
    """
    counts, repeats = torch.unique(positive_counts, return_counts=True)
    misses = torch.tensor([_miss(int(p), num_targets, k) for p in counts], dtype=torch.float64)
    return 1 - float((misses * repeats).sum()) / len(positive_counts)


def chance_median_rank(positive_counts: Int[Tensor, " Q"], num_targets: int) -> float:
    """The place, from 1, that the best positive of a random ranking reaches half the time."""
    low, high = 1, num_targets
    while low < high:
        middle = (low + high) // 2
        if chance_recall_at_k(positive_counts, num_targets, middle) < 0.5:
            low = middle + 1
        else:
            high = middle
    return float(low)


def _miss(num_positives: int, num_targets: int, k: int) -> float:
    """C(N - p, k) / C(N, k) as a product of min(k, p) factors: it is symmetric in both."""
    few, many = sorted((k, num_positives))
    return prod(max(0.0, 1 - many / (num_targets - i)) for i in range(min(few, num_targets)))
