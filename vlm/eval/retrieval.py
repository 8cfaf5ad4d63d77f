"""The retrieval task: find pictures by their captions and captions by their pictures."""

from array import array
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlm.errors import DataError
from vlm.eval.caption_table import CaptionTable
from vlm.eval.source import Outcome, Row, Source, cluster_of, mean_row
from vlm.eval.statistics import median_interval
from vlm.inference import VisionLanguageModel
from vlm.metrics import ranking
from vlm.tokenizer import Tokenizer

EqualCaptions = Literal["merge", "keep"]
RECALL_AT = (10, 1, 5)  # the primary metric first
NUM_EXAMPLES = 40  # queries a direction whose hits go into the details
NUM_HITS = 10
_TEXTS_AT_ONCE = 8192  # a million features are not held a second time, to be joined


@dataclass(frozen=True)
class Captions:
    """The captions of pictures.

    Attributes:
        texts: What is asked and found.
        pairs: The number of a text and of a picture it belongs to, a column each, by picture.
    """

    texts: list[str]
    pairs: Int[Tensor, "2 P"]


def retrieval(
    source: Source,
    *,
    equal_captions: EqualCaptions = "merge",
    table: CaptionTable | None = None,
) -> Outcome:
    """Recall at 10, 1 and 5 and the median rank, from text to image and from image to text.

    A query is a hit if any of its right answers is among the first K. A picture without a caption
    is no query, and still an answer to be wrong about.

    Args:
        source: The data.
        equal_captions: `merge`: captions that are equal after cleaning are one query, and each of
            their pictures answers it. `keep`: each caption is a query of its own, which only its
            own picture answers, as the field counts (CLIP_benchmark's `zeroshot_retrieval`).
        table: Where the captions are, if not in the data.

    Raises:
        DataError: No picture has a caption, or none can be read.
    """
    embedded, model = source.embedded, source.model
    of_pictures = [item.captions if table is None else table.of(item) for item in embedded.items]
    captions = number_captions(of_pictures, model.tokenizer, equal_captions)
    texts, images = _embed(model, captions.texts), embedded.features
    pairs = zip(embedded.items, embedded.sample_ids.tolist(), strict=True)
    forth, back = ranks_of(texts, images, captions.pairs, device=model.device)
    rows = retrieval_rows(forth, back, captions.pairs, [cluster_of(*pair) for pair in pairs])
    keys = [item.key for item in embedded.items]
    shown = _Shown(captions.texts, texts, keys, images, captions.pairs)
    details = {
        "text_to_image": shown.examples(forth),
        "image_to_text": shown.turned().examples(back),
        "num_captions": sum(map(len, of_pictures)),
        "skipped": dict(embedded.skipped),
    }
    settings = {"cleaning": model.tokenizer.cleaning, "equal_captions": equal_captions}
    where = None if table is None else table.protocol
    return Outcome(rows, source.protocol("retrieval", captions=where, **settings), details)


def number_captions(
    of_pictures: Iterable[Sequence[str]], tokenizer: Tokenizer, equal: EqualCaptions = "merge"
) -> Captions:
    """The captions of pictures, numbered: those that differ after cleaning, or every single one.

    Raises:
        DataError: There is none; one that cleaning leaves empty is none where captions are merged.
    """
    numbers: dict[str, int] = {}
    kept: list[str] = []
    pairs = array("q")
    for picture, captions in enumerate(of_pictures):
        if equal == "keep":
            found: Iterable[int] = range(len(kept), len(kept) + len(captions))
            kept += captions
        else:
            cleaned = dict.fromkeys(filter(None, map(tokenizer.clean, captions)))
            found = [numbers.setdefault(text, len(numbers)) for text in cleaned]
        for number in found:
            pairs.extend((number, picture))
    if not pairs:
        raise DataError("no picture has a caption: the retrieval task needs some")
    return Captions(kept or list(numbers), torch.from_numpy(np.array(pairs).reshape(-1, 2).T))


