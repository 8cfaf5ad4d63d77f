"""The caption task: describe each picture, and compare with what people wrote."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from vlm.errors import DataError
from vlm.eval import constant_captions as constants
from vlm.eval.chance import ConstantCaption, best_constant_caption
from vlm.eval.source import Described as Seen
from vlm.eval.source import Outcome, Row, Source, cluster_of, mean_row
from vlm.eval.statistics import FloatArray, jackknife_interval, sums_interval
from vlm.metrics import diversity
from vlm.metrics.bleu import bleu, bleu_counts
from vlm.metrics.cider import CiderD
from vlm.metrics.clip_score import clip_score
from vlm.metrics.ngrams import MAX_N
from vlm.metrics.ptb import tokenize
from vlm.metrics.rouge import rouge_l
from vlm.metrics.words import exact_match, token_f1
from vlm.retrieval.embed import Pictures


@dataclass
class Described:
    """The captioned pictures that have references; every list has one entry each.

    Attributes:
        keys: Of the pictures.
        generated: What the model says.
        texts: What people wrote.
        clusters: What shares a picture's fate.
        sample_ids: Where the pictures are in the data set.
        skipped: How many could not be read, by reason.
        num_without: How many had no reference.
    """

    keys: list[str] = field(default_factory=list)
    generated: list[str] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)
    clusters: list[Hashable] = field(default_factory=list)
    sample_ids: list[int] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    num_without: int = 0

    @cached_property
    def tokens(self) -> list[list[str]]:
        """The words of what the model says."""
        return [tokenize(text) for text in self.generated]

    @cached_property
    def references(self) -> list[list[list[str]]]:
        """The words of what people wrote."""
        return [[tokenize(text) for text in texts] for texts in self.texts]

    @cached_property
    def candidates(self) -> list[constants.Candidate]:
        """Captions that could be said of every picture."""
        return constants.candidates_of(self.texts, self.references)


class Measured:
    """Rows, and what belongs to them.

    Attributes:
        rows: Of results.
        scores: Of each picture, by metric, where a metric has any.
        constants: The caption behind each metric's chance.
    """

    def __init__(self, said: Described) -> None:
        self.rows: list[Row] = []
        self.scores: dict[str, list[float]] = {}
        self.constants: dict[str, str] = {}
        self._clusters = said.clusters

    def add_mean(self, metric: str, scores: Sequence[float], best: constants.Constant) -> None:
        """A metric that is the mean of the pictures' scores."""
        self.rows.append(mean_row(metric, scores, self._clusters, chance=best.value))
        self.scores[metric] = [float(score) for score in scores]
        self.constants[metric] = best.text


def caption(source: Source, *, prompt: str | None = None) -> Outcome:
    """How well the model describes pictures, by every metric that needs no other model.

    First token_f1 against the best reference, and exact_match; CIDEr-D, BLEU-1..4 and ROUGE-L as
    COCO's evaluation has them; CLIPScore, for which the model itself embeds pictures and captions:
    it judges itself, so compare it with its own chance and with no other model's; and distinct-1,
    distinct-2 and the length in words, which say how varied captions are, not whether they are
    right.

    Chance is what a constant caption reaches: for each metric that one of the split's own captions
    which scores best when it is given to every picture. Metrics that no reference enters have the
    value of token_f1's constant; what people reach in them (each picture's first reference) is in
    the details as `people`.

    Args:
        source: The data; pictures without a caption are left out, and counted in the details.
        prompt: How each caption begins.

    Raises:
        ConfigError: The model has no captioner.
        DataError: No readable picture has a caption.
    """
    said = _describe(source, prompt)
    if not said.keys:
        raise DataError("no readable picture has a caption: the caption task needs some")
    measured, best = Measured(said), best_constant_caption(said.texts)
    _add_words(measured, said, best)
    _add_cider_d(measured, said)
    _add_bleu(measured, said)
    _add_rouge_l(measured, said)
    _add_clip_score(measured, said, source)
    _add_diversity(measured, said, tokenize(best.text))
    firsts = [references[0] for references in said.references]
    details = {
        "samples": _samples(said, measured.scores),
        "best_constant": best.text,
        "constants": measured.constants,
        "people": {name: value for name, value, _ in _diversity(firsts, said.clusters)},
        "skipped": dict(said.skipped),
        "num_without_caption": said.num_without,
    }
    protocol = source.protocol("caption", prompt=prompt, decoding="greedy")
    return Outcome(measured.rows, protocol, details)


