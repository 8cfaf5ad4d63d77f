"""Where this rank is, and its end, with all stacks written down, when it stays there too long."""

import contextlib
import faulthandler
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from vlm.errors import RankFailureError
from vlm.runtime import distributed, failures
from vlm.runtime.preemption import StopSignals

FIRST_STEP_FACTOR = 3  # it starts the workers, and may compile
GRACE_S = 10.0  # to write the stacks and to ask other ranks


class Watch:
    """Ends the process if a step takes too long, whatever its main thread hangs in.

    Attributes:
        phase: Of the step.
    """

    def __init__(self, folder: Path, rank: int, timeout_s: float) -> None:
        self.phase = ""
        self._path = folder / f"stacks-rank{rank}.txt"
        self._rank = rank
        self._timeout_s = timeout_s
        self._step: int | None = None
        self._deadline = float("inf")
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def where(self) -> str:
        """What this rank is doing, for a message."""
        return "start-up" if self._step is None else f"step {self._step}, {self.phase}"

    def begin(self, step: int, phase: str) -> None:
        """Step number `step`, or what belongs to it, begins; its time does."""
        self._step, self.phase = step, phase
        allowed_s = self._timeout_s
        if self._thread is None:
            allowed_s *= FIRST_STEP_FACTOR
            self._start()
        self._deadline = time.monotonic() + allowed_s
        # For what holds the interpreter's lock, where our own thread cannot run
        faulthandler.dump_traceback_later(allowed_s + 2 * GRACE_S, exit=True, file=self._file)

    def end(self, phase: str) -> None:
        """There is no limit from now on."""
        self.phase = phase
        self._deadline = float("inf")
        faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        """End the watch."""
        self.end(self.phase)
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._file.close()
            self._path.unlink()
            self._thread = None

    def _start(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("w")
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closed.wait(min(1.0, self._timeout_s / 8)):
            if time.monotonic() > self._deadline:
                self._end_process()

    def _end_process(self) -> None:
        where = self.where
        faulthandler.dump_traceback(self._file)
        told = ""
        if distributed.world_size() > 1:
            told = _others(failures.ask(failures.Saying(where, None), wait_s=GRACE_S / 2))
        line = (
            f"error: rank {self._rank} hangs: {where}, for {self._timeout_s:g} s "
            f"(run.step_timeout_s){told}; stacks: {self._path}\n"
        )
        os.write(2, line.encode())
        for child in multiprocessing.active_children():  # one that is stopped ends no other way
            child.kill()
        os._exit(RankFailureError.exit_code)


def _others(said: dict[int, failures.Saying]) -> str:
    texts = [f"rank {rank}: {saying.line}" for rank, saying in sorted(said.items())]
    silent = distributed.world_size() - 1 - len(said)
    if silent:
        known = {*said, distributed.rank()}
        names = [str(r) for r in range(distributed.world_size()) if r not in known]
        texts.append(f"no answer from rank {', '.join(names[:8])}")
    return "".join(f"; {text}" for text in texts[:8])


@contextlib.contextmanager
def watched(
    folder: Path, ranks: distributed.Ranks, stop: StopSignals, *, step_timeout_s: float
) -> Iterator[Watch]:
    """A watch over a run; what ends one of its ranks ends all, and is told as `explain` does."""
    watch = Watch(folder, ranks.rank, step_timeout_s)
    try:
        yield watch
    except BaseException as error:
        stop.at_once = False
        watch.end(watch.phase)
        told = failures.explain(error, watch.where)
        if told is error:
            raise
        raise told from error
    finally:
        watch.close()
        distributed.stop()
