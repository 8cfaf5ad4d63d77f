"""ROUGE-L: the longest common subsequence of a caption and its references.

Lin, "ROUGE: a package for automatic evaluation of summaries" (ACL 2004 workshop), section 3.1, with
the beta and the maxima of pycocoevalcap, whose figures these are.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from vlm.metrics.ngrams import Tokens

BETA = 1.2
Bits = TypeVar("Bits", int, npt.NDArray[Any])
Share = TypeVar("Share", float, npt.NDArray[np.float64])


def rouge_l(candidate: Tokens, references: Sequence[Tokens]) -> float:
    """F of the best precision and the best recall, which may be of different references, in 0..1.

    A caption without a word counts as one empty word, as pycocoevalcap has it: two of them agree.

    Raises:
        ValueError: There is no reference.
    """
    if not references:
        raise ValueError("rouge_l needs at least one reference")
    words = candidate or [""]
    places: defaultdict[str, int] = defaultdict(int)
    for place, word in enumerate(words):
        places[word] |= 1 << place
    ones = (1 << len(words)) - 1
    precision = recall = 0.0
    for reference in references:
        others = reference or [""]
        rest = unmatched((places.get(word, 0) for word in others), ones)
        common = len(words) - rest.bit_count()
        precision, recall = max(precision, common / len(words)), max(recall, common / len(others))
    return f_measure(precision, recall) if precision else 0.0


def f_measure(precision: Share, recall: Share) -> Share:
    """Of precision and recall above 0 (section 3.1, equation 4)."""
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def unmatched(masks: Iterable[Bits], ones: Bits) -> Bits:
    """A bit for each place of a text that is in no longest common subsequence with another one.

    The bit-parallel recurrence of Hyyro, "Bit-parallel LCS-length computation revisited" (2004):
    the number of zeros is the length. Arrays hold many texts at once, of 64 words at most.

    Args:
        masks: Of each word of the other text, the places at which the text has it.
        ones: A bit for each place.
    """
    rest = ones
    for mask in masks:
        common = rest & mask
        rest = (rest + common) | (rest - common)
    last: Bits = rest & ones
    return last
