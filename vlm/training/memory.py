"""Memory as a plan: what a rank will need at its peak, and the micro-batch that fits a budget."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from vlm.data.batch import Batch, Negatives
from vlm.data.tally import Tally
from vlm.errors import ConfigError
from vlm.heads.model import VisionLanguageModule
from vlm.runtime import distributed
from vlm.runtime.device import Precision, arithmetic
from vlm.training.accounts import current_memory_bytes
from vlm.training.objective import Objective

GIB = 2**30


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a rank needs at its peak, by what for.

    Attributes:
        start: What is there before the first step: on the CPU the interpreter, its libraries and
            the weights; on a GPU the weights.
        state: Gradients and the optimiser's moments; a rank's share of them under FSDP2.
        batch: Pictures, features and their gradients.
        fixed: Of activations, what doesn't grow with the samples in memory at a time.
        per_row: Of activations, a sample's.
        tiles: Logits of the loss, and what is computed from them.
        rows: Samples of a rank.
        micro_batch_size: Samples in memory at a time; None for all.
    """

    start: int
    state: int
    batch: int
    fixed: float
    per_row: float
    tiles: int
    rows: int
    micro_batch_size: int | None

    @property
    def activations(self) -> int:
        """What autograd keeps at a time."""
        return round(self.fixed + self.per_row * min(self.rows, self.micro_batch_size or self.rows))

    @property
    def of_step(self) -> int:
        """What a step takes and frees again, but for the gradients."""
        return self.batch + self.activations + self.tiles

    @property
    def total(self) -> int:
        """The predicted peak."""
        return self.start + self.state + self.of_step

    def within(self, budget_gib: float) -> "MemoryPlan":
        """The plan with the largest micro-batches that the budget holds, all of about one size.

        Raises:
            ConfigError: It doesn't hold a sample at a time.
        """
        room = budget_gib * GIB - (self.total - self.activations) - self.fixed
        size = int(room // self.per_row)
        least = replace(self, micro_batch_size=1)
        if size < 1:
            raise ConfigError(
                f"train.memory_budget_gib: {budget_gib:g} GiB hold no sample at a time; "
                f"{math.ceil(10 * least.total / GIB) / 10:g} GiB would"
            )
        if size >= self.rows:
            return replace(self, micro_batch_size=None)
        return replace(self, micro_batch_size=math.ceil(self.rows / math.ceil(self.rows / size)))


def plan_memory(
    module: VisionLanguageModule,
    objective: Objective,
    *,
    rows: int,
    global_rows: int,
    num_logits: int,
    averages: bool,
    shards: int,
    precision: Precision,
    context_length: int,
    pad_id: int,
    negatives: bool = False,
) -> MemoryPlan:
    """Predict a rank's peak.

    Activations are measured, not modelled: the forward pass's peak for 2 and for 4 samples with
    captions of the greatest length gives a line. It is mostly what autograd keeps; where a tower is
    frozen, what passes through it.

    Args:
        module: Bare, with checkpointed blocks if they are to be.
        objective: Batch to loss.
        rows: Samples of a rank.
        global_rows: Of all ranks.
        num_logits: Matrices of logits that the loss keeps, as large as a tile.
        averages: Whether averaged weights are kept.
        shards: Over which the state is spread.
        precision: Of the forward pass.
        context_length: Of a text.
        pad_id: Of the tokenizer.
        negatives: Whether each pair has a false text beside it.
    """
    device = module.encoders.logit_scale.device
    start = current_memory_bytes(device)
    whole = replace(objective, micro_batch_size=None)
    every = objective.loss.caption_every

    def peak(num: int) -> int:
        batch = _full_batch(module, whole, num, context_length, pad_id)
        if negatives:
            batch = replace(batch, negatives=Negatives(batch.tokens, batch.valid))
        return _peak_bytes(module, whole, batch, precision)

    few, more = (peak(n) for n in (2 * every, 4 * every))
    size, dim = module.encoders.image.image_size, module.encoders.text.projection.out_features
    # the largest of all ranks, for all must choose the same micro-batch
    start, few, more = distributed.all_reduce_max(
        torch.tensor([start, few, more], dtype=torch.int64, device=device)
    ).tolist()
    weights, learns = (
        sum(p.nbytes for p in module.parameters() if p.requires_grad or frozen)
        for frozen in (True, False)
    )
    # of pictures and texts, with gradients
    features = 4 * 4 * dim * (rows + global_rows) + 4 * 2 * dim * rows * negatives
    return MemoryPlan(
        start=start,
        state=(3 * learns + averages * weights) // shards,  # gradients, two moments, the average
        batch=3 * size * size * rows + features,
        fixed=float(max(0, 2 * few - more)),
        per_row=(more - few) / (2 * every),
        tiles=num_logits * min(4 * rows * global_rows, objective.tile_bytes),
        rows=rows,
        micro_batch_size=objective.micro_batch_size,
    )


def _peak_bytes(
    module: VisionLanguageModule, objective: Objective, batch: Batch, precision: Precision
) -> int:
    """The most bytes of tensors that the forward pass of a batch holds at a time."""
    device = module.encoders.logit_scale.device
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    batch, live = batch.to(device), _Live()
    with live, arithmetic(precision, device):
        objective(module, batch)
    for name, buffer in module.named_buffers():  # batch norm's statistics have seen blank pictures
        buffer.copy_(buffers[name])
    return live.peak


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Counts the bytes of new tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        for tensor in _tensors(args):  # of the model and the batch: not new
            self._seen[tensor.untyped_storage()] = None
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen[storage] = None
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        finalize(storage, self._free, storage.nbytes())

    def _free(self, num_bytes: int) -> None:
        self.now -= num_bytes


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _full_batch(
    module: VisionLanguageModule, objective: Objective, rows: int, length: int, pad_id: int
) -> Batch:
    """Blank pictures with captions of the greatest length."""
    size = module.encoders.image.image_size
    tokens = torch.full((rows, length), pad_id)
    tokens[:, -1] = objective.eot_id
    ids = torch.arange(rows)
    images = torch.zeros(rows, 3, size, size, dtype=torch.uint8)
    valid = torch.ones(rows, dtype=torch.bool)
    return Batch(images, tokens, ids, ids, valid, Tally(), visits=ids)
