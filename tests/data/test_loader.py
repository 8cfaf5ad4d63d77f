"""The loader: the same batches for any workers, ranks and start, and no silent loss."""

import io
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from vlm.data import workers
from vlm.data.dataset import open_shards
from vlm.data.loader import evaluation_batches, training_batches
from vlm.data.order import SampleOrder, check_positive, draws_of_visit
from vlm.data.transforms import EvalTransform, TrainTransform
from vlm.data.workers import build_in_order
from vlm.errors import ConfigError, DataError
from vlm.tokenizer import caption_id, train_bpe

SHARD_SIZES = [7, 1, 15]
BROKEN, WITHOUT_CAPTION = 4, 12  # sample ids
TRANSFORM = TrainTransform(16, min_scale=0.5, horizontal_flip=0.5, color_jitter=0.3, erase=0.3)
TENSORS = ("images", "tokens", "sample_ids", "caption_ids", "valid")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    sample_id = 0
    for shard, size in enumerate(SHARD_SIZES):
        with webdataset.TarWriter(str(folder / f"part-{shard}.tar")) as tar:
            for _ in range(size):
                tar.write(_sample(sample_id))
                sample_id += 1
    return open_shards(str(folder / "part-*.tar"))


def _sample(sample_id):
    rng = np.random.default_rng(sample_id)
    pixels = rng.integers(256, size=(20 + sample_id, 30, 3), dtype=np.uint8)
    file, suffix = io.BytesIO(), ("webp", "png", "jpg")[sample_id % 3]
    Image.fromarray(pixels).save(file, {"jpg": "JPEG"}.get(suffix, suffix.upper()))
    data = file.getvalue()
    sample = {
        "__key__": f"s{sample_id:02}",
        suffix: data[: len(data) // 2] if sample_id == BROKEN else data,
    }
    if sample_id != WITHOUT_CAPTION:
        sample["json"] = {"captions": [f"Thing {sample_id}", "a thing"], "label": sample_id % 3}
    return sample


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["a thing", "Thing 12"], vocab_size=300, context_length=12)


@pytest.fixture
def batches(dataset, tokenizer):
    """Training batches of 4 of a global batch of 12, closed at the end of the test."""
    opened = []

    def start(micro_batch_size=4, transform=TRANSFORM, **options):
        order = SampleOrder(dataset.shard_sizes, seed=5, streams=2, global_batch_size=12)
        generator = training_batches(
            dataset,
            order,
            transform=transform,
            tokenizer=tokenizer,
            seed=9,
            micro_batch_size=micro_batch_size,
            **options,
        )
        opened.append(generator)
        return generator

    yield start
    for generator in opened:
        generator.close()
    assert multiprocessing.active_children() == []


def assert_equal(batch, other):
    for name in TENSORS:
        assert torch.equal(getattr(batch, name), getattr(other, name)), name
    assert batch.bad == other.bad


def joined(parts, name):
    return torch.cat([getattr(part, name) for part in parts])


# --- what is in a batch -------------------------------------------------------------------------


def test_rows_are_read_drawn_and_encoded_as_documented(dataset, tokenizer, batches):
    order = SampleOrder(dataset.shard_sizes, seed=5, streams=2, global_batch_size=12)
    chosen = set()
    for step, batch in enumerate(islice(batches(12), 6)):
        epochs, ids = order.batch(step)
        assert batch.sample_ids.tolist() == ids.tolist()
        for row, (epoch, sample_id) in enumerate(zip(epochs.tolist(), ids.tolist(), strict=True)):
            if sample_id in (BROKEN, WITHOUT_CAPTION):
                assert not batch.valid[row]
                continue
            sample, draws = dataset.read(sample_id), draws_of_visit(9, epoch, sample_id)
            caption = sample.captions[int(next(draws) * 2)]
            chosen.add(sample.captions.index(caption))
            pixels = torch.from_numpy(TRANSFORM(sample.image, draws)).permute(2, 0, 1)
            assert torch.equal(batch.images[row], pixels)
            assert torch.equal(batch.tokens[row], tokenizer(caption)[0])
            assert batch.caption_ids[row] == caption_id(tokenizer.clean(caption))
    assert chosen == {0, 1}


