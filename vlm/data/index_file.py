"""The file that holds a shard's index: its format, and its rows mapped into memory.

All numbers are little-endian:

    line 1   JSON, padded so that the line ends at a multiple of 64 bytes: format, version,
             size_bytes, mtime_ns and sha256 of the tar, num_samples, columns, texts_alone, fields,
             rejects, quarantine
    records  num_samples times RECORD
    columns  for each name in `columns`, num_samples float64: that number of the samples' JSON
    keys     every sample's key in UTF-8, end to end; a record's key_end says where its key ends
    crc32    of all bytes before it
"""

import json
import mmap
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from vlm.data.grouping import TEXT_SUFFIXES
from vlm.data.remote import RemoteShard
from vlm.data.tar import Problem
from vlm.errors import DataError

FORMAT, VERSION = "vlm-shard-index", 3
SUFFIX = ".idx"  # after the whole name of the tar
ALIGNMENT = 64
MAX_QUARANTINE = 100  # cases of one reason that an index keeps of its shard; all are counted
FIELD = np.dtype([("offset", "<i8"), ("size", "<i8"), ("crc32", "<u4")])
RECORD = np.dtype(
    [("key_end", "<i8"), ("image_hash", "<u8"), ("suffix", "u1"), ("format", "u1")]
    + [("width", "<i4"), ("height", "<i4"), ("caption_length", "<i4"), ("image", FIELD)]
    + [(suffix, FIELD) for suffix in TEXT_SUFFIXES]
)
_ROW = struct.Struct("<qQBBiii" + "qqI" * 4)  # a RECORD: numpy is slower for a single one


class Field(NamedTuple):
    """Where a field's bytes are in the tar; `offset` is -1 for a field that the sample lacks."""

    offset: int
    size: int
    crc32: int


class Record(NamedTuple):
    """One sample's row of the index.

    `suffix` counts into `grouping.IMAGE_SUFFIXES`, `format` into `decode.FORMATS`; the size is the
    upright picture's, in pixels; `caption_length` is the longest caption's, in characters.
    """

    key_end: int
    image_hash: int
    suffix: int
    format: int
    width: int
    height: int
    caption_length: int
    image: Field
    txt: Field
    json: Field
    cls: Field


@dataclass(frozen=True)
class Details:
    """What an index tells beyond what reading needs.

    Attributes:
        fields: How often each suffix came, those that are never read too.
        quarantine: What was left out, at most `MAX_QUARANTINE` cases of a reason.
    """

    fields: dict[str, int]
    quarantine: tuple[Problem, ...]


@dataclass(frozen=True, eq=False, slots=True)
class ShardIndex:
    """What is known of one shard as a whole; `rows` holds its samples.

    Attributes:
        path: The tar, which is opened only when a sample is read.
        index_path: The index file.
        num_samples: Samples that can be read.
        size_bytes: Of the tar.
        mtime_ns: Of the tar when it was indexed.
        sha256: Of the tar, in hex.
        crc32: Of the index file.
        columns: The numbers of the samples' JSON that it holds.
        rejects: What was left out, counted by reason.
        texts_alone: None of its samples has a picture.
        remote: Where the tar is, if it is not here; `path` is where its copy will be.
    """

    path: Path
    index_path: Path
    num_samples: int
    size_bytes: int
    mtime_ns: int
    sha256: str
    crc32: int
    columns: tuple[str, ...]
    rejects: dict[str, int]
    texts_alone: bool = False
    remote: RemoteShard | None = None

    @property
    def name(self) -> str:
        """The tar's file name."""
        return self.remote.name if self.remote else self.path.name

    @property
    def where(self) -> str:
        """The tar's URL or path, for messages."""
        return str(self.remote or self.path)

    def is_of(self, stat: os.stat_result) -> bool:
        """Whether the tar is still as it was when it was indexed, by its size and time."""
        return (self.size_bytes, self.mtime_ns) == (stat.st_size, stat.st_mtime_ns)

    def rows(self) -> "Rows":
        """Maps the index file into memory.

        Raises:
            DataError: It is gone, or another one by now.
        """
        try:
            return Rows(self)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.index_path}: the index is gone: {error}") from error

    def details(self) -> Details:
        """Reads what the index tells beyond the rest.

        Raises:
            DataError: It is gone.
        """
        try:
            with self.index_path.open("rb") as file:
                header = json.loads(file.readline())
        except (OSError, ValueError) as error:
            raise DataError(f"{self.index_path}: the index is gone: {error}") from error
        quarantine = tuple(Problem(*case) for case in header["quarantine"])
        return Details(header["fields"], quarantine)


