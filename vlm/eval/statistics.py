"""How sure a score is: 95% intervals from a bootstrap over clusters."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

NUM_RESAMPLES = 1000
_CHUNK = 4_000_000  # counts held at a time, which bounds the memory of any number of clusters

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Interval = tuple[float, float]
Scores = Sequence[float | bool] | npt.NDArray[Any]


def mean_interval(
    scores: Scores,
    clusters: Sequence[object],
    *,
    weights: Scores | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The 95% percentile interval of the (weighted) mean score, resampling whole clusters.

    Samples that share a concept or an image rise and fall together: resampling them one by one
    would make the interval too narrow (Cameron, Gelbach and Miller 2008, section II). A resample's
    mean is sum(w s) / sum(w) over the clusters drawn, so two sums a cluster are all that is needed.

    Args:
        scores: One a sample.
        clusters: The cluster of each sample, by any hashable name. With one cluster alone there is
            no spread to see, and the interval is a point.
        weights: Of the samples; 1 by default.
        num_resamples: How many means the percentiles are taken from.
        seed: Of the draws: equal inputs give equal intervals.
    """
    values = np.asarray(scores, np.float64)
    weight = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    codes, num_clusters = cluster_codes(clusters)
    totals = np.bincount(codes, weight * values, num_clusters)
    mass = np.bincount(codes, weight, num_clusters)
    return _interval(
        lambda counts: (counts @ totals) / (counts @ mass), num_clusters, num_resamples, seed
    )


def median_interval(
    scores: Scores,
    clusters: Sequence[object],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The 95% percentile interval of the (lower) median; see `mean_interval`."""
    values = np.asarray(scores, np.float64)
    order = np.argsort(values, kind="stable")
    ordered: FloatArray = values[order]
    codes, num_clusters = cluster_codes(clusters)

    def medians(counts: FloatArray) -> FloatArray:
        below = np.cumsum(counts[:, codes[order]], axis=1)  # [resamples, samples]
        middle: IntArray = np.argmax(2 * below >= below[:, -1:], axis=1)
        return ordered[middle]

    return _interval(medians, num_clusters, num_resamples, seed, width=len(values))


def resampled_interval(
    statistic: Callable[[FloatArray], FloatArray],
    clusters: Sequence[object],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The 95% percentile interval of any statistic of samples; see `mean_interval`.

    Args:
        statistic: Given how often each sample is drawn [R, N], its value [R] in each resample.
        clusters: The cluster of each sample.
        num_resamples: How many values the percentiles are taken from.
        seed: Of the draws.
    """
    codes, num_clusters = cluster_codes(clusters)
    return _interval(
        lambda counts: statistic(counts[:, codes]),
        num_clusters,
        num_resamples,
        seed,
        width=len(codes),
    )


def sums_interval(
    parts: npt.ArrayLike,
    clusters: Sequence[object],
    score: Callable[[FloatArray], FloatArray],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The 95% percentile interval of a score of summed parts; see `mean_interval`.

    Args:
        parts: [samples, K]: what a sample adds to the K sums.
        clusters: The cluster of each sample.
        score: From sums [resamples, K] to one number each.
        num_resamples: How many scores the percentiles are taken from.
        seed: Of the draws.
    """
    codes, num_clusters = cluster_codes(clusters)
    columns = np.asarray(parts, np.float64).T
    totals = np.stack([np.bincount(codes, column, num_clusters) for column in columns], axis=1)
    return _interval(lambda counts: score(counts @ totals), num_clusters, num_resamples, seed)


def jackknife_interval(value: float, without: FloatArray) -> Interval:
    """The 95% normal interval of what no resample may count twice, such as different words.

    A bootstrap's resamples hold only 63% of the clusters, so fewer different words. The jackknife
    leaves out one cluster at a time; its variance errs on the wide side (Efron and Stein 1981,
    "The jackknife estimate of variance", theorem 1).

    Args:
        value: Of all samples.
        without: The value without each cluster. With one cluster the interval is a point.
    """
    num = len(without)
    if num < 2:
        return value, value
    error = float(np.sqrt((num - 1) * np.var(without)))
    return value - 1.96 * error, value + 1.96 * error


def cluster_codes(clusters: Sequence[object]) -> tuple[IntArray, int]:
    """Each sample's cluster as a number from 0, and how many there are."""
    numbers: dict[object, int] = {}
    codes = [numbers.setdefault(cluster, len(numbers)) for cluster in clusters]
    return np.asarray(codes, np.int64), len(numbers)


def _interval(
    statistic: Callable[[FloatArray], FloatArray],
    num_clusters: int,
    num_resamples: int,
    seed: int,
    width: int = 0,
) -> Interval:
    chunk = max(1, _CHUNK // max(num_clusters, width))
    values = [statistic(c) for c in _draws(num_clusters, num_resamples, seed, chunk)]
    low, high = np.percentile(np.concatenate(values), [2.5, 97.5])
    return float(low), float(high)


def _draws(num_clusters: int, num_resamples: int, seed: int, chunk: int) -> Iterator[FloatArray]:
    """How often each resample draws each cluster: rows that sum to the number of clusters."""
    generator = np.random.default_rng(seed)
    for start in range(0, num_resamples, chunk):
        rows = min(chunk, num_resamples - start)
        drawn = generator.integers(0, num_clusters, (rows, num_clusters))
        drawn += num_clusters * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * num_clusters)
        yield counts.reshape(rows, num_clusters).astype(np.float64)
