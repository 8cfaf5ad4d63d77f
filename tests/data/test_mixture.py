"""Sources woven by weight: pinned, once a pass, elastic, and each stream with its share."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.data.mixture import MixedOrder, cycle_counts
from vlm.data.order import SampleOrder
from vlm.errors import ConfigError, DataError

SIZES = [[3, 0, 5], [2, 2], [7]]
COUNTS = [3, 1, 2]
any_sizes = st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=4), min_size=1, max_size=4)
any_streams = st.sampled_from([1, 2, 3, 6])


def mix(sizes=SIZES, counts=COUNTS, *, streams=2, global_batch_size=12, block_size=3, seed=7):
    return MixedOrder(
        sizes,
        counts,
        seed=seed,
        streams=streams,
        global_batch_size=global_batch_size,
        block_size=block_size,
    )


def split_by_source(order, epochs, ids):
    """(epoch, id within the source) of each position, source by source."""
    first = np.cumsum([0, *(one.num_samples for one in order.orders)])
    source = np.searchsorted(first, ids, side="right") - 1
    return [
        list(zip(epochs[source == s].tolist(), (ids[source == s] - first[s]).tolist(), strict=True))
        for s in range(len(order.orders))
    ]


def test_a_mixture_is_pinned():
    epochs, ids = mix().at(np.arange(24))
    assert ids[:12].tolist() == [1, 4, 2, 6, 0, 5, 8, 10, 12, 17, 13, 16]
    assert ids[12:].tolist() == [14, 18, 15, 12, 3, 7, 1, 5, 9, 11, 0, 4]
    assert epochs.tolist() == [0] * 15 + [1, 0, 0, 1, 1, 0, 0, 1, 1]


@settings(max_examples=25, deadline=None, database=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any), any_streams)
def test_a_mixture_of_one_source_is_that_source(sizes, streams):
    options = {"seed": 5, "streams": streams, "global_batch_size": 6, "block_size": 4}
    one, mixed = SampleOrder(sizes, **options), MixedOrder([sizes], [1], **options)
    positions = np.arange(3 * sum(sizes) + 5)
    assert np.array_equal(np.stack(mixed.at(positions)), np.stack(one.at(positions)))
    for step in range(8):
        assert np.array_equal(np.stack(mixed.batch(step)), np.stack(one.batch(step)))
    assert mixed.passes(60) == one.passes(60)


@settings(max_examples=15, deadline=None, database=None)
@given(any_sizes, any_streams, st.data())
def test_each_source_is_met_in_its_own_order_once_a_pass(sizes, streams, data):
    counts = data.draw(st.lists(st.integers(1, 5), min_size=len(sizes), max_size=len(sizes)))
    order = mix(sizes, counts, streams=streams)
    epochs, ids = order.at(np.arange(300))
    for source, visits in enumerate(split_by_source(order, epochs, ids)):
        own = order.orders[source].at(np.arange(len(visits)))
        assert visits == list(zip(*(row.tolist() for row in own), strict=True))
        size = order.orders[source].num_samples
        for start in range(0, len(visits) - size + 1, size):
            assert sorted(i for _, i in visits[start : start + size]) == list(range(size))
        assert order.passes(300)[source] == pytest.approx(len(visits) / size)


@settings(max_examples=25, deadline=None, database=None)
@given(any_streams, st.integers(0, 50))
def test_every_cycle_has_its_counts_in_an_order_of_its_own(streams, first):
    order = mix(streams=streams)
    cycle = sum(COUNTS) * streams
    positions = np.arange(first * cycle, (first + 40) * cycle)
    sources = order._own(positions)[0].reshape(40, sum(COUNTS), streams)
    assert (sources == sources[:, :, :1]).all()  # a group is of one source
    patterns = [row[:, 0].tolist() for row in sources]
    assert all(np.bincount(pattern).tolist() == COUNTS for pattern in patterns)
    assert len({tuple(pattern) for pattern in patterns}) > 10


@settings(max_examples=15, deadline=None, database=None)
@given(any_sizes, any_streams, st.integers(0, 40))
def test_concatenated_ranks_are_the_same_batch_for_any_world_size(sizes, streams, step):
    order = mix(sizes, [1 + n for n in range(len(sizes))], streams=streams)
    whole = np.stack(order.batch(step))
    for world_size in (2, 3, 12):
        ranks = [
            np.stack(order.batch(step, rank=r, world_size=world_size)) for r in range(world_size)
        ]
        assert np.array_equal(np.concatenate(ranks, axis=1), whole)
    positions = np.arange(12 * step, 12 * (step + 1))
    assert sorted(whole.T.tolist()) == sorted(np.stack(order.at(positions)).T.tolist())


def test_positions_may_be_asked_for_in_any_order():
    positions = np.random.default_rng(0).permutation(2_000)
    straight = np.stack(mix().at(np.arange(2_000)))
    assert np.array_equal(np.stack(mix().at(positions)), straight[:, positions])
    assert mix().at(np.arange(0))[1].size == 0


def test_a_rank_meets_only_the_shards_of_its_own_streams_in_every_source():
    order = mix([[100] * 64, [40] * 32], [2, 3], streams=8, global_batch_size=64, block_size=80)
    for rank in range(4):
        ids = np.concatenate([order.batch(step, rank=rank, world_size=4)[1] for step in range(30)])
        assert len(set(ids[ids < 6400] // 100)) <= 16  # a quarter of the shards
        assert len(set((ids[ids >= 6400] - 6400) // 40)) == 8


def test_sources_that_are_cut_alike_are_not_shuffled_alike():
    order = mix([[50] * 4, [50] * 4], [1, 1], block_size=None)
    visits = split_by_source(order, *order.at(np.arange(400)))
    same = [a == b for a, b in zip(*visits, strict=True)]
    assert np.mean(same) < 0.1


def test_a_pickled_mixture_is_small_and_the_same():
    order = mix([[1000] * 50, [10] * 50], [9, 1], global_batch_size=512, block_size=None)
    expected = order.batch(3)[1]
    data = pickle.dumps(order)
    assert len(data) < 3000
    assert np.array_equal(pickle.loads(data).batch(3)[1], expected)  # noqa: S301  # our own bytes


@pytest.mark.parametrize(
    ("weights", "counts"),
    [([2.0, 1.0], [2, 1]), ([0.5, 0.25, 0.25], [2, 1, 1]), ([3.0], [1]), ([0.7, 0.3], [7, 3])],
)
def test_whole_ratios_are_met_exactly_by_the_shortest_cycle(weights, counts):
    assert cycle_counts("abc"[: len(weights)], weights) == counts


@settings(max_examples=40, deadline=None, database=None)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=5))
def test_any_weights_are_met_closely(weights):
    counts = np.array(cycle_counts("abcde"[: len(weights)], weights))
    shares = np.array(weights) / sum(weights)
    assert np.abs(counts / counts.sum() / shares - 1).max() < 2e-3


def test_a_weight_that_no_cycle_holds_is_refused():
    with pytest.raises(ConfigError, match=r"the weight of b \(1e-05\) is below 1/10000 of all"):
        cycle_counts(["a", "b"], [1.0, 1e-5])


def test_a_source_without_samples_is_a_data_error():
    with pytest.raises(DataError, match="no samples in 2 shards"):
        mix([[3], [0, 0]], [1, 1])
