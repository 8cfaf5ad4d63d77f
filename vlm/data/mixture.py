"""Several sources as one: their samples joined, their orders woven by weight.

Positions are woven C at a time (C = streams): group j is the positions `[j C, (j + 1) C)`, and all
of it is one source's. Groups come in cycles of fixed length L with a fixed count of each source,
and each cycle is permuted with its own random numbers. So the place of group j in its source is

    cycle * count + rank in the cycle          cycle = j // L

and nothing has to be replayed to find it. As a source's positions are met one after another, each
of its samples comes exactly once a pass, whatever the weights; and as a group holds one position
of each stream, a stream has its share of every batch, as with one source.
"""

from collections.abc import Sequence
from functools import lru_cache, partial

import numpy as np
from jaxtyping import Int

from vlm.data.dataset import Dataset
from vlm.data.order import Order, SampleOrder, check_divides, generator
from vlm.errors import ConfigError
from vlm.runtime.seeding import derive

MAX_CYCLE = 10_000
PAGE_GROUPS = 4096  # of cycles permuted at a time: one by one takes 30 µs each


class MixedOrder(Order):
    """The orders of several sources, woven.

    An epoch is as many positions as all sources have samples; a sample's own epoch is the pass over
    its source. Sample ids count on from source to source, as `join` joins them.

    Args:
        shard_sizes: Of each source, the samples in each of its shards.
        counts: Of each source, its groups in a cycle, as `cycle_counts` finds them.
        seed: Of the permutations.
        streams: C.
        global_batch_size: G, a multiple of C.
        block_size: As in `SampleOrder`, of every source.

    Raises:
        ConfigError: A size is not positive, or C does not divide G.
        DataError: A source has no samples.
    """

    def __init__(
        self,
        shard_sizes: Sequence[Sequence[int]],
        counts: Sequence[int],
        *,
        seed: int,
        streams: int,
        global_batch_size: int,
        block_size: int | None = None,
    ) -> None:
        check_divides("streams", streams, "global_batch_size", global_batch_size)
        assert len(shard_sizes) == len(counts) > 0
        assert min(counts) > 0
        self.counts = np.asarray(counts, dtype=np.int64)
        self.seed = seed
        self.streams = streams
        self.global_batch_size = global_batch_size
        order = partial(
            SampleOrder,
            streams=streams,
            global_batch_size=global_batch_size,
            block_size=block_size,
        )
        # seeds of their own: sources cut alike would else be shuffled alike, and meet in step
        self.orders = [
            order(sizes, seed=derive("source", number, seed) if number else seed)
            for number, sizes in enumerate(shard_sizes)
        ]
        self.num_samples = sum(order.num_samples for order in self.orders)
        self._build_tables()

    def _build_tables(self) -> None:
        self._cycle = np.repeat(np.arange(len(self.counts)), self.counts)
        self._first_ids = np.cumsum([0, *(order.num_samples for order in self.orders[:-1])])
        self._cycles_a_page = max(1, PAGE_GROUPS // len(self._cycle))
        page = self._cycles_a_page * len(self._cycle)
        pages_a_batch = self.global_batch_size // self.streams // page + 2
        self._page = lru_cache(maxsize=2 * pages_a_batch)(self._permute_page)

    def at(
        self, positions: Int[np.ndarray, " n"]
    ) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """The passes over their source, and the sample ids, at `positions`."""
        epochs, sample_ids = (np.empty(len(positions), np.int64) for _ in range(2))
        sources, own = self._own(positions)
        for source, order in enumerate(self.orders):
            rows = sources == source
            epochs[rows], ids = order.at(own[rows])
            sample_ids[rows] = self._first_ids[source] + ids
        return epochs, sample_ids

    def streams_at(self, positions: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The stream, in its own source, that each position belongs to."""
        streams = np.empty(len(positions), np.int64)
        sources, own = self._own(positions)
        for source, order in enumerate(self.orders):
            rows = sources == source
            streams[rows] = order.streams_at(own[rows])
        return streams

    def passes(self, num_positions: int) -> list[float]:
        """How often each source has been passed over; `num_positions` is a multiple of C."""
        groups, rest = divmod(num_positions, self.streams)
        assert rest == 0, "whole groups"
        cycle, place = divmod(groups, len(self._cycle))
        page, row = divmod(cycle, self._cycles_a_page)
        begun = np.bincount(self._page(page)[0][row, :place], minlength=len(self.counts))
        sizes = np.array([order.num_samples for order in self.orders])
        passes: list[float] = ((cycle * self.counts + begun) * self.streams / sizes).tolist()
        return passes

    def _own(
        self, positions: Int[np.ndarray, " n"]
    ) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """The source of each position, and where in that source's order it is."""
        assert positions.size == 0 or positions.min() >= 0
        groups, lanes = np.divmod(positions.astype(np.int64, copy=False), self.streams)
        cycles, places = np.divmod(groups, len(self._cycle))
        pages, rows = np.divmod(cycles, self._cycles_a_page)
        sources, ranks = (np.empty_like(groups) for _ in range(2))
        for page in np.unique(pages).tolist():
            here = pages == page
            for values, table in zip((sources, ranks), self._page(page), strict=True):
                values[here] = table[rows[here], places[here]]
        return sources, (cycles * self.counts[sources] + ranks) * self.streams + lanes

    def _permute_page(
        self, page: int
    ) -> tuple[Int[np.ndarray, "cycles L"], Int[np.ndarray, "cycles L"]]:
        """The source at each place of some cycles, and its rank among that source's places."""
        rng = generator(self.seed, page, 2)
        sources = rng.permuted(np.tile(self._cycle, (self._cycles_a_page, 1)), axis=1)
        ranks = np.empty_like(sources)
        for source in range(len(self.counts)):
            is_here = sources == source
            ranks[is_here] = (np.cumsum(is_here, axis=1) - 1)[is_here]
        return sources, ranks


def cycle_counts(names: Sequence[str], weights: Sequence[float]) -> list[int]:
    """Each source's groups in a cycle: the shortest cycle that is true to the weights.

    Weights in whole ratios are met exactly (2 and 1: a cycle of 3); others as nearly as a cycle of
    at most `MAX_CYCLE` can.

    Raises:
        ConfigError: A weight is below `1 / MAX_CYCLE` of all.
    """
    shares = np.array(weights) / sum(weights)
    for name, weight, share in zip(names, weights, shares, strict=True):
        if share * MAX_CYCLE < 1:
            raise ConfigError(
                f"data.train: the weight of {name} ({weight:g}) is below 1/{MAX_CYCLE} of all; "
                "raise it, or leave the source out"
            )
    lengths = np.arange(len(shares), MAX_CYCLE + 1)
    counts = np.rint(lengths[:, None] * shares)
    errors = np.abs(counts / counts.sum(axis=1, keepdims=True) / shares - 1).max(axis=1)
    best: list[int] = counts[np.argmin(errors.round(6))].astype(int).tolist()
    return best


def join(datasets: Sequence[Dataset]) -> Dataset:
    """The samples of several, one data set after the other."""
    shards = [shard for dataset in datasets for shard in dataset.shards]
    sizes = [sum(shard.num_samples for shard in dataset.shards) for dataset in datasets]
    if [len(dataset) for dataset in datasets] == sizes:
        return Dataset(shards)
    starts = np.cumsum([0, *sizes[:-1]])
    positions = [d.positions() + start for d, start in zip(datasets, starts, strict=True)]
    return Dataset(shards, np.concatenate(positions))
