"""Ranks: starting, agreeing, gathering with gradient. One process is rank 0 of 1."""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from vlm import errors
from vlm.runtime.communication import waiting

_LET_GO_S = 0.2
_ROWS_AT_ONCE = 4096  # of each rank, gathered at a time: bounds the memory that this takes


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among those that `torchrun` started."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Rank 0 writes files and speaks."""
        return self.rank == 0


def ranks_from_environment() -> Ranks:
    """What torchrun says in RANK, LOCAL_RANK, ...; one process where it says nothing."""
    return Ranks(
        rank=int(os.environ.get("RANK", 0)),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    )


def start(ranks: Ranks, device: torch.device, *, timeout_s: float) -> None:
    """Join the process group: NCCL on CUDA, gloo elsewhere.

    Args:
        ranks: Where this process stands.
        device: On which it computes.
        timeout_s: After which a collective that some rank does not join is an error.
    """
    if ranks.world_size == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), device_id=bound)


def stop() -> None:
    """Leave the process group, if in one."""
    if dist.is_initialized():
        # Gloo's threads take the GIL to let go of the last collective's tensors. The group's
        # destructor waits for these threads, and holds the GIL: it must not come first.
        time.sleep(_LET_GO_S)
        dist.destroy_process_group()


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        with waiting():
            dist.barrier()


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 goes first: what it writes once (a cache, an index) is there for the others."""
    if rank() != 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, on all ranks; without gradient, in place."""
    if dist.is_initialized():
        with waiting():
            dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """The maximum over ranks, on all ranks, in place."""
    if dist.is_initialized():
        with waiting():
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def gather_json(value: Any) -> list[Any]:
    """Every rank's value in rank order, as JSON: object collectives are pickle."""
    if world_size() == 1:
        return [value]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    longest = int(all_reduce_max(torch.tensor(len(text), device=device)))
    row = torch.full((1, longest), ord(" "), dtype=torch.uint8)  # JSON ends with any white space
    row[0, : len(text)] = text
    rows = all_gather(row.to(device)).cpu().numpy()
    return [json.loads(row.tobytes()) for row in rows]


def gather_values(values: Sequence[Any]) -> list[Any]:
    """JSON values of all ranks in rank order, on rank 0; the others get their own back.

    Ranks may have different numbers of them.
    """
    if world_size() == 1:
        return list(values)
    longest = max(gather_json(len(values)))
    found: list[list[Any]] = [[] for _ in range(world_size())]
    for start in range(0, longest, _ROWS_AT_ONCE):
        for theirs, more in zip(
            found, gather_json(values[start : start + _ROWS_AT_ONCE]), strict=True
        ):
            theirs += more if rank() == 0 else []
    return [value for theirs in found for value in theirs] if rank() == 0 else list(values)


def gather_rows(rows: Tensor) -> Tensor:
    """`gather_values` for the rows of a tensor; shapes differ in the number of rows alone."""
    if world_size() == 1:
        return rows
    counts: list[int] = gather_json(len(rows))
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    found: list[list[Tensor]] = [[] for _ in counts]
    for start in range(0, max(counts), _ROWS_AT_ONCE):
        size = min(_ROWS_AT_ONCE, max(counts) - start)
        padded = rows.new_zeros((size, *rows.shape[1:]))
        mine = rows[start : start + size]
        padded[: len(mine)] = mine
        parts = all_gather(padded.to(device)).to(rows.device).chunk(world_size())
        for theirs, part, count in zip(found, parts, counts, strict=True):
            theirs += [part[: max(0, count - start)]] if rank() == 0 else []
    return torch.cat([part for theirs in found for part in theirs]) if rank() == 0 else rows


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """What is inside ends well on all ranks, or with an error on all.

    Raises:
        VlmError: Of the first rank that has one, which says its lines; others have none to say.
    """
    error: errors.VlmError | None = None
    try:
        yield
    except errors.VlmError as caught:
        error = caught
    kinds = gather_json(error and _kind(error))
    first = next((number for number, kind in enumerate(kinds) if kind), None)
    if error is not None and first == rank():
        raise error
    if first is not None:
        raise getattr(errors, kinds[first])([])


def _kind(error: errors.VlmError) -> str:
    """The name of its class, or of the nearest one in `vlm.errors`."""
    return next(c.__name__ for c in type(error).__mro__ if c.__module__ == errors.__name__)


def all_gather(tensor: Tensor) -> Tensor:
    """Rows of all ranks in rank order, without gradient; equal shapes on all ranks."""
    if world_size() == 1:
        return tensor
    gathered = tensor.new_empty((world_size() * len(tensor), *tensor.shape[1:]))
    # torch 2.13 renames all_gather_into_tensor to all_gather_single
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    with waiting():
        gather(gathered, tensor.contiguous())
    return gathered


def all_gather_with_gradient(features: Float[Tensor, "B D"]) -> Float[Tensor, "G D"]:
    """Rows of all ranks in rank order; a row's gradient sums what all ranks' losses say."""
    if world_size() == 1:
        return features
    gathered: Tensor = _AllGather.apply(features)  # type: ignore[no-untyped-call]  # torch's own
    return gathered


class _AllGather(torch.autograd.Function):
    """All-gather forward, reduce-scatter (sum) backward.

    torch 2.13 deprecates both differentiable gathers that open_clip uses; this is the one place to
    change. Backward reduces everything and keeps its slice: gloo has no reduce-scatter.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        return all_gather(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = all_reduce_sum(gradients[0].contiguous())
        rows = len(total) // world_size()
        return total[rank() * rows : (rank() + 1) * rows]
