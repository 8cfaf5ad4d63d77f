"""What a captioner reaches without looking: the best single caption for every picture."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm.metrics.words import words

MAX_CANDIDATES = 20_000  # each is scored against every reference; more are sampled evenly


@dataclass(frozen=True)
class ConstantCaption:
    """The caption that scores best on all pictures at once, and its scores.

    Attributes:
        text: The caption of the highest mean `token_f1`.
        token_f1: Its mean.
        exact_match: The highest share of pictures that one caption matches exactly.
    """

    text: str
    token_f1: float
    exact_match: float


def best_constant_caption(references: Sequence[Sequence[str]]) -> ConstantCaption:
    """The best constant caption among the references themselves.

    The overlap of two multisets of words is that of two sets of (word, how many before it), so an
    inverted index gives a candidate's overlap with all references at once.

    Args:
        references: Of each picture, at least one.
    """
    texts = [text for of_picture in references for text in of_picture]
    bags = [tuple(words(text)) for text in texts]
    lengths = np.array([len(bag) for bag in bags])
    first = np.cumsum([0, *(len(of_picture) for of_picture in references[:-1])])
    containing = _inverted(bags)
    candidates = list(dict(zip(bags, texts, strict=True)).items())
    best_text, best = "", -1.0
    for bag, text in candidates[:: -(-len(candidates) // MAX_CANDIDATES)]:
        overlap = np.zeros(len(bags))
        for entry in _numbered(bag):
            overlap[containing[entry]] += 1
        total = len(bag) + lengths
        f1 = np.where(total > 0, 2 * overlap / np.maximum(total, 1), 1.0)
        if (score := float(np.maximum.reduceat(f1, first).mean())) > best:
            best_text, best = text, score
    return ConstantCaption(best_text, best, _most_common_share(references))


def _numbered(bag: tuple[str, ...]) -> list[tuple[str, int]]:
    seen: Counter[str] = Counter()
    entries = []
    for word in bag:
        entries.append((word, seen[word]))
        seen[word] += 1
    return entries


def _inverted(bags: list[tuple[str, ...]]) -> dict[tuple[str, int], np.ndarray]:
    lists: dict[tuple[str, int], list[int]] = defaultdict(list)
    for number, bag in enumerate(bags):
        for entry in _numbered(bag):
            lists[entry].append(number)
    return {entry: np.array(numbers) for entry, numbers in lists.items()}


def _most_common_share(references: Sequence[Sequence[str]]) -> float:
    counts = Counter(bag for texts in references for bag in {tuple(words(t)) for t in texts})
    return counts.most_common(1)[0][1] / len(references)
