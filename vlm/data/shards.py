"""Shards on disk: from a pattern to files, and the index that each file gets once.

The index of `NAME.tar` is `NAME.tar.idx` beside it, or, where that cannot be written, a file in the
cache folder named by the sha256 of the tar's path, size and time. All numbers are little-endian:

    line 1   JSON, padded so that the line ends at a multiple of 64 bytes: format, version,
             size_bytes, mtime_ns and sha256 of the tar, num_samples, fields, rejects
    records  num_samples times RECORD
    keys     every sample's key in UTF-8, end to end; a record's key_end says where its key ends
    crc32    of all bytes before it

An index whose size_bytes or mtime_ns is not the tar's is built again. Nothing else is compared.
"""

import difflib
import glob
import hashlib
import json
import mmap
import os
import re
import struct
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import UInt64

from vlm.data import tar
from vlm.errors import ConfigError, DataError, DiskError

T = TypeVar("T")

FORMAT, VERSION = "vlm-shard-index", 1
SUFFIX = ".idx"
ALIGNMENT = 64
MAX_EXPANSION = (
    100_000  # files one pattern may name; the largest public sets have half as many shards
)
MAX_EXAMPLES = 3
FIELD = np.dtype([("offset", "<i8"), ("size", "<i8"), ("crc32", "<u4")])
RECORD = np.dtype(
    [("key_end", "<i8"), ("image_hash", "<u8"), ("suffix", "u1"), ("image", FIELD)]
    + [(suffix, FIELD) for suffix in tar.TEXT_SUFFIXES]
)
_ROW = struct.Struct("<qQB" + "qqI" * 4)  # a RECORD: numpy is slower for a single one
BRACES = re.compile(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}")


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

    @property
    def name(self) -> str:
        """The tar's file name."""
        return self.path.name

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
    problem = f"{path}: no place for its index"
    for candidate in (beside, cached):
        if _is_ours(candidate):
            try:
                write_atomically(candidate, content)
            except OSError as error:
                problem = f"{candidate}: cannot write the index: {error.strerror}"
            else:
                return _parse(path, candidate, content)
    raise DiskError(problem)


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


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that its name holds the whole content or what it held before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name[:80]}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(
                file.fileno(), 0o644
            )  # mkstemp's 0600 would hide it from other users of the data
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


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


def progress(items: Iterable[T], *, description: str, total: int | None = None) -> Iterator[T]:
    """Yields the items, with a bar on standard error where that is a terminal."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(items, description, total=total, console=console, transient=True)


def expand(pattern: str | Sequence[str]) -> list[Path]:
    """Returns the local files that a shard pattern names, each once, sorted by name.

    Args:
        pattern: Globs (`train-*.tar`, `**/*.tar`), ranges (`train-{0000..0003}.tar`) and lists
            (`{train,val}.tar`), or several of these.

    Raises:
        ConfigError: A URL, a command, or more than `MAX_EXPANSION` names.
        DataError: Something that a pattern names is not there; all such patterns are told.
    """
    paths: dict[Path, Path] = {}
    problems: list[str] = []
    for one in [pattern] if isinstance(pattern, str) else pattern:
        try:
            paths |= {path.resolve(): path for path in _expand_one(one)}
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return sorted(paths.values(), key=lambda path: (path.name, str(path)))


def _expand_one(pattern: str) -> list[Path]:
    if os.path.isfile(pattern):
        return [Path(pattern)]
    if pattern == "-":
        raise ConfigError('"-": samples are read by random access; shards must be files')
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", pattern):
        raise ConfigError(f'"{pattern}": remote shards are not supported yet; name local files')
    found, missing = [], []
    for name in _alternatives(os.path.expanduser(pattern)):
        hits = _files(name)
        found += hits
        if not hits:
            missing.append(name)
    if not found:
        raise DataError(f'no shard matches "{pattern}"; {neighbours(missing[0])}')
    if missing:
        names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise DataError(f'"{pattern}": {len(missing)} of its shards are missing: {names}')
    return found


def _files(name: str) -> list[Path]:
    if not glob.has_magic(name):
        return [Path(name)] if os.path.isfile(name) else []
    # compressed tars are listed too, to be refused by name rather than passed over
    shard = re.compile(r"\.(tar|tar\.(gz|bz2|xz|zst)|tgz|tbz2?|txz)$")
    hits = glob.glob(name, recursive=True)
    return [Path(hit) for hit in hits if shard.search(hit) and os.path.isfile(hit)]


def _alternatives(pattern: str) -> list[str]:
    """The pattern without braces, once for each combination of what they hold."""
    pending, done = [pattern], list[str]()
    while pending:
        name = pending.pop()
        match = BRACES.search(name)
        if match is None:
            done.append(name)
            continue
        options = _options(*match.groups())
        if len(options) + len(pending) + len(done) > MAX_EXPANSION:
            raise ConfigError(f'"{pattern}": names more than {MAX_EXPANSION} shards')
        before, after = name[: match.start()], name[match.end() :]
        pending += [before + option + after for option in reversed(options)]
    return list(dict.fromkeys(done))


def _options(first: str | None, last: str | None, listed: str | None) -> list[str]:
    if first is None or last is None:
        return (listed or "").split(",")
    low, high = int(first), int(last)
    width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
    step = 1 if high >= low else -1
    numbers = range(low, high + step, step)[: MAX_EXPANSION + 1]  # a longer one is refused
    return [f"{number:0{width}}" for number in numbers]


def neighbours(name: str) -> str:
    """What there is in the folder where a name or pattern was looked for."""
    folder = Path(name).parent
    while glob.has_magic(str(folder)):
        folder = folder.parent
    if not folder.is_dir():
        return f"there is no folder {folder}"
    names = [entry for entry in os.listdir(folder) if not entry.endswith(SUFFIX)]
    tars = sorted(entry for entry in names if entry.endswith(".tar"))
    near = difflib.get_close_matches(Path(name).name, names, n=3, cutoff=0.5) or tars[:3]
    shown = ", ".join(near) if near else "no shards"
    return f"the folder {folder} holds {shown}"
