"""The index that each shard gets once: where every sample lies, and what was left out.

The index of `NAME.tar` is `NAME.tar.idx` beside it, or, where that cannot be written, a file in the
cache folder named by the sha256 of the tar's path, size and time. All numbers are little-endian:

    line 1   JSON, padded so that the line ends at a multiple of 64 bytes: format, version,
             size_bytes, mtime_ns and sha256 of the tar, num_samples, fields, rejects
    records  num_samples times RECORD
    keys     every sample's key in UTF-8, end to end; a record's key_end says where its key ends
    crc32    of all bytes before it

An index whose size_bytes or mtime_ns is not the tar's is built again. Nothing else is compared.
"""

import hashlib
import json
import mmap
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt64

from vlm.data import tar
from vlm.data.remote import RemoteShard, ShardCache
from vlm.errors import DataError, DiskError
from vlm.runtime.files import write_atomic

FORMAT, VERSION = "vlm-shard-index", 1
SUFFIX = ".idx"
ALIGNMENT = 64
MAX_EXAMPLES = 3
FIELD = np.dtype([("offset", "<i8"), ("size", "<i8"), ("crc32", "<u4")])
RECORD = np.dtype(
    [("key_end", "<i8"), ("image_hash", "<u8"), ("suffix", "u1"), ("image", FIELD)]
    + [(suffix, FIELD) for suffix in tar.TEXT_SUFFIXES]
)
_ROW = struct.Struct("<qQB" + "qqI" * 4)  # a RECORD: numpy is slower for a single one


class Field(NamedTuple):
    """Where a field's bytes are in the tar; `offset` is -1 for a field that the sample lacks."""

    offset: int
    size: int
    crc32: int


class Record(NamedTuple):
    """One sample's row of the index; `suffix` counts into `tar.IMAGE_SUFFIXES`."""

    key_end: int
    image_hash: int
    suffix: int
    image: Field
    txt: Field
    json: Field
    cls: Field


@dataclass(frozen=True)
class Rejects:
    """How often something was left out for one reason, and the first few cases."""

    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """What is known of one shard as a whole; `rows` holds its samples.

    Attributes:
        path: The tar.
        index_path: The index file.
        num_samples: Samples that can be read.
        size_bytes: Of the tar.
        mtime_ns: Of the tar when it was indexed.
        sha256: Of the tar, in hex.
        fields: How often each suffix came, those that are never read too.
        rejects: What was left out, by reason.
        crc32: Of the index file.
        remote: Where the tar is, if it is not here; `path` is where its copy will be.
    """

    path: Path
    index_path: Path
    num_samples: int
    size_bytes: int
    mtime_ns: int
    sha256: str
    fields: dict[str, int]
    rejects: dict[str, Rejects]
    crc32: int
    remote: RemoteShard | None = None

    @property
    def name(self) -> str:
        """The tar's file name."""
        return self.remote.name if self.remote else self.path.name

    @property
    def where(self) -> str:
        """The tar's URL or path, for messages."""
        return str(self.remote or self.path)

    def rows(self) -> "Rows":
        """Maps the index file into memory.

        Raises:
            DataError: It is gone, or another one by now.
        """
        try:
            rows = Rows(self.index_path, self.num_samples)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.index_path}: the index is gone: {error}") from error
        if rows.crc32 != self.crc32:
            raise DataError(f"{self.index_path}: the index changed while it was in use")
        return rows


class Rows:
    """The rows of an index file, memory-mapped: processes share it, and it holds one file open."""

    def __init__(self, index_path: Path, num_samples: int) -> None:
        self._num_samples = num_samples
        with index_path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._start = self._map.find(b"\n") + 1
        self._keys = self._start + num_samples * RECORD.itemsize
        self.crc32 = int.from_bytes(self._map[-4:], "little")

    def record(self, row: int) -> Record:
        """The row's record."""
        values = _ROW.unpack_from(self._map, self._start + row * RECORD.itemsize)
        image, txt, json_, cls = (Field(*values[at : at + 3]) for at in (3, 6, 9, 12))
        return Record(values[0], values[1], values[2], image, txt, json_, cls)

    def key(self, row: int) -> str:
        """The row's sample key."""
        begin, end = (self.record(at).key_end if at >= 0 else 0 for at in (row - 1, row))
        return self._map[self._keys + begin : self._keys + end].decode()

    def image_hashes(self) -> UInt64[np.ndarray, " num_samples"]:
        """64-bit blake2b of every sample's image bytes."""
        records = np.frombuffer(self._map, RECORD, self._num_samples, self._start)
        return records["image_hash"].astype(np.uint64)


