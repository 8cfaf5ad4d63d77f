"""Ranks: starting, agreeing, gathering with gradient. One process is rank 0 of 1."""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


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
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))


def stop() -> None:
    """Leave the process group, if in one."""
    if dist.is_initialized():
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
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """The maximum over ranks, on all ranks, in place."""
    if dist.is_initialized():
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


def all_gather(tensor: Tensor) -> Tensor:
    """Rows of all ranks in rank order, without gradient; equal shapes on all ranks."""
    if world_size() == 1:
        return tensor
    gathered = tensor.new_empty((world_size() * len(tensor), *tensor.shape[1:]))
    # torch 2.13 renames all_gather_into_tensor to all_gather_single
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
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
