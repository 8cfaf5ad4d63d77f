"""The explain task: whether the relevance for an object's name lies where the object is."""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn.functional import interpolate

from vlm.data.dataset import Dataset
from vlm.data.transforms import Box, EvalTransform
from vlm.errors import DataError
from vlm.eval.explain import explain
from vlm.eval.faithfulness import NUM_FRESH, Faithfulness, judge, reinitialised
from vlm.eval.source import Outcome, Source, cluster_of, mean_row
from vlm.inference import VisionLanguageModel
from vlm.retrieval.embed import Item, read_pictures


@dataclass(frozen=True, config=ConfigDict(allow_inf_nan=False))
class _Object:
    """What a sample's metadata says of an object; more that it says is not used."""

    name: str
    box: Box  # left, top, right, bottom, in pixels


_OBJECTS = TypeAdapter(list[_Object])


class _Picture(NamedTuple):
    item: Item
    sample_id: int
    pixels: Tensor


class _Score(NamedTuple):
    """Of one name in one picture; the relevances are times what an even map gives."""

    in_box: float
    in_box_fresh: float
    area_share: float
    faithfulness: Faithfulness


def grounding(source: Source, *, template: str = "{}", num_pictures: int = 100) -> Outcome:
    """How much relevance lies in the box of the object that a text names, and how true it is.

    `relevance_in_box` is the share of relevance inside the box divided by the box's share of the
    picture; of objects that share a name, inside all their boxes. `relevance_in_box_fresh` is the
    same of models with fresh weights. `deletion` and `insertion` are those of
    `vlm.eval.faithfulness`; their chance is a random order.

    Args:
        source: The data; a sample's objects are in the field "objects" of its metadata, as
            [{"name": "cat", "box": [x0, y0, x1, y1]}] in pixels of the upright picture.
        template: Makes the text from the name, in place of {}.
        num_pictures: How many are looked at, evenly spaced over the data.

    Raises:
        ConfigError: The model cannot be explained.
        DataError: No readable picture has an object, or an object is not as above.
    """
    # These take turns: each has a bias of its own.
    fresh = [reinitialised(source.model, seed) for seed in range(NUM_FRESH)]
    scores: list[_Score] = []
    clusters: list[Hashable] = []
    samples: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    chosen = evenly_spaced(source.dataset, num_pictures)
    sizes = chosen.image_sizes().tolist()
    for picture in _pictures(source, chosen, counts):
        inside = boxes(picture.item, sizes[picture.sample_id], source.model.transform)
        counts["num_without_objects"] += not inside
        for name, mask in inside.items():
            text = template.replace("{}", name)
            other = fresh[picture.sample_id % NUM_FRESH]
            score = _score(source.model, other, picture.pixels, text, mask)
            scores.append(score)
            clusters.append(cluster_of(picture.item, picture.sample_id))
            samples.append(_sample(picture.item.key, text, score))
    if not scores:
        raise DataError(
            f"none of {len(chosen)} pictures shows an object that its metadata has in `objects`: "
            '[{"name": "cat", "box": [x0, y0, x1, y1]}]'
        )
    areas = [score.faithfulness for score in scores]
    chance = float(np.mean([area.random for area in areas]))
    rows = [
        mean_row("relevance_in_box", [s.in_box for s in scores], clusters, chance=1.0),
        mean_row("relevance_in_box_fresh", [s.in_box_fresh for s in scores], clusters, chance=1.0),
        mean_row("deletion", [a.explained.deletion for a in areas], clusters, chance=chance),
        mean_row("insertion", [a.explained.insertion for a in areas], clusters, chance=chance),
    ]
    protocol = source.protocol("explain", template=template, num_pictures=num_pictures)
    return Outcome(rows, protocol, {"samples": samples, **counts})


def evenly_spaced(dataset: Dataset, num: int) -> Dataset:
    """So many samples of a data set, from its first to its last; all, if it has no more."""
    mask = np.zeros(len(dataset), bool)
    mask[np.linspace(0, len(dataset) - 1, min(num, len(dataset))).round().astype(int)] = True
    return dataset.select(mask)


def boxes(
    item: Item, size: Sequence[int], transform: EvalTransform
) -> dict[str, Bool[Tensor, "S S"]]:
    """Which pixels of the model's picture each name's boxes cover; names without one are left out.

    Args:
        item: Of the data; see `grounding`.
        size: Width and height of the picture that the boxes are in.
        transform: What cut it.

    Raises:
        DataError: An object is no name with a box.
    """
    middles = torch.arange(transform.image_size) + 0.5
    found: dict[str, Tensor] = {}
    for name, box in ((each.name, each.box) for each in _objects(item)):
        x0, y0, x1, y1 = transform.place(box, size[0], size[1])
        across, down = (middles >= x0) & (middles < x1), (middles >= y0) & (middles < y1)
        covered = down[:, None] & across
        found[name] = found[name] | covered if name in found else covered
    return {name: covered for name, covered in found.items() if covered.any()}


def relevance_in(regions: Float[Tensor, "h w"], inside: Bool[Tensor, "S S"]) -> float:
    """The share of relevance inside, over the share of the picture: 1 if the map is even."""
    pixels = interpolate(regions[None, None], size=inside.shape, mode="nearest")[0, 0]
    return float(pixels[inside].mean() / pixels.mean())


def _objects(item: Item) -> list[_Object]:
    try:
        return _OBJECTS.validate_python(item.meta.get("objects") or [])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, ("objects", *first["loc"])))
        raise DataError(
            f"sample {item.key!r}: {place}: {first['msg']}; each object is "
            '{"name": TEXT, "box": [x0, y0, x1, y1]}, in pixels'
        ) from None


def _score(
    model: VisionLanguageModel,
    fresh: VisionLanguageModel,
    pixels: Tensor,
    text: str,
    inside: Tensor,
) -> _Score:
    mine, theirs = explain(model, pixels, text), explain(fresh, pixels, text)
    return _Score(
        in_box=relevance_in(mine.regions, inside),
        in_box_fresh=relevance_in(theirs.regions, inside),
        area_share=float(inside.float().mean()),
        faithfulness=judge(model, text, mine, [theirs]),
    )


def _sample(key: str, text: str, score: _Score) -> dict[str, Any]:
    numbers = {**score._asdict(), "faithfulness": asdict(score.faithfulness)}
    return {"key": key, "text": text, **numbers}


def _pictures(source: Source, chosen: Dataset, counts: Counter[str]) -> Iterator[_Picture]:
    """The readable ones; the others are counted."""
    reading = read_pictures(
        source.model, chosen, batch_size=1, description="explaining", log=source.log
    )
    for batch in reading:
        counts["num_skipped"] += sum(batch.skipped.values())
        ids = batch.sample_ids.tolist()
        yield from map(_Picture, batch.items, ids, batch.images)
