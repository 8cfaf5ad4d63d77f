import itertools
import math

import numpy as np
import pytest

from vlm.eval import paired
from vlm.eval.paired import holm, paired_difference, sign_flip_p
from vlm.eval.results import Samples
from vlm.eval.statistics import mean_interval


def share_of_flips(gains):
    """By trying them all."""
    sums = [sum(map(math.prod, zip(s, gains, strict=True)))
            for s in itertools.product((1, -1), repeat=len(gains))]  # fmt: skip
    return np.mean([abs(total) >= abs(sum(gains)) - 1e-9 for total in sums])


@pytest.mark.parametrize(
    "gains", [[1, 1, 1, -1, 0, 1, 1], [3, -2, 1, 1, 5, -1], [0.3, -0.1, 0.25, 0.5, 0.0], [2.0]]
)
def test_the_p_value_is_the_share_of_all_flips(gains):
    assert sign_flip_p(np.array(gains, float)) == pytest.approx(share_of_flips(gains), abs=1e-12)


def test_hits_and_misses_are_mcnemars_exact_test():
    gains = np.array([1] * 40 + [-1] * 18 + [0] * 500, float)
    tail = sum(math.comb(58, k) for k in range(19)) / 2**58
    assert sign_flip_p(gains) == pytest.approx(2 * tail, rel=1e-9)


def test_random_flips_come_near_the_exact_value(monkeypatch):
    gains = np.random.default_rng(1).normal(0.4, 1, 14)
    exact = sign_flip_p(gains)
    monkeypatch.setattr(paired, "MAX_ENUMERATED", 0)
    assert sign_flip_p(gains) == pytest.approx(exact, abs=0.02)


def test_alike_models_are_called_different_as_often_as_the_level_says():
    generator = np.random.default_rng(0)
    p = [sign_flip_p(generator.integers(-1, 2, 200).astype(float)) for _ in range(400)]
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.05, abs=0.03)


def test_no_difference_at_all_is_no_evidence():
    assert sign_flip_p(np.zeros(5)) == 1.0


def test_the_difference_is_paired_by_sample_and_resampled_by_cluster():
    """What both share cancels: the interval is far narrower than that of either."""
    generator = np.random.default_rng(0)
    base = generator.random(300)
    clusters = np.arange(300) // 3
    first, second = (Samples(base + gain, clusters) for gain in (0.0, 0.02))
    found = paired_difference(first, second)
    assert found.value == pytest.approx(0.02)
    assert found.ci95 == pytest.approx((0.02, 0.02))
    assert found.p < 0.001
    low, high = mean_interval(first.scores, clusters.tolist())
    assert high - low > 0.05


def test_a_weighted_mean_keeps_its_weights():
    weights = np.array([0.5, 0.25, 0.25])
    first, second = (
        Samples(np.array(s, float), np.arange(3), weights) for s in ([0, 1, 0], [1, 1, 0])
    )
    assert paired_difference(first, second).value == 0.5


def test_other_samples_are_not_paired():
    first = Samples(np.ones(3), np.arange(3))
    assert paired_difference(first, Samples(np.ones(4), np.arange(4))) is None
    assert paired_difference(first, Samples(np.ones(3), np.zeros(3, int))) is None
    assert paired_difference(first, Samples(np.ones(3), np.arange(3), np.ones(3))) is None


def test_holm_is_the_published_procedure():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.7, 0.6]) == [1.0, 1.0]
