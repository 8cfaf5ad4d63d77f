"""The memory that this process holds, and its heap, whose pages a training step takes again."""

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_IN_PIECES = 9 / 8  # of what should be: a heap is never packed to the last page
_STEPS_BETWEEN = 4  # at least: giving back and getting pages anew takes up to a fifth of a step

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of malloc.h
_KEEPING = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}
_USUAL = {_MMAP_MAX: 65_536, _MMAP_THRESHOLD: 32 * 2**20, _TRIM_THRESHOLD: 64 * 2**20}
_num_keeping = 0  # uses of `pages_kept` that have not ended
_lock = threading.Lock()


def resident_bytes() -> int:
    """What this process holds of the machine's memory; the most it ever held where not on Linux."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The most that it ever held."""
    return _status("VmHWM")


@contextmanager
def pages_kept(device: torch.device) -> Iterator[None]:
    """Within, what tensors on the CPU leave stays with the process, for the next ones.

    As GNU's C library comes, a large tensor's pages go back to the system with it, and the system
    hands out others, each zeroed first: gigabytes a step. Afterwards that is so again, with the
    thresholds that the library comes to by itself where tensors are large, and what is free goes
    back. Nothing happens with other libraries, where the environment sets these options, and for
    tensors elsewhere; tensors of other threads than the main one profit less.

    Args:
        device: Where the tensors are.
    """
    if device.type != "cpu" or (library := _gnu()) is None or _is_set_by_user():
        yield
        return
    _count(library, 1)
    try:
        yield
    finally:
        _count(library, -1)


@dataclass
class Heap:
    """Gives free memory back to the system when the process holds more than it should.

    Activations come and go in many sizes, and small things that stay lie between them; the C
    library keeps what is free there, cannot place the next step's tensors in it, and grows.

    Attributes:
        planned: Bytes that the process should not hold much more than.
        room: Of these, what a step takes and frees again; kept by the heap, it is no waste.
        stays: What the process held when nothing was left to give back: caches count, too.
        steps: Since then.
    """

    planned: int
    room: int
    stays: int = 0
    steps: int = 0

    def tidy(self) -> None:
        """Call it after each step."""
        self.steps += 1
        limit = max(self.planned, self.stays + self.room) * _IN_PIECES
        if self.steps >= _STEPS_BETWEEN and resident_bytes() > limit:
            _give_back()
            self.stays, self.steps = resident_bytes(), 0


def _gnu() -> ctypes.CDLL | None:
    """The C library, if it is GNU's: with others there is nothing to keep or to give back."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None


def _is_set_by_user() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return any(
        f"MALLOC_{name.upper()}_" in os.environ or f"glibc.malloc.{name}=" in tunables
        for name in ("mmap_max", "mmap_threshold", "trim_threshold")
    )


def _count(library: ctypes.CDLL, change: int) -> None:
    """Of uses of `pages_kept`: the first changes the options, and the last changes them back."""
    global _num_keeping
    with _lock:
        _num_keeping += change
        for option, value in (_KEEPING if _num_keeping else _USUAL).items():
            library.mallopt(option, value)
        if not _num_keeping:
            _give_back()


def _give_back() -> None:
    if (library := _gnu()) is not None:
        library.malloc_trim(0)


def _status(field: str) -> int:
    """A line of Linux's /proc/self/status; elsewhere the peak.

    Not `ru_maxrss` on Linux: a process is born with that of its parent.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
