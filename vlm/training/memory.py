"""Memory as a plan: what a rank will need at its peak, and the micro-batch that fits a budget."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlm.data.batch import Batch
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
    def total(self) -> int:
        """The predicted peak."""
        return self.start + self.state + self.batch + self.activations + self.tiles

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
) -> MemoryPlan:
    """Predict a rank's peak.

    Activations are measured, not modelled: what autograd keeps for 2 and for 4 samples with
    captions of the greatest length gives a line.

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
    """
    device = module.encoders.logit_scale.device
    start = current_memory_bytes(device)
    whole = replace(objective, micro_batch_size=None)
    few, more = (
        _kept_bytes(module, whole, _full_batch(module, whole, n, context_length, pad_id), precision)
        for n in (2, 4)
    )
    size, dim = module.encoders.image.image_size, module.encoders.text.projection.out_features
    # the largest of all ranks, for all must choose the same micro-batch
    start, few, more = distributed.all_reduce_max(
        torch.tensor([start, few, more], dtype=torch.int64, device=device)
    ).tolist()
    weights, learns = (
        sum(p.nbytes for p in module.parameters() if p.requires_grad or frozen)
        for frozen in (True, False)
    )
    features = 4 * 4 * dim * (rows + global_rows)  # of pictures and texts, with gradients
    return MemoryPlan(
        start=start,
        state=(3 * learns + averages * weights) // shards,  # gradients, two moments, the average
        batch=3 * size * size * rows + features,
        fixed=float(max(0, 2 * few - more)),
        per_row=(more - few) / 2,
        tiles=num_logits * min(4 * rows * global_rows, objective.tile_bytes),
        rows=rows,
        micro_batch_size=objective.micro_batch_size,
    )


def _kept_bytes(
    module: VisionLanguageModule, objective: Objective, batch: Batch, precision: Precision
) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass of a batch."""
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = module.encoders.logit_scale.device
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with hooks, arithmetic(precision, device):
        # alive until counted: freed storage would be counted once for several tensors
        terms = objective(module, batch.to(device))
    total = sum(kept.values())
    del terms
    for name, buffer in module.named_buffers():  # batch norm's statistics have seen blank pictures
        buffer.copy_(buffers[name])
    return total


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
