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
    """Healthy tars in every format, names short and long; each field says whose it is, 20 times."""
    path, contents = tmp_path_factory.mktemp("healthy") / "a.tar", []
    for form in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        for folder in ("", "folder/", "früh/", "x" * 90 + "/" + "y" * 40 + "/"):
            with tarfile.open(path, "w", format=form) as tar:
                for number in range(6):
                    texts = {"jpg": f"{number} jpg ", "txt": f"{number} txt "}
                    fields = {suffix: text * (20 + 60 * number) for suffix, text in texts.items()}
                    for suffix, text in {**fields, "json": f'{{"number": {number}}}'}.items():
                        info = tarfile.TarInfo(f"{folder}s{number}.{suffix}")
                        info.size = len(text)
                        tar.addfile(info, io.BytesIO(text.encode()))
            contents.append(path.read_bytes())
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
    said = Counter(re.findall(rb"(\d) (?:jpg|txt) ", field))
    return said.most_common(1)[0][0] if said else None


@amounts
@pytest.mark.parametrize("damage", [spoil, shift])
def test_mutated_tars(tars, tmp_path, damage, count):
    rng, outcomes = random.Random(0), Counter()
    for number in range(count):
        data = bytearray(tars[number % len(tars)])
        damage(data, rng)
        path = tmp_path / f"{number}.tar"
        path.write_bytes(data)
        try:
            dataset = open_shards(str(path), log=lambda line: None)
        except DataError:
            outcomes["refused"] += 1
            continue
        outcomes["shards with rejects"] += bool(dataset.rejects)
        outcomes["rejects"] += sum(dataset.rejects.values())
        for sample_id in range(len(dataset)):
            try:
                sample = dataset.read(sample_id)
            except BadSample as bad:
                outcomes[bad.reason] += 1
                continue
            outcomes["read"] += 1
            if damage is spoil and sample.captions:
                owners = {owner(sample.image), owner(sample.captions[0].encode() + b" ")}
                assert len(owners - {None}) <= 1, sample.key
        path.unlink()
    print(dict(outcomes))
    assert outcomes["read"] > count
    assert outcomes["shards with rejects"] > count / 2


def encoded(form, **options):
    y, x = np.mgrid[:24, :40]
    rgb = np.stack([x * 6, y * 10, (x + y) * 4], 2).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, form, **options)
    return file.getvalue()


@amounts
def test_mutated_pictures(count):
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
    print(dict(outcomes))
    assert len(outcomes) >= 4


def _flip_few(data, rng):
    for _ in range(rng.randint(1, 3)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
