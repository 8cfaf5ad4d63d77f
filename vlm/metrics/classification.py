"""Calibration, confusion and average precision; numbers in docstrings are arXiv papers."""

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

NUM_BINS = 15

Floats = npt.NDArray[np.float64]


def calibration_error(
    confidences: Float64[np.ndarray, " N"],
    hits: Bool[np.ndarray, " N"],
    counts: Float64[np.ndarray, "R N"] | None = None,
) -> Float64[np.ndarray, " R"]:
    """The expected calibration error (1706.04599, equations 2 and 3) with 15 bins of equal width.

    The mean over the samples of |accuracy - mean confidence| of the bin that a sample is in. The
    bins are (0, 1/15], ..., (14/15, 1].

    Args:
        confidences: The probability of each sample's likeliest class.
        hits: Whether that is its true class.
        counts: How often each sample counts, in each of R resamples; once, with R = 1, by default.
    """
    gaps = np.zeros((len(confidences), NUM_BINS))
    gaps[np.arange(len(confidences)), _bins(confidences)] = hits - confidences
    drawn = np.ones((1, len(confidences))) if counts is None else counts
    error: Floats = np.abs(drawn @ gaps).sum(axis=1) / drawn.sum(axis=1)
    return error


def chance_calibration_error(confidences: Float64[np.ndarray, " N"]) -> float:
    """What a perfectly calibrated model of these confidences shows, as there are only N samples.

    Its hits are Bernoulli draws with the confidences p, so a bin's gap has variance sum p (1 - p)
    and, as of a normal distribution, a mean absolute value of sqrt(2 / pi) standard deviations.
    """
    variances = np.bincount(_bins(confidences), confidences * (1 - confidences), NUM_BINS)
    return float(np.sqrt(2 / np.pi * variances).sum() / len(confidences))


def _bins(confidences: Float64[np.ndarray, " N"]) -> npt.NDArray[np.int64]:
    bins: npt.NDArray[np.int64] = np.ceil(confidences * NUM_BINS).astype(np.int64) - 1
    return bins.clip(0, NUM_BINS - 1)


def confusion_matrix(
    labels: Int[Tensor, " N"], predicted: Int[Tensor, " N"], num_classes: int
) -> Int[Tensor, "C C"]:
    """How often samples of a class (row) were taken for another (column)."""
    cells = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def average_precision(
    scores: Float[Tensor, "N C"],
    targets: Bool[Tensor, "N C"],
    counts: Float64[np.ndarray, "R N"] | None = None,
) -> Float64[np.ndarray, "R C"]:
    """Each class's average precision: the mean, over its samples, of the precision at their place.

    Samples are ordered by `torch.sort`, without interpolation, and a class without samples has 0:
    CLIP_benchmark's `average_precision_per_class`. In a resample that draws none of the samples
    that a class has, it is NaN.

    Args:
        scores: Of each sample and class.
        targets: The classes of each sample.
        counts: How often each sample counts, in each of R resamples; once, with R = 1, by default.
            All copies of a sample stand at the place of the last one.
    """
    drawn = np.ones((1, len(scores))) if counts is None else counts
    precisions = np.zeros((len(drawn), scores.shape[1]))
    for number in range(scores.shape[1]):
        order = scores[:, number].sort(descending=True).indices
        at = targets[order, number].nonzero()[:, 0].numpy()
        if not len(at):
            continue
        ordered = drawn[:, order.numpy()]
        places = ordered.cumsum(axis=1)[:, at]
        right = ordered[:, at]
        found = right * right.cumsum(axis=1) / np.maximum(places, 1)
        total = right.sum(axis=1)
        precisions[:, number] = np.where(
            total > 0, found.sum(axis=1) / np.maximum(total, 1), np.nan
        )
    return precisions


def chance_average_precision(
    positive_counts: Int[Tensor, " C"], num_samples: int
) -> Float64[np.ndarray, " C"]:
    """The expected average precision of each class in a random order, exact; 0 without samples.

    With P of N samples: (H + (P - 1) / (N - 1) (N - H)) / N, where H = 1 + 1/2 + ... + 1/N. A place
    k holds one of the P with probability P / N, and has then (1 + (k - 1)(P - 1) / (N - 1)) / k.
    """
    counts = positive_counts.double().numpy()
    harmonic = float((1 / np.arange(1, num_samples + 1)).sum())
    others = (counts - 1) / max(num_samples - 1, 1)
    expected = (harmonic + others * (num_samples - harmonic)) / num_samples
    return np.where(counts > 0, expected, 0.0)
