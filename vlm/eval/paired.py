"""Whether two models differ on the same samples: paired intervals, exact tests, Holm."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vlm.eval.results import Samples
from vlm.eval.statistics import Interval, mean_interval

MAX_ENUMERATED = 16  # clusters that differ: their 2^16 signs are all tried
MAX_SUM = 2**20  # of whole numbers, whose distribution is computed
NUM_FLIPS = 9_999
_CHUNK = 20_000_000  # signs drawn at a time


class Difference(NamedTuple):
    """How much a mean is higher than another on the same samples.

    Attributes:
        value: In the metric's own unit.
        ci95: Its 95% interval, from resampled clusters, the same for both.
        p: How often chance alone makes it as large, to either side.
    """

    value: float
    ci95: Interval
    p: float


def paired_difference(first: Samples, second: Samples) -> Difference | None:
    """What the second has more than the first; None if their samples are not the same."""
    if first.scores.shape != second.scores.shape or not (
        np.array_equal(first.clusters, second.clusters) and _same_weights(first, second)
    ):
        return None
    gains = second.scores.astype(np.float64) - first.scores.astype(np.float64)
    weights = np.ones_like(gains) if first.weights is None else first.weights.astype(np.float64)
    value = float(np.average(gains, weights=weights))
    interval = mean_interval(gains, first.clusters.tolist(), weights=weights)
    return Difference(
        value, interval, sign_flip_p(np.bincount(first.clusters, weights=weights * gains))
    )


def sign_flip_p(gains: npt.NDArray[Any]) -> float:
    """The two-sided p-value of a sum of gains, one a cluster, under flips of their signs.

    If the models are alike, a cluster's gain is as likely as its opposite: the p-value is the share
    of all flips whose sum is at least as far from 0 (Fisher's randomisation test). It is exact for
    whole numbers (hits and misses; with one sample a cluster it is McNemar's exact test) and for
    few clusters; else it is that of 9,999 random flips and the one that is there (Phipson and Smyth
    2010).
    """
    gains = gains[gains != 0]
    if not len(gains):
        return 1.0
    if np.array_equal(gains, np.rint(gains)) and np.abs(gains).sum() <= MAX_SUM:
        return _p_of_whole_numbers(gains)
    if len(gains) <= MAX_ENUMERATED:
        bits = np.arange(2 ** len(gains))[:, None] >> np.arange(len(gains))
        return float(np.mean(_as_far((1.0 - 2.0 * (bits & 1)) @ gains, gains)))
    generator = np.random.default_rng(0)
    count, rows = 1, max(1, _CHUNK // len(gains))
    for start in range(0, NUM_FLIPS, rows):
        shape = (min(rows, NUM_FLIPS - start), len(gains))
        signs = 1.0 - 2.0 * generator.integers(0, 2, shape, dtype=np.int8)
        count += int(_as_far(signs @ gains, gains).sum())
    return count / (NUM_FLIPS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p-value, corrected for how many there are (Holm 1979, section 3)."""
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    stepped = np.maximum.accumulate(np.asarray(p_values, np.float64)[order] * factors)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(stepped, 1.0)
    return [float(p) for p in corrected]


def _p_of_whole_numbers(gains: npt.NDArray[Any]) -> float:
    """From the distribution of the sum, by its characteristic function: the product of cosines."""
    sizes, counts = np.unique(np.abs(gains).astype(np.int64), return_counts=True)
    largest = int(sizes @ counts)
    length = 1 << (2 * largest + 1).bit_length()  # above twice the largest sum: none is another's
    angles = 2 * np.pi * np.arange(length) / length
    characteristic = np.ones(length)
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        characteristic *= np.cos(size * angles) ** count
    shares = np.fft.ifft(characteristic).real
    sums = np.fft.fftfreq(length, 1 / length)
    return float(np.clip(shares[np.abs(sums) >= abs(gains.sum()) - 0.5].sum(), 0.0, 1.0))


def _as_far(sums: npt.NDArray[Any], gains: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which sums are as far from 0 as that of the gains, rounding aside."""
    allowed = 1e-9 * np.abs(gains).sum()
    far: npt.NDArray[np.bool_] = np.abs(sums) >= abs(gains.sum()) - allowed
    return far


def _same_weights(first: Samples, second: Samples) -> bool:
    if first.weights is None or second.weights is None:
        return first.weights is second.weights
    return bool(np.array_equal(first.weights, second.weights))
