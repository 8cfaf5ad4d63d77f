"""Runs of words in a caption, counted."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain

MAX_N = 4  # of BLEU (Papineni et al., 2002) and CIDEr (1411.5726): runs of one to four words

Tokens = Sequence[str]
Ngram = tuple[str, ...]


def ngrams(tokens: Tokens, max_n: int = MAX_N) -> Counter[Ngram]:
    """How often each run of 1 to `max_n` words occurs."""
    tails = [tokens[start:] for start in range(max_n)]
    runs = (zip(*tails[:n], strict=False) for n in range(1, max_n + 1))
    return Counter(chain.from_iterable(runs))
