"""Random access to the samples of indexed shards: the one reader that everything shares."""

import hashlib
import json
import operator
import os
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any, SupportsIndex, TypeVar

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64, UInt8, UInt64
from numpy.typing import NDArray

from vlm.data.findings import left_out, left_out_of_all, useless, without_captions
from vlm.data.grouping import IMAGE_SUFFIXES
from vlm.data.index_file import Field, Record, Rows, ShardIndex
from vlm.data.joined import is_joined, read_joined
from vlm.data.opening import SHARD_CACHE_BYTES, open_indexes
from vlm.data.patterns import expand
from vlm.data.samples import BadSample, Sample, parse_texts
from vlm.data.tally import Place
from vlm.errors import ConfigError, DataError

MAX_OPEN_SHARDS = 64
Value = TypeVar("Value", bound=np.generic)
NUM_READS = 3  # a network file system may hand out a bad page once


class Dataset:
    """Samples 0 .. num_samples-1 of a list of shards, or of a selection from them.

    The order is that of the shards, and within one that of the tar. Reading is safe from several
    threads and processes; a pickle holds paths and the selection, no open file.

    Attributes:
        shards: The shards' indexes, in order.
        num_samples: Samples selected.
    """

    def __init__(
        self, shards: Sequence[ShardIndex], selection: Int64[np.ndarray, " N"] | None = None
    ) -> None:
        """Joins indexed shards.

        Args:
            shards: The indexes, in order.
            selection: Ascending positions in the joined shards; None for all.
        """
        self.shards = list(shards)
        self._starts = list(accumulate((shard.num_samples for shard in self.shards), initial=0))
        self._selection = selection
        self.num_samples = self._starts[-1] if selection is None else len(selection)
        self._local_tar = lru_cache(MAX_OPEN_SHARDS)(_open_tar)
        self._rows = lru_cache(MAX_OPEN_SHARDS)(ShardIndex.rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return Dataset, (self.shards, self._selection)

    def __len__(self) -> int:
        return self.num_samples

    @property
    def shard_sizes(self) -> list[int]:
        """Samples selected from each shard."""
        if self._selection is None:
            return [shard.num_samples for shard in self.shards]
        bounds: list[int] = np.searchsorted(self._selection, self._starts).tolist()
        return [end - begin for begin, end in pairwise(bounds)]

    @property
    def fingerprint(self) -> str:
        """Sha256 over the shards (name, size, number of samples, sha256) and the selection."""
        digest = hashlib.sha256(json.dumps([_identity(shard) for shard in self.shards]).encode())
        if self._selection is not None:
            digest.update(self._selection.astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def rejects(self) -> dict[str, int]:
        """What was left out of the shards, counted by reason; of all, not of the selection."""
        counts: Counter[str] = Counter()
        for shard in self.shards:
            counts.update(shard.rejects)
        return dict(counts)

    @property
    def has_texts_alone(self) -> bool:
        """Whether some samples are texts without a picture: their `Sample.image` is empty."""
        return any(shard.texts_alone for shard in self.shards)

    def key(self, sample_id: SupportsIndex) -> str:
        """The sample's key."""
        shard, row = self._locate(sample_id)
        return self._rows(shard).key(row)

    def name(self, sample_id: SupportsIndex) -> str:
        """`SHARD.tar/KEY`."""
        shard, row = self._locate(sample_id)
        return f"{shard.name}/{self._rows(shard).key(row)}"

    def place(self, sample_id: SupportsIndex) -> Place:
        """Where the sample lies."""
        shard, row = self._locate(sample_id)
        rows = self._rows(shard)
        record = rows.record(row)
        fields = (record.image, record.txt, record.json, record.cls)
        offset = next(field.offset for field in fields if field.offset >= 0)
        return Place(shard.name, rows.key(row), offset)

    def read(self, sample_id: SupportsIndex) -> Sample:
        """Returns a sample, its bytes checked against the index.

        Raises:
            BadSample: `shard.crc` (not the bytes indexed), `shard.unreadable` or `shard.size`.
            IndexError: There is no such sample.
        """
        shard, row = self._locate(sample_id)
        rows = self._rows(shard)
        record, key = rows.record(row), rows.key(row)
        try:
            image = b"" if record.image.offset < 0 else self._bytes(shard, record.image)
            captions, meta = self._texts(shard, record)
        except BadSample as bad:
            where = f"{shard.where}: {key!r}"
            raise BadSample(bad.reason, f"{where}: {bad.detail}") from None
        return Sample(key, image, captions, meta)

    def captions(self) -> Iterator[str]:
        """Yields every caption, image by image, without reading images; bad samples have none."""
        for captions, _ in self._all_texts():
            yield from captions

    def metas(self) -> Iterator[dict[str, Any]]:
        """Yields every sample's meta by sample id, without reading images; a bad one's is empty."""
        for _, meta in self._all_texts():
            yield meta

    def image_suffix(self, sample_id: SupportsIndex) -> str:
        """The suffix under which the sample's image is stored."""
        shard, row = self._locate(sample_id)
        return IMAGE_SUFFIXES[self._rows(shard).record(row).suffix]

    def image_hashes(self) -> UInt64[np.ndarray, " num_samples"]:
        """64-bit hash of each sample's image bytes: equal pictures have equal hashes."""
        return self._gather(lambda rows: rows.records()["image_hash"], np.uint64)

    def image_sizes(self) -> Int32[np.ndarray, "num_samples 2"]:
        """Width and height of each picture, upright as far as its header tells."""

        def sizes(rows: Rows) -> Int32[np.ndarray, "n 2"]:
            records = rows.records()
            return np.stack([records["width"], records["height"]], axis=1)

        return self._gather(sizes, np.int32, 2)

    def image_formats(self) -> UInt8[np.ndarray, " num_samples"]:
        """Each picture's format, whatever its suffix says, as a place in `decode.FORMATS`."""
        return self._gather(lambda rows: rows.records()["format"], np.uint8)

    def caption_lengths(self) -> Int32[np.ndarray, " num_samples"]:
        """Characters of each sample's longest caption; 0 where it has none."""
        return self._gather(lambda rows: rows.records()["caption_length"], np.int32)

    def field(self, name: str) -> Float64[np.ndarray, " num_samples"]:
        """A number of each sample's meta; NaN where it has none.

        Raises:
            DataError: It was not indexed.
        """
        return self._gather(lambda rows: rows.column(name), np.float64)

    def select(self, mask: Bool[np.ndarray, " num_samples"]) -> "Dataset":
        """The samples where `mask` is true."""
        assert len(mask) == self.num_samples, "one truth value a sample"
        if mask.all():
            return self
        chosen = np.flatnonzero(mask)
        return Dataset(self.shards, chosen if self._selection is None else self._selection[chosen])

    def split(self, val_fraction: float) -> tuple["Dataset", "Dataset"]:
        """Returns (train, val), by a hash of the image bytes: equal pictures stay together.

        A sample is in val if its hash, as a fraction of 2^64, is below `val_fraction`, so a larger
        fraction's val contains a smaller one's.

        Raises:
            ConfigError: `val_fraction` is not in [0, 1).
        """
        if not 0 <= val_fraction < 1:
            raise ConfigError(f"val_fraction ({val_fraction}) must be at least 0 and below 1")
        is_val = self.image_hashes() < np.uint64(int(val_fraction * 2**64))
        return self.select(~is_val), self.select(is_val)

    def _locate(self, sample_id: SupportsIndex) -> tuple[ShardIndex, int]:
        position = operator.index(sample_id)
        if not 0 <= position < self.num_samples:
            raise IndexError(f"sample {position} of {self.num_samples}")
        if self._selection is not None:
            position = int(self._selection[position])
        shard = bisect_right(self._starts, position) - 1
        return self.shards[shard], position - self._starts[shard]

    def positions(self) -> Int64[np.ndarray, " num_samples"]:
        """Where the samples are among all of the shards."""
        return np.arange(self.num_samples) if self._selection is None else self._selection

    def _gather(
        self, column: Callable[[Rows], Any], dtype: type[Value], *shape: int
    ) -> NDArray[Value]:
        """A value of every sample, from the indexes alone."""
        values = np.empty((self.num_samples, *shape), dtype)
        filled = 0
        for shard, start, size in zip(self.shards, self._starts, self.shard_sizes, strict=False):
            if size:
                found = column(shard.rows())
                if self._selection is not None:
                    found = found[self._selection[filled : filled + size] - start]
                values[filled : filled + size] = found
                filled += size
        return values

    def _all_texts(self) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
        for sample_id in range(self.num_samples):
            shard, row = self._locate(sample_id)
            try:
                yield self._texts(shard, self._rows(shard).record(row))
            except BadSample:  # reading it as a sample tells what is wrong
                yield (), {}

    def _texts(self, shard: ShardIndex, record: Record) -> tuple[tuple[str, ...], dict[str, Any]]:
        def text(field: Field) -> bytes | None:
            return None if field.offset < 0 else self._bytes(shard, field)

        return parse_texts(json_text=text(record.json), txt=text(record.txt), cls=text(record.cls))

    def _bytes(self, shard: ShardIndex, field: Field) -> bytes:
        try:
            for attempt in range(NUM_READS):
                file = self._tar(shard)
                data = os.pread(file.number, field.size, field.offset)
                if len(data) == field.size and zlib.crc32(data) == field.crc32:
                    return data
                if shard.remote and attempt == 0:
                    shard.remote.recheck()
        except OSError as error:
            raise BadSample("shard.unreadable", str(error.strerror)) from error
        raise BadSample("shard.crc", f"{field.size} bytes at {field.offset} are not as indexed")

    def _tar(self, shard: ShardIndex) -> "_Descriptor":
        """The shard's tar, open; a remote one's only while it is read, or its copy could not go."""
        return _Descriptor(shard.remote.open()) if shard.remote else self._local_tar(shard)


class _Descriptor:
    """An open file that closes when nobody holds it: never under a thread that reads from it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def _open_tar(shard: ShardIndex) -> _Descriptor:
    file = _Descriptor(os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC))
    size = os.fstat(file.number).st_size
    if size != shard.size_bytes:
        raise BadSample("shard.size", f"has {size} bytes; indexed were {shard.size_bytes}")
    return file


def _identity(shard: ShardIndex) -> tuple[str, int, int, str]:
    return shard.name, shard.size_bytes, shard.num_samples, shard.sha256


def open_shards(
    pattern: str | Sequence[str],
    cache_dir: Path | None = None,
    *,
    shard_cache_bytes: int = SHARD_CACHE_BYTES,
    fields: Collection[str] = (),
    require_captions: bool = False,
    needs_images: bool = True,
    log: Callable[[str], object] = print,
) -> Dataset:
    """Opens shards as one data set, and indexes those local ones that have no index yet.

    Args:
        pattern: One or several of what `vlm.data.patterns.expand` takes, or of joined indexes,
            whose shards are looked at only when a sample is read.
        cache_dir: Where indexes go that cannot be written beside their tar, and what is remote;
            None for the user's.
        shard_cache_bytes: How much of remote shards is kept there.
        fields: Numbers of the samples' JSON that `Dataset.field` must give.
        require_captions: Whether a data set without a single caption is an error.
        needs_images: Whether shards of texts alone are an error.
        log: Gets one line for each shard from which something had to be left out.

    Raises:
        ConfigError: A command, or a remote shard that has no index.
        DataError: A shard is missing, compressed or without images; all of them are told.
        DiskError: An index can be written nowhere.
    """
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    joined = {one: read_joined(one) for one in patterns if is_joined(one)}
    names = expand([one for one in patterns if not is_joined(one)])
    shards = open_indexes(
        names,
        cache_dir=cache_dir,
        shard_cache_bytes=shard_cache_bytes,
        fields=fields,
        needs_images=needs_images,
    )
    of_joined = list(chain(*joined.values()))
    if needs_images and (texts := [shard for shard in of_joined if shard.texts_alone]):
        raise DataError([why for shard in texts if (why := useless(shard))])
    told = (left_out_of_all(name, found) for name, found in joined.items())
    for line in chain(left_out(shards), *told):
        log(line)
    dataset = Dataset(sorted([*shards, *of_joined], key=_identity))
    if require_captions and next(dataset.captions(), None) is None:
        raise DataError(without_captions(dataset.shards))
    return dataset
