"""Random access to the samples of indexed shards: the one reader that everything shares."""

import hashlib
import json
import operator
import os
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from vlm.data.patterns import expand
from vlm.data.remote import ShardCache
from vlm.data.samples import BadSample, Sample, parse_texts
from vlm.data.shards import (
    Field,
    Record,
    ShardIndex,
    default_cache_dir,
    open_index,
    open_remote_index,
)
from vlm.data.tar import IMAGE_SUFFIXES
from vlm.errors import ConfigError, DataError
from vlm.runtime.files import progress

MAX_OPEN_SHARDS = 64
MAX_IMAGE_BYTES = 1 << 28
MAX_TEXT_BYTES = 1 << 20
NUM_CONNECTIONS = 16  # when indexes are fetched
SHARD_CACHE_BYTES = 100 * 2**30
NUM_READS = 3  # a network file system may hand out a bad page once


class Dataset:
    """Samples 0 .. num_samples-1 of a list of shards, or of a selection from them.

    The order is that of the shards sorted by name, and within one that of the tar. Reading is safe
    from several threads and processes; a pickle holds paths and the selection, no open file.

    Attributes:
        shards: The shards' indexes, in order.
        num_samples: Samples selected.
    """

    def __init__(
        self, shards: Sequence[ShardIndex], selection: Int64[np.ndarray, " N"] | None = None
    ) -> None:
        """Joins indexed shards.

        Args:
            shards: The indexes, in any order.
            selection: Ascending positions in the joined shards; None for all.
        """
        self.shards = sorted(shards, key=_identity)
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
            counts.update({reason: found.count for reason, found in shard.rejects.items()})
        return dict(counts)

    def key(self, sample_id: SupportsIndex) -> str:
        """The sample's key."""
        shard, row = self._locate(sample_id)
        return self._rows(shard).key(row)

    def read(self, sample_id: SupportsIndex) -> Sample:
        """Returns a sample, its bytes checked against the index.

        Raises:
            BadSample: `shard.crc` (the bytes are not those that were indexed), `shard.unreadable`,
                `image.size`, or `text.json`, `text.encoding`, `text.size`.
            IndexError: There is no such sample.
        """
        shard, row = self._locate(sample_id)
        rows = self._rows(shard)
        record, key = rows.record(row), rows.key(row)
        try:
            if record.image.size > MAX_IMAGE_BYTES:
                raise BadSample("image.size", f"more than {MAX_IMAGE_BYTES} bytes")
            image = self._bytes(shard, record.image)
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
        hashes = [shard.rows().image_hashes() for shard in self.shards]
        joined = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
        return joined if self._selection is None else joined[self._selection]

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

    def _all_texts(self) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
        for sample_id in range(self.num_samples):
            shard, row = self._locate(sample_id)
            try:
                yield self._texts(shard, self._rows(shard).record(row))
            except BadSample:  # reading it as a sample tells what is wrong
                yield (), {}

    def _texts(self, shard: ShardIndex, record: Record) -> tuple[tuple[str, ...], dict[str, Any]]:
        def text(field: Field) -> bytes | None:
            if field.offset < 0:
                return None
            if field.size > MAX_TEXT_BYTES:
                reason = "text.json" if field is record.json else "text.size"
                raise BadSample(reason, f"a text of {field.size} bytes; at most {MAX_TEXT_BYTES}")
            return self._bytes(shard, field)

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
        if shard.remote:
            return _Descriptor(shard.remote.open())
        return self._local_tar(shard.path)


class _Descriptor:
    """An open file that closes when nobody holds it: never under a thread that reads from it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def _open_tar(path: Path) -> _Descriptor:
    return _Descriptor(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def _identity(shard: ShardIndex) -> tuple[str, int, int, str]:
    return shard.name, shard.size_bytes, shard.num_samples, shard.sha256


def open_shards(
    pattern: str | Sequence[str],
    cache_dir: Path | None = None,
    *,
    shard_cache_bytes: int = SHARD_CACHE_BYTES,
    require_captions: bool = False,
    log: Callable[[str], object] = print,
) -> Dataset:
    """Opens shards as one data set, and indexes those local ones that have no index yet.

    Args:
        pattern: One or several of what `vlm.data.patterns.expand` takes.
        cache_dir: Where indexes go that cannot be written beside their tar, and what is remote;
            None for the user's.
        shard_cache_bytes: How much of remote shards is kept there.
        require_captions: Whether a data set without a single caption is an error.
        log: Gets one line for each shard from which something had to be left out.

    Raises:
        ConfigError: A command, or a remote shard that has no index.
        DataError: A shard is missing, compressed or without images; all of them are told.
        DiskError: An index can be written nowhere.
    """
    shards: list[ShardIndex] = []
    problems: list[str] = []
    cache = ShardCache((cache_dir or default_cache_dir()) / "remote", shard_cache_bytes)

    def opened(name: Path | str) -> ShardIndex | DataError:
        try:
            if isinstance(name, str):
                return open_remote_index(name, cache)
            return open_index(name, cache_dir=cache_dir)
        except DataError as error:
            return error

    names = expand(pattern)
    for found in progress(_mapped(opened, names), description="indexing", total=len(names)):
        if isinstance(found, DataError):
            problems += found.problems
        else:
            shards.append(found)
    problems += [problem for shard in shards if (problem := _useless(shard))]
    if problems:
        raise DataError(problems)
    for line in _left_out(shards):
        log(line)
    dataset = Dataset(shards)
    if require_captions and next(dataset.captions(), None) is None:
        raise DataError(_without_captions(dataset))
    return dataset


def _mapped(
    opened: Callable[[Path | str], ShardIndex | DataError], names: Sequence[Path | str]
) -> Iterator[ShardIndex | DataError]:
    """In turn where all is local: the disk and sha256 are the limit there, not the waiting."""
    if not any(isinstance(name, str) for name in names):
        yield from map(opened, names)
        return
    with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
        try:
            yield from pool.map(opened, names)
        finally:
            pool.shutdown(cancel_futures=True)


def _useless(shard: ShardIndex) -> str | None:
    """Why nothing can be read from a shard, if that is so."""
    if shard.num_samples:
        return None
    fields = ", ".join(sorted(shard.fields))
    if not any(suffix in shard.fields for suffix in IMAGE_SUFFIXES):
        images = ", ".join(IMAGE_SUFFIXES)
        return f"{shard.name}: no sample has an image field ({images}); its fields are: {fields}"
    return f"{shard.name}: every sample was rejected: {_counts(shard)}"


def _counts(shard: ShardIndex) -> str:
    return ", ".join(f"{found.count} {reason}" for reason, found in shard.rejects.items())


def _left_out(shards: Sequence[ShardIndex], limit: int = 10) -> Iterator[str]:
    damaged = [shard for shard in shards if shard.rejects]
    for shard in damaged[:limit]:
        reason, found = next(iter(shard.rejects.items()))
        yield (
            f"{shard.name}: {shard.num_samples} samples; left out: {_counts(shard)}; "
            f"first: {reason} {found.examples[0]}"
        )
    if len(damaged) > limit:
        yield f"and {len(damaged) - limit} more shards from which something was left out"


def _without_captions(dataset: Dataset) -> str:
    fields = sorted(set().union(*(shard.fields for shard in dataset.shards)))
    names = [shard.name for shard in dataset.shards]
    shown = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    return (
        f'{shown}: no sample has a caption (txt, or json with "captions" or "caption"); '
        f"the fields are: {', '.join(fields)}"
    )
