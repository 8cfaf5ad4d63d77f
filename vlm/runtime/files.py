"""Files and folders, whole or absent: written aside, synced, renamed; locks; a progress bar."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from vlm.errors import DiskError

T = TypeVar("T")
_LEFTOVER = re.compile(r".*\.tmp-[0-9a-f]{8}|\.trash-.*")


def sha256_file(path: Path) -> str:
    """Of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json_lines(path: Path) -> Iterator[Any]:
    """The values of a file with one a line, as metrics.jsonl; what a kill cut short is left out."""
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                return


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file: readers see the old bytes or the new ones, never a part.

    Raises:
        DiskError: It cannot be written; what it held is still there.
    """
    temporary = path.with_name(f".{path.name[:80]}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_synced(temporary, data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise DiskError(f"{path}: cannot write: {error.strerror or error}") from error


@contextlib.contextmanager
def written_whole(final: Path) -> Iterator[Path]:
    """A folder to fill; it becomes `final` when the block ends, and vanishes when it raises."""
    temporary = final.with_name(f"{final.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        sync_folder(temporary)
        temporary.rename(final)
        sync_folder(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process was writing or deleting in a folder that is this one's alone.

    Raises:
        DiskError: It cannot be deleted.
    """
    try:
        for path in folder.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        raise DiskError(f"{folder}: cannot delete leftovers: {error.strerror}") from error


def check_room(folder: Path, num_bytes: int, *, num_files: int) -> None:
    """Refuse to begin what cannot be finished: a fifth more than `num_bytes` must be free.

    Raises:
        DiskError: It is not.
    """
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    needed = num_bytes * 6 // 5
    if free < needed:
        raise DiskError(f"{folder}: disk full: {_need_have(needed, free)}")
    if disk.f_files and disk.f_favail < num_files:  # f_files is 0 where inodes are not counted
        raise DiskError(
            f"{folder}: disk full: need {num_files} inodes (files), have {disk.f_favail}"
        )


def disk_error(path: Path, error: OSError, num_bytes: int) -> DiskError:
    """What the system said while `num_bytes` were written to `path`, as a line."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(next(p for p in path.parents if p.exists())).free
        return DiskError(f"{path}: disk full: {_need_have(num_bytes, free)}")
    return DiskError(f"{path}: cannot save: {error.strerror or error}")


def _need_have(needed: int, free: int) -> str:
    return f"need {needed / 2**20:.1f} MiB, have {free / 2**20:.1f} MiB"


def sync_folder(folder: Path) -> None:
    """Wait until the folder's entries are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds a lock file against other processes and threads; yields whether it could be had.

    The lock ends with its holder, however that dies; the file stays.

    Raises:
        DiskError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("wb")
    except OSError as error:
        raise DiskError(f"{path.parent}: cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def progress(items: Iterable[T], *, description: str, total: int | None = None) -> Iterator[T]:
    """Yields the items, with a bar on standard error where that is a terminal."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(items, description, total=total, console=console, transient=True)
