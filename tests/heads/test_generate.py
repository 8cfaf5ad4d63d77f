"""Greedy, beam and nucleus decoding, with the cache and without."""

import itertools

import pytest
import torch

from vlm.errors import ConfigError
from vlm.heads.generate import Decoding, generate

EOT = 2
GREEDY = Decoding()


def write(decoder, image, decoding=GREEDY, prompt=(1,), max_length=12):
    start = torch.tensor([prompt] * len(image))
    return generate(decoder, image, start, decoding, eot_id=EOT, max_length=max_length)


PROMPTS = [(1,), (1, 4), (1, 11, 3)]


@pytest.fixture
def image():
    torch.manual_seed(5)
    return 2 * torch.randn(24, 4, 12)


SEARCHES = [
    GREEDY,
    Decoding(num_beams=4),
    Decoding(num_beams=3, length_penalty=0.0),
    Decoding(num_beams=3, no_repeat_ngram=2),
    Decoding(top_p=0.9),
]


@pytest.mark.parametrize("decoding", SEARCHES)
def test_the_cache_changes_no_token(decoder, uncached, image, decoding):
    found = write(decoder, image, decoding)
    assert found.equal(write(uncached(decoder), image, decoding))
    assert len(found.unique(dim=0)) > 12  # of 24 pictures


def test_greedy_takes_the_likeliest_token_each_step_and_stops_at_the_end(decoder, logits_of, image):
    found = {prompt: write(decoder, image, prompt=prompt) for prompt in PROMPTS}
    for prompt, row in itertools.product(PROMPTS, range(0, 24, 3)):
        text, line = found[prompt][row], list(prompt)
        while len(line) < len(text):
            logits = logits_of(decoder, image[row : row + 1], torch.tensor([line]))
            line.append(EOT if EOT in line else int(logits[0, -1].argmax()))
        assert text.tolist() == line
    assert sum(int((texts == EOT).any(dim=1).sum()) for texts in found.values()) > 2


@pytest.mark.parametrize("decoding", SEARCHES[:4])
def test_the_order_of_the_batch_does_not_matter(decoder, image, decoding):
    order = torch.randperm(len(image))
    together = write(decoder, image, decoding)
    assert write(decoder, image[order], decoding).equal(together[order])
    alone = write(decoder, image[2:3], decoding)
    assert together[2, : alone.shape[1]].tolist() == alone[0].tolist()


def score(decoder, logits_of, image, text, length_penalty):
    """Log-probability of a text up to its end, by the whole forward pass."""
    end = text.index(EOT) + 1 if EOT in text else len(text)
    logp = logits_of(decoder, image, torch.tensor([text[:end]])).detach().log_softmax(-1)[0]
    total = sum(float(logp[place, token]) for place, token in enumerate(text[1:end]))
    return total / end**length_penalty


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_a_beam_as_wide_as_all_texts_finds_the_best(decoder, logits_of, image, length_penalty):
    """Of all texts of at most three more tokens; some of the others are scored."""
    decoding = Decoding(num_beams=400, length_penalty=length_penalty)
    found = write(decoder, image[:1], decoding, max_length=4)[0].tolist()
    others = [[1, EOT], *([1, a, EOT] for a in range(20) if a != EOT)]
    others += [[1, a, b, c] for a, b, c in itertools.product(range(3, 20), repeat=3)][::41]
    scores = [score(decoder, logits_of, image[:1], text, length_penalty) for text in others]
    assert score(decoder, logits_of, image[:1], found, length_penalty) >= max(scores) - 1e-4


def test_no_ngram_is_repeated(decoder, image):
    plain = write(decoder, image)
    assert any(repeats(text, 1) for text in plain.tolist())
    for size in (1, 2, 3):
        found = write(decoder, image, Decoding(no_repeat_ngram=size))
        assert not any(repeats(text, size) for text in found.tolist())


def repeats(text, size):
    text = text[: text.index(EOT)] if EOT in text else text
    grams = list(zip(*(text[i:] for i in range(size)), strict=False))
    return len(set(grams)) < len(grams)


def test_a_narrow_nucleus_is_greedy(decoder, image):
    assert write(decoder, image, Decoding(top_p=1e-6)).equal(write(decoder, image))


def test_drawing_follows_from_its_seed(decoder, image):
    one, two, other = (write(decoder, image, Decoding(top_p=1.0, seed=s)) for s in (0, 0, 1))
    assert one.equal(two)
    assert not one.equal(other)


def test_tokens_are_drawn_as_often_as_they_are_likely(decoder, logits_of):
    torch.manual_seed(1)
    image = torch.randn(1, 4, 12)
    logits = logits_of(decoder, image, torch.tensor([[1]]))[0, -1] / 2.0
    expected, order = logits.softmax(0).sort(descending=True)
    kept = expected.cumsum(0) - expected < 0.7
    expected = torch.where(kept, expected, 0) / expected[kept].sum()
    decoding = Decoding(top_p=0.7, temperature=2.0)
    drawn = write(decoder, image.expand(4000, -1, -1), decoding, max_length=2)[:, 1]
    share = torch.bincount(drawn, minlength=20)[order] / 4000
    torch.testing.assert_close(share, expected, rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"num_beams": 0}, "num_beams must be at least 1"),
        ({"top_p": 0.0}, "top_p must be in 0..1"),
        ({"top_p": 0.5, "num_beams": 2}, "give one"),
        ({"temperature": 0.0}, "temperature must be greater than 0"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, match):
    with pytest.raises(ConfigError, match=match):
        Decoding(**wrong)
