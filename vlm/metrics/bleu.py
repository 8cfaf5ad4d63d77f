"""BLEU-1 to BLEU-4: the counts of one picture, and the score of any sum of such counts.

Papineni et al., "BLEU: a method for automatic evaluation of machine translation" (ACL 2002),
section 2, with the constants of pycocoevalcap, whose figures these are.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vlm.metrics.ngrams import MAX_N, Ngram, Tokens, ngrams

FloatArray = npt.NDArray[np.float64]
NUM_COUNTS = 2 * MAX_N + 2
_SMALL, _TINY = 1e-9, 1e-15  # so that 0 / 0 is 0; pycocoevalcap's


def bleu_counts(candidate: Tokens, references: Sequence[Tokens]) -> list[int]:
    """What BLEU needs to know of a picture, [10]: add these up over pictures.

    The clipped matches of n = 1..4 (section 2.1), the runs of n = 1..4 there are, the length, and
    the length of that reference which is closest to it, the shorter one of two (section 2.2.2).

    Raises:
        ValueError: There is no reference.
    """
    if not references:
        raise ValueError("bleu_counts needs at least one reference")
    allowed = most_in_one(references)
    matches = [0] * MAX_N
    for ngram, count in ngrams(candidate).items():
        matches[len(ngram) - 1] += min(count, allowed[ngram])
    runs = [max(0, len(candidate) - n) for n in range(MAX_N)]
    lengths = [len(reference) for reference in references]
    return [*matches, *runs, len(candidate), closest_length(len(candidate), lengths)]


def most_in_one(references: Sequence[Tokens]) -> Counter[Ngram]:
    """How often each run of words occurs in the reference that has it most often."""
    most: Counter[Ngram] = Counter()
    for reference in references:
        most |= ngrams(reference)
    return most


def closest_length(length: int, lengths: Sequence[int]) -> int:
    """The nearest of `lengths`; of two, the shorter."""
    return min(lengths, key=lambda other: (abs(other - length), other))


def bleu(counts: npt.ArrayLike) -> FloatArray:
    """BLEU-1..4 in 0..1, [..., 4], of counts [..., 10]: of a corpus's sum, or of one picture.

    The geometric mean of the precisions, times exp(1 - r / c) where the candidates are shorter than
    their references (section 2.3).
    """
    values = np.asarray(counts, np.float64)
    matches, runs = values[..., :MAX_N], values[..., MAX_N : 2 * MAX_N]
    precisions = (matches + _TINY) / (runs + _SMALL)
    means = np.cumprod(precisions, axis=-1) ** (1 / np.arange(1, MAX_N + 1))
    ratio = (values[..., -2:-1] + _TINY) / (values[..., -1:] + _SMALL)
    scores: FloatArray = means * np.exp(np.minimum(0, 1 - 1 / ratio))
    return scores