def test_tags_are_shuffled_behind_their_name(tmp_path, tokenizer):
    with webdataset.TarWriter(str(tmp_path / "tags.tar")) as tar:
        picture = _sample(1)["png"]
        tar.write({"__key__": "a", "png": picture, "txt": "thing: one, two, three"})
        tar.write({"__key__": "b", "png": picture, "txt": "a thing"})
    dataset = open_shards(str(tmp_path / "tags.tar"))
    order = SampleOrder(dataset.shard_sizes, seed=5, streams=1, global_batch_size=2)
    seen = set()
    options = {"transform": TRANSFORM, "tokenizer": tokenizer, "seed": 9, "micro_batch_size": 2}
    for batch in islice(training_batches(dataset, order, shuffle_tags=True, **options), 40):
        seen |= set(batch.caption_ids.tolist())
    orders = itertools.permutations(("one", "two", "three"))
    expected = {f"thing: {', '.join(tags)}" for tags in orders} | {"a thing"}
    assert seen == {caption_id(tokenizer.clean(text)) for text in expected}


def test_images_are_uint8_in_channels_last_format(batches):
    batch = next(batches())
    assert batch.images.shape == (4, 3, 16, 16)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_bad_samples_keep_their_slot_and_are_counted(tokenizer, batches):
    parts = list(islice(batches(12), 6))  # a little more than three epochs
    ids = joined(parts, "sample_ids")
    is_bad = (ids == BROKEN) | (ids == WITHOUT_CAPTION)
    assert is_bad.sum() >= 6
    assert torch.equal(joined(parts, "valid"), ~is_bad)
    counted = sum((Counter(part.bad.counts) for part in parts), Counter())
    broken, captionless = ((ids == i).sum() for i in (BROKEN, WITHOUT_CAPTION))
    assert counted == {"image.truncated": broken, "text.missing": captionless}
    assert joined(parts, "images")[is_bad].max() == 0
    assert (joined(parts, "tokens")[is_bad] == tokenizer("")).all()
    assert (joined(parts, "caption_ids")[is_bad] == 0).all()


def test_samples_come_equally_often_and_never_look_the_same(batches):
    parts = list(islice(batches(12), 6))
    ids = joined(parts, "sample_ids")
    assert set(ids.bincount(minlength=23).tolist()) == {3, 4}
    visits = joined(parts, "images")[ids == 0]
    assert len({visit.numpy().tobytes() for visit in visits}) == len(visits)


def test_a_batch_moves_to_a_device(batches):
    moved = next(batches()).to("meta")
    assert {getattr(moved, name).device.type for name in TENSORS} == {"meta"}


# --- what it does not depend on -----------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_ranks_and_micro_batches_join_to_one_global_batch(batches, world_size, micro_batch_size):
    per_step = 12 // world_size // micro_batch_size
    ranks = [
        list(
            islice(
                batches(micro_batch_size, rank=rank, world_size=world_size),
                3 * per_step,
            )
        )
        for rank in range(world_size)
    ]
    for step, whole in enumerate(islice(batches(12), 3)):
        own = slice(step * per_step, (step + 1) * per_step)
        parts = [part for rank in ranks for part in rank[own]]
        for name in TENSORS:
            assert torch.equal(joined(parts, name), getattr(whole, name))


def test_a_run_resumes_at_any_micro_batch(batches):
    straight = list(islice(batches(), 8))
    for first in range(7):
        for batch, expected in zip(
            batches(first_micro_batch=first), straight[first:], strict=False
        ):
            assert_equal(batch, expected)


@pytest.mark.parametrize(("num_workers", "first"), [(1, 0), (2, 3), (3, 7)])
def test_workers_change_nothing(batches, num_workers, first):
    random_state = torch.get_rng_state()
    many = batches(num_workers=num_workers, first_micro_batch=first, cache_bytes=30_000)
    for batch, expected in zip(islice(many, 8), batches(first_micro_batch=first), strict=False):
        assert_equal(batch, expected)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("cache_bytes", [20_000, 10**9])
def test_the_cache_changes_nothing(batches, cache_bytes):
    transform = TrainTransform(12, min_scale=0.5)  # some JPEGs are decoded reduced, some never
    cached = batches(transform=transform, cache_bytes=cache_bytes)
    for batch, expected in zip(islice(cached, 12), batches(transform=transform), strict=False):
        assert_equal(batch, expected)


def test_cached_pictures_are_not_read_again(batches, dataset, monkeypatch):
    cached = batches(cache_bytes=10**9, transform=TrainTransform(64))
    list(islice(cached, 12))  # two epochs
    reads = []
    read = type(dataset).read
    monkeypatch.setattr(
        type(dataset), "read", lambda self, i: reads.append(int(i)) or read(self, i)
    )
    list(islice(cached, 6))
    assert set(reads) <= {BROKEN, WITHOUT_CAPTION}


# --- workers ------------------------------------------------------------------------------------


def test_a_killed_worker_is_a_data_error(batches):
    generator = batches(num_workers=2)
    next(generator)
    time.sleep(0.2)  # batches are waiting in the memory of the worker
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"a loader worker died .*if it was killed for memory"):
        list(islice(generator, 100))


