import pytest
import torch

from vlm.metrics.clip_score import clip_score
from vlm.metrics.diversity import distinct_n, distinct_n_without
from vlm.metrics.units import unit_of

CAPTIONS = [["a", "red", "dog"], ["a", "red", "cat"], ["a"]]


def test_distinct_n_of_captions_worked_by_hand():
    assert distinct_n(CAPTIONS, 1) == 4 / 7  # a, red, dog, cat
    assert distinct_n(CAPTIONS, 2) == 3 / 7  # a red, red dog, red cat; over words, as in the paper
    assert distinct_n([[], []], 1) == 0.0


def test_distinct_n_without_a_cluster_is_that_of_the_others():
    clusters = ["x", "y", "x"]
    for n in (1, 2):
        others = [[CAPTIONS[1]], [CAPTIONS[0], CAPTIONS[2]]]
        expected = [distinct_n(captions, n) for captions in others]
        assert distinct_n_without(CAPTIONS, n, clusters).tolist() == pytest.approx(expected)
    assert distinct_n_without(CAPTIONS, 1, ["x", "x", "x"]).tolist() == [0.0]


def test_clip_score_is_never_below_0():
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    texts = torch.tensor([[0.6, 0.8], [-0.6, 0.8]])
    assert clip_score(images, texts).tolist() == pytest.approx([1.5, 0.0])


def test_a_metric_s_unit_says_how_it_is_shown():
    units = [unit_of(name) for name in ("bleu_4", "cider_d", "length", "x_median_rank")]
    assert units == ["share", "points", "words", "place"]