def open_index(path: Path, *, cache_dir: Path | None = None) -> ShardIndex:
    """Returns the index of a tar, built now if there is none of the tar as it is.

    Args:
        path: The tar.
        cache_dir: Where indexes go that cannot be written beside their tar.

    Raises:
        DataError: The tar is compressed, cannot be read, or changed meanwhile.
        DiskError: The index can be written nowhere.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    identity = f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    cached = (cache_dir or default_cache_dir()) / "index"
    cached = cached / (hashlib.sha256(identity.encode()).hexdigest() + SUFFIX)
    beside = path.with_name(path.name + SUFFIX)
    for candidate in (beside, cached):
        index = _load(path, candidate)
        if index and (index.size_bytes, index.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
            return index
    content = _build(path)
    problems = [f"{path}: no place for its index"]
    for candidate in (beside, cached):
        if _is_ours(candidate):
            try:
                write_atomic(candidate, content)
            except DiskError as error:
                problems = error.problems
            else:
                return _parse(path, candidate, content)
    raise DiskError(problems)


def open_remote_index(url: str, cache: ShardCache) -> ShardIndex:
    """Returns the index that lies beside a remote tar, fetched once.

    Raises:
        ConfigError: There is none.
        DataError: There is no such tar, or the index is damaged.
    """
    path = cache.file(url, ".tar")
    index = cache.index(url, lambda file: _load(path, file))
    remote = RemoteShard(url, index.size_bytes, index.sha256, cache)
    return replace(index, index_path=cache.file(url, ".idx"), remote=remote)


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/vlm`, or `~/.cache/vlm`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlm"


def _load(path: Path, index_path: Path) -> ShardIndex | None:
    """The index in a file, or None if it is missing, of another version, or damaged."""
    try:
        content = index_path.read_bytes()
        if zlib.crc32(content[:-4]) != int.from_bytes(content[-4:], "little"):
            return None
        return _parse(path, index_path, content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _parse(path: Path, index_path: Path, content: bytes) -> ShardIndex:
    header = json.loads(content.partition(b"\n")[0])
    if (header["format"], header["version"]) != (FORMAT, VERSION):
        raise ValueError(f"{index_path} has version {header['version']}, not {VERSION}")
    return ShardIndex(
        path,
        index_path,
        num_samples=header["num_samples"],
        size_bytes=header["size_bytes"],
        mtime_ns=header["mtime_ns"],
        sha256=header["sha256"],
        fields=header["fields"],
        rejects={
            reason: Rejects(found["count"], tuple(found["examples"]))
            for reason, found in header["rejects"].items()
        },
        crc32=int.from_bytes(content[-4:], "little"),
    )


def _is_ours(index_path: Path) -> bool:
    """Whether the file may be written: other programs keep other things under this name."""
    try:
        with index_path.open("rb") as file:
            return file.read(64).startswith(f'{{"format": "{FORMAT}"'.encode())
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _build(path: Path) -> bytes:
    """The content of the tar's index."""
    try:
        with path.open("rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            samples, problems, fields = tar.samples(tar.scan(file.fileno(), name=path.name))
            payload = _payload(file.fileno(), samples)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            after = os.fstat(file.fileno())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    if not fields:  # perhaps no tar at all: leave no index beside it
        problem = problems[0] if problems else tar.Problem("shard.empty", 0, "it has no members")
        raise DataError(
            f"{path.name}: holds no samples: {problem.reason} at byte {problem.offset}: "
            f"{problem.detail}"
        )
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError(f"{path}: changed while it was indexed; index it when it is finished")
    header = {
        "format": FORMAT,
        "version": VERSION,
        "size_bytes": after.st_size,
        "mtime_ns": after.st_mtime_ns,
        "sha256": digest,
        "num_samples": len(samples),
        "fields": dict(fields.most_common(100)),
        "rejects": _summary(problems),
    }
    line = json.dumps(header).encode()
    padding = -(len(line) + 1) % ALIGNMENT
    content = line + b" " * padding + b"\n" + payload
    return content + zlib.crc32(content).to_bytes(4, "little")


def _payload(descriptor: int, samples: Sequence[tar.TarSample]) -> bytes:
    records = np.zeros(len(samples), RECORD)
    keys = [sample.key.encode() for sample in samples]
    records["key_end"] = np.cumsum([len(key) for key in keys])
    for row, sample in enumerate(samples):
        suffix, member = sample.image()  # type: ignore[misc]  # tar.samples keeps none without
        crc32, image_hash = _checksums(descriptor, member)
        records[row]["suffix"] = tar.IMAGE_SUFFIXES.index(suffix)
        records[row]["image_hash"] = image_hash
        records[row]["image"] = (member.offset, member.size, crc32)
        for suffix in tar.TEXT_SUFFIXES:
            text = sample.fields.get(suffix)
            crc32 = _checksums(descriptor, text)[0] if text else 0
            records[row][suffix] = (text.offset, text.size, crc32) if text else (-1, 0, 0)
    return records.tobytes() + b"".join(keys)


def _checksums(descriptor: int, member: tar.Member) -> tuple[int, int]:
    """The crc32 and the 64-bit blake2b of a member's bytes."""
    crc32, blake, end = 0, hashlib.blake2b(digest_size=8), member.offset + member.size
    for offset in range(member.offset, end, tar.CHUNK):
        data = os.pread(descriptor, min(tar.CHUNK, end - offset), offset)
        crc32 = zlib.crc32(data, crc32)
        blake.update(data)
    return crc32, int.from_bytes(blake.digest(), "little")


def _summary(problems: Sequence[tar.Problem]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for problem in problems:
        entry = found.setdefault(problem.reason, {"count": 0, "examples": []})
        entry["count"] += 1
        if entry["count"] <= MAX_EXAMPLES:
            entry["examples"].append(f"at byte {problem.offset}: {problem.detail}")
    return found