@pytest.mark.long
def test_a_worker_killed_before_its_first_batch_is_a_data_error(batches):
    generator = batches(num_workers=1)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(DataError, match="a loader worker died"):
        next(generator)  # found by polling, every 5 s


def test_workers_outlive_a_signal_to_their_group(batches):
    generator = batches(num_workers=1)
    next(generator)
    pid = str(multiprocessing.active_children()[0].pid)
    subprocess.run(["kill", "-TERM", pid], check=True)
    subprocess.run(["kill", "-INT", pid], check=True)
    for batch, expected in zip(islice(generator, 12), islice(batches(), 1, 13), strict=True):
        assert_equal(batch, expected)


def test_a_script_without_a_guard_starts_workers_and_is_not_run_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from functools import partial\n"
        "from vlm.data.workers import build_in_order\n"
        "batches = build_in_order(\n"
        "    partial(partial, divmod, 7), range(1, 4), num_workers=2, batch_bytes=1\n"
        ")\n"
        "print(list(batches))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[[7, 0], [3, 1], [2, 1]]\n", "")


def test_closing_ends_the_workers_promptly(batches):
    generator = batches(num_workers=2)
    next(generator)
    assert len(multiprocessing.active_children()) == 2
    start = time.monotonic()
    generator.close()
    assert multiprocessing.active_children() == []
    assert time.monotonic() - start < 3


def test_an_unused_generator_leaves_no_workers(batches):
    batches(num_workers=1).close()
    assert multiprocessing.active_children() == []


def test_an_error_for_the_user_arrives_as_it_was_raised():
    generator = build_in_order(
        partial(partial, check_positive, "batch"), range(2, -3, -1), num_workers=2, batch_bytes=1
    )
    assert [next(generator), next(generator)] == [2, 1]
    with pytest.raises(ConfigError) as error:
        next(generator)
    assert str(error.value) == "batch (0) must be at least 1"
    assert multiprocessing.active_children() == []  # though the error holds on to its frames


def test_a_bug_in_a_worker_keeps_its_type_and_traceback():
    generator = build_in_order(partial(partial, divmod, 6), range(1), num_workers=1, batch_bytes=1)
    with pytest.raises(ZeroDivisionError, match="Traceback") as error:
        next(generator)
    assert multiprocessing.active_children() == []
    del error


@pytest.mark.parametrize(
    ("num_workers", "batch_bytes", "expected"),
    [(0, 1, None), (2, 1, 8), (2, 50 * 2**20, 2), (4, 2**30, 1)],
)
def test_prefetching_is_bounded_in_bytes(num_workers, batch_bytes, expected):
    assert workers.prefetch_factor(num_workers, batch_bytes) == expected


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
def test_a_worker_cannot_take_all_memory():
    context = workers._context()
    limit = partial(workers._limit_memory, 2**30)
    with ProcessPoolExecutor(1, mp_context=context, initializer=limit) as pool:
        assert pool.submit(len, bytes(2**10)).result() == 2**10
        with pytest.raises(MemoryError):
            pool.submit(bytes, 2**31).result()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 5}, "use world_size 4 or 6, or global_batch_size 10 or 15"),
        (
            {"micro_batch_size": 4, "world_size": 2},
            "global_batch_size / world_size (6) must be divisible by micro_batch_size (4); "
            "use micro_batch_size 3 or 6",
        ),
        ({"micro_batch_size": 0}, "micro_batch_size (0) must be at least 1"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_before_anything_starts(batches, options, message):
    with pytest.raises(ConfigError) as error:
        batches(**options)
    assert message in str(error.value)


# --- evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (1, 2), (4, 0), (30, 0)])
def test_evaluation_sees_every_sample_once_in_order(dataset, world_size, num_workers):
    transform = EvalTransform(16)
    ranks = [
        evaluation_batches(
            dataset,
            transform=transform,
            batch_size=3,
            num_workers=num_workers,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    parts = [batch for rank in ranks for batch in rank]
    assert joined(parts, "sample_ids").tolist() == list(range(23))
    samples = [sample for part in parts for sample in part.samples]
    images, valid = joined(parts, "images"), joined(parts, "valid")
    for i, (key, captions, meta) in enumerate(samples):
        assert key == dataset.key(i)
        assert valid[i] == (i != BROKEN)
        if i != BROKEN:
            assert torch.equal(images[i], transform(dataset.read(i).image))
        if i != WITHOUT_CAPTION:
            assert captions == (f"Thing {i}", "a thing")
            assert meta == {"label": i % 3}
    assert images[BROKEN].max() == 0
    assert [part.bad for part in parts if part.bad] == [{"image.truncated": 1}]
