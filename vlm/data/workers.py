"""Runs a builder of numbered batches in worker processes, whose number changes nothing.

Worker w of n builds whole batches `first + w`, `first + w + n`, ...; the data loader hands them out
in turn, so they arrive in order for any n.

Workers start by "forkserver" where there is one, else by "spawn". "fork" would copy a process that
has threads (OpenMP, CUDA, tokenizers), whose locks may be held; Python 3.12 deprecates that. The
fork server imports torch once, in 1-3 s, and then starts a worker in 50 ms. Workers do not import
the script that starts them, so it needs no `if __name__ == "__main__":`.
"""

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.context import BaseContext
from pathlib import Path
from types import ModuleType
from typing import Generic, TypeVar

import cv2
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vlm.errors import DataError, VlmError

PREFETCH_BYTES = 256 * 2**20  # of finished batches that wait in shared memory, over all workers
HEADROOM_BYTES = 2 * 2**30  # of a worker, beyond what it starts with; the largest picture takes 0.7

T = TypeVar("T")


def build_in_order(
    make_builder: Callable[[], Callable[[int], T]],
    batches: range,
    *,
    num_workers: int,
    batch_bytes: int,
    cache_bytes: int = 0,
    pin_memory: bool = False,
) -> Generator[T, None, None]:
    """The batches of these numbers, in order; closing the generator ends the workers.

    Args:
        make_builder: Called once in each worker, so it is pickled; makes what builds a batch from
            its number.
        batches: The numbers.
        num_workers: 0 builds in this process. Workers start at once, and so get ready while a
            model is built.
        batch_bytes: Rough size of a batch, by which the number of those that wait is bounded.
        cache_bytes: What a builder may keep, on top of what a batch takes.
        pin_memory: Whether to call the batches' `pin_memory`.

    Raises:
        DataError: A worker died, or raised one.
    """
    headroom_bytes = HEADROOM_BYTES + 4 * batch_bytes + cache_bytes
    with warnings.catch_warnings():  # more workers than cores is the user's choice
        warnings.filterwarnings("ignore", "This DataLoader will create")
        loader = DataLoader(
            _Source(make_builder, batches),
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor(num_workers, batch_bytes),
            multiprocessing_context=_context() if num_workers else None,
            worker_init_fn=partial(_set_up_worker, os.getpid(), headroom_bytes),
            pin_memory=pin_memory,
            generator=torch.Generator(),  # its own: the process's random state is left alone
        )
        with _sigterm_blocked(), _without_main():
            items = iter(loader)
    return _handed_on(items, num_workers)


class _Source(IterableDataset[T | VlmError], Generic[T]):
    """What a worker iterates over: its share of the batches, and at most one error, at the end."""

    def __init__(self, make_builder: Callable[[], Callable[[int], T]], batches: range) -> None:
        self.make_builder = make_builder
        self.batches = batches

    def __iter__(self) -> Iterator[T | VlmError]:
        info = get_worker_info()
        mine = self.batches[info.id :: info.num_workers] if info else self.batches
        build = self.make_builder()
        try:
            for batch in mine:
                yield build(batch)
        except VlmError as error:  # as a value: the data loader would wrap it in a traceback
            yield error


def _handed_on(items: Iterator[T | VlmError], num_workers: int) -> Generator[T, None, None]:
    """Hand on the batches, raise the errors that came as values, end the workers in any case."""
    try:
        for item in _received(items) if num_workers else items:
            if isinstance(item, VlmError):
                raise item
            yield item
    finally:
        # What its __del__ calls. Left to that, an error's traceback keeps the workers alive, and
        # they take 5 s each to end once it is collected, as a cycle: the queues go first.
        getattr(items, "_shutdown_workers", bool)()


def _received(items: Iterator[T]) -> Iterator[T]:
    """The items, with a clear error when a worker is gone."""
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            if "in DataLoader worker process" in str(error):  # raised there: a bug, not a death
                raise
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise DataError(
                f"a loader worker died ({what}); if it was killed for memory, lower "
                "data.num_workers or the batch size, or give /dev/shm more room"
            ) from error
        yield item


def prefetch_factor(num_workers: int, batch_bytes: int) -> int | None:
    """Batches a worker builds ahead: up to 8, within PREFETCH_BYTES."""
    if num_workers == 0:
        return None
    return max(1, min(8, PREFETCH_BYTES // (num_workers * max(1, batch_bytes))))


def _context() -> BaseContext:
    """How workers start; see the top of this file."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "vlm.data.loader"])
    return context


@contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """The fork server and its workers start with this mask: SIGTERM to the group waits for them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # starting it unblocks SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _without_main() -> Iterator[None]:
    """Workers need nothing of the script: it is not imported again, with or without a guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _set_up_worker(main_pid: int, headroom_bytes: int, _worker_id: int) -> None:
    """Make a worker end when its run says so, and only then; torch has set itself to one thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # before anything starts a thread, which inherits the mask
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for, args=(main_pid,), daemon=True).start()
    cv2.setNumThreads(1)
    _limit_memory(headroom_bytes)


def _end_for(main_pid: int) -> None:
    """Obey SIGTERM from the run alone.

    Sent to a process group (by `timeout`, or a cluster's scheduler) it asks the run to finish its
    step and to save, and for that it needs its workers.
    """
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_pid:
        pass
    os._exit(0)


def _limit_memory(headroom_bytes: int) -> None:
    """Let this process's address space grow by so much, so that no picture takes the machine down.

    Where the address space can be read (Linux); elsewhere the cap on pixels alone holds.
    """
    statm = Path("/proc/self/statm")
    if statm.exists():
        import resource

        used_bytes = int(statm.read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = used_bytes + headroom_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
