"""Micro-batches from samples: what a visit shows, and what lies in the cache."""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import get_worker_info

from vlm.data.batch import Batch, EvalBatch, EvalSample, HeadTexts, Negatives
from vlm.data.dataset import Dataset
from vlm.data.decode import read_header
from vlm.data.order import Order, draws_of_visit, hashes_of_visits
from vlm.data.questions import NOTHING, Questions, Text, conversation, questions_of, whole
from vlm.data.samples import BadSample, negatives_of
from vlm.data.tally import Place, Tally
from vlm.data.transforms import EvalTransform, Pixels, TrainTransform
from vlm.tokenizer import Tokenizer, caption_id


class _Kept(NamedTuple):
    """A sample as it is read, or lies in the cache."""

    image: bytes | Pixels
    captions: tuple[str, ...]
    asked: tuple[tuple[str, str], ...]
    negatives: tuple[str | None, ...]  # beside each caption


class _Visit(NamedTuple):
    """What a visit shows: a picture, if there is one, the caption, and the captioner's text."""

    image: Pixels | None
    tokens: Int[np.ndarray, " l"]
    caption_id: int
    head_text: Text
    negative: Int[np.ndarray, " m"] | None


class _Shelves:
    """Pictures in blocks of memory: alone, each would lie in the way of a step's large tensors."""

    block_bytes = 2**24

    def __init__(self) -> None:
        self.block = np.empty(0, dtype=np.uint8)

    def keep(self, pixels: Pixels) -> Pixels:
        """A copy of a picture, in a block with others."""
        if pixels.nbytes > self.block.nbytes:
            self.block = np.empty(max(self.block_bytes, pixels.nbytes), dtype=np.uint8)
        place, self.block = np.split(self.block, [pixels.nbytes])
        kept = place.reshape(pixels.shape)
        kept[...] = pixels
        return kept


class TrainingBuilder:
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
        hard_negatives: str | None,
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
        self.hard_negatives = hard_negatives
        self.has_texts_alone = dataset.has_texts_alone
        self.cache_room = cache_bytes
        self.cache: dict[int, _Kept] = {}
        self.shelves = _Shelves()
        self.encode = lru_cache(maxsize=32768)(self._encode)
        self.blank_tokens = tokenizer("").numpy()
        self.context_length = tokenizer.context_length

    def __call__(self, micro_batch: int) -> Batch:
        """Micro-batch number so many of this rank."""
        step, part = divmod(micro_batch, self.slices_per_step)
        epochs, ids = self.order.batch(step, rank=self.first_slice + part, world_size=self.slices)
        images = _blank_images(len(ids), self.transform.image_size)
        tokens = np.repeat(self.blank_tokens, len(ids), axis=0)
        caption_ids = np.zeros(len(ids), dtype=np.int64)
        valid = np.ones(len(ids), dtype=np.bool_)
        texts_alone = np.zeros(len(ids), dtype=np.bool_)
        negatives, present = tokens.copy(), np.zeros(len(ids), dtype=np.bool_)
        bad: Tally[Place] = Tally()
        head_tokens, head_targets = tokens.copy(), np.full_like(tokens, NOTHING)
        rows = images.permute(0, 2, 3, 1).numpy()
        for row, visit in enumerate(zip(epochs.tolist(), ids.tolist(), strict=True)):
            try:
                seen = self._visit(*visit)
                caption_ids[row] = seen.caption_id
                if seen.image is None:
                    texts_alone[row], valid[row] = True, False
                else:
                    rows[row] = seen.image
                tokens[row, : len(seen.tokens)] = seen.tokens
                length = len(seen.head_text.tokens)
                head_tokens[row, :length], head_targets[row, :length] = seen.head_text
                if seen.negative is not None:
                    negatives[row, : len(seen.negative)], present[row] = seen.negative, True
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
            HeadTexts(torch.from_numpy(head_tokens), torch.from_numpy(head_targets))
            if self.questions
            else None,
            torch.from_numpy(texts_alone) if self.has_texts_alone else None,
            Negatives(torch.from_numpy(negatives), torch.from_numpy(present))
            if self.hard_negatives
            else None,
        )

    def _visit(self, epoch: int, sample_id: int) -> "_Visit":
        """What one visit to a sample shows."""
        image, captions, asked, negatives = self._sample(sample_id)
        draws = draws_of_visit(self.seed, epoch, sample_id)
        chosen = int(next(draws) * len(captions))
        caption, false = captions[chosen], negatives[chosen]
        if self.shuffle_tags:
            caption = _shuffled(caption, draws)
        pixels = None if isinstance(image, bytes) and not image else self.transform(image, draws)
        tokens, number = self.encode(caption)
        head_text = self._head_text(tokens, asked, draws)
        negative = None if false is None else self.encode(false)[0]
        return _Visit(pixels, tokens, number, head_text, negative)

    def _head_text(
        self,
        tokens: Int[np.ndarray, " l"],
        asked: Sequence[tuple[str, str]],
        draws: Iterator[float],
    ) -> Text:
        """What the captioner learns: answers, or the caption."""
        if self.questions and asked and next(draws) < self.questions.fraction:
            pairs = sorted(asked, key=lambda _: next(draws))
            told = conversation(pairs, lambda text: self.encode(text)[0], self.context_length)
            if told is not None:
                return told
        return whole(tokens)

    def _sample(self, sample_id: int) -> "_Kept":
        """A sample's picture, decoded if it is in the cache or fits there, and its texts."""
        if (cached := self.cache.get(sample_id)) is not None:
            return cached
        sample = self.dataset.read(sample_id)
        if not sample.captions:
            raise BadSample("text.missing", sample.key)
        asked = questions_of(sample.meta, self.questions.field) if self.questions else ()
        num_captions = len(sample.captions)
        false: tuple[str | None, ...] = (None,) * num_captions
        if self.hard_negatives:
            false = negatives_of(sample.meta, self.hard_negatives, num_captions)
        if self.cache_room <= 0 or not sample.image:
            return _Kept(sample.image, sample.captions, asked, false)
        encoded = read_header(sample.image)
        width, height = encoded.size
        size_bytes = 3 * width * height + 1024  # and what is around it
        if size_bytes > self.cache_room or not self.transform.can_reuse(width, height):
            return _Kept(sample.image, sample.captions, asked, false)
        self.cache_room -= size_bytes
        pixels = self.shelves.keep(encoded.pixels())
        self.cache[sample_id] = _Kept(pixels, sample.captions, asked, false)
        return self.cache[sample_id]

    def _encode(self, caption: str) -> tuple[Int[np.ndarray, " l"], int]:
        """Token ids and caption id of a text."""
        tokens = np.array(self.tokenizer.encode(caption), dtype=np.int64)
        return tokens, caption_id(self.tokenizer.clean(caption))


class EvaluationBuilder:
    """Builds any batch of an evaluation."""

    def __init__(
        self, dataset: Dataset, transform: EvalTransform, ids: range, batch_size: int
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.ids = ids
        self.batch_size = batch_size

    def __call__(self, batch: int) -> EvalBatch:
        """Batch number so many."""
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
