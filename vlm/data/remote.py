"""Shards at URLs: downloaded once a node, verified, and kept in a folder of bounded size.

    KEY.tar        a verified shard; KEY is the sha256 of its URL, its time that of its last use
    KEY.part       what is being downloaded, at its full size from the start: the room is taken
    index/KEY.idx  a shard's index; small, so it stays
    locks/KEY      locked by who downloads the shard; locks/room by who makes room

The locks are flock's, which end with their holder however it dies. A reader holds a shared lock on
the tar that it has open, and a tar is deleted under an exclusive one. So nothing in use goes, and
who opened a tar just before that finds it without a name once the lock is his, and fetches it.
"""

import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from vlm.data.fetch import Patience, Stopped, fetch, writing
from vlm.data.streams import MissingError, is_http, probe, shown
from vlm.errors import ConfigError, DiskError
from vlm.runtime.files import locked, sha256_file

GIB = 2**30
ROOM_TIMEOUT_S = 600.0  # a read holds a shard for a moment, a download until it ends
POLL_S = 0.05

T = TypeVar("T")


@dataclass(frozen=True)
class ShardCache:
    """A folder of this node's own for copies of remote shards.

    Attributes:
        folder: Where.
        max_bytes: Of all shards in it, those being downloaded too.
        patience: With servers.
    """

    folder: Path
    max_bytes: int
    patience: Patience = field(default_factory=Patience)

    def file(self, url: str, suffix: str) -> Path:
        """Where something that belongs to a URL lies: equal file names do not meet."""
        folder = self.folder / "index" if suffix == ".idx" else self.folder
        return folder / (_key(url) + suffix)

    def lock(self, url: str) -> Path:
        """The lock file of who downloads a URL."""
        return self.folder / "locks" / _key(url)

    def index(self, url: str, load: Callable[[Path], T | None]) -> T:
        """Returns what `load` makes of a shard's index, which is fetched if none is here.

        Args:
            url: Of the shard; the index lies beside it.
            load: Reads an index file; None if that is missing, damaged, or of another version.

        Raises:
            ConfigError: The shard has no index.
            DataError: Neither is there, or the index is damaged.
        """
        path, source = self.file(url, ".idx"), index_url(url)
        if (known := load(path)) is not None:
            return known
        with locked(self.lock(source)), writing(path):
            if (known := load(path)) is not None:
                return known
            path.parent.mkdir(exist_ok=True)
            part = path.with_suffix(".part")
            try:
                self._fetch_index(url, part, load)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        found = load(path)
        assert found is not None
        return found

    def _fetch_index(self, url: str, part: Path, load: Callable[[Path], T | None]) -> None:
        def check(path: Path) -> str | None:
            return None if load(path) is not None else "it is damaged, or of another version of vlm"

        try:
            fetch(index_url(url), part, check=check, patience=self.patience)
        except MissingError as missing:
            probe(url, self.patience.timeout_s)
            raise ConfigError(
                f"{missing}; a remote shard needs its index beside it: run "
                '"vlm data index FOLDER/*.tar" where the tars are, and upload the .tar.idx files'
            ) from missing

    def reserve(self, part: Path, size_bytes: int, stop: threading.Event) -> None:
        """Makes an empty file of so many bytes, in room that it makes; waits for what is in use.

        Raises:
            DiskError: All that is there stays in use.
            Stopped: `stop` was set.
        """
        deadline = time.monotonic() + ROOM_TIMEOUT_S
        while (excess := self._try_to_reserve(part, size_bytes)) > 0:
            if stop.wait(POLL_S):
                raise Stopped
            if time.monotonic() > deadline:
                raise DiskError(
                    f"{self.folder}: no room for {size_bytes} more bytes, all shards in it are in "
                    f"use; raise data.shard_cache_gib by {excess / GIB:.3g}"
                )

    def _try_to_reserve(self, part: Path, size_bytes: int) -> int:
        """Returns how many bytes of room are missing; none if it is done."""
        with locked(self._room), writing(part):
            excess = self._evict(size_bytes)
            if excess <= 0:
                with part.open("wb") as file:
                    file.truncate(size_bytes)
        return excess

    def keep(self, part: Path, path: Path) -> None:
        """Gives what was downloaded its name, and no one who counts misses it."""
        with locked(self._room), writing(path):
            part.replace(path)

    @property
    def _room(self) -> Path:
        return self.folder / "locks" / "room"

    def _evict(self, size_bytes: int) -> int:
        """Deletes the shards used longest ago, for so many bytes; returns how many are missing."""
        files = list(_sizes_and_times(self.folder))
        excess = sum(stat.st_size for _, stat in files) + size_bytes - self.max_bytes
        for path, stat in sorted(files, key=lambda file: file[1].st_mtime_ns):
            if excess <= 0:
                break
            if _delete_unused(path) if path.suffix == ".tar" else self._delete_left(path):
                excess -= stat.st_size
        return excess

    def _delete_left(self, part: Path) -> bool:
        """Deletes what a killed download left, unless it is a live one's."""
        with locked(self.folder / "locks" / part.stem, wait=False) as held:
            if held:
                part.unlink(missing_ok=True)
            return held


