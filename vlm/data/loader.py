"""Batches of uint8 pictures and tokens: endless for training, each sample once for evaluation.

A micro-batch is a pure function of its number, so nothing here is state: a run resumes by asking
for another first micro-batch, with any number of workers.
"""

import sys
from collections.abc import Generator
from functools import partial

from vlm.data.batch import Batch, EvalBatch
from vlm.data.builders import EvaluationBuilder, TrainingBuilder
from vlm.data.dataset import Dataset
from vlm.data.order import Order, check_divides
from vlm.data.prefetch import look_ahead
from vlm.data.questions import Questions
from vlm.data.transforms import EvalTransform, TrainTransform
from vlm.data.workers import build_in_order
from vlm.tokenizer import Tokenizer


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
    hard_negatives: str | None = None,
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
        hard_negatives: A field of the json with texts that are nearly true of the picture.

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
        TrainingBuilder,
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
        hard_negatives=hard_negatives,
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
    make_builder = partial(EvaluationBuilder, dataset, transform, ids, batch_size)
    return build_in_order(
        make_builder,
        range(-(-len(ids) // batch_size)),
        num_workers=num_workers,
        batch_bytes=batch_size * 3 * transform.image_size**2,
    )


def evaluation_slice(num_samples: int, batch_size: int, *, rank: int, world_size: int) -> range:
    """The samples that a rank evaluates."""
    num_batches = -(-num_samples // batch_size)
    start, stop = (batch_size * (num_batches * r // world_size) for r in (rank, rank + 1))
    return range(min(start, num_samples), min(stop, num_samples))
