"""Batches of uint8 pictures and tokens: endless for training, each sample once for evaluation.

A micro-batch is a pure function of its number, so nothing here is state: a run resumes by asking
for another first micro-batch, with any number of workers.
"""

import sys
from collections import Counter
from collections.abc import Generator, Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import get_worker_info

from vlm.data.batch import Batch, EvalBatch, EvalSample, HeadTexts
from vlm.data.dataset import Dataset
from vlm.data.decode import read_header
from vlm.data.order import Order, check_divides, draws_of_visit, hashes_of_visits
from vlm.data.prefetch import look_ahead
from vlm.data.samples import BadSample, questions_of
from vlm.data.tally import Place, Tally
from vlm.data.transforms import EvalTransform, Pixels, TrainTransform
from vlm.data.workers import build_in_order
from vlm.tokenizer import Tokenizer, caption_id


class Questions(NamedTuple):
    """What the captioner learns beside captions.

    Attributes:
        field: Of the json: a list of {"question": ..., "answer": ...}.
        fraction: Of the visits to samples that have some, those in which an answer is learned.
    """

    field: str
    fraction: float


def training_batches(
    dataset: Dataset,
    order: Order,
    *,
    transform: TrainTransform,
    tokenizer: Tokenizer,
    seed: int,
    micro_batch_size: int,
    first_micro_batch: int = 0,
    rank: int = 0,
    world_size: int = 1,
    ranks_per_node: int = 1,
    num_workers: int = 0,
    cache_bytes: int = 0,
    pin_memory: bool = False,
    shuffle_tags: bool = False,
    questions: Questions | None = None,
) -> Generator[Batch, None, None]:
    """This rank's micro-batches from `first_micro_batch` on, endlessly; closing ends the workers.

    A rank's slice of global batch k is its micro-batches `k A` to `(k + 1) A - 1`, A of them a
    step. Caption choice and augmentation come from (seed, epoch, sample id): what a sample looks
    like in an epoch depends on nothing else.

    Args:
        dataset: Where samples are read.
        order: Which sample comes when.
        transform: Encoded picture and random numbers to pixels.
        tokenizer: For the chosen caption.
        seed: Of caption choice and augmentation.
        micro_batch_size: Samples in a batch here.
        first_micro_batch: Where to begin, for a resumed run: consumed steps x A.
        rank: Of this process.
        world_size: Processes that share a global batch.
        ranks_per_node: Neighbours that share a node and its cache of remote shards.
        num_workers: Processes that build micro-batches; 0 builds them here.
        cache_bytes: Memory for decoded small pictures, over all workers of this rank; 0: none. A
            picture in it is not read and decoded again, which is 2/3 of a 64 px WebP's cost.
        pin_memory: Page-locked batches, for a GPU.
        shuffle_tags: Whether the parts of a caption between commas come in random order, so that a
            short context shows them all over time; what stands before a colon stays in front.
        questions: What the captioner learns beside captions; None for captions alone.

    Raises:
        ConfigError: `world_size` x `micro_batch_size` does not divide the global batch.
        DataError: A worker died, or the data set is damaged.
    """
    check_divides("world_size", world_size, "global_batch_size", order.global_batch_size)
    per_rank = order.global_batch_size // world_size
    check_divides("micro_batch_size", micro_batch_size, "global_batch_size / world_size", per_rank)
    per_step = per_rank // micro_batch_size
    worker_cache_bytes = cache_bytes // max(1, num_workers)
    make_builder = partial(
        _TrainingBuilder,
        dataset,
        order=order,
        transform=transform,
        tokenizer=tokenizer,
        seed=seed,
        first_slice=rank * per_step,
        slices=world_size * per_step,
        slices_per_step=per_step,
        cache_bytes=worker_cache_bytes,
        shuffle_tags=shuffle_tags,
        questions=questions,
    )
    if world_size % ranks_per_node:
        ranks_per_node = 1  # nodes of unequal size: each rank looks ahead for itself
    prefetcher = look_ahead(
        dataset,
        order,
        first_step=first_micro_batch // per_step,
        rank=rank // ranks_per_node,
        world_size=world_size // ranks_per_node,
    )
    batches = build_in_order(
        make_builder,
        range(first_micro_batch, sys.maxsize),
        num_workers=num_workers,
        batch_bytes=micro_batch_size * 3 * transform.image_size**2,
        cache_bytes=worker_cache_bytes,
        pin_memory=pin_memory,
    )
    return prefetcher.hand_on(batches, first_batch=first_micro_batch, batches_per_step=per_step)