@dataclass(frozen=True)
class RemoteShard:
    """A tar at a URL: what its index says of it, and the cache through which it is read."""

    url: str
    size_bytes: int
    sha256: str
    cache: ShardCache = field(repr=False)

    def __str__(self) -> str:
        return shown(self.url)

    @property
    def name(self) -> str:
        """The file name in the URL."""
        return shard_name(self.url)

    @property
    def path(self) -> Path:
        """Of the copy."""
        return self.cache.file(self.url, ".tar")

    @property
    def is_here(self) -> bool:
        """Whether the cache has a copy of the right size."""
        try:
            return self.path.stat().st_size == self.size_bytes
        except FileNotFoundError:
            return False

    def open(self) -> int:
        """Returns a descriptor of the copy, made now if there is none.

        While it is open the copy is not deleted, so close it soon.

        Raises:
            ConfigError: The cache is smaller than the shard.
            DataError: It cannot be had, or is not what its index says.
            DiskError: The cache cannot be written.
        """
        while (descriptor := self._open_here()) is None:
            self.fetch()
        return descriptor

    def _open_here(self) -> int | None:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            stat = os.fstat(descriptor)
            if stat.st_nlink and stat.st_size == self.size_bytes:
                with suppress(PermissionError):  # another user's
                    os.utime(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def fetch(self, *, wait: bool = True, stop: threading.Event | None = None) -> None:
        """Makes the copy if there is none; without `wait`, leaves it to a process that is at it.

        Raises:
            ConfigError, DataError, DiskError: As `open` does.
            Stopped: `stop` was set.
        """
        if self.is_here:
            return
        if self.size_bytes > self.cache.max_bytes:
            raise ConfigError(
                f"data.shard_cache_gib ({self.cache.max_bytes / GIB:.3g}) is less than one shard: "
                f"{self} has {self.size_bytes / GIB:.3g} GiB"
            )
        with locked(self.cache.lock(self.url), wait=wait) as held:
            if not held or self.is_here:
                return
            part = self.cache.file(self.url, ".part")
            try:
                part.unlink(missing_ok=True)  # by one that was killed
                self.cache.reserve(part, self.size_bytes, stop or threading.Event())
                fetch(
                    self.url,
                    part,
                    size_bytes=self.size_bytes,
                    sha256=self.sha256,
                    patience=self.cache.patience,
                    stop=stop,
                )
                self.cache.keep(part, self.path)
            finally:
                part.unlink(missing_ok=True)

    def touch(self) -> None:
        """Counts as used now, if it is here."""
        with suppress(OSError):
            os.utime(self.path)

    def recheck(self) -> None:
        """Deletes the copy if its bytes are no longer those of the index."""
        with locked(self.cache.lock(self.url)):
            if self.is_here and sha256_file(self.path) != self.sha256:
                self.path.unlink(missing_ok=True)


def index_url(url: str) -> str:
    """Where a shard's index lies: beside it, before a query."""
    base, question_mark, query = url.partition("?") if is_http(url) else (url, "", "")
    return f"{base}.idx{question_mark}{query}"


def shard_name(url: str) -> str:
    """The file name in a URL."""
    base = url.partition("?")[0] if is_http(url) else url
    return base.rpartition("/")[2]


def _key(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()


def _sizes_and_times(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.iterdir():
        if path.suffix in (".tar", ".part"):
            with suppress(FileNotFoundError):  # a download that failed just now
                yield path, path.stat()


def _delete_unused(path: Path) -> bool:
    """Deletes a tar unless a process has it open."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
