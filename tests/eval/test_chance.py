import random

import pytest

from vlm.eval import chance
from vlm.metrics.words import exact_match, token_f1


def brute_force(references):
    candidates = [text for texts in references for text in texts]
    f1 = [sum(token_f1(c, texts) for texts in references) for c in candidates]
    exact = [sum(exact_match(c, texts) for texts in references) for c in candidates]
    return max(f1) / len(references), max(exact) / len(references)


@pytest.mark.parametrize("seed", range(5))
def test_best_constant_caption_equals_brute_force(seed):
    rng = random.Random(seed)
    references = [
        [
            " ".join(rng.choices(["a", "a", "red", "blue", "car", "dog", "."], k=rng.randint(1, 5)))
            for _ in range(n)
        ]
        for n in rng.choices([1, 2, 4], k=12)
    ]
    best = chance.best_constant_caption(references)
    f1, exact = brute_force(references)
    assert best.token_f1 == pytest.approx(f1, abs=1e-12)
    assert best.exact_match == pytest.approx(exact, abs=1e-12)
    reached = [token_f1(best.text, texts) for texts in references]
    assert sum(reached) / len(reached) == pytest.approx(f1, abs=1e-12)


def test_one_picture_is_described_by_its_own_caption():
    assert chance.best_constant_caption([["A dog"]]) == chance.ConstantCaption("A dog", 1.0, 1.0)


def test_too_many_candidates_are_sampled(monkeypatch):
    monkeypatch.setattr(chance, "MAX_CANDIDATES", 2)
    best = chance.best_constant_caption([["a b"], ["c d"], ["e f"], ["g h"]])
    assert best.token_f1 == 0.25
