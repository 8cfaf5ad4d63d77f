"""What a run would do and need, without training: `vlm train CONFIG --check`."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from vlm.config.schema import Config
from vlm.eval.suite import check_suite
from vlm.heads.model import VisionLanguageModule
from vlm.runtime import distributed
from vlm.runtime.distributed import Ranks
from vlm.training.setup import Parts, build_parts

MIB = 2**20
MAX_LOOKED_AT = 10_000_000  # samples: a second for local indexes


def print_plan(config: Config, ranks: Ranks, console: Console | None = None) -> None:
    """Print parameters by part, steps, samples, epochs, and an estimate of a rank's memory.

    Under torchrun it is the plan of so many ranks, by rank 0. The suite is looked at, too.

    Raises:
        ConfigError, DataError: As training would.
    """
    try:
        parts = build_parts(config, ranks)
        if ranks.is_main and config.eval.suite is not None:
            check_suite(config.eval.suite)
        table = Table(show_header=False, box=None, pad_edge=False)
        for name, value in plan(parts, ranks):
            table.add_row(name, value)
        if ranks.is_main:
            (console or Console(highlight=False)).print(table)
    finally:
        distributed.stop()


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
    memory = parts.memory
    yield "memory, before the first step", f"{memory.start / MIB:,.0f} MiB a rank"
    yield "memory, gradients and optimiser", f"{memory.state / MIB:,.0f} MiB"
    yield "memory, batch and logits", f"{(memory.batch + memory.tiles) / MIB:,.0f} MiB"
    at_a_time = memory.micro_batch_size or memory.rows
    yield (
        "memory, activations",
        f"{memory.activations / MIB:,.0f} MiB, {at_a_time:,} samples at a time",
    )
    yield "memory, peak", f"{memory.total / MIB:,.0f} MiB a rank, predicted"


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
    if module.language_head is not None:
        parts["language head"] = module.language_head
    for name, part in parts.items():
        yield name, sum(p.numel() for p in part.parameters())
    yield "all", sum(p.numel() for p in module.parameters())
