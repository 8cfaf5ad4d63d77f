"""The swap task: tell a caption from the same words about another picture, as Winoground does."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from vlm.errors import DataError
from vlm.eval.source import Outcome, Row, Source, cluster_of, mean_row
from vlm.retrieval.embed import Item

CHANCE = {"text_score": 1 / 4, "image_score": 1 / 4, "group_score": 1 / 6}  # Winoground, section 4
Bools = npt.NDArray[np.bool_]


class Swap(NamedTuple):
    """A picture's true caption, and the one whose words are exchanged."""

    caption: str
    swapped: str


class Pairs(NamedTuple):
    """Two pictures that one another's swapped captions are true of, by row: [P] each."""

    first: list[int]
    second: list[int]


def swap(source: Source) -> Outcome:
    """Winoground's text, image and group score (2204.03162, section 4), and accuracy.

    Of a pair of pictures I0, I1 with captions C0, C1: text is right where each picture is more like
    its own caption than like the other; image, where each caption is more like its own picture;
    group, where both are. A tie is wrong. `accuracy` is the share of all pictures that are more
    like their true caption than like the swapped one (chance 1/2). Scores of one kind of scene, by
    the meta field "kind", follow as `text_score/KIND`.

    Args:
        source: The data: pictures whose meta has a "swap" with a "caption" and a "swapped" one, and
            the same "pair" as their partner, where there is one. The others are left out, and
            counted in the details.

    Raises:
        DataError: No readable picture has a swap, or a swap is not as it should be.
    """
    embedded, model = source.embedded, source.model
    swaps = [swap_of(item) for item in embedded.items]
    rows = [row for row, found in enumerate(swaps) if found is not None]
    if not rows:
        raise DataError(
            'no readable picture has a "swap" of a caption and a swapped one: the swap task '
            "needs some, as vlm data scenes writes them"
        )
    known = [found for found in swaps if found is not None]
    items = [embedded.items[row] for row in rows]
    ids = embedded.sample_ids[rows].tolist()
    clusters = [cluster_of(item, sample_id) for item, sample_id in zip(items, ids, strict=True)]
    features = embedded.features[rows]
    own = similarity(features, model.embed_texts([found.caption for found in known]))
    other = similarity(features, model.embed_texts([found.swapped for found in known]))
    scores = {"accuracy": (own > other).numpy()}
    pairs = pairs_of(items, known)
    kinds = [item.meta.get("kind") for item in items]
    measured: list[Row] = []
    if pairs.first:
        of_pairs = winoground(own, other, pairs)
        scores |= of_pairs
        names = [clusters[row] for row in pairs.first]
        measured += _rows(of_pairs, names, [kinds[row] for row in pairs.first])
    measured += _rows({"accuracy": scores["accuracy"]}, clusters, kinds)
    details = {
        "samples": _details(items, known, own, other),
        "num_pairs": len(pairs.first),
        "num_without_swap": len(embedded) - len(rows),
        "skipped": dict(embedded.skipped),
    }
    protocol = source.protocol("swap", cleaning=model.tokenizer.cleaning)
    return Outcome(sorted(measured, key=lambda row: "/" in row.metric), protocol, details)


def similarity(images: Float[Tensor, "N D"], texts: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    """Of each picture with its text."""
    return (images * texts).sum(dim=1)


def winoground(
    own: Float[Tensor, " N"], other: Float[Tensor, " N"], pairs: Pairs
) -> dict[str, Bools]:
    """Whether each pair is right, by score.

    Args:
        own: Similarity of each picture with its caption.
        other: With its swapped caption, which is its partner's.
        pairs: Rows of both.
    """
    first, second = torch.tensor(pairs.first), torch.tensor(pairs.second)
    text = (own[first] > other[first]) & (own[second] > other[second])
    # other[second] is the second picture with the first one's caption
    image = (own[first] > other[second]) & (own[second] > other[first])
    scores = zip(CHANCE, (text, image, text & image), strict=True)
    return {name: right.numpy() for name, right in scores}


def swap_of(item: Item) -> Swap | None:
    """The captions of a picture's swap; None where it has none.

    Raises:
        DataError: It has one that is no caption and a swapped one.
    """
    found = item.meta.get("swap")
    if found is None:
        return None
    texts = [found.get(key, "") for key in Swap._fields] if isinstance(found, dict) else [""]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(f'{item.key}: "swap" must be {{"caption": TEXT, "swapped": TEXT}}')
    return Swap(*texts)


def pairs_of(items: Sequence[Item], swaps: Sequence[Swap]) -> Pairs:
    """The rows of the pictures that share a "pair"; one whose partner is missing is in none.

    Raises:
        DataError: A pair has more than two pictures, or captions that are not each other's swaps.
    """
    rows: dict[str, list[int]] = defaultdict(list)
    for row, item in enumerate(items):
        if (name := item.meta.get("pair")) is not None:
            rows[str(name)].append(row)
    whole = {name: two for name, two in rows.items() if len(two) > 1}
    for name, two in whole.items():
        if len(two) > 2 or swaps[two[0]] != swaps[two[1]][::-1]:
            keys = ", ".join(items[row].key for row in two)
            raise DataError(
                f'pair {name} ({keys}): must be two pictures, the caption of each the "swapped" of '
                "the other"
            )
    return Pairs([two[0] for two in whole.values()], [two[1] for two in whole.values()])


def _rows(
    scores: dict[str, Bools], clusters: Sequence[Hashable], kinds: Sequence[object]
) -> list[Row]:
    """Each score over all, then over each kind."""
    rows = []
    for name, right in scores.items():
        chance = CHANCE.get(name, 1 / 2)
        rows.append(mean_row(name, right, clusters, chance=chance))
        for kind in sorted({str(kind) for kind in kinds if kind is not None}):
            chosen = [row for row, found in enumerate(kinds) if str(found) == kind]
            of_kind = [clusters[row] for row in chosen]
            rows.append(mean_row(f"{name}/{kind}", right[chosen], of_kind, chance=chance))
    return rows


def _details(
    items: Sequence[Item], swaps: Sequence[Swap], own: Tensor, other: Tensor
) -> list[dict[str, Any]]:
    shown = zip(items, swaps, own.tolist(), other.tolist(), strict=True)
    return [
        {
            "key": item.key,
            "pair": item.meta.get("pair"),
            **found._asdict(),
            "similarity": round(right, 4),
            "swapped_similarity": round(wrong, 4),
        }
        for item, found, right, wrong in shown
    ]
