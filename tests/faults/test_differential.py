"""Random healthy tars: our index and WebDataset's own reader have the same keys and bytes."""

import io
import os
import random
import tarfile

import pytest
import webdataset
from PIL import Image

from vlm.data.dataset import open_shards
from vlm.data.grouping import IMAGE_SUFFIXES, TEXT_SUFFIXES

FORMATS = (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)
SIZES = (0, 1, 511, 512, 513, 3000, 70_000)


def picture(form):
    file = io.BytesIO()
    Image.new("RGB", (2, 1)).save(file, form)
    return file.getvalue()


PICTURES = [picture(form) for form in ("PNG", "GIF", "JPEG", "WEBP")]


def write_random(path, rng):
    """Samples of random fields, with folders, long names, and members that are no sample's."""
    form = rng.choice(FORMATS)
    with tarfile.open(path, "w", format=form) as tar:
        for number in range(rng.randint(1, 12)):
            folder = rng.choice(["", "./", "a/", "a.b/c/", "früh/", "長い/"])
            stretch = "x" * rng.choice([0, 0, 60, 90, 200, 900] if form else [0])
            suffixes = [rng.choice([*IMAGE_SUFFIXES, "JPG"])]
            suffixes += rng.sample([*TEXT_SUFFIXES, "npy", "seg.png", "pickle"], rng.randint(0, 5))
            rng.shuffle(suffixes)
            for suffix in suffixes:
                _add(tar, f"{folder}{number:03}{stretch}.{suffix}", _data(suffix, rng))
            if rng.random() < 0.2:
                _add(tar, rng.choice(["README", "__meta__", "__index__/x.json"]), b"no sample")


def _data(suffix, rng):
    if suffix == "json":
        return b'{"caption": "%d"}' % rng.randrange(10**9)
    if suffix in TEXT_SUFFIXES:
        return " ".join(rng.choices(["über", "a", "猫", "word"], k=rng.randrange(200))).encode()
    size = rng.choice(SIZES)
    if suffix.lower() in IMAGE_SUFFIXES:  # the index reads its header; what follows is anything
        start = rng.choice(PICTURES)
        return start + rng.randbytes(max(0, size - len(start)))
    return rng.randbytes(size)


def _add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def ours(path):
    """Every sample's fields, read where the index says they are."""
    dataset = open_shards(str(path), log=pytest.fail)
    rows, descriptor, found = dataset.shards[0].rows(), os.open(path, os.O_RDONLY), {}
    for sample_id in range(len(dataset)):
        record, sample = rows.record(sample_id), dataset.read(sample_id)
        suffix = dataset.image_suffix(sample_id)
        fields = {suffix: record.image, **{name: getattr(record, name) for name in TEXT_SUFFIXES}}
        found[sample.key] = {
            name: os.pread(descriptor, field.size, field.offset)
            for name, field in fields.items()
            if field.offset >= 0
        }
        assert found[sample.key][suffix] == sample.image
    os.close(descriptor)
    return found


def theirs(path):
    return {
        sample["__key__"]: {
            name: data for name, data in sample.items() if name in (*IMAGE_SUFFIXES, *TEXT_SUFFIXES)
        }
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
    }


@pytest.mark.filterwarnings(  # webdataset leaves its files to the garbage collector
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.long)])
def test_random_healthy_tars_read_as_webdataset_reads_them(tmp_path, record, count):
    num_samples = 0
    for seed in range(count):
        path = tmp_path / f"{seed}.tar"
        write_random(path, random.Random(seed))
        found = ours(path)
        assert found == theirs(path)
        assert list(found) == list(theirs(path))  # in the same order
        num_samples += len(found)
        path.unlink()
    assert num_samples > 4 * count
    record("K", "random healthy tars", count, f"{num_samples} samples, same keys, same bytes")
