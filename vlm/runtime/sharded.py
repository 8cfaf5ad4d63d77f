"""Tensors that FSDP2 has spread over the ranks, and whole ones."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from vlm.runtime.communication import waiting


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every rank, which must all ask; a plain tensor is that already.

    A spread tensor of one element is a scalar in files: `fully_shard` takes no scalars.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    with waiting():
        full: Tensor = tensor.full_tensor()
    return full.reshape(()) if full.numel() == 1 else full


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, equal on all ranks, as `like` holds it: on its device, this rank's part."""
    if not isinstance(like, DTensor):
        return value.to(like.device)
    value = value.reshape(like.shape) if like.numel() == 1 == value.numel() else value
    value = value.to(like.to_local().device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """This rank's part, in the same memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    part: Tensor = tensor.to_local()
    return part
