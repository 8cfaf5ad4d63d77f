"""Work spread over fresh processes, the results in the order of the items."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from vlm.errors import RankFailureError

T = TypeVar("T")
R = TypeVar("R")


def spread(function: Callable[[T], R], items: Sequence[T], *, num_workers: int) -> Iterator[R]:
    """Yields `function` of each item.

    Args:
        function: Must pickle, as the items and the results; spawned processes import it.
        items: What to work on.
        num_workers: Processes; 1 does the work here.

    Raises:
        RankFailureError: A process died.
    """
    if num_workers <= 1 or len(items) <= 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")  # a fork copies the locks of other threads
    with ProcessPoolExecutor(min(num_workers, len(items)), mp_context=context) as pool:
        try:
            yield from pool.map(function, items)
        except BrokenProcessPool as error:
            raise RankFailureError(
                f"one of {num_workers} workers died (of memory, perhaps); use --workers 1"
            ) from error
