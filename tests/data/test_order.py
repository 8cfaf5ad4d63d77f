"""The order: exactly once an epoch, the same for every world size, pinned to the number."""

import hashlib
import pickle
import tracemalloc
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import PCG64, Generator, SeedSequence

from vlm.data.order import SampleOrder, draws_of_visit, hashes_of_visits
from vlm.errors import ConfigError, DataError

SIZES = [3, 0, 5, 1, 4]
any_sizes = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any)
any_streams = st.sampled_from([1, 2, 3, 4, 6, 12])  # of 12, so that some exceed the shards


def order_of(sizes, *, seed=7, streams=2, global_batch_size=4, block_size=3):
    return SampleOrder(
        sizes,
        seed=seed,
        streams=streams,
        global_batch_size=global_batch_size,
        block_size=block_size,
    )


def epoch_by_the_book(sizes, *, seed, epoch, streams, block_size):
    """The definition, sample by sample: shards, cut into streams, blocks shuffled, in turn."""

    def shuffled(items, *key):
        rng = Generator(PCG64(SeedSequence([seed, epoch, *key])))
        return [items[i] for i in rng.permutation(len(items))]

    first = [0, *np.cumsum(sizes)]
    samples = iter(
        [i for s in shuffled(range(len(sizes)), 0) for i in range(first[s], first[s + 1])]
    )
    quotient, remainder = divmod(sum(sizes), streams)
    queues = []
    for c in range(streams):
        stream = [next(samples) for _ in range(quotient + (c < remainder))]
        starts = range(0, len(stream), block_size)
        blocks = [shuffled(stream[i : i + block_size], 1, c, i // block_size) for i in starts]
        queues.append([i for block in blocks for i in block])
    return [queue[k] for k in range(quotient + 1) for queue in queues if k < len(queue)]


def test_an_epoch_with_remainders_is_pinned():
    epochs, ids = order_of(SIZES).at(np.arange(26))
    assert SampleOrder.version == 1
    assert epochs.tolist() == [0] * 13 + [1] * 13
    assert ids[:13].tolist() == [4, 2, 5, 10, 3, 9, 0, 11, 7, 12, 6, 8, 1]
    assert ids[13:].tolist() == [0, 7, 8, 6, 1, 9, 3, 11, 2, 10, 4, 12, 5]


def test_batches_that_straddle_epochs_are_pinned():
    batches = [order_of(SIZES).batch(step)[1].tolist() for step in range(4)]
    # step 3: positions 12, 13, 15 are of stream 0, and 14 is of stream 1
    assert batches == [[4, 5, 2, 10], [3, 0, 9, 11], [7, 6, 12, 8], [1, 0, 8, 7]]


def test_a_large_order_with_default_blocks_is_pinned():
    sizes = [0, 1000, 1, 70000, 333, 123456]
    order = SampleOrder(sizes, seed=2026, streams=8, global_batch_size=1024)
    _, ids = order.at(np.arange(400_000))
    assert order.block_size == 8192
    assert hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest() == (
        "4b2301d32d155368c5fe23d54f4e09d2ba2e4d0724a2d512c33f95b8eb9837ab"
    )
    batches = np.concatenate([order.batch(step)[1] for step in range(200)])
    assert hashlib.sha256(batches.astype("<i8").tobytes()).hexdigest() == (
        "5b91354c93b6781a63ec6aa3e26bff011d4e60f0d7214a1e5b3a817ad858f4cb"
    )


@settings(max_examples=30, deadline=None, database=None)
@given(any_sizes, any_streams, st.integers(1, 17), st.integers(0, 2**70))
def test_positions_follow_the_definition(sizes, streams, block_size, seed):
    order = order_of(sizes, seed=seed, streams=streams, global_batch_size=12, block_size=block_size)
    epochs, ids = order.at(np.arange(3 * sum(sizes)))
    for epoch in range(3):
        expected = epoch_by_the_book(
            sizes, seed=seed, epoch=epoch, streams=streams, block_size=block_size
        )
        assert ids[epochs == epoch].tolist() == expected
        assert sorted(expected) == list(range(sum(sizes)))  # each sample exactly once


@settings(max_examples=15, deadline=None, database=None)
@given(any_sizes, any_streams, st.integers(0, 40))
def test_concatenated_ranks_are_the_same_batch_for_any_world_size(sizes, streams, step):
    order = order_of(sizes, streams=streams, global_batch_size=12)
    whole = np.stack(order.batch(step))
    for world_size in (1, 2, 3, 4, 12):
        ranks = [
            np.stack(order.batch(step, rank=r, world_size=world_size)) for r in range(world_size)
        ]
        assert np.array_equal(np.concatenate(ranks, axis=1), whole)
    positions = np.arange(12 * step, 12 * (step + 1))
    assert sorted(whole.T.tolist()) == sorted(np.stack(order.at(positions)).T.tolist())


def test_positions_may_be_asked_for_in_any_order():
    order = order_of(SIZES)
    positions = np.random.default_rng(0).permutation(200)
    straight = np.stack(order.at(np.arange(200)))
    assert np.array_equal(np.stack(order.at(positions)), straight[:, positions])
    assert order.at(np.arange(0))[1].size == 0


def test_epochs_and_seeds_differ():
    sizes = [500, 500]
    orders = [order_of(sizes, seed=seed, block_size=None) for seed in (0, 1)]
    ids = [order.at(np.arange(2000))[1] for order in orders]
    assert np.mean(ids[0][:1000] == ids[0][1000:]) < 0.05
    assert np.mean(ids[0] == ids[1]) < 0.05


def test_a_rank_meets_only_the_shards_of_its_own_streams():
    sizes = [100] * 64
    order = order_of(sizes, streams=8, global_batch_size=64, block_size=80)
    for rank in range(4):
        batches = [order.batch(step, rank=rank, world_size=4)[1] for step in range(100)]
        assert len(set(np.concatenate(batches) // 100)) == 16  # a quarter of the shards


def test_a_pickled_order_is_small_and_the_same():
    order = order_of([1000] * 100, global_batch_size=512, block_size=None)
    expected = order.batch(3)[1]
    data = pickle.dumps(order)
    assert len(data) < 2000
    assert np.array_equal(pickle.loads(data).batch(3)[1], expected)  # noqa: S301  # our own bytes


def test_web_scale_is_ordered_without_memory_for_its_samples():
    sizes = np.random.default_rng(0).integers(9_000, 10_700, size=41_455)  # 407 million
    tracemalloc.start()
    order = SampleOrder(sizes.tolist(), seed=0, streams=64, global_batch_size=32768)
    order.batch(1_000_000, rank=3, world_size=8)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 16 * 2**20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"streams": 3},
            "global_batch_size (4) must be divisible by streams (3); use streams 2 or 4",
        ),
        ({"streams": 8}, "use streams 4, or global_batch_size 8"),
        ({"streams": 0}, "streams (0) must be at least 1"),
        ({"global_batch_size": 0}, "global_batch_size (0) must be at least 1"),
        ({"block_size": -1}, "block_size (-1) must be at least 1"),
    ],
)
def test_wrong_sizes_are_refused_with_the_nearest_right_ones(settings, message):
    with pytest.raises(ConfigError) as error:
        order_of(SIZES, **settings)
    assert message in str(error.value)


