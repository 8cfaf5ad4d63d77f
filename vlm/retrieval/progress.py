"""How far a long pass over data is: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

SECONDS_BETWEEN_LINES = 15.0

T = TypeVar("T")


def track(
    batches: Iterable[T],
    size: Callable[[T], int],
    *,
    total: int,
    description: str,
    log: Callable[[str], object],
) -> Iterator[T]:
    """Yield the batches, showing how many samples are done.

    Args:
        batches: What to iterate over.
        size: The number of samples in a batch.
        total: The number of samples in all batches.
        description: What is being done, as "embedding".
        log: Gets the plain lines; short passes have none.
    """
    if sys.stderr.isatty():
        yield from _bar(batches, size, total, description)
    else:
        yield from _lines(batches, size, total, description, log)


def _bar(
    batches: Iterable[T], size: Callable[[T], int], total: int, description: str
) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)
        for batch in batches:
            yield batch
            bar.advance(task, size(batch))


def _lines(
    batches: Iterable[T],
    size: Callable[[T], int],
    total: int,
    description: str,
    log: Callable[[str], object],
) -> Iterator[T]:
    start = last = time.monotonic()
    done = 0
    for batch in batches:
        yield batch
        done += size(batch)
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            log(f"{description}: {done:,} of {total:,}, {done / (now - start):.1f} a second")
            last = now
