"""A URL into a file, byte for byte as its index says: bounded retries, timeouts, a hash.

What broke off goes on where it stopped, if the server can do that.
"""

import hashlib
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.error import URLError

from vlm.data.streams import Stream, open_stream, shown
from vlm.errors import DataError, DiskError

CHUNK = 1 << 20
MAX_INDEX_BYTES = 4 << 30  # the one thing whose size is not known
SLOWEST = 16 << 10  # bytes a second: a trickle below that is a stall


@dataclass(frozen=True)
class Patience:
    """How long a URL is tried.

    Attributes:
        attempts: In all.
        timeout_s: Longest silence of a server.
        wait_s: Before the second attempt; doubled before each further one, and multiplied by 0.5 to
            1.5 at random, so that many nodes do not come back at the same instant.
    """

    attempts: int = 5
    timeout_s: float = 30.0
    wait_s: float = 1.0

    def wait_before(self, attempt: int) -> float:
        """Seconds before the attempt of this number, counted from 0."""
        return self.wait_s * 2.0 ** (attempt - 1) * random.SystemRandom().uniform(0.5, 1.5)


class Stopped(Exception):  # it is an outcome, not an error
    """A download that is no longer wanted."""


def fetch(
    url: str,
    path: Path,
    *,
    size_bytes: int | None = None,
    sha256: str | None = None,
    check: Callable[[Path], str | None] = lambda path: None,
    patience: Patience,
    stop: threading.Event | None = None,
) -> None:
    """Downloads into a file that nobody else looks at, and waits until it is on disk.

    Args:
        url: What `check_url` lets pass.
        path: Where it goes; may exist.
        size_bytes: What it must have, if known.
        sha256: What it must have, in hex, if known.
        check: Says what is wrong with the file, if anything is.
        patience: How long to try.
        stop: Set when it is no longer wanted.

    Raises:
        MissingError: There is nothing at the URL.
        DataError: It could not be had, or what comes is not what the index says.
        DiskError: The file cannot be written.
        Stopped: `stop` was set.
    """
    stop = stop or threading.Event()
    problem: str | None = None
    with writing(path), path.open("r+b" if path.exists() else "w+b") as file:
        download = _Download(url, path, file, size_bytes=size_bytes, sha256=sha256, stop=stop)
        for attempt in range(patience.attempts):
            if attempt:
                _wait(url, problem, patience.wait_before(attempt), stop)
            problem = download.run(patience.timeout_s)
            problem = problem or download.finish() or check(path)
            if problem is None:
                return
    raise DataError(f"{shown(url)}: {problem}; tried {patience.attempts} times")


def _wait(url: str, problem: str | None, wait_s: float, stop: threading.Event) -> None:
    """Waits before another attempt, and says so where that takes a second or more."""
    if wait_s >= 1:
        print(f"{shown(url)}: {problem}; trying again in {wait_s:.0f} s", file=sys.stderr)
    if stop.wait(wait_s):
        raise Stopped


class _Download:
    """What of a URL has arrived, and the hash of that."""

    def __init__(
        self,
        url: str,
        path: Path,
        file: BinaryIO,
        *,
        size_bytes: int | None,
        sha256: str | None,
        stop: threading.Event,
    ) -> None:
        self.url, self.path, self.file, self.stop = url, path, file, stop
        self.size_bytes, self.sha256 = size_bytes, sha256
        self._restart()

    def _restart(self) -> None:
        self.file.seek(0)
        self.received, self.digest = 0, hashlib.sha256()

    def run(self, timeout_s: float) -> str | None:
        """Receives from where it stands to the end; returns what went wrong, if anything did."""
        try:
            with open_stream(self.url, self.received, timeout_s) as stream:
                if stream.start != self.received:
                    self._restart()
                if None not in (stream.total, self.size_bytes) and stream.total != self.size_bytes:
                    return f"it has {stream.total} bytes, and {self.size_bytes} by its index"
                self._receive(stream, timeout_s)
        except (OSError, HTTPException) as error:
            return _told(error, timeout_s)
        total = stream.total if stream.total is not None else self.size_bytes
        if total is not None and self.received < total:
            return f"it ended after {self.received} of {total} bytes"
        return None

    def _receive(self, stream: Stream, timeout_s: float) -> None:
        begun, before = time.monotonic(), self.received
        while chunk := stream.read(CHUNK):
            with writing(self.path):
                self.file.write(chunk)
            self.digest.update(chunk)
            self.received += len(chunk)
            if self.stop.is_set():
                raise Stopped
            if self.received > (MAX_INDEX_BYTES if self.size_bytes is None else self.size_bytes):
                return
            overtime_s = time.monotonic() - begun - timeout_s
            if overtime_s > 0 and self.received - before < overtime_s * SLOWEST:
                raise OSError(f"less than {SLOWEST} bytes a second")

    def finish(self) -> str | None:
        """Brings the file to disk if it is what it must be; else says why, to start anew."""
        problem = None
        if self.size_bytes is not None and self.received != self.size_bytes:
            problem = f"it has more than the {self.size_bytes} bytes of its index"
        elif self.sha256 is not None and self.digest.hexdigest() != self.sha256:
            problem = "its sha256 is not that of its index"
        else:
            with writing(self.path):
                self.file.truncate(self.received)
                self.file.flush()
                os.fsync(self.file.fileno())
        self._restart()
        return problem


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the disk refuses into a DiskError."""
    try:
        yield
    except OSError as error:
        problem = f"{path}: cannot write: {error.strerror or error}"
        raise DiskError(f"{problem}; see data.cache_dir and data.shard_cache_gib") from error


def _told(error: Exception, timeout_s: float) -> str:
    reason = error.reason if isinstance(error, URLError) else error
    if isinstance(reason, TimeoutError):
        return f"no answer for {timeout_s:g} s"
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return text[0].lower() + text[1:]
