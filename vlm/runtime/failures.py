"""Which rank failed: ranks in trouble say so in the store of their group, and read there."""

import contextlib
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store, _get_default_store

from vlm.errors import ConfigError, Outcome, Preempted, RankFailureError
from vlm.runtime import distributed

WAIT_S = 1.0  # for other ranks' sayings: a dead one never says anything
_BROKEN = re.compile(r"gloo|NCCL|Connection (closed|reset)|Broken pipe|recvValue|Timed out wait")


class Saying(NamedTuple):
    """What a rank in trouble says; the exit code is None if it only lost the others."""

    line: str
    exit_code: int | None


def explain(
    error: BaseException, where: str, *, way_out: str = "continue with --resume auto"
) -> BaseException:
    """What this rank ends with, when it met `error`; other ranks learn of it.

    A broken connection becomes an error that names the rank that is gone or silent; `Preempted`, if
    that rank was. A line that another rank has said already is not said again: its exit code stays.

    Args:
        error: An error of this rank alone, one that all ranks have, or a connection that broke.
        where: What this rank was doing, as "step 12, computing".
        way_out: How to go on, once it is known what the rank at fault ended with.
    """
    error = _out_of_memory(error, where) or error
    if not dist.is_initialized():
        return _never_met(error) if isinstance(error, dist.DistError) else error
    if isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _BROKEN.search(str(error))
    ):
        return _blame(error, where, way_out)
    mine = Saying(" ".join(f"{error}".split())[:500], getattr(error, "exit_code", 1))
    said = ask(mine, wait_s=0)
    if isinstance(error, Preempted) and (failed := _failed(said)):
        return RankFailureError(_told(*failed))  # whoever started the ranks is ending them all
    return _once(error) if isinstance(error, Outcome) else error


def ask(mine: Saying, *, wait_s: float = WAIT_S) -> dict[int, Saying]:
    """Says so, and returns what other ranks say, once all of them have or time is over.

    Ranks that are dead or stopped are absent. So are all, if the rank that keeps the store is.
    """
    said: dict[int, Saying] = {}

    def work(store: Store) -> None:
        store.set(_key(distributed.rank()), json.dumps(mine))
        others = [r for r in range(distributed.world_size()) if r != distributed.rank()]
        pause = threading.Event()
        for _ in range(round(wait_s / 0.05)):
            if store.check([_key(other) for other in others]):
                break
            pause.wait(0.05)
        for other in others:
            if store.check([_key(other)]):
                said[other] = Saying(*json.loads(store.get(_key(other))))

    _with_store(work, wait_s + 1)
    return dict(said)


def _key(rank: int) -> str:
    return f"vlm/says/{rank}"


def _blame(error: BaseException, where: str, way_out: str) -> Outcome:
    said = ask(Saying(where, None))
    if failed := _failed(said):
        return RankFailureError(_told(*failed))
    for saying in said.values():
        if saying.exit_code == Preempted.exit_code:
            return _once(Preempted(saying.line))
    silent = [r for r in range(distributed.world_size()) if r not in {*said, distributed.rank()}]
    is_late = "Timed out" in str(error)
    what = "gave no answer in time (run.rank_timeout_s)" if is_late else "died"
    whose = f"{_ranks(silent)} {what}" if silent else "the connection between ranks broke"
    return RankFailureError(
        f"{whose}; rank {distributed.rank()} was at {where}; find out what that rank ended with, "
        f"then {way_out}"
    )


def _failed(said: dict[int, Saying]) -> tuple[int, int] | None:
    """The first rank, and its exit code, that failed by itself."""
    for rank, saying in sorted(said.items()):
        if saying.exit_code not in (None, Preempted.exit_code):
            return rank, saying.exit_code
    return None


def _out_of_memory(error: BaseException, where: str) -> ConfigError | None:
    """In a line, if that is what it is; the CPU's allocator has no type of error of its own."""
    text = " ".join(f"{error}".split())
    is_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in text
    if not is_cpu and not isinstance(error, torch.OutOfMemoryError | MemoryError):
        return None
    tried = re.search(r"[Tt]ried to allocate (\d[\d.]* \w+)", text)
    way_out = ""
    if where.endswith("computing"):
        way_out = (
            "; set train.memory_budget_gib to less than there is, or a smaller "
            "train.micro_batch_size: a step then takes micro-batches that fit"
        )
    return ConfigError(f"{where}: out of memory{f', at {tried[1]} more' if tried else ''}{way_out}")


def _told(rank: int, exit_code: int) -> str:
    return f"rank {rank} failed, with exit code {exit_code}; its own line says why"


def _never_met(error: BaseException) -> RankFailureError:
    reason = str(error).splitlines()[0][:200]
    return RankFailureError(
        f"the ranks did not find each other: {reason}; check MASTER_ADDR, MASTER_PORT and that all "
        "of WORLD_SIZE were started"
    )


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _once(error: Outcome) -> Outcome:
    """The error; without its lines, if another rank says them."""
    claims: list[int] = []
    name = hashlib.sha256(str(error).encode()).hexdigest()
    _with_store(lambda store: claims.append(store.add(f"vlm/said/{name}", 1)), 1.0)
    if claims and claims[0] > 1:
        error.problems = []
    return error


def _with_store(work: Callable[[Store], object], timeout_s: float) -> None:
    """Runs `work(store)` for at most so long: the rank that keeps the store may be the one."""

    def run() -> None:
        with contextlib.suppress(RuntimeError, OSError):
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            socket.create_connection(address, timeout=timeout_s).close()  # else torch logs stacks
            work(_get_default_store())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
