"""The caption task: describe each picture, and compare with what people wrote."""

from collections import Counter
from collections.abc import Hashable
from typing import Any

from vlm.errors import DataError
from vlm.eval.chance import best_constant_caption
from vlm.eval.source import Outcome, Source, cluster_of, mean_row
from vlm.metrics.words import exact_match, token_f1
from vlm.retrieval.embed import read_pictures


def caption(source: Source, *, prompt: str | None = None) -> Outcome:
    """Mean token_f1 against the best reference, and the share of exact matches.

    Chance is the best constant caption: that one of the split's own captions which scores best when
    it is given to every picture.

    Args:
        source: The data; pictures without a caption are left out, and counted in the details.
        prompt: How each caption begins.

    Raises:
        ConfigError: The model has no captioner.
        DataError: No readable picture has a caption.
    """
    samples, clusters, skipped, num_without = _describe(source, prompt)
    if not samples:
        raise DataError("no readable picture has a caption: the caption task needs some")
    constant = best_constant_caption([sample["references"] for sample in samples])
    f1 = [sample["token_f1"] for sample in samples]
    exact = [exact_match(sample["generated"], sample["references"]) for sample in samples]
    return Outcome(
        [
            mean_row("token_f1", f1, clusters, chance=constant.token_f1),
            mean_row("exact_match", exact, clusters, chance=constant.exact_match),
        ],
        source.protocol("caption", prompt=prompt, decoding="greedy"),
        {
            "samples": samples,
            "best_constant": constant.text,
            "skipped": skipped,
            "num_without_caption": num_without,
        },
    )


def _describe(
    source: Source, prompt: str | None
) -> tuple[list[dict[str, Any]], list[Hashable], dict[str, int], int]:
    """Each picture's caption beside its references; clusters; what was left out."""
    samples: list[dict[str, Any]] = []
    clusters: list[Hashable] = []
    skipped: Counter[str] = Counter()
    num_without = 0
    reading = read_pictures(
        source.model,
        source.dataset,
        batch_size=source.batch_size,
        description="captioning",
        log=source.log,
    )
    for batch in reading:
        skipped.update(batch.skipped)
        texts = source.model.caption_pixels(batch.images, prompt=prompt) if batch.items else []
        ids = batch.sample_ids.tolist()
        for item, sample_id, text in zip(batch.items, ids, texts, strict=True):
            if not item.captions:
                num_without += 1
                continue
            samples.append(_sample(item.key, text, list(item.captions)))
            clusters.append(cluster_of(item, sample_id))
    return samples, clusters, dict(skipped), num_without


def _sample(key: str, generated: str, references: list[str]) -> dict[str, Any]:
    f1 = token_f1(generated, references)
    return {"key": key, "generated": generated, "references": references, "token_f1": f1}
