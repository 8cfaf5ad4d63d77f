"""What a run would do and need, without training: `vlm train CONFIG --check`."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vlm.config.schema import Config
from vlm.data.batch import Batch
from vlm.data.tally import Tally
from vlm.heads.model import VisionLanguageModule
from vlm.losses.pairs import TILE_BYTES
from vlm.runtime.device import arithmetic
from vlm.runtime.distributed import Ranks
from vlm.training.setup import Parts, build_parts

MIB = 2**20
MAX_LOOKED_AT = 10_000_000  # samples: a second for local indexes


def print_plan(config: Config, ranks: Ranks, console: Console | None = None) -> None:
    """Print parameters by part, steps, samples, epochs, and an estimate of a rank's memory.

    Raises:
        ConfigError, DataError: As training would.
    """
    parts = build_parts(config, ranks)
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in plan(parts, ranks):
        table.add_row(name, value)
    (console or Console(highlight=False)).print(table)


def plan(parts: Parts, ranks: Ranks) -> Iterator[tuple[str, str]]:
    """The plan's lines: what, and how much."""
    config, step = parts.config, parts.step
    size = config.train.global_batch_size
    total = parts.num_steps * size
    yield "run folder", config.run.dir
    for ledger, (name, passes) in zip(
        parts.data.ledgers, parts.data.passes(total).items(), strict=True
    ):
        yield "data", f"{name}: {ledger.kept:,} samples, {passes:.1f} passes"
    if num_without := _num_without_caption(parts):
        way_out = "masked in training; a source's filter: {min_caption_chars: 1} leaves them out"
        yield "without a caption", f"{num_without:,} samples: {way_out}"
    yield "steps", f"{parts.num_steps:,} of {size:,} samples on {ranks.world_size} rank(s)"
    yield "samples", f"{total:,} ({total / len(parts.data.dataset):.1f} epochs)"
    yield "device", f"{step.device}, {step.precision}"
    yield "vocabulary", f"{parts.tokenizer.vocab_size:,} ({config.model.text.tokenizer})"
    for name, count in parameters_by_part(step.module):
        yield f"parameters, {name}", f"{count:,}"
    state, activations = estimate_memory(parts, size // ranks.world_size)
    yield "memory, weights and optimiser", f"{state / MIB:,.0f} MiB a rank"
    yield "memory, activations", f"{activations / MIB:,.0f} MiB a rank (estimate)"


def _num_without_caption(parts: Parts) -> int:
    """Samples without a caption; 0 where there are too many to look at."""
    dataset = parts.data.dataset
    if len(dataset) > MAX_LOOKED_AT:
        return 0
    return int((dataset.caption_lengths() == 0).sum())


def parameters_by_part(module: VisionLanguageModule) -> Iterator[tuple[str, int]]:
    """Number of parameters of each encoder, the captioner, and all."""
    parts = {"image encoder": module.encoders.image, "text encoder": module.encoders.text}
    if module.captioner is not None:
        parts["captioner"] = module.captioner
    for name, part in parts.items():
        yield name, sum(p.numel() for p in part.parameters())
    yield "all", sum(p.numel() for p in module.parameters())


def estimate_memory(parts: Parts, rows: int) -> tuple[int, int]:
    """Bytes of state (weights, gradients, moments, average) and of activations for `rows` samples.

    Activations are measured, not modelled: what autograd keeps for 2 and for 4 samples with full
    captions gives a line. Tiles of logits are added.
    """
    config = parts.config
    weights = sum(p.nbytes for p in parts.step.module.parameters())
    copies = 4 + (parts.step.averaged is not None)  # weights, gradients, two moments, the average
    few, more = (_kept_bytes(parts, n) for n in (2, 4))
    per_row = (more - few) / 2
    computed = min(rows, config.train.micro_batch_size or rows)
    logits = 4 * min(4 * rows * config.train.global_batch_size, TILE_BYTES)  # fp32, and 3 copies
    return weights * copies, round(few + per_row * (computed - 2)) + logits


def _kept_bytes(parts: Parts, rows: int) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass of `rows` samples."""
    step, kept = parts.step, {}
    parameters = {p.untyped_storage().data_ptr() for p in step.module.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        arithmetic(step.precision, step.device),
    ):
        # alive until counted: freed storage would be counted once for several tensors
        objective = replace(step.objective, micro_batch_size=None)
        terms = objective(step.module, _full_batch(parts, rows).to(step.device))
    total = sum(kept.values())
    del terms
    return total


def _full_batch(parts: Parts, rows: int) -> Batch:
    """Blank pictures with captions of the greatest length."""
    size, length = parts.config.model.image.image_size, parts.tokenizer.context_length
    tokens = torch.full((rows, length), parts.tokenizer.pad_id)
    tokens[:, -1] = parts.tokenizer.eot_id
    ids = torch.arange(rows)
    images = torch.zeros(rows, 3, size, size, dtype=torch.uint8)
    return Batch(images, tokens, ids, ids, torch.ones(rows, dtype=torch.bool), Tally())
