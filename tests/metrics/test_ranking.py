import gc
import itertools
import math
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.metrics import ranking

# Classes 0, 1, 2; the truth is 0, 1, 2; ranks by hand: 0, 2, 1.
LOGITS = torch.tensor([[3.0, 2.0, 1.0], [3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
LABELS = torch.tensor([0, 1, 2])


def test_top_k_hits_of_a_hand_worked_3x3():
    assert ranking.top_k_hits(LOGITS, LABELS, 1).tolist() == [True, False, False]
    assert ranking.top_k_hits(LOGITS, LABELS, 2).tolist() == [True, False, True]
    assert ranking.top_k_accuracy(LOGITS, LABELS, 2) == pytest.approx(2 / 3)
    assert ranking.top_k_accuracy(LOGITS, LABELS, 3) == 1.0


def test_mean_per_class_recall_weighs_classes_not_samples():
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    labels = torch.tensor([0, 0, 0, 1])  # recall 1 and 0; accuracy would be 3 / 4
    assert ranking.mean_per_class_recall(logits, labels) == 0.5


def test_mean_per_class_recall_leaves_out_absent_classes():
    assert ranking.mean_per_class_recall(LOGITS[:1], LABELS[:1]) == 1.0


def test_positive_ranks_of_a_hand_worked_3x3():
    similarity = torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.2, 0.5, 0.3]])
    positives = torch.tensor([[1, 0, 0], [0, 0, 1], [1, 0, 1]], dtype=torch.bool)
    ranks = ranking.positive_ranks(similarity, positives)
    assert ranks.tolist() == [0, 2, 1]  # the third query's best positive is 0.3, behind 0.5
    assert [ranking.recall_at_k(ranks, k) for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert ranking.median_rank(ranks) == 2.0


@given(seed=st.integers(0, 999), size=st.tuples(st.integers(1, 9), st.integers(1, 9)))
@settings(max_examples=40, deadline=None)
def test_positive_ranks_equal_a_loop(seed, size):
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.randint(0, 4, size, generator=generator).float()  # many ties
    positives = torch.rand(size, generator=generator) < 0.4
    positives[torch.arange(size[0]), torch.randint(0, size[1], size[:1], generator=generator)] = (
        True
    )
    expected = []
    for scores, wanted in zip(similarity.tolist(), positives.tolist(), strict=True):
        order = sorted(range(size[1]), key=lambda j: (-scores[j], wanted[j]))  # positives last
        expected.append(next(rank for rank, j in enumerate(order) if wanted[j]))
    assert ranking.positive_ranks(similarity, positives).tolist() == expected


def test_ranks_do_not_depend_on_the_chunks_of_queries():
    similarity, positives = torch.randn(7, 5), torch.eye(7, 5).bool()
    positives[:, 0] = True
    whole = ranking.positive_ranks(similarity, positives)
    pairs = zip(similarity.split(3), positives.split(3), strict=True)
    assert torch.equal(whole, torch.cat([ranking.positive_ranks(*pair) for pair in pairs]))


@given(
    seed=st.integers(0, 999),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    tile=st.tuples(st.integers(1, 10), st.integers(1, 10)),
)
@settings(max_examples=40, deadline=None)
def test_best_ranks_are_those_of_the_whole_matrix_and_of_its_transpose(seed, size, tile):
    generator = torch.Generator().manual_seed(seed)
    # whole numbers: products are exact, and many are equal
    rows, columns = (torch.randint(-1, 2, (n, 3), generator=generator).float() for n in size)
    positives = torch.rand(size, generator=generator) < 0.3
    pairs = positives.nonzero().T
    found = ranking.best_ranks(rows, columns, pairs, tile=tile)
    similarity = rows @ columns.T
    for ranks, scores, right in zip(
        found, (similarity, similarity.T), (positives, positives.T), strict=True
    ):
        asked = right.any(dim=1)
        assert torch.equal(ranks[asked], ranking.positive_ranks(scores[asked], right[asked]))
        assert (ranks[~asked] == scores.shape[1]).all()


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_best_ranks_of_a_collapsed_model_are_the_last(value):
    rows, pairs = torch.full((4, 2), value), torch.arange(4).expand(2, -1)
    for ranks in ranking.best_ranks(rows, rows, pairs, tile=(3, 2)):
        assert ranks.tolist() == [3] * 4


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_best_ranks_never_hold_the_matrix():
    features = torch.randn(8192, 8)  # the matrix would take 256 MiB, of bytes 64
    pairs = torch.arange(8192).expand(2, -1)
    ranking.best_ranks(features[:600], features[:600], pairs[:, :600])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before = _resident("VmRSS")
    ranking.best_ranks(features, features, pairs)
    assert _resident("VmHWM") - before < 24 * 2**20


def _resident(name):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{name}:")[2].split()[0])


def test_a_model_of_nan_hits_nothing():
    logits = torch.full((3, 3), math.nan)
    assert ranking.top_k_accuracy(logits, LABELS, 2) == 0.0


@pytest.mark.parametrize("num_classes", [3, 20])
def test_a_constant_model_hits_as_often_as_chance(num_classes):
    labels = torch.arange(num_classes).repeat(2)
    logits = torch.zeros(len(labels), num_classes)
    for k in (1, 2, 3):
        assert ranking.top_k_accuracy(logits, labels, k) == pytest.approx(k / num_classes)
    assert ranking.mean_per_class_recall(logits, labels) == pytest.approx(1 / num_classes)


def test_a_query_without_positives_is_an_error():
    with pytest.raises(ValueError, match="at least one positive"):
        ranking.positive_ranks(torch.ones(2, 2), torch.tensor([[True, False], [False, False]]))


@pytest.mark.parametrize(("num_targets", "k"), [*itertools.product([1, 4, 6], [1, 2, 5])])
def test_chance_recall_equals_the_mean_over_every_subset(num_targets, k):
    counts = [p for p in (1, 2, 2, 3) if p <= num_targets]
    subsets = list(itertools.combinations(range(num_targets), min(k, num_targets)))
    hits = [any(j < p for j in subset) for p in counts for subset in subsets]
    chance = ranking.chance_recall_at_k(torch.tensor(counts), num_targets, k)
    assert chance == pytest.approx(statistics.fmean(hits), abs=1e-12)


def test_chance_median_rank_of_one_positive_is_the_middle():
    assert ranking.chance_median_rank(torch.tensor([1]), 9) == 5.0
    assert ranking.chance_median_rank(torch.tensor([9]), 9) == 1.0
