"""Every position of small streams: exactly once an epoch, and resumed there as if never stopped.

The order is a pure function and is asked at all positions; the share of each worker comes from the
loader's own source; the whole loader, with processes and real shards, restarts at a dozen places.
"""

import io
import pickle
from itertools import chain, islice, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset import TarWriter

from vlm.data import loader, workers
from vlm.data.dataset import Dataset, open_shards
from vlm.data.loader import training_batches
from vlm.data.order import SampleOrder
from vlm.data.samples import BadSample
from vlm.data.tally import Place
from vlm.data.transforms import TrainTransform
from vlm.tokenizer import train_bpe

WORLD_SIZES, WORKERS = (1, 2, 4), (0, 1, 2, 3)
SETS = {  # sizes of the shards, G, B
    "one sample": ([1], 4, 1),
    "fewer than a batch": ([2, 0, 1], 8, 2),
    "thirteen in five shards": ([3, 0, 5, 1, 4], 4, 3),
    "sixty, uneven": ([1, 40, 0, 19], 12, 5),
}
LONG = {"five hundred, uneven": ([40, 120, 1, 97, 64, 3, 55, 120], 20, 7)}
sets = pytest.mark.parametrize(
    "name", [*SETS, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)]
)
streams_1_and_4 = pytest.mark.parametrize("streams", [1, 4])


def order_of(name, streams, size=None):
    sizes, global_batch_size, block_size = {**SETS, **LONG}[name]
    return SampleOrder(
        sizes,
        seed=3,
        streams=streams,
        global_batch_size=size or global_batch_size,
        block_size=block_size,
    )


def pairs(columns):
    return np.stack(columns, axis=1).tolist()


@sets
@streams_1_and_4
def test_every_position_is_the_same_after_a_restart_there(record, name, streams):
    whole = order_of(name, streams)
    length = 2 * whole.num_samples + whole.global_batch_size
    straight = pairs(whole.at(np.arange(length + whole.global_batch_size)))
    for position in range(2 * whole.num_samples + 1):
        resumed = order_of(name, streams)  # nothing remembered
        positions = np.arange(position, position + whole.global_batch_size)
        assert pairs(resumed.at(positions)) == straight[position : position + len(positions)]
    record("B1", f"restart at any position, {streams} stream(s)", position + 1, "the same samples")


