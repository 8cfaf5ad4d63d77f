import numpy as np
import pytest

from vlm.eval import statistics


def test_interval_equals_a_loop_over_resampled_samples():
    rng = np.random.default_rng(1)
    scores, weights = rng.random(30), rng.random(30) + 0.1
    clusters = rng.integers(0, 6, 30)
    draws = np.concatenate([*statistics._draws(6, 200, 3, 70)])
    codes, _ = statistics.cluster_codes(clusters.tolist())
    means = []
    for counts in draws.astype(int):
        drawn = [i for i, code in enumerate(codes) for _ in range(counts[code])]
        means.append(np.average(scores[drawn], weights=weights[drawn]))
    expected = np.percentile(means, [2.5, 97.5])
    interval = statistics.mean_interval(
        scores, clusters.tolist(), weights=weights, num_resamples=200, seed=3
    )
    # A chunk of 70 resamples above, one chunk inside: the draws do not depend on it.
    assert interval == pytest.approx(tuple(expected), abs=1e-12)


def test_interval_agrees_with_the_normal_approximation():
    scores = np.random.default_rng(0).random(2000) < 0.3
    low, high = statistics.mean_interval(scores, range(2000))
    error = 1.96 * np.sqrt(0.3 * 0.7 / 2000)
    assert low == pytest.approx(scores.mean() - error, abs=0.15 * error)
    assert high == pytest.approx(scores.mean() + error, abs=0.15 * error)


def test_copies_of_a_sample_do_not_narrow_the_interval():
    scores = np.random.default_rng(0).random(50)
    once = statistics.mean_interval(scores, range(50))
    copied = statistics.mean_interval(np.tile(scores, 9), [*range(50)] * 9)
    assert copied == pytest.approx(once, abs=1e-12)
    apart = statistics.mean_interval(np.tile(scores, 9), range(450))
    assert apart[1] - apart[0] < 0.5 * (once[1] - once[0])


def test_median_interval_equals_a_loop():
    rng = np.random.default_rng(2)
    scores, clusters = rng.integers(1, 9, 20), ["a", "b", "c", "d", "e"] * 4
    medians = []
    for counts in statistics._draws(5, 100, 0, 100).__next__().astype(int):
        drawn = sorted(
            s
            for s, c in zip(scores, clusters, strict=True)
            for _ in range(counts["abcde".index(c)])
        )
        medians.append(drawn[(len(drawn) - 1) // 2])
    expected = tuple(np.percentile(medians, [2.5, 97.5]))
    assert statistics.median_interval(scores, clusters, num_resamples=100) == expected


def test_sums_interval_of_a_ratio_is_that_of_the_mean():
    rng = np.random.default_rng(4)
    scores, weights, clusters = rng.random(30), rng.random(30) + 0.1, rng.integers(0, 6, 30)
    parts = np.stack([scores * weights, weights], axis=1)
    expected = statistics.mean_interval(scores, clusters.tolist(), weights=weights)
    interval = statistics.sums_interval(parts, clusters.tolist(), lambda s: s[:, 0] / s[:, 1])
    assert interval == pytest.approx(expected, abs=1e-12)


def test_jackknife_interval_of_a_mean_is_the_normal_one():
    scores = np.random.default_rng(5).random(40)
    without = (scores.sum() - scores) / 39
    low, high = statistics.jackknife_interval(scores.mean(), without)
    error = 1.96 * scores.std(ddof=1) / np.sqrt(40)
    assert (low, high) == pytest.approx((scores.mean() - error, scores.mean() + error))
    assert statistics.jackknife_interval(0.5, np.array([0.0])) == (0.5, 0.5)


def test_equal_inputs_give_equal_intervals():
    scores = np.arange(10) / 10
    assert statistics.mean_interval(scores, range(10)) == statistics.mean_interval(
        scores, range(10)
    )
    assert statistics.mean_interval(scores, range(10), seed=1) != statistics.mean_interval(
        scores, range(10)
    )


def test_one_cluster_gives_a_point():
    assert statistics.mean_interval([0.0, 1.0], ["x", "x"]) == (0.5, 0.5)


def test_many_clusters_stay_within_the_chunk(monkeypatch):
    whole = statistics.mean_interval(np.arange(40) % 3, range(40))
    monkeypatch.setattr(statistics, "_CHUNK", 100)
    assert statistics.mean_interval(np.arange(40) % 3, range(40)) == pytest.approx(whole, abs=1e-12)
