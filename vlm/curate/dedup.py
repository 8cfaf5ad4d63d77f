"""Pictures that repeat: equal bytes, or perceptual hashes a few bits apart; the first one is kept.

A picture's perceptual hash is the signs of its low DCT frequencies (Zauner, Implementation and
Benchmarking of Perceptual Image Hash Functions, 2010; the pHash library's). Here its 32 x 32 greys
are box averages instead of a mean filter's samples, frequencies are rounded to whole numbers, so
that a flat picture's noise has no signs, and the mean colour is kept beside the hash: greys alone
take a red heart for a blue one.

Hashes are computed once and kept beside each shard's index, as `NAME.tar.phash`: one line of JSON
(format, version, sha256 of the tar, num_samples), then num_samples times HASH, then the crc32 of
all that. A file that is not of the tar as it is, is made again.
"""

import json
import math
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt64
from PIL import Image

from vlm.data.dataset import Dataset
from vlm.data.decode import decode_image
from vlm.data.index_file import ShardIndex
from vlm.data.samples import BadSample
from vlm.data.shards import default_cache_dir
from vlm.errors import DiskError
from vlm.runtime.files import progress, write_atomic

FORMAT, VERSION = "vlm-picture-hashes", 1
HASH = np.dtype([("bits", "<u8"), ("colour", "u1", 3), ("valid", "?")])
SIDE = 32  # of the greys
COLOUR_TOLERANCE = 8  # of 255, in each channel of the mean colour
_COSINES = np.cos(np.pi / SIDE * np.outer(np.arange(1, 9), np.arange(SIDE) + 0.5))


def perceptual_hash(picture: Image.Image) -> tuple[int, tuple[int, int, int]]:
    """64 bits that hardly change under scaling and compression, and the mean colour."""
    grey = picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    low = np.rint(_COSINES @ np.asarray(grey, np.float64) @ _COSINES.T * (2 / SIDE))
    bits = np.packbits(low > np.median(low))
    colour = picture.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    return int.from_bytes(bits.tobytes(), "little"), colour  # type: ignore[return-value]


def exact_firsts(image_hashes: UInt64[np.ndarray, " N"]) -> Int64[np.ndarray, " N"]:
    """For each sample, the first one whose image has the same bytes; itself where it is that."""
    _, index, inverse = np.unique(image_hashes, return_index=True, return_inverse=True)
    firsts: Int64[np.ndarray, " N"] = index[inverse]
    return firsts


def perceptual_firsts(hashes: Any, *, max_bits: int) -> Int64[np.ndarray, " N"]:
    """For each sample, the first kept one that looks alike; itself where it is kept.

    A sample is kept unless a kept one before it looks alike: at most `max_bits` of the hash differ,
    and no channel of the mean colour by more than `COLOUR_TOLERANCE`. So all that is dropped is
    that close to what is kept, and no chain of small changes joins pictures that differ.

    Args:
        hashes: Of the samples, as `perceptual_hashes` gives them; not valid ones are kept.
        max_bits: Of 64.
    """
    firsts = np.arange(len(hashes))
    rows = np.flatnonzero(hashes["valid"])
    packed = np.ascontiguousarray(hashes[rows]).view(f"V{HASH.itemsize}")
    _, index, inverse = np.unique(packed, return_index=True, return_inverse=True)
    order = np.argsort(index)  # of what differs: as the samples come, not by hash
    place = np.argsort(order)
    heads = rows[index[order]]
    first_head = np.arange(len(heads))
    for earlier, later in _near_pairs(hashes[heads], max_bits).tolist():
        if first_head[later] == later and first_head[earlier] == earlier:
            first_head[later] = earlier
    firsts[rows] = heads[first_head[place[inverse]]]
    return firsts


def groups(firsts: Int64[np.ndarray, " N"]) -> list[list[int]]:
    """The samples that repeat one, each group led by its first."""
    found: dict[int, list[int]] = {}
    for sample_id in np.flatnonzero(firsts != np.arange(len(firsts))).tolist():
        first = int(firsts[sample_id])
        found.setdefault(first, [first]).append(sample_id)
    return list(found.values())