def describe(source: Source, prompt: str | None = None) -> Seen:
    """A caption of each picture, by all ranks together; None where people wrote none."""

    def look(batch: Pictures) -> list[str | None]:
        texts = source.model.caption_pixels(batch.images, prompt=prompt)
        return [
            text if item.captions else None for item, text in zip(batch.items, texts, strict=True)
        ]

    return source.describe(f"caption {prompt!r}", look, description="captioning")


def _add_words(measured: Measured, said: Described, best: ConstantCaption) -> None:
    pairs = list(zip(said.generated, said.texts, strict=True))
    f1 = [token_f1(*pair) for pair in pairs]
    measured.add_mean("token_f1", f1, constants.Constant(best.text, best.token_f1))
    exact = [exact_match(*pair) for pair in pairs]
    measured.rows.append(mean_row("exact_match", exact, said.clusters, chance=best.exact_match))


def _add_cider_d(measured: Measured, said: Described) -> None:
    corpus = CiderD(said.references)
    best = constants.best_cider_d(said.candidates, corpus)
    measured.add_mean("cider_d", corpus.scores(said.tokens).tolist(), best)


def _add_bleu(measured: Measured, said: Described) -> None:
    """Of the corpus: counts are added up before they are divided, in resamples too."""
    counts = np.array(
        [bleu_counts(*pair) for pair in zip(said.tokens, said.references, strict=True)]
    )
    values = bleu(counts.sum(0))
    best = constants.best_bleu(said.candidates, said.references)
    for n in range(MAX_N):
        name = f"bleu_{n + 1}"
        interval = sums_interval(counts, said.clusters, _nth_bleu(n))
        measured.rows.append(Row(name, float(values[n]), interval, len(counts), best[n].value))
        measured.constants[name] = best[n].text


def _nth_bleu(n: int) -> Callable[[FloatArray], FloatArray]:
    return lambda sums: bleu(sums)[:, n]


def _add_rouge_l(measured: Measured, said: Described) -> None:
    pairs = zip(said.tokens, said.references, strict=True)
    best = constants.best_rouge_l(said.candidates, said.references)
    measured.add_mean("rouge_l", [rouge_l(*pair) for pair in pairs], best)


def _add_clip_score(measured: Measured, said: Described, source: Source) -> None:
    images = _image_features(source, said.sample_ids)
    scores = clip_score(images, source.model.embed_texts(said.generated))
    best = constants.best_clip_score(said.candidates, images, source.model.embed_texts)
    measured.add_mean("clip_score", scores.tolist(), best)


def _image_features(source: Source, sample_ids: list[int]) -> Float[Tensor, "N D"]:
    embedded = source.embedded
    places = {sample_id: row for row, sample_id in enumerate(embedded.sample_ids.tolist())}
    return embedded.features[[places[sample_id] for sample_id in sample_ids]]


def _add_diversity(measured: Measured, said: Described, constant: list[str]) -> None:
    always = _diversity([constant] * len(said.tokens), said.clusters)
    for (name, value, interval), (_, chance, _) in zip(
        _diversity(said.tokens, said.clusters), always, strict=True
    ):
        measured.rows.append(Row(name, value, interval, len(said.tokens), chance))


def _diversity(
    captions: list[list[str]], clusters: list[Hashable]
) -> list[tuple[str, float, tuple[float, float]]]:
    """Each metric of the texts alone, with its interval."""
    found = []
    for n in (1, 2):
        value = diversity.distinct_n(captions, n)
        without = diversity.distinct_n_without(captions, n, clusters)
        found.append((f"distinct_{n}", value, jackknife_interval(value, without)))
    length = mean_row("length", [float(len(tokens)) for tokens in captions], clusters, chance=0.0)
    return [*found, ("length", length.value, length.ci95)]


def _describe(source: Source, prompt: str | None) -> Described:
    found = describe(source, prompt)
    said = Described(skipped=Counter(found.skipped))
    for item, sample_id, text in zip(found.items, found.sample_ids, found.values, strict=True):
        if not item.captions:
            said.num_without += 1
            continue
        said.keys.append(item.key)
        said.generated.append(text)
        said.texts.append(list(item.captions))
        said.clusters.append(cluster_of(item, sample_id))
        said.sample_ids.append(sample_id)
    return said


def _samples(said: Described, scores: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Each picture's caption beside its references, with its scores."""
    parts = zip(
        said.keys, said.generated, said.texts, zip(*scores.values(), strict=True), strict=True
    )
    return [
        {
            "key": key,
            "generated": generated,
            "references": references,
            **dict(zip(scores, values, strict=True)),
        }
        for key, generated, references, values in parts
    ]
