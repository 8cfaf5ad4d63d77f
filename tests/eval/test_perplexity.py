"""Perplexity of captions given their pictures, and of texts alone."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from vlm.data.dataset import open_shards
from vlm.errors import ConfigError
from vlm.eval.perplexity import perplexity
from vlm.eval.source import Source
from vlm.heads.language import MASKED
from vlm.heads.model import build_model
from vlm.inference import VisionLanguageModel

KINDS = {
    "causal": {"language_head": True},
    "masked": {"language_head": True, "attention": "bidirectional", "pool": "mean"},
}


@pytest.fixture
def measured(make_model, shards):
    def measured(captioner=True, batch_size=64, **text):
        plain = make_model(captioner=captioner)
        config = replace(plain.config, text=replace(plain.config.text, **text))
        torch.manual_seed(0)
        network = build_model(config, plain.tokenizer)
        model = VisionLanguageModel(network, config, plain.tokenizer, torch.device("cpu"))
        dataset = open_shards(str(shards), log=lambda _: None)
        source = Source(model, dataset, batch_size=batch_size, log=lambda _: None)
        outcome = perplexity(source)
        return model, dataset, outcome, {row.metric: row for row in outcome.rows}

    return measured


@torch.inference_mode()
def nll_of(model, dataset, logits_of):
    """Sum and count over all captions, one text at a time."""
    total, count = 0.0, 0
    for number in range(12):
        sample = dataset.read(number)
        for text in sample.captions:
            tokens = torch.tensor([model.tokenizer.encode(text)])
            logits = logits_of(sample.image, tokens)
            total += float(cross_entropy(logits[0], tokens[0, 1:], reduction="sum"))
            count += tokens.shape[1] - 1
    return total / count


def test_both_heads_equal_a_loop_over_texts(measured):
    model, dataset, outcome, rows = measured(language_head=True)
    module = model.model

    def of_captioner(image, tokens):
        image_tokens = model.image_tokens(model.pixels([image]))
        return module.captioner(image_tokens, tokens[:, :-1]) @ module.captioner.vocabulary.T

    def of_text(_, tokens):
        states = module.encoders.text(tokens)[1][:, :-1]
        return module.language_head(states) @ module.encoders.text.token_embedding.weight.T

    for name, logits_of in (("caption", of_captioner), ("text", of_text)):
        expected = math.exp(nll_of(model, dataset, logits_of))
        row = rows[f"{name}_perplexity"]
        assert row.value == pytest.approx(expected, rel=1e-4)
        assert row.ci95[0] <= row.value <= row.ci95[1]
        assert row.n == 12
        assert 1 < row.chance < model.tokenizer.vocab_size
    assert [row.metric for row in outcome.rows] == ["caption_perplexity", "text_perplexity"]


@pytest.mark.parametrize("text", KINDS.values(), ids=KINDS)
def test_the_batch_size_changes_nothing(measured, text):
    (_, _, one, _), (_, _, other, _) = (measured(batch_size=size, **text) for size in (64, 5))
    for mine, theirs in zip(one.rows, other.rows, strict=True):
        assert mine.value == pytest.approx(theirs.value, rel=1e-5)


def test_masked_tokens_are_counted_and_not_all(measured):
    _, _, masked, _ = measured(captioner=False, **KINDS["masked"])
    _, _, causal, _ = measured(captioner=False, **KINDS["causal"])
    share = masked.details["num_tokens"]["text"] / causal.details["num_tokens"]["text"]
    assert share == pytest.approx(MASKED, abs=0.08)


def test_what_is_foreseen_is_part_of_the_protocol(measured):
    protocols = {
        measured(captioner=False, **KINDS[kind])[2].protocol for kind in ("causal", "masked")
    }
    assert len(protocols) == 2


def test_a_model_that_predicts_no_words_is_refused(measured):
    with pytest.raises(ConfigError, match="predicts no words"):
        measured(captioner=False)
