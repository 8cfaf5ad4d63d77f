"""Repeats: what looks alike is found, what differs is not, and nothing is compared with all."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vlm.curate.dedup import (
    HASH,
    exact_firsts,
    groups,
    perceptual_firsts,
    perceptual_hash,
    perceptual_hashes,
)
from vlm.data.dataset import open_shards
from vlm.errors import DiskError


def drawing(seed, colour=None):
    """A picture of a few random shapes."""
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", (160, 120), "white")
    draw = ImageDraw.Draw(picture)
    for _ in range(7):
        x, y, w, h = rng.integers(0, (120, 80, 60, 50)).tolist()
        fill = colour or tuple(rng.integers(0, 256, 3).tolist())
        draw.ellipse((x, y, x + 8 + w, y + 8 + h), fill=fill)
    return picture


def saved(picture, form="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def hashed(pictures):
    return np.array([(*perceptual_hash(picture), True) for picture in pictures], HASH)


def brute_force_firsts(hashes, max_bits):
    firsts = list(range(len(hashes)))
    for later, one in enumerate(hashes):
        for earlier, other in enumerate(hashes[:later]):
            colours = np.abs(one["colour"].astype(int) - other["colour"].astype(int))
            near = (int(one["bits"]) ^ int(other["bits"])).bit_count() <= max_bits
            alike = near and colours.max() <= 8 and one["valid"] and other["valid"]
            if alike and firsts[earlier] == earlier:
                firsts[later] = earlier
                break
    return firsts


def test_compression_and_scaling_change_few_bits_and_other_pictures_many():
    originals = [drawing(seed) for seed in range(40)]
    small = [picture.resize((96, 72)) for picture in originals]
    jpeg = [Image.open(io.BytesIO(saved(p, "JPEG", quality=60))) for p in originals]
    first = hashed(originals)["bits"]
    for changed in (small, jpeg):
        differing = np.bitwise_count(first ^ hashed(changed)["bits"])
        assert np.quantile(differing, 0.9) <= 4
    others = np.bitwise_count(first[:, None] ^ first)[np.triu_indices(40, 1)]
    assert np.quantile(others, 0.01) > 10


def test_shapes_of_another_colour_and_flat_pictures_are_not_alike():
    pictures = [drawing(3, "red"), drawing(3, "blue")]
    pictures += [Image.new("RGB", (40, 40), colour) for colour in ("red", "lime", "black")]
    hashes = hashed(pictures)
    assert perceptual_firsts(hashes, max_bits=4).tolist() == [0, 1, 2, 3, 4]
    again = hashed([*pictures, Image.new("RGB", (90, 30), "lime")])
    assert perceptual_firsts(again, max_bits=4).tolist() == [0, 1, 2, 3, 4, 3]


@pytest.mark.parametrize("max_bits", [0, 1, 3, 6])
@pytest.mark.parametrize("seed", range(3))
def test_the_banded_lookup_finds_what_comparing_all_finds(max_bits, seed):
    rng = np.random.default_rng(seed)
    hashes = np.zeros(150, HASH)
    centres = rng.integers(0, 2**63, 12, dtype=np.uint64)
    for row in hashes:
        flips = np.uint64(
            sum(1 << b for b in rng.choice(64, rng.integers(0, 6), replace=False).tolist())
        )
        row["bits"] = rng.choice(centres) ^ flips
        row["colour"] = rng.choice([0, 5, 100])
        row["valid"] = rng.random() < 0.95
    firsts = perceptual_firsts(hashes, max_bits=max_bits)
    assert firsts.tolist() == brute_force_firsts(hashes, max_bits)


def test_a_chain_of_small_changes_does_not_join_what_differs():
    hashes = np.zeros(3, HASH)
    hashes["bits"], hashes["valid"] = [0, 0b111, 0b111111], True
    assert perceptual_firsts(hashes, max_bits=3).tolist() == [0, 0, 2]


def test_no_samples_have_no_repeats():
    assert perceptual_firsts(np.zeros(0, HASH), max_bits=4).tolist() == []
    assert exact_firsts(np.zeros(0, np.uint64)).tolist() == []


def test_groups_are_led_by_their_first():
    assert groups(np.array([0, 1, 0, 1, 4, 0])) == [[0, 2, 5], [1, 3]]


@pytest.fixture
def shard(make_tar):
    pictures = [saved(drawing(seed)) for seed in (0, 1, 0)] + [b"\x89PNG\r\n\x1a\n cut"]
    pictures.append(saved(drawing(1), "JPEG", quality=70))
    members = [(f"s{i}.png", data) for i, data in enumerate(pictures)]
    return make_tar(members)


def test_hashes_are_kept_beside_the_index_and_made_again_when_not_of_this_tar(shard):
    dataset = open_shards(str(shard))
    hashes = perceptual_hashes(dataset)
    assert groups(exact_firsts(dataset.image_hashes())) == [[0, 2]]
    alike = groups(perceptual_firsts(hashes, max_bits=4))
    assert [[dataset.key(i) for i in group] for group in alike] == [["s0", "s2"], ["s1", "s4"]]
    kept = shard.with_name("a.tar.phash")
    content = kept.read_bytes()
    stamp = kept.stat().st_mtime_ns
    assert np.array_equal(perceptual_hashes(dataset), hashes)
    assert kept.stat().st_mtime_ns == stamp
    for damaged in (
        content[:-9] + b"x" + content[-8:],
        content.replace(b'"sha256": "', b'"sha256": "0'),
    ):
        kept.write_bytes(damaged)
        assert np.array_equal(perceptual_hashes(dataset), hashes)
        assert kept.read_bytes() == content


def test_hashes_of_shards_in_a_read_only_folder_go_to_the_cache(shard, monkeypatch):
    from vlm.curate import dedup

    dataset = open_shards(str(shard))
    write = dedup.write_atomic

    def refuse_beside(path, data):  # root may write anywhere, so chmod would prove nothing
        if path.parent == shard.parent:
            raise DiskError("read-only")
        write(path, data)

    monkeypatch.setattr(dedup, "write_atomic", refuse_beside)
    hashes = perceptual_hashes(dataset)
    assert not shard.with_name("a.tar.phash").exists()
    monkeypatch.setattr(dedup, "_hash_sample", None)  # the second time nothing is decoded
    assert np.array_equal(perceptual_hashes(dataset), hashes)
