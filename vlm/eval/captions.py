"""The caption task: describe each picture, and compare with what people wrote."""

from collections.abc import Hashable
from typing import Any

from vlm.errors import DataError
from vlm.eval.chance import best_constant_caption
from vlm.eval.source import Described, Outcome, Source, cluster_of, mean_row
from vlm.metrics.words import exact_match, token_f1
from vlm.retrieval.embed import Pictures


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


def describe(source: Source, prompt: str | None = None) -> Described:
    """A caption of each picture, by all ranks together; None where people wrote none."""

    def look(batch: Pictures) -> list[str | None]:
        texts = source.model.caption_pixels(batch.images, prompt=prompt)
        return [
            text if item.captions else None for item, text in zip(batch.items, texts, strict=True)
        ]

    return source.describe(f"caption {prompt!r}", look, description="captioning")


def _describe(
    source: Source, prompt: str | None
) -> tuple[list[dict[str, Any]], list[Hashable], dict[str, int], int]:
    """Each picture's caption beside its references; clusters; what was left out."""
    described = describe(source, prompt)
    seen = zip(described.items, described.sample_ids, described.values, strict=True)
    chosen = [(item, sample_id, text) for item, sample_id, text in seen if item.captions]
    samples = [_sample(item.key, text, list(item.captions)) for item, _, text in chosen]
    clusters = [cluster_of(item, sample_id) for item, sample_id, _ in chosen]
    return samples, clusters, described.skipped, len(described.items) - len(chosen)


def _sample(key: str, generated: str, references: list[str]) -> dict[str, Any]:
    f1 = token_f1(generated, references)
    return {"key": key, "generated": generated, "references": references, "token_f1": f1}
