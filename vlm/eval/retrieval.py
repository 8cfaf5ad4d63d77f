"""The retrieval task: find pictures by their captions and captions by their pictures."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlm.errors import DataError
from vlm.eval.source import Outcome, Row, Source, cluster_of, mean_row
from vlm.eval.statistics import median_interval
from vlm.metrics import ranking
from vlm.retrieval.embed import Item
from vlm.tokenizer import Tokenizer

RECALL_AT = (10, 1, 5)  # the primary metric first
NUM_EXAMPLES = 40  # queries a direction whose hits go into the details
NUM_HITS = 10
_SCORES_AT_ONCE = 2**24  # of a similarity matrix: 64 MiB


@dataclass(frozen=True)
class Captions:
    """The captions of pictures, each once.

    Attributes:
        texts: Cleaned.
        of_picture: The numbers of each picture's texts.
        pictures: The numbers of each text's pictures: all of them are right answers to it.
    """

    texts: list[str]
    of_picture: list[list[int]]
    pictures: list[list[int]]


def retrieval(source: Source) -> Outcome:
    """Recall at 10, 1 and 5 and the median rank, from text to image and from image to text.

    A query is a hit if any of its right answers is among the first K. Text queries are the unique
    captions; a picture without a caption is no query, and still an answer to be wrong about.

    Raises:
        DataError: No picture has a caption, or none can be read.
    """
    embedded, model = source.embedded, source.model
    captions = unique_captions(embedded.items, model.tokenizer)
    texts = model.embed_texts(captions.texts)
    images = embedded.features
    pairs = zip(embedded.items, embedded.sample_ids.tolist(), strict=True)
    clusters = [cluster_of(*pair) for pair in pairs]
    asked = [row for row, numbers in enumerate(captions.of_picture) if numbers]
    positives = [captions.of_picture[row] for row in asked]
    text_ranks = best_ranks(texts, images, captions.pictures)
    image_ranks = best_ranks(images[asked], texts, positives)
    # A caption that pictures of several concepts share is counted with the first one's.
    text_clusters = [clusters[pictures[0]] for pictures in captions.pictures]
    rows = [
        *_rows("text_to_image", text_ranks, captions.pictures, text_clusters, len(images)),
        *_rows("image_to_text", image_ranks, positives, [clusters[r] for r in asked], len(texts)),
    ]
    keys = [item.key for item in embedded.items]
    forth = _examples(captions.texts, texts, text_ranks, keys, images, captions.pictures)
    back = _examples(
        [keys[row] for row in asked], images[asked], image_ranks, captions.texts, texts, positives
    )
    details = {"text_to_image": forth, "image_to_text": back, "skipped": dict(embedded.skipped)}
    return Outcome(rows, source.protocol("retrieval", cleaning=model.tokenizer.cleaning), details)


def unique_captions(items: Sequence[Item], tokenizer: Tokenizer) -> Captions:
    """The captions that differ after cleaning; empty ones are left out.

    Raises:
        DataError: There is none.
    """
    numbers: dict[str, int] = {}
    pictures: list[list[int]] = []
    of_picture: list[list[int]] = []
    for picture, item in enumerate(items):
        cleaned = dict.fromkeys(filter(None, map(tokenizer.clean, item.captions)))
        of_picture.append([numbers.setdefault(text, len(numbers)) for text in cleaned])
        pictures += [[] for _ in range(len(numbers) - len(pictures))]
        for number in of_picture[-1]:
            pictures[number].append(picture)
    if not numbers:
        raise DataError("no picture has a caption: the retrieval task needs some")
    return Captions(list(numbers), of_picture, pictures)


def best_ranks(
    queries: Float[Tensor, "Q D"], targets: Float[Tensor, "N D"], positives: Sequence[Sequence[int]]
) -> Int[Tensor, " Q"]:
    """The rank of each query's best positive, from 0, a chunk of queries at a time."""
    chunk = max(1, _SCORES_AT_ONCE // len(targets))
    ranks = []
    for start in range(0, len(queries), chunk):
        similarity = queries[start : start + chunk] @ targets.T  # [q, N]
        right = torch.zeros_like(similarity, dtype=torch.bool)
        for row, numbers in enumerate(positives[start : start + chunk]):
            right[row, numbers] = True
        ranks.append(ranking.positive_ranks(similarity, right))
    return torch.cat(ranks)


def _rows(
    direction: str,
    ranks: Int[Tensor, " Q"],
    positives: Sequence[Sequence[int]],
    clusters: Sequence[Hashable],
    num_targets: int,
) -> list[Row]:
    counts = torch.tensor([len(numbers) for numbers in positives])
    rows = [
        mean_row(
            f"{direction}_recall@{k}",
            (ranks < k).numpy(),
            clusters,
            chance=ranking.chance_recall_at_k(counts, num_targets, k),
        )
        for k in RECALL_AT
    ]
    median = ranking.median_rank(ranks)
    interval = median_interval((ranks + 1).numpy(), clusters)
    chance = ranking.chance_median_rank(counts, num_targets)
    return [*rows, Row(f"{direction}_median_rank", median, interval, len(ranks), chance)]


def _examples(
    names: Sequence[str],
    queries: Float[Tensor, "Q D"],
    ranks: Int[Tensor, " Q"],
    target_names: Sequence[str],
    targets: Float[Tensor, "N D"],
    positives: Sequence[Sequence[int]],
) -> list[dict[str, Any]]:
    """Queries spread evenly over the data, with what was found."""
    step = -(-len(queries) // NUM_EXAMPLES)
    examples = []
    for row in range(0, len(queries), step):
        scores, found = (targets @ queries[row]).topk(min(NUM_HITS, len(targets)))
        hits = [
            {"target": target_names[i], "score": round(score, 4), "right": i in positives[row]}
            for score, i in zip(scores.tolist(), found.tolist(), strict=True)
        ]
        wanted = [target_names[i] for i in positives[row][:NUM_HITS]]
        examples.append(
            {"query": names[row], "rank": int(ranks[row]) + 1, "right": wanted, "hits": hits}
        )
    return examples
