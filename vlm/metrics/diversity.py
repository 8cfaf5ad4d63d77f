"""How varied captions are, without a look at any reference."""

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from vlm.metrics.ngrams import Ngram, Tokens


def distinct_n(captions: Sequence[Tokens], n: int) -> float:
    """The number of different runs of n words in all captions, over the number of words.

    As Li et al. have it (1510.03055, section 5: "scaled by total number of generated tokens"),
    also for n = 2; others divide by the number of runs. It falls as there are more captions, so
    compare it for the same pictures only. Captions without a word have 0.
    """
    num_words = sum(len(tokens) for tokens in captions)
    runs = {run for tokens in captions for run in _runs(tokens, n)}
    return len(runs) / num_words if num_words else 0.0


def distinct_n_without(
    captions: Sequence[Tokens], n: int, clusters: Sequence[Hashable]
) -> npt.NDArray[np.float64]:
    """`distinct_n` without the captions of each cluster in turn, [clusters]: for a jackknife."""
    words: dict[Hashable, int] = dict.fromkeys(clusters, 0)
    owners: dict[Ngram, set[Hashable]] = {}
    for tokens, cluster in zip(captions, clusters, strict=True):
        words[cluster] += len(tokens)
        for run in _runs(tokens, n):
            owners.setdefault(run, set()).add(cluster)
    alone = dict.fromkeys(words, 0)
    for owning in owners.values():
        if len(owning) == 1:
            alone[next(iter(owning))] += 1
    left = sum(words.values()) - np.array(list(words.values()))
    runs = len(owners) - np.array(list(alone.values()))
    shares: npt.NDArray[np.float64] = runs / np.maximum(left, 1)
    return shares


def _runs(tokens: Tokens, n: int) -> list[Ngram]:
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))
