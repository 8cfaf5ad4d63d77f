"""A run's first steps, timed part by part; one of them traced."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from vlm.data.batch import Batch
from vlm.data.workers import prefetch_factor
from vlm.runtime.device import synchronize
from vlm.runtime.distributed import Ranks
from vlm.runtime.files import write_atomic
from vlm.runtime.heap import pages_kept
from vlm.runtime.peak import Peak, peak_flops
from vlm.training import marks
from vlm.training.flops import ModelFlops, StepFlops, count_flops
from vlm.training.marks import BACKWARD, DATA, FORWARD, OTHER, PARTS, Marks, marked
from vlm.training.setup import Parts

NUM_WARM_UP = 2  # steps: allocations, kernels' choices, the optimisers' state
NUM_MEASURED = 3
NUM_OPERATORS = 10


@dataclass(frozen=True)
class Row:
    """A part of the step.

    Attributes:
        part: One of `marks.PARTS`.
        seconds: Of the step.
        flops: Needed; None for what needs no matrix products.
    """

    part: str
    seconds: float
    flops: float | None


@dataclass(frozen=True)
class Operator:
    """One of PyTorch's operators in the traced step, without those that it calls itself."""

    name: str
    calls: int
    seconds: float
    share: float  # of all operators' time


@dataclass(frozen=True)
class Profile:
    """Of one rank.

    Attributes:
        rows: Of the median step, in order; they add up to its time.
        step_s: Wall times of the measured steps.
        unmarked_s: Wall times of steps in which nothing was measured but this.
        num_skipped: Measured steps that changed no weight.
        text_length: Tokens to which the median step's texts were padded.
        captioned_rows: Samples of it whose captions are learned.
        flops: Of it.
        peak: Of the device.
        operators: The slowest ones, of one step more.
    """

    rows: list[Row]
    step_s: list[float]
    unmarked_s: list[float]
    num_skipped: int
    text_length: int
    captioned_rows: int
    flops: StepFlops
    peak: Peak
    operators: list[Operator]

    @property
    def seconds(self) -> float:
        """Of the median step."""
        return sum(row.seconds for row in self.rows)

    @property
    def mfu(self) -> float:
        """Share of the peak that the needed FLOPs reach."""
        return self.flops.needed / self.seconds / self.peak.flops_per_s


@dataclass(frozen=True)
class _Step:
    seconds: dict[str, float]
    text_length: int
    captioned_rows: int
    negatives: int
    pictures: int | None
    skipped: bool

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def measure(parts: Parts, ranks: Ranks, trace: Path | None) -> Profile:
    """Take steps: some to warm up, some as they are, some with marks, one traced.

    Args:
        parts: Of the run; its weights change.
        ranks: All must call it together.
        trace: Chrome trace of the last step to write; None on ranks that do not.
    """
    step = parts.step
    flops, peak = count_flops(step.module, step.objective), peak_flops(step.device, step.precision)
    unmarked: list[float] = []
    steps: list[_Step] = []
    with pages_kept(step.device), closing(parts.batches(0, ranks)) as batches:
        _drain(parts, ranks, batches)
        for number in range(NUM_WARM_UP):
            step(number, next(batches))
        for _ in range(NUM_MEASURED):  # by turns: a busy machine slows both
            unmarked.append(_unmarked_seconds(parts, batches))
            steps.append(_marked_step(parts, batches, Marks(step.device)))
        operators = _trace(parts, batches, trace)
    median = sorted(steps, key=lambda each: each.total)[NUM_MEASURED // 2]
    needed = _needed(median, flops, parts, ranks)
    return Profile(
        rows=list(_rows(median, needed)),
        step_s=[each.total for each in steps],
        unmarked_s=unmarked,
        num_skipped=sum(each.skipped for each in steps),
        text_length=median.text_length,
        captioned_rows=median.captioned_rows,
        flops=needed,
        peak=peak,
        operators=operators,
    )


def _needed(step: _Step, flops: ModelFlops, parts: Parts, ranks: Ranks) -> StepFlops:
    train, objective = parts.config.train, parts.step.objective
    return flops.step(
        train.global_batch_size // ranks.world_size,
        step.text_length,
        negatives=step.negatives,
        pictures=step.pictures,
        captioned_rows=step.captioned_rows,
        global_rows=train.global_batch_size,
        micro_batch_size=objective.micro_batch_size,
        tile_bytes=objective.tile_bytes,
    )


def _drain(parts: Parts, ranks: Ranks, batches: Iterator[Batch]) -> None:
    """Take what the workers built ahead, so that waiting for data shows as in a long run."""
    config = parts.config
    rows = config.train.global_batch_size // ranks.world_size
    workers = config.data.num_workers
    ahead = prefetch_factor(workers, rows * 3 * config.model.image.image_size**2) or 0
    for _ in range(workers * ahead):
        next(batches)


def _unmarked_seconds(parts: Parts, batches: Iterator[Batch]) -> float:
    synchronize(parts.step.device)
    start = time.perf_counter()
    parts.step(NUM_WARM_UP, next(batches))
    synchronize(parts.step.device)
    return time.perf_counter() - start


def _marked_step(parts: Parts, batches: Iterator[Batch], watch: Marks) -> _Step:
    with marked(parts.step, watch):
        watch.start(DATA)
        batch = next(batches)
        watch.switch(OTHER)
        with marks.shadowed(batch, "to", watch.marked(batch.to, marks.TO_DEVICE)):
            result = parts.step(NUM_WARM_UP, batch)
        watch.stop()
    return _Step(
        dict(watch.seconds),
        watch.text_length,
        watch.captioned_rows,
        watch.negatives,
        watch.pictures,
        result.skipped,
    )


def _rows(step: _Step, flops: StepFlops) -> Iterator[Row]:
    by_part = {
        marks.IMAGE: flops.image,
        marks.TEXT: flops.text,
        marks.CAPTIONER: flops.captioner,
        marks.LOSS: flops.loss,
    }
    needed = {
        **{FORWARD + name: part.forward for name, part in by_part.items()},
        **{BACKWARD + name: part.backward for name, part in by_part.items()},
    }
    for part in PARTS:
        if part in step.seconds:
            yield Row(part, step.seconds[part], needed.get(part))


def _trace(parts: Parts, batches: Iterator[Batch], path: Path | None) -> list[Operator]:
    """Trace one step; its slowest operators. On CUDA their kernels' times count."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it tells stderr that it starts and stops
    kinds = torch.profiler.ProfilerActivity
    on_cuda = parts.step.device.type == "cuda"
    activities = [kinds.CPU, kinds.CUDA] if on_cuda else [kinds.CPU]
    with torch.profiler.profile(activities=activities) as found:
        _marked_step(parts, batches, Marks(parts.step.device, tracing=True))
    if path is not None:
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder) / path.name
            found.export_chrome_trace(str(written))
            write_atomic(path, written.read_bytes())
    events = [  # no ranges, and no kernels: their times are their operators'
        each for each in found.key_averages() if "::" in each.key and each.device_type.name == "CPU"
    ]
    time_us = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    seconds = {each.key: getattr(each, time_us) / 1e6 for each in events}
    total = sum(seconds.values())
    slowest = sorted(events, key=lambda each: -seconds[each.key])[:NUM_OPERATORS]
    return [
        Operator(each.key, each.count, seconds[each.key], seconds[each.key] / total)
        for each in slowest
    ]
