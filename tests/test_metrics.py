import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm import metrics

# Classes 0, 1, 2; the truth is 0, 1, 2; ranks by hand: 0, 2, 1.
LOGITS = torch.tensor([[3.0, 2.0, 1.0], [3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
LABELS = torch.tensor([0, 1, 2])


def test_top_k_hits_of_a_hand_worked_3x3():
    assert metrics.top_k_hits(LOGITS, LABELS, 1).tolist() == [True, False, False]
    assert metrics.top_k_hits(LOGITS, LABELS, 2).tolist() == [True, False, True]
    assert metrics.top_k_accuracy(LOGITS, LABELS, 2) == pytest.approx(2 / 3)
    assert metrics.top_k_accuracy(LOGITS, LABELS, 3) == 1.0


def test_mean_per_class_recall_weighs_classes_not_samples():
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    labels = torch.tensor([0, 0, 0, 1])  # recall 1 and 0; accuracy would be 3 / 4
    assert metrics.mean_per_class_recall(logits, labels) == 0.5


def test_mean_per_class_recall_leaves_out_absent_classes():
    assert metrics.mean_per_class_recall(LOGITS[:1], LABELS[:1]) == 1.0


def test_positive_ranks_of_a_hand_worked_3x3():
    similarity = torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.2, 0.5, 0.3]])
    positives = torch.tensor([[1, 0, 0], [0, 0, 1], [1, 0, 1]], dtype=torch.bool)
    ranks = metrics.positive_ranks(similarity, positives)
    assert ranks.tolist() == [0, 2, 1]  # the third query's best positive is 0.3, behind 0.5
    assert [metrics.recall_at_k(ranks, k) for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert metrics.median_rank(ranks) == 2.0


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
    assert metrics.positive_ranks(similarity, positives).tolist() == expected


def test_ranks_do_not_depend_on_the_chunks_of_queries():
    similarity, positives = torch.randn(7, 5), torch.eye(7, 5).bool()
    positives[:, 0] = True
    whole = metrics.positive_ranks(similarity, positives)
    pairs = zip(similarity.split(3), positives.split(3), strict=True)
    assert torch.equal(whole, torch.cat([metrics.positive_ranks(*pair) for pair in pairs]))


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -math.inf])
def test_a_collapsed_model_hits_nothing(value):
    logits = torch.full((3, 3), value)
    assert metrics.top_k_accuracy(logits, LABELS, 2) == 0.0
    assert metrics.top_k_accuracy(logits, LABELS, 3) == 1.0


def test_a_query_without_positives_is_an_error():
    with pytest.raises(ValueError, match="at least one positive"):
        metrics.positive_ranks(torch.ones(2, 2), torch.tensor([[True, False], [False, False]]))


@pytest.mark.parametrize(("num_targets", "k"), [*itertools.product([1, 4, 6], [1, 2, 5])])
def test_chance_recall_equals_the_mean_over_every_subset(num_targets, k):
    counts = [p for p in (1, 2, 2, 3) if p <= num_targets]
    subsets = list(itertools.combinations(range(num_targets), min(k, num_targets)))
    hits = [any(j < p for j in subset) for p in counts for subset in subsets]
    chance = metrics.chance_recall_at_k(torch.tensor(counts), num_targets, k)
    assert chance == pytest.approx(statistics.fmean(hits), abs=1e-12)


def test_chance_median_rank_of_one_positive_is_the_middle():
    assert metrics.chance_median_rank(torch.tensor([1]), 9) == 5.0
    assert metrics.chance_median_rank(torch.tensor([9]), 9) == 1.0


def test_words_split_at_punctuation_and_fold_case():
    assert metrics.words("A T-Rex, eating: “Straße”!") == ["a", "t", "rex", "eating", "strasse"]
    assert metrics.words("हिन्दी शब्द") == ["हिन्दी", "शब्द"]  # combining marks do not split
    assert metrics.words(" ,. ") == []


def test_token_f1_counts_repeated_words_once_each():
    # common: red, red (the reference has two of the three); 2 * 2 / (4 + 3)
    assert metrics.token_f1("red red red car", ["Red, red bus"]) == pytest.approx(4 / 7)


def test_token_f1_takes_the_best_reference():
    assert metrics.token_f1("a red car", ["blue bus", "red car"]) == pytest.approx(4 / 5)
    assert metrics.token_f1("cat", ["dog"]) == 0.0
    assert metrics.token_f1("", ["..."]) == 1.0
    assert metrics.token_f1("", ["dog"]) == 0.0


def test_token_f1_without_references_is_an_error():
    with pytest.raises(ValueError, match="reference"):
        metrics.token_f1("cat", [])


def test_exact_match_needs_all_words_in_order():
    assert metrics.exact_match("Red car.", ["bus", "red car"])
    assert not metrics.exact_match("car red", ["red car"])
