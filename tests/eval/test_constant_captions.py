import random

import numpy as np
import pytest
import torch

from vlm.eval import constant_captions as constants
from vlm.metrics.bleu import bleu, bleu_counts
from vlm.metrics.cider import CiderD
from vlm.metrics.clip_score import clip_score
from vlm.metrics.rouge import rouge_l

WORDS = ["a", "a", "red", "blue", "car", "dog", "on"]


def corpus(seed):
    rng = random.Random(seed)
    return [
        [" ".join(rng.choices(WORDS, k=rng.choice([0, 1, 3, 5, 9]))) for _ in range(n)]
        for n in rng.choices([1, 2, 4], k=12)
    ]


@pytest.fixture(params=range(4))
def texts(request):
    return corpus(request.param)


@pytest.fixture
def references(texts):
    return [[text.split() for text in of_picture] for of_picture in texts]


@pytest.fixture
def candidates(texts, references):
    return constants.candidates_of(texts, references)


def best_of_all(texts, score):
    return max(score(text.split()) for of_picture in texts for text in of_picture)


def test_best_bleu_equals_brute_force(texts, references, candidates):
    def score(tokens):
        return bleu(np.sum([bleu_counts(tokens, others) for others in references], 0))

    for n, best in enumerate(constants.best_bleu(candidates, references)):
        assert best.value == pytest.approx(best_of_all(texts, lambda t, n=n: score(t)[n]), abs=1e-9)
        assert score(best.text.split())[n] == pytest.approx(best.value, abs=1e-9)


def test_best_rouge_l_equals_brute_force(texts, references, candidates):
    def score(tokens):
        return np.mean([rouge_l(tokens, others) for others in references])

    best = constants.best_rouge_l(candidates, references)
    assert best.value == pytest.approx(best_of_all(texts, score), abs=1e-9)
    assert score(best.text.split()) == pytest.approx(best.value, abs=1e-9)


def test_best_cider_d_equals_brute_force(texts, references, candidates):
    cider = CiderD(references)

    def score(tokens):
        return cider.scores([tokens] * len(references)).mean()

    best = constants.best_cider_d(candidates, cider)
    assert best.value == pytest.approx(best_of_all(texts, score), abs=1e-9)
    assert score(best.text.split()) == pytest.approx(best.value, abs=1e-9)


def test_best_clip_score_equals_brute_force():
    images = torch.nn.functional.normalize(torch.randn(7, 8), dim=1)
    features = {str(n): torch.nn.functional.normalize(torch.randn(8), dim=0) for n in range(9)}
    candidates = [constants.Candidate(text, (text,)) for text in features]
    best = constants.best_clip_score(
        candidates, images, lambda texts: torch.stack([features[text] for text in texts])
    )
    means = {t: clip_score(images, f.expand(7, 8)).mean().item() for t, f in features.items()}
    assert best.value == pytest.approx(max(means.values()), abs=1e-6)
    assert best.text == max(means, key=means.get)


def test_long_captions_are_cut_where_words_no_longer_fit():
    words = [str(number) for number in range(100)]
    best = constants.best_rouge_l([constants.Candidate(" ".join(words), tuple(words))], [[words]])
    assert best.value == pytest.approx(rouge_l(words[:64], [words]))


def test_many_captions_are_sampled_evenly(monkeypatch):
    monkeypatch.setattr(constants, "MAX_CANDIDATES", 3)
    texts = [["a"], ["b"], ["A"], ["c"], ["d"], ["e"]]
    references = [[[text.lower()] for text in of_picture] for of_picture in texts]
    found = [candidate.tokens for candidate in constants.candidates_of(texts, references)]
    assert found == [("a",), ("c",), ("e",)]