class Rows:
    """The rows of an index file, memory-mapped: processes share it, and it holds one file open."""

    def __init__(self, shard: ShardIndex) -> None:
        with shard.index_path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._shard = shard
        self._start = self._map.find(b"\n") + 1
        self._columns = self._start + shard.num_samples * RECORD.itemsize
        self._keys = self._columns + 8 * shard.num_samples * len(shard.columns)
        if int.from_bytes(self._map[-4:], "little") != shard.crc32:
            raise DataError(f"{shard.index_path}: the index changed while it was in use")

    def record(self, row: int) -> Record:
        """The row's record."""
        values = _ROW.unpack_from(self._map, self._start + row * RECORD.itemsize)
        fields = (Field(*values[at : at + 3]) for at in (7, 10, 13, 16))
        return Record._make((*values[:7], *fields))

    def key(self, row: int) -> str:
        """The row's sample key."""
        begin, end = (self.record(at).key_end if at >= 0 else 0 for at in (row - 1, row))
        return self._map[self._keys + begin : self._keys + end].decode()

    def records(self) -> Any:
        """All records, as an array of RECORD.

        Raises:
            DataError: The file is not the one that was written.
        """
        if zlib.crc32(memoryview(self._map)[:-4]) != self._shard.crc32:
            raise DataError(
                f"{self._shard.index_path}: the index is damaged; delete it to index again"
            )
        return np.frombuffer(self._map, RECORD, self._shard.num_samples, self._start)

    def column(self, name: str) -> Float64[np.ndarray, " num_samples"]:
        """A number of every sample's JSON; NaN where it has none.

        Raises:
            DataError: It was not indexed.
        """
        if name not in self._shard.columns:
            raise DataError(
                f'{self._shard.name}: "{name}" was not indexed; run vlm data index with '
                f"--field {name}"
            )
        count = self._shard.num_samples
        start = self._columns + 8 * count * self._shard.columns.index(name)
        return np.frombuffer(self._map, "<f8", count, start).astype(np.float64)


def encode_index(
    header: dict[str, Any],
    *,
    keys: Sequence[str],
    records: Sequence[Record],
    numbers: Sequence[Sequence[float]],
) -> bytes:
    """Returns the bytes of an index file.

    Args:
        header: What line 1 says beside format and version.
        keys: Of the samples.
        records: Of the samples, their key_end not yet known.
        numbers: Of each sample, one for each of the header's columns.
    """
    line = json.dumps({"format": FORMAT, "version": VERSION, **header}).encode()
    spelled = [key.encode() for key in keys]
    rows = np.array(records, RECORD)
    rows["key_end"] = np.cumsum([len(key) for key in spelled], dtype=np.int64)
    columns = np.array(numbers, "<f8").reshape(len(keys), len(header["columns"])).T
    padding = b" " * (-(len(line) + 1) % ALIGNMENT) + b"\n"
    content = b"".join([line, padding, rows.tobytes(), columns.tobytes(), *spelled])
    return content + zlib.crc32(content).to_bytes(4, "little")


def decode_index(content: bytes, *, path: Path, index_path: Path) -> ShardIndex:
    """Returns what an index file's bytes say of the tar at `path`.

    Raises:
        ValueError: They are damaged, of another version, or no index at all.
    """
    if zlib.crc32(content[:-4]) != int.from_bytes(content[-4:], "little"):
        raise ValueError(f"{index_path}: its checksum is wrong")
    header = json.loads(content.partition(b"\n")[0])
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{index_path}: is no index of a shard")
    if header["version"] != VERSION:
        raise ValueError(f"{index_path}: has version {header['version']}, not {VERSION}")
    return ShardIndex(
        path,
        index_path,
        num_samples=header["num_samples"],
        size_bytes=header["size_bytes"],
        mtime_ns=header["mtime_ns"],
        sha256=header["sha256"],
        crc32=int.from_bytes(content[-4:], "little"),
        columns=tuple(header["columns"]),
        rejects=header["rejects"],
        texts_alone=header["texts_alone"],
    )


def count_rejects(problems: Iterable[Problem]) -> tuple[dict[str, int], list[Problem]]:
    """How often each reason came, and the first `MAX_QUARANTINE` cases of each."""
    counts: Counter[str] = Counter()
    kept = []
    for problem in problems:
        counts[problem.reason] += 1
        if counts[problem.reason] <= MAX_QUARANTINE:
            kept.append(problem)
    return dict(counts), kept
