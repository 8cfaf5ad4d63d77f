"""The memory that this process holds, and its heap, which training leaves in pieces."""

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path

_IN_PIECES = 9 / 8  # of what should be: a heap is never packed to the last page
_STEPS_BETWEEN = 8  # at least: giving back and getting pages anew takes up to a fifth of a step


def resident_bytes() -> int:
    """What this process holds of the machine's memory; the most it ever held where not on Linux."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The most that it ever held."""
    return _status("VmHWM")


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


def _give_back() -> None:
    """GNU's C library can; with others there is nothing to do."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
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