def _near_pairs(hashes: Any, max_bits: int) -> Int64[np.ndarray, "P 2"]:
    """The pairs (i < j) that look alike, by j and then i; without comparing all with all.

    Cut into `max_bits + k` bands, two hashes that differ in at most `max_bits` bits agree in at
    least k bands (pigeonholes; Manku, Jain and Das Sarma, Detecting Near-Duplicates for Web
    Crawling, WWW 2007, section 3). Each choice of k bands is a key; only equal keys are compared. k
    grows with the number of hashes, so that a key has about as many values as there are hashes.
    """
    count = max(2, len(hashes))
    agree = next(k for k in range(1, 65) if k == 4 or 64 * k >= math.log2(count) * (max_bits + k))
    edges = np.rint(np.linspace(0, 64, max_bits + agree + 1)).astype(int).tolist()
    bands = [(1 << end) - (1 << start) for start, end in pairwise(edges)]
    found = [np.zeros((0, 2), np.int64)]
    for chosen in combinations(bands, agree):
        keys = hashes["bits"] & np.uint64(sum(chosen))
        found += _pairs_of_equals(keys, hashes, max_bits)
    pairs = np.unique(np.sort(np.concatenate(found), axis=1), axis=0)
    return pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]


def _pairs_of_equals(
    keys: UInt64[np.ndarray, " n"], hashes: Any, max_bits: int
) -> Iterator[Int64[np.ndarray, "p 2"]]:
    """Of the hashes whose keys are equal, the pairs that look alike."""
    order = np.argsort(keys, kind="stable")
    keys, bits = keys[order], hashes["bits"][order]
    colours = hashes["colour"][order].astype(np.int16)
    left = np.arange(len(keys))
    for gap in range(1, len(keys)):
        left = left[left + gap < len(keys)]
        left = left[keys[left] == keys[left + gap]]
        if not left.size:
            return
        near = left[np.bitwise_count(bits[left] ^ bits[left + gap]) <= max_bits]
        apart = np.abs(colours[near] - colours[near + gap]).max(axis=1, initial=0)
        near = near[apart <= COLOUR_TOLERANCE]
        yield np.stack([order[near], order[near + gap]], axis=1)


def perceptual_hashes(dataset: Dataset) -> Any:
    """The hashes of a whole data set's pictures, an array of HASH; computed for new shards only.

    Raises:
        DiskError: They can be kept nowhere.
    """
    found, start = [np.zeros(0, HASH)], 0
    for shard in progress(dataset.shards, description="hashing pictures"):
        ids = range(start, start + shard.num_samples)
        found.append(_shard_hashes(shard, dataset, ids))
        start = ids.stop
    assert start == len(dataset), "hashes are of whole shards"
    return np.concatenate(found)


def _shard_hashes(shard: ShardIndex, dataset: Dataset, ids: range) -> Any:
    header = {"format": FORMAT, "version": VERSION, "sha256": shard.sha256, "num_samples": len(ids)}
    line = json.dumps(header).encode() + b"\n"
    places = (
        Path(shard.index_path).with_suffix(".phash"),
        default_cache_dir() / "index" / f"{shard.sha256}.phash",
    )
    for path in places:
        if (kept := _read(path, line)) is not None:
            return kept
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes without the GIL
        hashes = np.array(list(pool.map(lambda i: _hash_sample(dataset, i), ids)), HASH)
    content = line + hashes.tobytes()
    content += zlib.crc32(content).to_bytes(4, "little")
    try:
        write_atomic(places[0], content)
    except DiskError:  # the shards' folder may be read-only
        write_atomic(places[1], content)
    return hashes


def _read(path: Path, line: bytes) -> Any:
    """The hashes in a file, None if it is missing, damaged or of another tar."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    whole = zlib.crc32(content[:-4]) == int.from_bytes(content[-4:], "little")
    if not (whole and content.startswith(line)):
        return None
    return np.frombuffer(content[len(line) : -4], HASH)


def _hash_sample(dataset: Dataset, sample_id: int) -> tuple[int, tuple[int, int, int], bool]:
    try:
        picture = decode_image(dataset.read(sample_id).image, min_size=2 * SIDE)
    except BadSample:  # it is never like another, and training counts it
        return 0, (0, 0, 0), False
    return *perceptual_hash(picture), True