@sets
@streams_1_and_4
def test_every_sample_comes_exactly_once_an_epoch(name, streams):
    order = order_of(name, streams)
    num_epochs = order.global_batch_size + 1  # whole batches, though they straddle epochs
    steps = range(num_epochs * order.num_samples // order.global_batch_size)
    seen = np.concatenate([np.stack(order.batch(step), axis=1) for step in steps])
    for epoch in range(len(seen) // order.num_samples):
        ids = seen[seen[:, 0] == epoch, 1]
        assert sorted(ids.tolist()) == list(range(order.num_samples))


@sets
@streams_1_and_4
def test_ranks_join_to_one_batch_at_every_step(name, streams):
    straight = order_of(name, streams)
    for step in range(2 * straight.num_samples // straight.global_batch_size + 2):
        whole = pairs(straight.batch(step))
        start = step * straight.global_batch_size
        positions = np.arange(start, start + straight.global_batch_size)
        assert sorted(whole) == sorted(pairs(straight.at(positions)))
        for world_size in WORLD_SIZES:
            resumed = pickle.loads(pickle.dumps(straight))  # noqa: S301  # our own bytes
            ranks = [
                pairs(resumed.batch(step, rank=rank, world_size=world_size))
                for rank in range(world_size)
            ]
            assert list(chain(*ranks)) == whole


class Unread(Dataset):
    """Samples that nobody reads: only who comes when is asked here."""

    def __init__(self):
        super().__init__([])

    def read(self, sample_id):
        raise BadSample("text.missing", "not read")

    def place(self, sample_id):
        return Place("none.tar", str(sample_id), 0)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["a thing"], vocab_size=300, context_length=4)


def handed_out(make_builder, batches, num_workers, monkeypatch):
    """What the data loader hands out: the real source's share of each worker, in turn."""
    source = workers._Source(make_builder, batches)
    if num_workers == 0:
        yield from source
        return
    shares = []
    for worker in range(num_workers):
        info = SimpleNamespace(id=worker, num_workers=num_workers)
        monkeypatch.setattr(workers, "get_worker_info", lambda info=info: info)
        share = iter(source)
        shares.append(chain([next(share)], share))  # it asks which worker it is in, once
    while True:
        yield from (next(share) for share in shares)


@sets
@streams_1_and_4
@pytest.mark.parametrize("num_workers", WORKERS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_workers_hand_out_the_same_samples_from_every_start(
    name, streams, num_workers, world_size, tokenizer, monkeypatch, record
):
    def in_turn(make_builder, batches, **_):
        yield from handed_out(make_builder, batches, num_workers, monkeypatch)

    monkeypatch.setattr(loader, "build_in_order", in_turn)
    order = order_of(name, streams)
    per_rank = order.global_batch_size // world_size
    per_step = 2 if per_rank % 2 == 0 else 1
    steps = range(2 * order.num_samples // order.global_batch_size + 2)
    for step, rank in product(steps, range(world_size)):
        batches = training_batches(
            Unread(),
            order,
            transform=TrainTransform(1),
            tokenizer=tokenizer,
            seed=0,
            micro_batch_size=per_rank // per_step,
            first_micro_batch=step * per_step,
            rank=rank,
            world_size=world_size,
        )
        ids = chain(*(batch.sample_ids.tolist() for batch in islice(batches, 2 * per_step)))
        expected = (order.batch(s, rank=rank, world_size=world_size)[1] for s in (step, step + 1))
        assert list(ids) == np.concatenate(list(expected)).tolist()
    count, fault = len(steps) * world_size, f"{num_workers} workers, {world_size} ranks"
    record("B1", f"restart at any step, {fault}", count, "the same samples")


# --- the whole loader, with its processes ---

SHARD_SIZES = [7, 1, 15]
TENSORS = ("images", "tokens", "sample_ids", "caption_ids", "valid")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    number = 0
    for shard, size in enumerate(SHARD_SIZES):
        with TarWriter(str(folder / f"{shard}.tar")) as tar:
            for _ in range(size):
                file = io.BytesIO()
                Image.new("RGB", (9 + number, 9), (number, 0, 99)).save(file, "PNG")
                captions = [f"thing {number}", "a thing"]
                tar.write(
                    {
                        "__key__": f"{number:02}",
                        "png": file.getvalue(),
                        "json": {"captions": captions},
                    }
                )
                number += 1
    return open_shards(str(folder / "*.tar"))


def start(dataset, tokenizer, *, streams, **options):
    order = SampleOrder(
        dataset.shard_sizes, seed=1, streams=streams, global_batch_size=8, block_size=3
    )
    return training_batches(
        dataset,
        order,
        transform=TrainTransform(8, min_scale=0.5, horizontal_flip=0.5, erase=0.3),
        tokenizer=tokenizer,
        seed=2,
        micro_batch_size=2,
        **options,
    )


@pytest.mark.fault("B1")
@pytest.mark.parametrize(
    ("first_step", "num_workers", "world_size", "streams"),
    [
        pytest.param(0, 1, 1, 1, marks=pytest.mark.long),
        pytest.param(1, 2, 2, 1, marks=pytest.mark.long),
        (2, 3, 1, 4),  # the batch that straddles the first two epochs
        (3, 2, 4, 4),
        pytest.param(4, 0, 2, 4, marks=pytest.mark.long),
        (5, 3, 2, 1),
        pytest.param(6, 1, 1, 1, marks=pytest.mark.long),
        (7, 2, 1, 4),
        pytest.param(8, 3, 1, 1, marks=pytest.mark.long),
        pytest.param(11, 0, 4, 4, marks=pytest.mark.long),
        pytest.param(13, 1, 2, 4, marks=pytest.mark.long),
        pytest.param(17, 3, 2, 4, marks=pytest.mark.long),
    ],
)
def test_a_real_loader_restarts_where_it_was(
    dataset, tokenizer, first_step, num_workers, world_size, streams
):
    whole = islice(start(dataset, tokenizer, streams=streams), 4 * first_step, 4 * first_step + 12)
    expected = list(whole)
    per_step = 4 // world_size
    for rank in range(world_size):
        batches = start(
            dataset,
            tokenizer,
            streams=streams,
            first_micro_batch=first_step * per_step,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
        )
        for number, batch in enumerate(islice(batches, 3 * per_step)):
            step, part = divmod(number, per_step)
            same = expected[4 * step + rank * per_step + part]
            for name in TENSORS:
                assert torch.equal(getattr(batch, name), getattr(same, name)), name
        batches.close()


def test_real_loaders_show_every_sample_once_an_epoch(dataset, tokenizer):
    streams = [
        start(dataset, tokenizer, streams=4, rank=rank, world_size=2, num_workers=2)
        for rank in range(2)
    ]
    steps = sum(SHARD_SIZES)  # of 8: eight epochs to the sample
    ids = [batch.sample_ids for stream in streams for batch in islice(stream, 2 * steps)]
    for stream in streams:
        stream.close()
    assert torch.cat(ids).bincount().tolist() == [8] * steps
