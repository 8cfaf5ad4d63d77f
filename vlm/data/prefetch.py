"""The remote shards that come next, downloaded while the present ones are read."""

import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from typing import TypeVar

from vlm.data.dataset import Dataset
from vlm.data.fetch import Stopped
from vlm.data.index_file import ShardIndex
from vlm.data.order import Order, shards_of_steps
from vlm.data.remote import GIB, RemoteShard
from vlm.errors import ConfigError, VlmError

NUM_THREADS = 4  # a single connection to an object store carries about 100 MB/s
CACHE_SHARE = 0.75  # of the cache; the rest is for who lags behind or reads other data
TOUCH_EVERY_S = 5.0
POLL_S = 1.0  # of threads that have nothing to do: how soon they end
MAX_LOOK_AHEAD = 4096  # steps

T = TypeVar("T")


class Prefetcher:
    """Threads that download what later steps read, never more than the cache holds until then.

    All processes of a node may look ahead at the same steps: each shard goes to one of them. What
    fails here is tried again, and then told, by whoever needs the shard.

    Args:
        shards: Of the data set; those that are not remote are passed over.
        needs: The shards that a step reads, as places in `shards`, in order of first use.
        first_step: Where reading begins.
        look_ahead: Steps.
    """

    def __init__(
        self,
        shards: Sequence[ShardIndex],
        needs: Callable[[int], Sequence[int]],
        *,
        first_step: int,
        look_ahead: int,
    ) -> None:
        self._shards = [shard.remote for shard in shards]
        self._needs = needs
        self._step = self._next_step = first_step
        self._look_ahead = min(look_ahead, MAX_LOOK_AHEAD)
        self._last_use: dict[int, int] = {}  # of what the steps from `_step` to `_next_step` read
        self._todo: list[int] = []  # of `_next_step - 1`
        self._touched_s = time.monotonic()
        self._changed = threading.Condition()
        self._stop = threading.Event()

    def __enter__(self) -> "Prefetcher":
        for _ in range(NUM_THREADS if any(self._shards) else 0):
            threading.Thread(target=self._work, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def reached(self, step: int) -> None:
        """Tells that reading has come to a step: what only earlier ones needed may go."""
        with self._changed:
            self._step = step
            self._next_step = max(self._next_step, step)
            self._last_use = {s: last for s, last in self._last_use.items() if last >= step}
            wanted = list(self._last_use)
            self._changed.notify_all()
        if time.monotonic() - self._touched_s > TOUCH_EVERY_S:
            self._touched_s = time.monotonic()
            for shard in wanted:  # or what waits for its use would be deleted first
                self._remote(shard).touch()

    def hand_on(
        self, batches: Generator[T, None, None], *, first_batch: int, batches_per_step: int
    ) -> Generator[T, None, None]:
        """The batches of a run, with downloads for those after them; closing ends both."""
        try:
            with self:
                for number, batch in enumerate(batches, start=first_batch):
                    self.reached(number // batches_per_step)
                    yield batch
        finally:
            batches.close()

    def _work(self) -> None:
        while not self._stop.is_set():
            if (shard := self._next()) is not None:
                with suppress(VlmError, Stopped):
                    self._remote(shard).fetch(wait=False, stop=self._stop)

    def _next(self) -> int | None:
        """A shard to download now; None if there was none yet, after a look or a wait."""
        with self._changed:  # for one step at a time: the reader comes here too
            if not self._todo and self._next_step < self._step + self._look_ahead:
                self._look_at_a_step()
            elif not self._todo or not self._fits(self._todo[0]):
                self._changed.wait(timeout=POLL_S)
            else:
                shard = self._todo.pop(0)
                self._last_use[shard] = max(self._next_step - 1, self._step)
                return shard
        return None

    def _look_at_a_step(self) -> None:
        needed = [shard for shard in self._needs(self._next_step) if self._shards[shard]]
        self._todo = [shard for shard in needed if shard not in self._last_use]
        self._last_use |= {shard: self._next_step for shard in needed if shard in self._last_use}
        self._next_step += 1

    def _fits(self, shard: int) -> bool:
        wanted = [self._remote(place) for place in (*self._last_use, shard)]
        size_bytes = sum(remote.size_bytes for remote in wanted)
        return size_bytes <= CACHE_SHARE * wanted[-1].cache.max_bytes

    def _remote(self, shard: int) -> RemoteShard:
        remote = self._shards[shard]
        assert remote is not None
        return remote


def look_ahead(
    dataset: Dataset, order: Order, *, first_step: int, rank: int, world_size: int
) -> Prefetcher:
    """What downloads the shards that an order comes to within two blocks.

    Args:
        dataset: Where its samples are.
        order: Of a run.
        first_step: Where the run begins.
        rank: Of this node among the nodes.
        world_size: Number of nodes.

    Raises:
        ConfigError: The cache is too small for the shards of one step.
    """
    sizes = dataset.shard_sizes

    def needs(step: int) -> list[int]:
        steps = range(step, step + 1)
        return shards_of_steps(order, sizes, steps, rank=rank, world_size=world_size)

    if any(shard.remote for shard in dataset.shards):
        _check_room([dataset.shards[place] for place in needs(first_step)])
    size = order.global_batch_size
    return Prefetcher(
        dataset.shards,
        needs,
        first_step=first_step,
        look_ahead=2 * max(65536, 8 * size) // size,
    )


def _check_room(used: Sequence[ShardIndex]) -> None:
    remote = [shard.remote for shard in used if shard.remote]
    needed = sum(shard.size_bytes for shard in remote)
    if remote and needed > (room := remote[0].cache.max_bytes):
        raise ConfigError(
            f"data.shard_cache_gib ({room / GIB:.3g}) is less than the {needed / GIB:.3g} GiB of "
            "shards that a step draws from on this node; give at least that, and twice as much to "
            "download ahead"
        )