def evaluation_batches(
    dataset: Dataset,
    *,
    transform: EvalTransform,
    batch_size: int,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Generator[EvalBatch, None, None]:
    """This rank's contiguous slice, each sample once and in order; the last batch may be short.

    Slices are of whole batches: which samples are computed together, and so every digit of what
    comes out, does not depend on the number of ranks.

    Raises:
        DataError: A worker died, or the data set is damaged.
    """
    ids = evaluation_slice(len(dataset), batch_size, rank=rank, world_size=world_size)
    make_builder = partial(_EvaluationBuilder, dataset, transform, ids, batch_size)
    return build_in_order(
        make_builder,
        range(-(-len(ids) // batch_size)),
        num_workers=num_workers,
        batch_bytes=batch_size * 3 * transform.image_size**2,
    )


class _Kept(NamedTuple):
    """A sample as it is read, or lies in the cache."""

    image: bytes | Pixels
    captions: tuple[str, ...]
    asked: tuple[tuple[str, str], ...]


class _Visit(NamedTuple):
    """What a visit shows: the caption, and the captioner's text with what is given of it."""

    image: Pixels
    tokens: Int[np.ndarray, " l"]
    caption_id: int
    head_tokens: Int[np.ndarray, " h"]
    given: int


def evaluation_slice(num_samples: int, batch_size: int, *, rank: int, world_size: int) -> range:
    """The samples that a rank evaluates."""
    num_batches = -(-num_samples // batch_size)
    start, stop = (batch_size * (num_batches * r // world_size) for r in (rank, rank + 1))
    return range(min(start, num_samples), min(stop, num_samples))


class _TrainingBuilder:
    """Builds any micro-batch of training; lives in one worker, with its caches."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        order: Order,
        transform: TrainTransform,
        tokenizer: Tokenizer,
        seed: int,
        first_slice: int,
        slices: int,
        slices_per_step: int,
        cache_bytes: int,
        shuffle_tags: bool,
        questions: Questions | None,
    ) -> None:
        self.dataset = dataset
        self.order = order
        self.transform = transform
        self.tokenizer = tokenizer
        self.seed = seed
        self.first_slice = first_slice
        self.slices = slices
        self.slices_per_step = slices_per_step
        self.shuffle_tags = shuffle_tags
        self.questions = questions
        self.cache_room = cache_bytes
        self.cache: dict[int, _Kept] = {}
        self.encode = lru_cache(maxsize=32768)(self._encode)
        self.blank_tokens = tokenizer("").numpy()

    def __call__(self, micro_batch: int) -> Batch:
        step, part = divmod(micro_batch, self.slices_per_step)
        epochs, ids = self.order.batch(step, rank=self.first_slice + part, world_size=self.slices)
        images = _blank_images(len(ids), self.transform.image_size)
        tokens = np.repeat(self.blank_tokens, len(ids), axis=0)
        caption_ids = np.zeros(len(ids), dtype=np.int64)
        valid = np.ones(len(ids), dtype=np.bool_)
        bad: Tally[Place] = Tally()
        head_tokens, num_given = tokens.copy(), np.ones(len(ids), dtype=np.int64)
        rows = images.permute(0, 2, 3, 1).numpy()
        for row, visit in enumerate(zip(epochs.tolist(), ids.tolist(), strict=True)):
            try:
                seen = self._visit(*visit)
                rows[row], caption_ids[row], num_given[row] = (
                    seen.image,
                    seen.caption_id,
                    seen.given,
                )
                tokens[row, : len(seen.tokens)] = seen.tokens
                head_tokens[row, : len(seen.head_tokens)] = seen.head_tokens
            except BadSample as error:
                valid[row] = False
                bad.add(error.reason, self.dataset.place(visit[1]))
        return Batch(
            images,
            torch.from_numpy(tokens),
            torch.from_numpy(ids),
            torch.from_numpy(caption_ids),
            torch.from_numpy(valid),
            bad,
            torch.from_numpy(hashes_of_visits(self.seed, epochs, ids)),
            HeadTexts(torch.from_numpy(head_tokens), torch.from_numpy(num_given))
            if self.questions
            else None,
        )

    def _visit(self, epoch: int, sample_id: int) -> "_Visit":
        """What one visit to a sample shows."""
        image, captions, asked = self._sample(sample_id)
        draws = draws_of_visit(self.seed, epoch, sample_id)
        caption = captions[int(next(draws) * len(captions))]
        if self.shuffle_tags:
            caption = _shuffled(caption, draws)
        pixels = self.transform(image, draws)
        tokens, number = self.encode(caption)
        if self.questions and asked and next(draws) < self.questions.fraction:
            question, answer = asked[int(next(draws) * len(asked))]
            given, whole = (self.encode(text)[0] for text in (question, f"{question} {answer}"))
            return _Visit(pixels, tokens, number, whole, min(len(given), len(whole)) - 1)
        return _Visit(pixels, tokens, number, tokens, 1)

    def _sample(self, sample_id: int) -> "_Kept":
        """A sample's picture, decoded if it is in the cache or fits there, and its texts."""
        if (cached := self.cache.get(sample_id)) is not None:
            return cached
        sample = self.dataset.read(sample_id)
        if not sample.captions:
            raise BadSample("text.missing", sample.key)
        asked = questions_of(sample.meta, self.questions.field) if self.questions else ()
        if self.cache_room <= 0:
            return _Kept(sample.image, sample.captions, asked)
        encoded = read_header(sample.image)
        width, height = encoded.size
        size_bytes = 3 * width * height + 1024  # and what is around it
        if size_bytes > self.cache_room or not self.transform.can_reuse(width, height):
            return _Kept(sample.image, sample.captions, asked)
        self.cache_room -= size_bytes
        self.cache[sample_id] = _Kept(encoded.pixels(), sample.captions, asked)
        return self.cache[sample_id]

    def _encode(self, caption: str) -> tuple[Int[np.ndarray, " l"], int]:
        """Token ids and caption id of a text."""
        tokens = np.array(self.tokenizer.encode(caption), dtype=np.int64)
        return tokens, caption_id(self.tokenizer.clean(caption))


class _EvaluationBuilder:
    """Builds any batch of an evaluation."""

    def __init__(
        self, dataset: Dataset, transform: EvalTransform, ids: range, batch_size: int
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.ids = ids
        self.batch_size = batch_size

    def __call__(self, batch: int) -> EvalBatch:
        ids = self.ids[batch * self.batch_size : (batch + 1) * self.batch_size]
        images = _blank_images(len(ids), self.transform.image_size)
        valid = torch.ones(len(ids), dtype=torch.bool)
        samples: list[EvalSample] = []
        bad: Counter[str] = Counter()
        rows = images.permute(0, 2, 3, 1).numpy()  # torch would copy each with all of its threads
        for row, sample_id in enumerate(ids):
            try:
                sample = self.dataset.read(sample_id)
                samples.append((sample.key, sample.captions, sample.meta))
                rows[row] = self.transform(sample.image).permute(1, 2, 0).numpy()
            except BadSample as error:
                valid[row] = False
                bad[error.reason] += 1
                if len(samples) == row:
                    samples.append((self.dataset.key(sample_id), (), {}))
        return EvalBatch(images, torch.tensor(ids), valid, samples, dict(bad))


def _shuffled(caption: str, draws: Iterator[float]) -> str:
    """The caption with its comma-separated parts in random order, after a "name: " if any."""
    name, colon, tags = caption.rpartition(": ")
    parts = tags.split(", ")
    return name + colon + ", ".join(sorted(parts, key=lambda _: next(draws)))


def _blank_images(size: int, image_size: int) -> UInt8[Tensor, "B 3 S S"]:
    """Zeros in channels_last format: each picture is one copy, and convolutions prefer it.

    A worker's are in shared memory from the start, which saves a copy of the batch.
    """
    blank = torch.zeros(size, image_size, image_size, 3, dtype=torch.uint8)
    if get_worker_info():
        blank.share_memory_()  # type: ignore[no-untyped-call]  # torch's
    return blank.permute(0, 3, 1, 2)
