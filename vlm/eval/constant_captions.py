"""The best constant caption under each of the field's metrics: what they give without looking."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from jaxtyping import Float
from torch import Tensor

from vlm.metrics.bleu import bleu, closest_length, most_in_one
from vlm.metrics.cider import CiderD, penalty
from vlm.metrics.clip_score import SCALE
from vlm.metrics.ngrams import MAX_N, Ngram, Tokens, ngrams
from vlm.metrics.rouge import f_measure, unmatched

MAX_CANDIDATES = 20_000  # more are sampled evenly
FEW_CANDIDATES = 2_000  # where every reference or picture is looked at for each
_WORD_BITS = 64
_PADDING = 8  # references are padded to a multiple of this many words
_CHUNK = 256  # captions whose similarities to all pictures are held at a time

References = Sequence[Sequence[Tokens]]  # of each picture
FloatArray = npt.NDArray[np.float64]
T = TypeVar("T")


class Constant(NamedTuple):
    """A caption that is given to every picture, and what it scores."""

    text: str
    value: float


class Candidate(NamedTuple):
    """A caption that someone wrote, and its words."""

    text: str
    tokens: tuple[str, ...]


def candidates_of(texts: Sequence[Sequence[str]], references: References) -> list[Candidate]:
    """The captions that differ in their words, or `MAX_CANDIDATES` of them."""
    pairs = (
        (text, tuple(tokens))
        for of_picture, tokenized in zip(texts, references, strict=True)
        for text, tokens in zip(of_picture, tokenized, strict=True)
    )
    found = [Candidate(text, tokens) for tokens, text in {t: text for text, t in pairs}.items()]
    return _sampled(found, MAX_CANDIDATES)


def best_bleu(candidates: list[Candidate], references: References) -> list[Constant]:
    """Of BLEU-1..4 each, of the whole corpus."""
    num_allowing: Counter[tuple[Ngram, int]] = Counter()  # pictures that allow so many of it
    for texts in references:
        for ngram, most in most_in_one(texts).items():
            num_allowing.update((ngram, count) for count in range(1, most + 1))
    lengths = [[len(tokens) for tokens in texts] for texts in references]

    @cache
    def closest(length: int) -> int:
        return sum(closest_length(length, of_picture) for of_picture in lengths)

    counts = []
    for _, tokens in candidates:
        matches = [0] * MAX_N
        for ngram, count in ngrams(tokens).items():
            for number in range(1, count + 1):
                matches[len(ngram) - 1] += num_allowing[ngram, number]
        runs = [max(0, len(tokens) - n) * len(references) for n in range(MAX_N)]
        counts.append([*matches, *runs, len(tokens) * len(references), closest(len(tokens))])
    return [_best(candidates, scores) for scores in bleu(counts).T]


def best_rouge_l(candidates: list[Candidate], references: References) -> Constant:
    """Of ROUGE-L, among `FEW_CANDIDATES`; of each, the first 64 words are what is said."""
    flat, first = _flat([[list(tokens) or [""] for tokens in texts] for texts in references])
    numbers: dict[str, int] = {}
    rows = [[numbers.setdefault(word, len(numbers)) + 1 for word in words] for words in flat]
    lengths = np.array([len(row) for row in rows])
    groups = []
    for width in sorted(set(padded := -(-lengths // _PADDING) * _PADDING)):
        members = np.flatnonzero(padded == width)
        words = np.zeros((width, len(members)), np.int64)  # 0 is no word
        for column, member in enumerate(members):
            words[: lengths[member], column] = rows[member]
        groups.append((members, words))

    def score(candidate: Candidate) -> float:
        words = candidate.tokens[:_WORD_BITS] or ("",)
        places = np.zeros(len(numbers) + 1, np.uint64)
        for place, word in enumerate(words):
            if word in numbers:
                places[numbers[word] + 1] |= np.uint64(1 << place)
        common = np.zeros(len(rows))
        for members, others in groups:
            ones = np.full(len(members), (1 << len(words)) - 1, np.uint64)
            rest = unmatched((places[row] for row in others), ones)
            common[members] = len(words) - np.bitwise_count(rest)
        precision = np.maximum.reduceat(common, first) / len(words)
        recall = np.maximum.reduceat(common / lengths, first)
        some = precision > 0
        return float(f_measure(precision[some], recall[some]).sum() / len(references))

    some = _sampled(candidates, FEW_CANDIDATES)
    return _best(some, [score(candidate) for candidate in some])


def best_cider_d(candidates: list[Candidate], corpus: CiderD) -> Constant:
    """Of CIDEr-D, with the corpus's document frequencies.

    min(a, b) is the number of k up to both: over (n-gram, k) the clipped cosine is a plain product,
    and what depends on a reference beyond that is its length. So the references are added up by
    n-gram, k and length, once for all candidates.
    """
    sums: defaultdict[tuple[Ngram, int], defaultdict[int, float]]
    sums = defaultdict(lambda: defaultdict(float))
    for vectors in corpus.references:
        for vector in vectors:
            for ngram, count in vector.counts.items():
                if norm := vector.norms[len(ngram) - 1]:
                    weight = count * corpus.idf(ngram) ** 2 / norm / len(vectors)
                    for number in range(1, count + 1):
                        sums[ngram, number][vector.length] += weight

    penalties = cache(penalty)

    def score(candidate: Candidate) -> float:
        vector, total = corpus.vector(candidate.tokens), 0.0
        for ngram, count in vector.counts.items():
            norm = vector.norms[len(ngram) - 1] or 1.0
            for number in range(1, count + 1):
                for length, weight in sums.get((ngram, number), {}).items():
                    total += weight / norm * penalties(vector.length - length)
        return 10 * total / MAX_N / len(corpus.references)

    return _best(candidates, [score(candidate) for candidate in candidates])


def best_clip_score(
    candidates: list[Candidate],
    images: Float[Tensor, "N D"],
    embed_texts: Callable[[list[str]], Float[Tensor, "C D"]],
) -> Constant:
    """Of CLIPScore, among `FEW_CANDIDATES`."""
    some = _sampled(candidates, FEW_CANDIDATES)
    texts = embed_texts([candidate.text for candidate in some])
    means: list[float] = []
    for start in range(0, len(texts), _CHUNK):
        cosines = images @ texts[start : start + _CHUNK].T  # [N, c]
        means += (SCALE * cosines.clamp(min=0).double().mean(0)).tolist()
    return _best(some, means)


def _sampled(candidates: list[Candidate], most: int) -> list[Candidate]:
    return candidates[:: -(-len(candidates) // most)]


def _best(candidates: list[Candidate], scores: Sequence[float] | FloatArray) -> Constant:
    number = int(np.argmax(scores))
    return Constant(candidates[number].text, float(scores[number]))


def _flat(of_pictures: Sequence[Sequence[T]]) -> tuple[list[T], npt.NDArray[np.int64]]:
    """All references in a row, and where each picture's begin."""
    counts = [len(texts) for texts in of_pictures]
    return [text for texts in of_pictures for text in texts], np.cumsum([0, *counts[:-1]])
