"""The weighted vote of the nearest pictures."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from vlm.heads import knn
from vlm.heads.knn import NearestNeighbours


def test_votes_of_a_hand_worked_case():
    # cosines with the query: 1, 0.8, 0.6, 0; the three nearest vote for classes 1, 0, 0
    features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
    labels, query = torch.tensor([1, 0, 0, 2]), torch.tensor([[1.0, 0.0]])
    votes = NearestNeighbours(features, labels, 3, k=3, temperature=0.1)(query)
    assert votes[0].tolist() == pytest.approx([math.exp(-2) + math.exp(-4), 1, 0])
    even = NearestNeighbours(features, labels, 3, k=3, temperature=100.0)(query)
    assert even.argmax() == 0  # two votes against one


def test_votes_equal_a_loop_and_do_not_depend_on_the_tile(monkeypatch):
    features, queries = (normalize(torch.randn(n, 6), dim=1) for n in (50, 9))
    labels = torch.randint(4, (50,))
    classifier = NearestNeighbours(features, labels, 4, k=7)
    votes = classifier(queries)
    for query, found in zip(queries, votes, strict=True):
        scores = sorted(zip((features @ query).tolist(), labels.tolist(), strict=True))[-7:]
        expected = [0.0] * 4
        for score, label in scores:
            expected[label] += math.exp((score - scores[-1][0]) / 0.07)
        assert found.tolist() == pytest.approx(expected, rel=1e-4)
    monkeypatch.setattr(knn, "_NEIGHBOURS_AT_ONCE", 11)
    assert classifier(queries) == pytest.approx(votes, rel=1e-5)


def test_fewer_pictures_than_k_all_vote():
    votes = NearestNeighbours(torch.eye(3), torch.arange(3), 3)(torch.eye(3))
    assert votes.argmax(dim=1).tolist() == [0, 1, 2]
