"""Embeds a data set batch by batch; pictures that cannot be read are skipped and counted."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from vlm.curate.source import Columns, open_data
from vlm.data.batch import EvalBatch
from vlm.data.dataset import Dataset
from vlm.data.grouping import IMAGE_SUFFIXES
from vlm.data.loader import evaluation_batches, evaluation_slice
from vlm.errors import DataError
from vlm.inference import VisionLanguageModel
from vlm.retrieval.progress import track
from vlm.runtime.heap import pages_kept

_FEW = 4000  # samples that are read sooner than workers start
Log = Callable[[str], object]


class Item(NamedTuple):
    """What a data set says about a picture."""

    key: str
    captions: tuple[str, ...]
    meta: dict[str, Any]

    @property
    def path(self) -> str:
        """Where its folder or table had it; empty for what was packed by others."""
        return str(self.meta.get("path", ""))


@dataclass(frozen=True)
class Pictures:
    """The readable pictures of a batch, cut to the model's size.

    Attributes:
        images: In the order of the data set.
        sample_ids: Where they are in it.
        items: What is said about them.
        skipped: How many could not be read, by reason.
    """

    images: UInt8[Tensor, "B 3 S S"]
    sample_ids: Int[Tensor, " B"]
    items: list[Item]
    skipped: dict[str, int]


@dataclass(frozen=True)
class Embedded:
    """Features of pictures, fp32 rows of length 1 on the CPU; the rest is as in `Pictures`."""

    features: Float[Tensor, "N D"]
    sample_ids: Int[Tensor, " N"]
    items: list[Item]
    skipped: dict[str, int]

    def __len__(self) -> int:
        return len(self.items)


def read_pictures(
    model: VisionLanguageModel,
    dataset: Dataset,
    *,
    batch_size: int = 64,
    num_workers: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    description: str = "reading",
    log: Log = print,
) -> Iterator[Pictures]:
    """Each readable picture of this rank's slice of a data set once, in order.

    Args:
        model: Whose evaluation transform cuts the pictures.
        dataset: What to read.
        batch_size: Pictures at a time.
        num_workers: Processes that decode; by default one a core for large data, none for small.
        rank: Of this process; ranks take contiguous slices.
        world_size: Number of ranks.
        description: Of the progress bar.
        log: Gets lines of progress where there is no terminal, and one for what was skipped.
            Rank 0 alone shows progress; who gathers from several ranks tells what was skipped.
    """
    batches: Iterator[EvalBatch]
    batches = evaluation_batches(
        dataset,
        transform=model.transform,
        batch_size=batch_size,
        num_workers=_default_workers(len(dataset)) if num_workers is None else num_workers,
        rank=rank,
        world_size=world_size,
    )
    total = len(evaluation_slice(len(dataset), batch_size, rank=rank, world_size=world_size))
    skipped: Counter[str] = Counter()
    if rank == 0:
        batches = track(batches, _size, total=total, description=description, log=log)
    with pages_kept(model.device):
        for batch in batches:
            skipped.update(batch.bad)
            yield _readable(batch)
    if skipped and world_size == 1:
        log(skipped_line(skipped, total))


def embed_batches(
    model: VisionLanguageModel, dataset: Dataset, *, description: str = "embedding", **reading: Any
) -> Iterator[Embedded]:
    """Features of a data set, batch by batch; the other arguments are those of `read_pictures`."""
    for batch in read_pictures(model, dataset, description=description, **reading):
        features = model.encode_pixels(batch.images) if batch.items else _none(model)
        yield Embedded(features.float().cpu(), batch.sample_ids, batch.items, batch.skipped)


def embed_dataset(model: VisionLanguageModel, dataset: Dataset, **reading: Any) -> Embedded:
    """Features of a data set, in memory; the other arguments are those of `read_pictures`."""
    parts = list(embed_batches(model, dataset, **reading))
    skipped: Counter[str] = Counter()
    for part in parts:
        skipped.update(part.skipped)
    items = [item for part in parts for item in part.items]
    features = torch.cat([_none(model), *(part.features for part in parts)])
    sample_ids = torch.cat([torch.empty(0, dtype=torch.int64), *(p.sample_ids for p in parts)])
    return Embedded(features, sample_ids, items, dict(skipped))


def skipped_line(skipped: dict[str, int], total: int) -> str:
    """What is said of samples that could not be read."""
    return f"{sum(skipped.values())} of {total} samples skipped: {describe_skipped(skipped)}"


def describe_skipped(skipped: dict[str, int]) -> str:
    """Counts by reason, the most frequent first, as "3 image.truncated, 1 image.empty"."""
    return ", ".join(f"{count} {reason}" for reason, count in Counter(skipped).most_common())


def _size(batch: EvalBatch) -> int:
    return len(batch.samples)


def _readable(batch: EvalBatch) -> Pictures:
    valid = batch.valid.tolist()
    if all(valid):  # nothing to leave out, so nothing to copy
        return Pictures(
            batch.images, batch.sample_ids, [Item(*s) for s in batch.samples], batch.bad
        )
    items = [Item(*s) for s, ok in zip(batch.samples, valid, strict=True) if ok]
    return Pictures(batch.images[batch.valid], batch.sample_ids[batch.valid], items, batch.bad)


def _none(model: VisionLanguageModel) -> Tensor:
    return torch.empty(0, model.embed_dim)


def _default_workers(num_samples: int) -> int:
    return 0 if num_samples < _FEW else min(8, os.cpu_count() or 1)


def pictures_of(
    model: VisionLanguageModel,
    data: str,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    description: str = "reading",
    log: Log = print,
) -> Iterator[Pictures]:
    """The readable pictures of DATA, which may also be one image file, batch by batch.

    Raises:
        ConfigError: A column that is not there, or of what is no table.
        DataError: DATA cannot be opened, or not one picture can be read.
    """
    if is_image_file(data):
        Columns(image_column, caption_column).refuse(f"{data} is an image")
        item = Item(Path(data).name, (), {})
        yield Pictures(model.pixels([data]), torch.tensor([0]), [item], {})
        return
    dataset = open_data(data, image_column=image_column, caption_column=caption_column, log=log)
    num_pictures = 0
    for batch in read_pictures(model, dataset, description=description, log=log):
        num_pictures += len(batch.items)
        if batch.items:
            yield batch
    if not num_pictures:
        raise DataError(f"{data}: no picture can be read")


def is_image_file(name: str) -> bool:
    """Whether a name is that of an image file that exists."""
    path = Path(name)
    return path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES and os.path.isfile(path)
