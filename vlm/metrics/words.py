"""Agreement of two texts, word by word; numbers in docstrings are arXiv papers."""

import unicodedata
from collections import Counter
from collections.abc import Sequence


def words(text: str) -> list[str]:
    """The words of a text: NFKC, case folded, split at white space and punctuation."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    spaced = [" " if unicodedata.category(char)[0] in "PZC" else char for char in folded]
    return "".join(spaced).split()


def token_f1(candidate: str, references: Sequence[str]) -> float:
    """F1 of the multisets of words, against the best reference (SQuAD, 1606.05250, section 6.1).

    Unlike SQuAD's, articles count: a caption is not an answer. Two texts without any word agree.

    Raises:
        ValueError: There is no reference.
    """
    if not references:
        raise ValueError("token_f1 needs at least one reference")
    return max(_f1(words(candidate), words(reference)) for reference in references)


def _f1(candidate: list[str], reference: list[str]) -> float:
    if not candidate and not reference:
        return 1.0
    common = (Counter(candidate) & Counter(reference)).total()
    return 2 * common / (len(candidate) + len(reference))


def exact_match(candidate: str, references: Sequence[str]) -> bool:
    """Whether the words equal those of any reference, in order (SQuAD, 1606.05250, section 6.1)."""
    return words(candidate) in [words(reference) for reference in references]
