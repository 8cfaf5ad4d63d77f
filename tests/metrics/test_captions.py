"""BLEU, ROUGE-L and CIDEr-D are those of pycocoevalcap, whose classes run on the same tokens."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from vlm.metrics.bleu import bleu, bleu_counts
from vlm.metrics.cider import CiderD
from vlm.metrics.rouge import rouge_l

GOLDEN = json.loads((Path(__file__).parent / "ptb.json").read_text())["tokens"]
WORDS = ["a", "a", "the", "dog", "cat", "on", "red", "mat", "naïve", "日本", "'s", "sits"]


def written(rng):
    """A caption that someone wrote, of those the tokeniser is held to."""
    return rng.choice(GOLDEN)


def random_words(rng):
    return " ".join(rng.choices(WORDS, k=rng.choice([0, 1, 2, 3, 5, 8, 12])))


def corpus(seed):
    """Pictures with one to seven references; candidates are empty, made up, copied or garbled."""
    rng = random.Random(seed)
    make = written if seed % 2 else random_words
    references = [
        [make(rng) for _ in range(rng.choice([1, 1, 2, 5, 7]))] for _ in range(rng.randint(1, 3))
    ]
    candidates = []
    for texts in references:
        words = rng.choice(texts).split()
        candidates.append(rng.choice(["", make(rng), " ".join(words), " ".join((words * 2)[:20])]))
    return candidates, references


def compare(scorer, ours, candidates, references):
    pictures = range(len(candidates))
    theirs = scorer.compute_score(
        {i: references[i] for i in pictures}, {i: [candidates[i]] for i in pictures}
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


class Quiet(Bleu):
    def compute_score(self, gts, res):
        return super().compute_score(gts, res, verbose=0)


@pytest.mark.parametrize("first", range(0, 1000, 100))
def test_a_thousand_corpora_score_as_with_pycocoevalcap(first):
    for seed in range(first, first + 100):
        candidates, references = corpus(seed)
        tokens = [text.split() for text in candidates]
        others = [[text.split() for text in texts] for texts in references]
        pairs = list(zip(tokens, others, strict=True))
        counts = np.array([bleu_counts(*pair) for pair in pairs])
        compare(Quiet(), [bleu(counts.sum(0)), bleu(counts).T], candidates, references)
        rouge = np.array([rouge_l(*pair) for pair in pairs])
        compare(Rouge(), [rouge.mean(), rouge], candidates, references)
        if any(any(texts) for texts in others):  # theirs fails where no reference has a word
            cider = CiderD(others).scores(tokens)
            compare(Cider(), [cider.mean(), cider], candidates, references)


def test_a_hundred_pictures_at_once_score_as_with_pycocoevalcap():
    rng = random.Random(0)
    references = [[written(rng) for _ in range(5)] for _ in range(100)]
    candidates = [rng.choice([*texts, written(rng)]) for texts in references]
    others = [[text.split() for text in texts] for texts in references]
    cider = CiderD(others).scores([text.split() for text in candidates])
    assert cider.mean() > 1
    compare(Cider(), [cider.mean(), cider], candidates, references)


@pytest.mark.parametrize("score", [bleu_counts, rouge_l])
def test_no_reference_is_an_error(score):
    with pytest.raises(ValueError, match="at least one reference"):
        score(["a"], [])


def test_a_picture_without_reference_is_an_error():
    with pytest.raises(ValueError, match="reference of each picture"):
        CiderD([[["a"]], []])


def test_captions_of_many_words_have_their_subsequence():
    words = [str(number) for number in range(200)]
    assert rouge_l(words, [words]) == pytest.approx(1)
    assert rouge_l(words, [words[::-1]]) == pytest.approx(1 / 200)
