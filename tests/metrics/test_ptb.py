import json
from pathlib import Path

from vlm.metrics.ptb import tokenize

GOLDEN = json.loads((Path(__file__).parent / "ptb.json").read_text(encoding="utf-8"))


def test_every_caption_is_split_as_stanford_s_program_does():
    pairs = list(zip(GOLDEN["captions"], GOLDEN["tokens"], strict=True))
    assert len(pairs) > 1500
    wrong = [
        (c, tokens, found) for c, tokens in pairs if (found := " ".join(tokenize(c))) != tokens
    ]
    assert wrong == []


def test_what_is_no_caption_has_no_words():
    assert tokenize("") == tokenize(" ") == tokenize("...") == tokenize("😀") == []


def test_white_space_does_not_matter():
    assert tokenize("  a\tdog\nruns ") == ["a", "dog", "runs"]
