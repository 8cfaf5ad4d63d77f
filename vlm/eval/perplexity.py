"""The perplexity task: how surprising the words of captions are to the model."""

import hashlib
import math
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from vlm.errors import ConfigError, DataError
from vlm.eval.source import Described, Outcome, Row, Source, cluster_of
from vlm.eval.statistics import FloatArray, sums_interval
from vlm.heads.coca import Coca
from vlm.heads.language import language_states, language_targets
from vlm.inference import VisionLanguageModel
from vlm.losses.caption import caption_targets
from vlm.models.text_encoder import trim
from vlm.retrieval.embed import Pictures

_TEXTS_AT_ONCE = 64


def perplexity(source: Source) -> Outcome:
    """Exp of the mean -log p of a token: of captions given their picture, and of texts alone.

    `caption_perplexity` is the captioner's. `text_perplexity` is the text encoder's language
    head's: of the next token where attention is causal; where it is bidirectional, of tokens that
    are masked, a fixed draw of each caption's (a pseudo-perplexity, which compares with none of the
    first kind). Chance is that of the data's own token frequencies, without any context.

    Args:
        source: The data; pictures without a caption are left out, and counted in the details.

    Raises:
        ConfigError: The model has neither a captioner nor a language head.
        DataError: No readable picture has a caption, or of all captions no token is masked.
    """
    found = surprise(source)
    seen = zip(found.items, found.sample_ids, found.values, strict=True)
    chosen = [(cluster_of(item, number), value) for item, number, value in seen if item.captions]
    if not chosen:
        raise DataError("no readable picture has a caption: the perplexity task needs some")
    clusters = [cluster for cluster, _ in chosen]
    chance = _chance(source.model, [text for item in found.items for text in item.captions])
    rows = []
    for name in sorted(chosen[0][1]):
        sums = np.array([value[name] for _, value in chosen])
        if not sums[:, 1].any():
            raise DataError(f"{len(chosen)} captions have no token that is masked: give more")
        rows.append(_row(f"{name}_perplexity", sums, clusters, chance))
    details: dict[str, Any] = {
        "skipped": found.skipped,
        "num_without_caption": len(found.items) - len(chosen),
        "num_tokens": {name: sum(v[name][1] for _, v in chosen) for name in chosen[0][1]},
    }
    return Outcome(rows, source.protocol("perplexity", **_settings(source.model)), details)


def _settings(model: VisionLanguageModel) -> dict[str, Any]:
    """Which tokens are counted, and what each is foreseen from."""
    tokenizer, text = model.tokenizer, model.config.text
    return {
        "tokenizer": hashlib.sha256(tokenizer.to_json().encode()).hexdigest(),
        "context_length": tokenizer.context_length,
        "text_attention": text.attention if text.language_head else None,
    }


def surprise(source: Source) -> Described:
    """[the sum of -log p, the number of tokens] of each picture's captions, by head."""
    model = source.model
    if model.model.captioner is None and model.model.language_head is None:
        raise ConfigError(
            "this model predicts no words: it has no captioner and no model.text.language_head"
        )

    @torch.inference_mode()
    def look(batch: Pictures) -> list[dict[str, list[float]]]:
        owners = [row for row, item in enumerate(batch.items) for _ in item.captions]
        texts = [text for item in batch.items for text in item.captions]
        visits = torch.tensor(
            [
                1000 * number + n
                for number, item in zip(batch.sample_ids.tolist(), batch.items, strict=True)
                for n in range(len(item.captions))
            ]
        )
        sums = [dict.fromkeys(_heads(model), (0.0, 0.0)) for _ in batch.items]
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            part = slice(start, start + _TEXTS_AT_ONCE)
            pixels = batch.images[owners[part]]
            for name, losses in _losses(model, pixels, texts[part], visits[part]).items():
                for row, (loss, count) in zip(owners[part], losses, strict=True):
                    total, num = sums[row][name]
                    sums[row][name] = total + loss, num + count
        return [{name: list(pair) for name, pair in each.items()} for each in sums]

    return source.describe("perplexity", look, description="reading captions")


def _heads(model: VisionLanguageModel) -> list[str]:
    heads = {"caption": model.model.captioner, "text": model.model.language_head}
    return [name for name, head in heads.items() if head is not None]


def _losses(
    model: VisionLanguageModel, images: Tensor, texts: list[str], visits: Int[Tensor, " B"]
) -> dict[str, list[tuple[float, float]]]:
    """Of each head and each text."""
    module, eot_id = model.model, model.tokenizer.eot_id
    tokens = trim(model.tokenizer(texts), eot_id).to(model.device)
    valid = torch.ones(len(tokens), dtype=torch.bool, device=model.device)
    states = module.encoders.text(tokens)[1]
    found = {}
    if module.captioner is not None:
        inputs, targets, mask = caption_targets(tokens, eot_id, valid)
        read = states[:, :-1] if isinstance(module.captioner, Coca) else inputs
        hidden = module.captioner(model.image_tokens(images), read)
        found["caption"] = _each(hidden, module.captioner.vocabulary, targets, mask)
    if module.language_head is not None:
        text, head = module.encoders.text, module.language_head
        visits = visits.to(model.device)
        wanted = language_targets(tokens, eot_id, valid, visits, causal=text.causal)
        hidden = language_states(text, head, tokens, wanted, states)
        vocabulary = text.token_embedding.weight
        found["text"] = _each(hidden, vocabulary, wanted.targets, wanted.mask)
    return found


def _each(
    hidden: Float[Tensor, "B T W"],
    vocabulary: Float[Tensor, "V W"],
    targets: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
) -> list[tuple[float, float]]:
    """The sum of -log p and the number of tokens, a text at a time: logits are large."""
    losses = []
    for states, wanted, counts in zip(hidden, targets, mask, strict=True):
        logits = (states[counts] @ vocabulary.T).float()
        loss = cross_entropy(logits, wanted[counts], reduction="sum")
        losses.append((float(loss), float(counts.sum())))
    return losses


def _row(name: str, sums: FloatArray, clusters: list[Hashable], chance: float) -> Row:
    def of(totals: FloatArray) -> FloatArray:
        values: FloatArray = np.exp(totals[:, 0] / np.maximum(totals[:, 1], 1))
        return values

    value = float(of(sums.sum(0, keepdims=True))[0])
    return Row(name, value, sums_interval(sums, clusters, of), len(sums), chance)


def _chance(model: VisionLanguageModel, texts: list[str]) -> float:
    """Exp of the entropy of all tokens but the first of each text."""
    tokens = [token for text in texts for token in model.tokenizer.encode(text)[1:]]
    counts = torch.bincount(torch.tensor(tokens)).double()
    shares = counts[counts > 0] / counts.sum()
    return math.exp(-float((shares * shares.log()).sum()))
