"""SIGTERM and SIGUSR1: a run is asked to stop, and does so where nothing is lost."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from vlm.errors import Preempted
from vlm.runtime.files import write_atomic

MARKER = "PREEMPTED"  # torchrun returns 1 whatever its ranks return, so a file says it
_SIGNALS = ("SIGTERM", "SIGUSR1")


class StopSignals:
    """Whether this process was asked to stop.

    Attributes:
        requested: It was; later signals change nothing.
        at_once: Whether a signal ends the run where it stands; else somebody looks at `requested`.
    """

    def __init__(self) -> None:
        self.requested = False
        self.at_once = True

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """The handler."""
        is_first, self.requested = not self.requested, True
        if is_first and self.at_once:
            self.at_once = False
            raise Preempted(
                f"stopped by {signal.Signals(number).name} between saved states, nothing is lost; "
                "continue with --resume auto"
            )

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """What is inside ends in its own way; a signal on its way is heeded after it."""
        before, self.at_once = self.at_once, False
        yield
        if self.requested:
            raise Preempted("stopped after the last step; continue with --resume auto")
        self.at_once = before


_active: list[StopSignals] = []  # signals belong to the process


@contextlib.contextmanager
def stop_signals(folder: Path, *, until_exit: bool = False) -> Iterator[StopSignals]:
    """Handles the signals; when they end the run, rank 0 writes a marker into its folder.

    Inside another one, or in a thread, where no handler can be set, it is the other one, or none.

    Args:
        folder: The run's.
        until_exit: Whether the process ends after this: signals that follow the first are ignored
            to its end, so that its exit code stays.
    """
    if _active:
        yield _active[-1]
        return
    stop = StopSignals()
    numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    before = {number: signal.signal(number, stop.receive) for number in numbers}
    _active.append(stop)
    try:
        _unblock(numbers)
        yield stop
    except Preempted as reason:
        stop.at_once = False
        if int(os.environ.get("RANK", 0)) == 0:
            write_atomic(folder / MARKER, f"{reason}\n".encode())
        raise
    finally:
        _active.pop()
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if until_exit and stop.requested else handler)


def _unblock(numbers: list[int]) -> None:
    """Let them arrive, whatever mask the process was born with: a parent's is inherited."""
    if numbers and hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
