"""CIDEr-D: how much a caption agrees with its references in what is rare elsewhere.

Vedantam, Zitnick and Parikh (1411.5726), section 3; D, which is harder to game, as COCO's server
has it (1504.00325, section 3.5). The details are those of pycocoevalcap, whose figures these are.
"""

from collections import Counter
from collections.abc import Sequence
from math import exp, log, sqrt
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vlm.metrics.ngrams import MAX_N, Ngram, Tokens, ngrams

SIGMA = 6.0  # of the Gaussian over the difference in length


class Vector(NamedTuple):
    """A caption.

    Attributes:
        counts: Of its runs of one to four words.
        norms: Of the tf-idf weights of each n.
        length: In runs of two words: what pycocoevalcap calls length.
    """

    counts: Counter[Ngram]
    norms: list[float]
    length: int


class CiderD:
    """A corpus of references, against which captions are scored.

    An n-gram's idf is log(pictures / pictures with it in any reference); one that no reference has
    counts as if one picture had it. So scores depend on the corpus, and with one picture all are 0.

    Args:
        references: Of each picture, at least one.

    Attributes:
        references: Likewise, as vectors.

    Raises:
        ValueError: A picture has no reference.
    """

    def __init__(self, references: Sequence[Sequence[Tokens]]) -> None:
        if not all(references):
            raise ValueError("CiderD needs at least one reference of each picture")
        counted = [[ngrams(tokens) for tokens in of_picture] for of_picture in references]
        pictures_with = Counter(ngram for texts in counted for ngram in set().union(*texts))
        self._highest = log(len(references)) if references else 0.0
        self._idf = {ngram: self._highest - log(df) for ngram, df in pictures_with.items()}
        self.references = [[self._vector(counts) for counts in texts] for texts in counted]

    def scores(self, candidates: Sequence[Tokens]) -> npt.NDArray[np.float64]:
        """The score of each picture's caption, in 0..10; their mean is the corpus's.

        The mean over n = 1..4 and over references of the cosine of tf-idf vectors, of which the
        candidate's are clipped to the reference's, times exp(-d^2 / (2 sigma^2)), times 10.
        """
        pairs = zip(candidates, self.references, strict=True)
        return np.array([self._score(self.vector(tokens), vectors) for tokens, vectors in pairs])

    def vector(self, tokens: Tokens) -> Vector:
        """A caption of any words."""
        return self._vector(ngrams(tokens))

    def idf(self, ngram: Ngram) -> float:
        """What an n-gram weighs, 0 where every picture has it."""
        return self._idf.get(ngram, self._highest)

    def _vector(self, counts: Counter[Ngram]) -> Vector:
        squares, length, idf = [0.0] * MAX_N, 0, self._idf
        for ngram, count in counts.items():
            n = len(ngram)
            squares[n - 1] += (count * idf.get(ngram, self._highest)) ** 2
            length += count if n == 2 else 0
        return Vector(counts, [sqrt(square) for square in squares], length)

    def _score(self, candidate: Vector, references: list[Vector]) -> float:
        total = sum(self._similarity(candidate, reference) for reference in references)
        return 10 * total / MAX_N / len(references)

    def _similarity(self, candidate: Vector, reference: Vector) -> float:
        """Summed over n."""
        products = [0.0] * MAX_N
        for ngram, count in candidate.counts.items():
            if other := reference.counts.get(ngram):
                products[len(ngram) - 1] += min(count, other) * other * self._idf[ngram] ** 2
        norms = (a * b for a, b in zip(candidate.norms, reference.norms, strict=True))
        cosines = sum(dot / norm for dot, norm in zip(products, norms, strict=True) if norm)
        return cosines * penalty(candidate.length - reference.length)


def penalty(difference: int) -> float:
    """For a caption that many runs of two words longer or shorter than the reference."""
    return exp(-(difference**2) / (2 * SIGMA**2))