def ranks_of(
    texts: Float[Tensor, "M D"],
    images: Float[Tensor, "N D"],
    pairs: Int[Tensor, "2 P"],
    *,
    device: torch.device,
) -> tuple[Int[Tensor, " M"], Int[Tensor, " N"]]:
    """`ranking.best_ranks`, computed on a device and given on the CPU."""
    ranks = ranking.best_ranks(texts.to(device), images.to(device), pairs.to(device))
    return ranks[0].cpu(), ranks[1].cpu()


def retrieval_rows(
    text_ranks: Int[Tensor, " M"],
    image_ranks: Int[Tensor, " N"],
    pairs: Int[Tensor, "2 P"],
    clusters: Sequence[Hashable],
) -> list[Row]:
    """The metrics of both directions.

    Args:
        text_ranks: Of each text's best picture, from 0.
        image_ranks: Of each picture's best text; those without a text are no queries.
        pairs: As in `Captions`.
        clusters: What each picture shares its fate with. A caption of several pictures is counted
            with the first of them.
    """
    counts = pairs[1].bincount(minlength=len(image_ranks))
    asked = counts.nonzero().flatten()
    first = np.unique(pairs[0].numpy(), return_index=True)[1]  # pairs are in order of pictures
    of_texts = [clusters[picture] for picture in pairs[1][first].tolist()]
    of_pictures = [clusters[picture] for picture in asked.tolist()]
    forth, back = (len(image_ranks), pairs[0].bincount()), (len(text_ranks), counts[asked])
    return [
        *_rows("text_to_image", text_ranks, of_texts, *forth),
        *_rows("image_to_text", image_ranks[asked], of_pictures, *back),
    ]


def _rows(
    direction: str,
    ranks: Int[Tensor, " Q"],
    clusters: Sequence[Hashable],
    num_targets: int,
    num_right: Int[Tensor, " Q"],
) -> list[Row]:
    rows = [
        mean_row(
            f"{direction}_recall@{k}",
            (ranks < k).numpy(),
            clusters,
            chance=ranking.chance_recall_at_k(num_right, num_targets, k),
        )
        for k in RECALL_AT
    ]
    median = ranking.median_rank(ranks)
    interval = median_interval((ranks + 1).numpy(), clusters)
    chance = ranking.chance_median_rank(num_right, num_targets)
    return [*rows, Row(f"{direction}_median_rank", median, interval, len(ranks), chance)]


def _embed(model: VisionLanguageModel, texts: Sequence[str]) -> Float[Tensor, "N D"]:
    features = torch.empty(len(texts), model.embed_dim)
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        chunk = slice(start, start + _TEXTS_AT_ONCE)
        features[chunk] = model.embed_texts(texts[chunk])
    return features


@dataclass(frozen=True)
class _Shown:
    """Queries and targets by name, for examples of what was found."""

    names: Sequence[str]
    queries: Float[Tensor, "Q D"]
    target_names: Sequence[str]
    targets: Float[Tensor, "N D"]
    pairs: Int[Tensor, "2 P"]

    def turned(self) -> "_Shown":
        """The other direction."""
        return _Shown(self.target_names, self.targets, self.names, self.queries, self.pairs.flip(0))

    def examples(self, ranks: Int[Tensor, " Q"]) -> list[dict[str, Any]]:
        """Queries spread evenly over those that have an answer."""
        asked = torch.unique(self.pairs[0])
        return [
            self._example(query, int(ranks[query]) + 1)
            for query in asked[:: -(-len(asked) // NUM_EXAMPLES)].tolist()
        ]

    def _example(self, query: int, rank: int) -> dict[str, Any]:
        right = self.pairs[1][self.pairs[0] == query].tolist()
        scores, found = (self.targets @ self.queries[query]).topk(min(NUM_HITS, len(self.targets)))
        hits = [
            {"target": self.target_names[i], "score": round(score, 4), "right": i in right}
            for score, i in zip(scores.tolist(), found.tolist(), strict=True)
        ]
        wanted = [self.target_names[i] for i in right[:NUM_HITS]]
        return {"query": self.names[query], "rank": rank, "right": wanted, "hits": hits}
