"""The order of training: the sample at any stream position, as a pure function of one integer.

Positions run from 0 to infinity; epoch e holds the positions `[e N, (e + 1) N)`, and epochs are
joined: a batch may straddle them, so nothing is dropped, padded or repeated. In an epoch of N
samples and C streams:

1. the shards are permuted, with the random numbers of (seed, e, 0);
2. the permuted epoch is cut into C contiguous streams: stream c has `N // C` samples, and one more
   if `c < N % C`. Position p belongs to stream `p % C`, at offset `p // C`: exactly filled;
3. a stream is cut into blocks of B consecutive samples (the last may be shorter), and each block is
   permuted when it is first met, with the random numbers of (seed, e, 1, stream, block).

Global batch k is `[k G, (k + 1) G)`, ordered by stream, and a rank takes a contiguous slice of it.
`vlm.data.mixture` weaves the orders of several sources into one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from hashlib import blake2b
from itertools import count
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from numpy.random import PCG64, Generator, SeedSequence

from vlm.errors import ConfigError, DataError

_WORDS = Struct("<16I")


class Order(ABC):
    """The sample at any stream position, and the batches that follow from it.

    Attributes:
        num_samples: Positions in an epoch.
        streams: C, what a batch is ordered by.
        global_batch_size: G, a multiple of C.
    """

    version = 1  # of the order; goes up when the same arguments give another order
    num_samples: int
    streams: int
    global_batch_size: int

    @abstractmethod
    def at(
        self, positions: Int[np.ndarray, " n"]
    ) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """The epochs and sample ids at `positions` (>= 0, in any order), both int64."""

    @abstractmethod
    def streams_at(self, positions: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The stream that each position belongs to, from 0 to C - 1."""

    @abstractmethod
    def passes(self, num_positions: int) -> list[float]:
        """How often each source has been passed over after the first `num_positions`."""

    @abstractmethod
    def _build_tables(self) -> None:
        """Derive what only depends on the arguments, with empty caches."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave the tables and caches out of a pickle: a worker derives them in microseconds."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._build_tables()

    def batch(
        self, step: int, *, rank: int = 0, world_size: int = 1
    ) -> tuple[Int[np.ndarray, " b"], Int[np.ndarray, " b"]]:
        """The epochs and sample ids of a rank's slice of global batch `step`, ordered by stream.

        Concatenating the ranks gives the same batch for every world size. Micro-batch a of A of a
        rank is slice `rank * A + a` of `world_size * A`.

        Raises:
            ConfigError: `world_size` does not divide the global batch.
        """
        check_divides("world_size", world_size, "global_batch_size", self.global_batch_size)
        assert 0 <= rank < world_size
        size = self.global_batch_size // world_size
        return self.at(self._batch_positions(step)[rank * size : (rank + 1) * size])

    def _order_batch(self, step: int) -> Int[np.ndarray, " G"]:
        """The positions of global batch `step`, by stream and within a stream in order."""
        start = step * self.global_batch_size
        positions = np.arange(start, start + self.global_batch_size, dtype=np.int64)
        return positions[np.argsort(self.streams_at(positions), kind="stable")]

    @cached_property
    def _batch_positions(self) -> Callable[[int], Int[np.ndarray, " G"]]:
        return lru_cache(maxsize=2)(self._order_batch)


class SampleOrder(Order):
    """The order of one source, in memory that does not grow with the number of samples.

    Args:
        shard_sizes: Samples in each shard, in the order of their ids; 0 is allowed.
        seed: Of the permutations.
        streams: C; a part of the order, whatever the world size. With C a multiple of the number
            of nodes, a node meets only the shards of its own streams (a few rows of a batch that
            straddles two epochs excepted, where C does not divide N).
        global_batch_size: G, a multiple of C.
        block_size: B; the default, `max(65536, 8 G) // C`, keeps a batch well mixed and the working
            set of shards small.

    Raises:
        ConfigError: A size is not positive, or C does not divide G.
        DataError: There are no samples.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        *,
        seed: int,
        streams: int,
        global_batch_size: int,
        block_size: int | None = None,
    ) -> None:
        check_divides("streams", streams, "global_batch_size", global_batch_size)
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.seed = seed
        self.streams = streams
        self.global_batch_size = global_batch_size
        if block_size is None:
            block_size = max(1, max(65536, 8 * global_batch_size) // streams)
        self.block_size = check_positive("block_size", block_size)
        self.num_samples = int(self.shard_sizes.sum())
        if self.num_samples == 0:
            raise DataError(f"no samples in {len(shard_sizes)} shards; there is nothing to order")
        self._build_tables()

    def _build_tables(self) -> None:
        quotient, remainder = divmod(self.num_samples, self.streams)
        stream = np.arange(self.streams, dtype=np.int64)
        self._stream_starts = stream * quotient + np.minimum(stream, remainder)
        self._stream_sizes = quotient + (stream < remainder)
        self._first_ids = np.cumsum(self.shard_sizes) - self.shard_sizes
        self._shuffled_shards = lru_cache(maxsize=2)(self._shuffle_shards)
        # every stream's block, and its next one while a batch straddles two: at most 16 B C bytes
        self._shuffled_block = lru_cache(maxsize=max(4, 2 * self.streams))(self._shuffle_block)

    def at(
        self, positions: Int[np.ndarray, " n"]
    ) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """The epochs and sample ids at `positions`."""
        assert positions.size == 0 or positions.min() >= 0
        epochs, place = np.divmod(positions.astype(np.int64, copy=False), self.num_samples)
        offsets, streams = np.divmod(place, self.streams)
        blocks, places = np.divmod(offsets, self.block_size)
        sample_ids = np.empty_like(place)
        for rows in _equal_rows(epochs, streams, blocks):
            epoch, stream, block = (int(key[rows[0]]) for key in (epochs, streams, blocks))
            start = self._stream_starts[stream] + block * self.block_size
            in_epoch = start + self._shuffled_block(epoch, stream, block)[places[rows]]
            shards = self._shuffled_shards(epoch)
            slot = np.searchsorted(shards.ends, in_epoch, side="right")
            sample_ids[rows] = in_epoch + shards.id_shifts[slot]
        return epochs, sample_ids

    def streams_at(self, positions: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The stream of each position."""
        return positions % self.num_samples % self.streams

    def passes(self, num_positions: int) -> list[float]:
        """The epochs, as there is one source."""
        return [num_positions / self.num_samples]

    def _shuffle_shards(self, epoch: int) -> "_ShuffledShards":
        """The shards of an epoch in their order."""
        permutation = generator(self.seed, epoch, 0).permutation(len(self.shard_sizes))
        sizes = self.shard_sizes[permutation]
        ends = np.cumsum(sizes)
        return _ShuffledShards(ends, self._first_ids[permutation] - (ends - sizes))

    def _shuffle_block(self, epoch: int, stream: int, block: int) -> Int[np.ndarray, " b"]:
        """The order within a block: where each of its places is found."""
        size = min(self.block_size, self._stream_sizes[stream] - block * self.block_size)
        return generator(self.seed, epoch, 1, stream, block).permutation(size)


class _ShuffledShards(NamedTuple):
    """An epoch's shards in their order: where each ends, and sample id minus place in the epoch."""

    ends: Int[np.ndarray, " shards"]
    id_shifts: Int[np.ndarray, " shards"]


def draws_of_visit(seed: int, epoch: int, sample_id: int) -> Iterator[float]:
    """Endless uniform numbers in [0, 1): the same on any rank, worker and micro-batch.

    A keyed hash in counter mode, 16 numbers of 32 bits a block: 2 µs, where a numpy generator takes
    6 µs to start and 0.5 µs for each number, together a fifth of a cached small picture.
    """
    for block in count():
        key = b"%d %d %d %d" % (seed, epoch, sample_id, block)
        for word in _WORDS.unpack(blake2b(key, digest_size=64, person=b"vlm sample").digest()):
            yield word / 2**32


def hashes_of_visits(
    seed: int, epochs: Int[np.ndarray, " b"], ids: Int[np.ndarray, " b"]
) -> Int[np.ndarray, " b"]:
    """A 64-bit number for each visit: the same on any rank, worker and micro-batch."""
    hashes = np.full(len(ids), seed % 2**64, dtype=np.uint64)
    for part in (epochs, ids):  # murmur3's finaliser, arithmetic modulo 2^64
        hashes ^= part.astype(np.uint64)
        for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            hashes ^= hashes >> np.uint64(33)
            hashes *= np.uint64(multiplier)
        hashes ^= hashes >> np.uint64(33)
        hashes += np.uint64(0x9E3779B97F4A7C15)  # so that 0 does not stay 0
    return hashes.view(np.int64)


def generator(*entropy: int) -> Generator:
    """The random numbers of a place in the order, pinned by golden values in its tests."""
    return Generator(PCG64(SeedSequence(entropy)))


def _equal_rows(*keys: Int[np.ndarray, " n"]) -> Iterator[Int[np.ndarray, " b"]]:
    """Groups of the rows that agree in all keys."""
    code = np.ravel_multi_index(keys, tuple(int(key.max(initial=0)) + 1 for key in keys))
    order = np.argsort(code, kind="stable")
    edges = np.flatnonzero(np.diff(code[order], prepend=-1))
    yield from (rows for rows in np.split(order, edges[1:]) if rows.size)


def shards_of_steps(
    order: Order,
    shard_sizes: Sequence[int],
    steps: range,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> list[int]:
    """The shards that a rank's slices of these steps draw from, in order of first use.

    What to fetch ahead. Ranks of a node are neighbours, so a node is a rank among the nodes.

    Raises:
        ConfigError: `world_size` does not divide the global batch.
    """
    ids = [order.batch(step, rank=rank, world_size=world_size)[1] for step in steps]
    shards = np.searchsorted(np.cumsum(shard_sizes), np.concatenate(ids), side="right")
    found, first_uses = np.unique(shards, return_index=True)
    in_order: list[int] = found[np.argsort(first_uses)].tolist()
    return in_order


def check_divides(name: str, value: int, whole_name: str, whole: int) -> None:
    """Raise a `ConfigError` that lists the nearest valid values."""
    check_positive(name, value)
    check_positive(whole_name, whole)
    if whole % value:
        divisors = [d for d in range(1, whole + 1) if whole % d == 0]
        below = [d for d in divisors if d < value]
        near = [*below[-1:], *divisors[len(below) :][:1]]
        multiples = [m for m in (whole // value * value, (whole // value + 1) * value) if m]
        raise ConfigError(
            f"{whole_name} ({whole}) must be divisible by {name} ({value}); use {name} "
            f"{_either(near)}, or {whole_name} {_either(multiples)}"
        )


def check_positive(name: str, value: int) -> int:
    """The value, or a `ConfigError` if it is below 1."""
    if value < 1:
        raise ConfigError(f"{name} ({value}) must be at least 1")
    return value


def _either(values: Sequence[int]) -> str:
    return " or ".join(map(str, values))
