"""Random damage with a fixed seed: our own exceptions only, no crash, no pair of two samples."""

import io
import random
import re
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vlm.data.dataset import open_shards
from vlm.data.decode import decode_image
from vlm.data.samples import BadSample
from vlm.errors import DataError

amounts = pytest.mark.parametrize("count", [100, pytest.param(5000, marks=pytest.mark.long)])


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Healthy tars and where their samples begin: every format, names short and long.

    Each field says whose it is, 20 times and more.
    """
    path, contents = tmp_path_factory.mktemp("healthy") / "a.tar", []
    start = encoded("PNG")
    for form in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        for folder in ("", "folder/", "früh/", "x" * 90 + "/" + "y" * 40 + "/"):
            with tarfile.open(path, "w", format=form) as tar:
                for number in range(6):
                    image, text = (b"%d %s " % (number, kind) for kind in (b"png", b"txt"))
                    times = 20 + 60 * number
                    fields = {"png": start + image * times, "txt": text * times}
                    for suffix, data in {**fields, "json": b'{"number": %d}' % number}.items():
                        info = tarfile.TarInfo(f"{folder}s{number}.{suffix}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
            with tarfile.open(path) as tar:
                begins = [member.offset for member in tar.getmembers()[::3]]
            contents.append((path.read_bytes(), begins))
    return contents


def spoil(data, rng):
    """Damage in place: bytes, bits, zeroed blocks and pages, an end cut off."""
    for _ in range(rng.randint(1, 10)):
        at, kind = rng.randrange(len(data)), rng.randrange(4)
        if kind == 0:
            data[at] = rng.randrange(256)
        elif kind == 1:
            data[at] ^= 1 << rng.randrange(8)
        else:
            at -= at % 512
            size = len(data[at : at + rng.choice([512, 1024, 4096])])
            data[at : at + size] = bytes(size)
    if rng.random() < 0.2:
        del data[rng.randrange(1, len(data)) :]


def shift(data, rng):
    """Damage that moves what follows; without checksums of data, no tar reader can tell a pair."""
    for _ in range(rng.randint(1, 4)):
        at, size = rng.randrange(len(data) + 1), rng.choice([1, 100, 512, 1024, 5000])
        begin, kind = rng.randrange(len(data) + 1), rng.randrange(3)
        if kind == 0:
            del data[at : at + size]
        elif kind == 1:
            data[at:at] = data[begin : begin + size]
        else:
            data[at : at + size] = rng.randbytes(size)


def owner(field):
    """The sample that a field says it is of, by majority."""
    said = Counter(re.findall(rb"(\d) (?:png|txt) ", field))
    return said.most_common(1)[0][0] if said else None


def read_all(dataset):
    """Each sample, or the reason why it cannot be read."""
    found = []
    for sample_id in range(len(dataset)):
        try:
            found.append(dataset.read(sample_id))
        except BadSample as bad:
            found.append(bad.reason)
    return found


@amounts
@pytest.mark.parametrize("damage", [spoil, shift])
def test_mutated_tars(tars, tmp_path, record, damage, count):
    """Damaged, indexed, and damaged again: told by the index, then masked where it is read."""
    rng, outcomes = random.Random(0), Counter()
    for number in range(count):
        content, begins = tars[number % len(tars)]
        data = bytearray(content)
        damage(data, rng)
        path = tmp_path / f"{number}.tar"
        path.write_bytes(data)
        try:
            dataset = open_shards(str(path), log=lambda line: None)
        except DataError:
            outcomes["refused"] += 1
            continue
        outcomes["shards with rejects"] += bool(dataset.rejects)
        outcomes.update(dataset.rejects)
        problems = dataset.shards[0].details().quarantine
        assert Counter(problem.reason for problem in problems) == dataset.rejects
        samples = read_all(dataset)  # what the index holds can be read while the tar is as it was
        outcomes["read"] += len(samples)
        for sample in samples if damage is spoil else ():
            owners = {
                owner(sample.image),
                *map(owner, (t.encode() + b" " for t in sample.captions)),
            }
            assert len(owners - {None}) <= 1, sample.key
        if damage is spoil:
            kept = [int(sample.key[-1]) for sample in samples]
            assert kept == sorted(set(kept))
            lost = set(range(len(begins))).difference(kept)
            # zeros up to the end are how a tar ends: all that no reader can tell
            assert problems or not any(any(data[begins[sample] :]) for sample in lost)
        damage(data, rng)
        path.write_bytes(data)
        for before, after in zip(samples, read_all(dataset), strict=True):
            assert after in (before, "shard.crc")
            outcomes["masked"] += after != before
        path.unlink()
    assert outcomes["read"] > count
    assert outcomes["shards with rejects"] > count / 2
    assert {"masked", "text.encoding"} <= set(outcomes)
    assert damage is shift or "text.json" in outcomes  # too rare for a hundred shards
    assert any(reason.startswith("image.") for reason in outcomes)
    record("C6", f"tars, random damage ({damage.__name__})", count, told(outcomes))


def encoded(form, **options):
    y, x = np.mgrid[:24, :40]
    rgb = np.stack([x * 6, y * 10, (x + y) * 4], 2).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, form, **options)
    return file.getvalue()


@amounts
def test_mutated_pictures(record, count):
    rng, outcomes = random.Random(0), Counter()
    exif, grey = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("I;16", (30, 20), 30000).save(grey, "PNG")
    frames = {"save_all": True, "append_images": [Image.new("RGB", (40, 24), "red")]}
    healthy = [
        encoded("JPEG", exif=exif),
        encoded("JPEG", progressive=True),
        encoded("PNG"),
        grey.getvalue(),
        encoded("WEBP"),
        encoded("WEBP", lossless=True),
        encoded("WEBP", **frames),
        encoded("GIF", **frames),
        encoded("PNG", **frames),
    ]
    for number in range(count):
        data = bytearray(healthy[number % len(healthy)])
        rng.choice([spoil, shift, _flip_few])(data, rng)
        try:
            image = decode_image(bytes(data), max_pixels=10**6)
        except BadSample as bad:
            outcomes[bad.reason] += 1
            continue
        outcomes["decoded"] += 1
        assert image.mode == "RGB"
        assert image.width * image.height <= 10**6
    assert len(outcomes) >= 4
    record("C6", "pictures, random damage", count, told(outcomes))


def told(outcomes):
    return ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())


def _flip_few(data, rng):
    for _ in range(rng.randint(1, 3)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
