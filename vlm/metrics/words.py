"""Agreement of two texts, word by word; numbers in docstrings are arXiv papers."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

_WITHOUT_SPACES = re.compile(  # the blocks of scripts that put no space between words
    "[\u3005-\u3007\u3021-\u3029\u3038-\u303b\u2e80-\u2fdf\u3400-\u4dbf\u4e00-\u9fff"  # Han
    "\uf900-\ufaff\U00020000-\U0003ffff"
    "\u3040-\u30ff\u31f0-\u31ff\U0001aff0-\U0001b16f"  # Hiragana, Katakana
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1780-\u17ff\u19e0-\u19ff"  # Khmer
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f]"  # Myanmar
)


def words(text: str) -> list[str]:
    """The words of a text: NFKC, case folded, split at white space and punctuation.

    In Han, Hiragana, Katakana, Thai, Lao, Khmer and Myanmar, which are written without spaces, each
    character is a word, with the combining marks that follow it.
    """
    parts, is_word = [], False  # whether the last character is a word of its own
    for char in unicodedata.normalize("NFKC", text).casefold():
        kind = unicodedata.category(char)[0]
        if kind in "PZC":
            parts.append(" ")
        elif kind == "M":
            parts.append(char)
        else:
            was_word, is_word = is_word, _WITHOUT_SPACES.match(char) is not None
            parts.append(f" {char}" if is_word or was_word else char)
    return "".join(parts).split()


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