def test_a_world_size_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError) as error:
        order_of(SIZES, global_batch_size=64).batch(0, world_size=24)
    assert "use world_size 16 or 32, or global_batch_size 48 or 72" in str(error.value)


@pytest.mark.parametrize("sizes", [[], [0, 0]])
def test_no_samples_is_a_data_error(sizes):
    with pytest.raises(DataError, match=f"no samples in {len(sizes)} shards"):
        order_of(sizes)


def test_the_draws_of_a_visit_are_pinned():
    assert list(islice(draws_of_visit(0, 0, 0), 3)) == [
        0.41306204558350146,
        0.32073086546733975,
        0.9572478402405977,
    ]
    assert list(islice(draws_of_visit(2**70, 3, 5), 15, 18)) == [
        0.08647323166951537,
        0.2791780228726566,
        0.28242943226359785,
    ]  # two blocks


def test_the_draws_of_neighbours_are_independent():
    draws = np.array(
        [
            list(islice(draws_of_visit(0, epoch, i), 40))[::39]
            for epoch in range(4)
            for i in range(1000)
        ]
    )
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    assert ((counts - 400) ** 2 / 400).sum() < 50  # chi-square, 19 degrees: p = 1e-4
    by_epoch = draws[:, 0].reshape(4, 1000)
    correlations = np.corrcoef(np.vstack([by_epoch, by_epoch[:, ::-1], np.roll(by_epoch, 1, 1)]))
    assert np.abs(correlations - np.eye(12)).max() < 0.16  # five standard errors


def test_hashes_of_visits_are_pinned_and_differ():
    epochs, ids = np.array([0, 0, 1, 0]), np.array([0, 1, 0, 2**40])
    found = hashes_of_visits(3, epochs, ids)
    assert found.tolist() == [
        6976259416729115779,
        5557721396462259822,
        -713827747699968746,
        760136474643063293,
    ]
    assert hashes_of_visits(3, epochs[2:], ids[2:]).tolist() == found[2:].tolist()
    assert hashes_of_visits(4, epochs, ids).tolist() != found.tolist()
