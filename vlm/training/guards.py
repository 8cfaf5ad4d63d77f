"""What ends a run that has gone wrong, or warns of it, rather than letting it waste hours."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlm.data.tally import Place, Tally, tally_of_places
from vlm.errors import BadSampleQuotaError, NonFiniteError
from vlm.runtime.files import write_atomic
from vlm.training.step import StepResult


@dataclass
class NonFiniteGuard:
    """Ends the run when more than `quota` of the last `window` steps were not finite.

    Attributes:
        recent: The last such steps, counted from 1.
        num_skipped: Skipped steps in all, those with too few samples included.
    """

    recent: list[int] = field(default_factory=list)
    num_skipped: int = 0
    quota: int = 3
    window: int = 100

    def check(self, step: int, result: StepResult) -> None:
        """Count a step.

        Raises:
            NonFiniteError: The quota is passed.
        """
        self.num_skipped += result.skipped
        if not result.skipped or result.num_valid < 2:  # BadSampleGuard's
            return
        self.recent = [old for old in self.recent if old > step - self.window] + [step]
        if len(self.recent) > self.quota:
            raise NonFiniteError(
                f"{len(self.recent)} of the last {self.window} steps had a loss or gradient that "
                f"is not finite (the last at step {step}); lower optim.lr (now {result.lr:g}) or "
                "lengthen optim.warmup_steps; the newest checkpoint is from before"
            )


@dataclass
class BadSampleGuard:
    """Counts bad samples by reason and ends the run when they pass a share of all.

    Args:
        max_fraction: The share.
        epoch_size: Samples in an epoch. Of whole epochs the share is exact; of a part of one the
            count may be four standard deviations higher, or chance would end good runs early.
        tally: What was bad until now.
    """

    max_fraction: float
    epoch_size: int
    tally: Tally[Place] = field(default_factory=Tally)

    def check(self, num_seen: int, bad: Tally[Place]) -> list[str]:
        """Add a step's bad samples; a line for each that is a new example of its reason.

        Args:
            num_seen: Samples since the run's start, all ranks.
            bad: Of all ranks.

        Raises:
            BadSampleQuotaError: The share is passed.
        """
        before = set(self._examples())
        self.tally.merge(bad)
        expected = self.max_fraction * num_seen
        part = self.max_fraction * (num_seen % self.epoch_size)
        if self.tally.total > expected + 4 * math.sqrt(part):
            raise BadSampleQuotaError(
                [
                    f"{self.tally.total} of {num_seen} samples were bad, more than "
                    f"data.max_bad_fraction={self.max_fraction:g} allows; mend or remove them:",
                    *self.tally.lines(),
                ]
            )
        new = [example for example in self._examples() if example not in before]
        return [f"bad sample: {reason}: {place}" for reason, place in new]

    def _examples(self) -> Iterator[tuple[str, Place]]:
        for reason, places in self.tally.examples.items():
            for place in places:
                yield reason, place


@dataclass
class SpikeGuard:
    """Warns when the loss jumps above its running mean; what follows is left to the reader.

    One step is enough, or two in a row that are as unlikely together. The variance is half the
    mean square of differences between steps, so that a loss that falls steadily does not look
    noisy.

    Attributes:
        mean: Of about the last `1 / MEAN_RATE` steps; spikes are left out.
        variance: Of about the last `1 / VARIANCE_RATE`.
        last: Step's loss.
        last_height: Its standard deviations above the mean, if that was no spike.
        num_steps: Behind them.
        num_high: Steps since the loss is high; after MAX_HIGH it is the new normal.
    """

    mean: float = 0.0
    variance: float = 0.0
    last: float = 0.0
    last_height: float = 0.0
    num_steps: int = 0
    num_high: int = 0

    MEAN_RATE = 0.05
    VARIANCE_RATE = 0.02
    MIN_STEPS = 50
    MIN_RELATIVE = 0.01  # of the mean: less deviation than this is not told from none
    LIMIT = 5.5  # standard deviations
    MAX_HIGH = 20

    def check(self, step: int, loss: float) -> list[str]:
        """Take note of a step's loss; a warning if it begins to be high."""
        if not math.isfinite(loss):
            return []
        deviation = max(math.sqrt(self.variance), self.MIN_RELATIVE * abs(self.mean), 1e-8)
        height = (loss - self.mean) / deviation
        both = (height + self.last_height) / math.sqrt(2)
        if self.num_steps >= self.MIN_STEPS and max(height, both) > self.LIMIT:
            return self._high(step, loss, height)
        self.num_high, self.last_height = 0, height
        self._learn(loss)
        return []

    def _high(self, step: int, loss: float, height: float) -> list[str]:
        self.num_high += 1
        self.last_height = 0.0
        if self.num_high >= self.MAX_HIGH:
            self.mean = self.variance = 0.0
            self.num_steps = self.num_high = 0
        if self.num_high != 1:
            return []
        return [
            f"warning: loss {loss:.3g} at step {step} is {height:.1f} sigma above its running mean"
        ]

    def _learn(self, loss: float) -> None:
        if self.num_steps:
            rate = max(self.VARIANCE_RATE, 1 / self.num_steps)
            self.variance += rate * ((loss - self.last) ** 2 / 2 - self.variance)
        self.num_steps += 1
        self.mean += max(self.MEAN_RATE, 1 / self.num_steps) * (loss - self.mean)
        self.last = loss


class Guards:
    """All guards of a run, as they were left by its checkpoint.

    Args:
        state: What `state` gave; empty for a new run.
        folder: The run's, for bad_samples.jsonl; None on ranks that do not write.
        max_bad_fraction: Of samples.
        epoch_size: Samples in an epoch.
        global_batch_size: Samples in a step.
    """

    def __init__(
        self,
        state: Mapping[str, Any],
        *,
        folder: Path | None,
        max_bad_fraction: float,
        epoch_size: int,
        global_batch_size: int,
    ) -> None:
        tally = tally_of_places(state["bad"]) if state else Tally[Place]()
        self.bad = BadSampleGuard(max_bad_fraction, epoch_size, tally)
        self.finite = NonFiniteGuard(**state.get("finite", {}))
        self.spikes = SpikeGuard(**state.get("spikes", {}))
        self.global_batch_size = global_batch_size
        self.path = folder / "bad_samples.jsonl" if folder is not None else None

    def check(self, step: int, result: StepResult) -> list[str]:
        """Judge step number `step`, counted from 1; lines for the log.

        Raises:
            BadSampleQuotaError, NonFiniteError: The run should end.
        """
        try:
            lines = self.bad.check(step * self.global_batch_size, result.bad)
        except BadSampleQuotaError:
            self._write()
            raise
        if lines:
            self._write()
        self.finite.check(step, result)
        return lines + self.spikes.check(step, result.terms["loss"])

    def counters(self) -> dict[str, Any]:
        """For the metrics: the counts since the run's start."""
        return {
            "bad_samples": self.bad.tally.total,
            "bad_by_reason": dict(self.bad.tally.counts),
            "skipped_steps": self.finite.num_skipped,
        }

    def state(self) -> dict[str, Any]:
        """All of it, for a checkpoint; bad_samples.jsonl is brought up to date with it."""
        if self.bad.tally.total:
            self._write()
        return {
            "bad": self.bad.tally.as_json(),
            "finite": asdict(self.finite),
            "spikes": asdict(self.spikes),
        }

    def _write(self) -> None:
        """One line a reason: how many, and where the first are."""
        if self.path is None:
            return
        tally = self.bad.tally
        lines = [
            {
                "reason": reason,
                "count": count,
                "examples": [place._asdict() for place in tally.examples[reason]],
            }
            for reason, count in tally.counts.items()
        ]
        write_atomic(self.path, "".join(f"{json.dumps(line)}\n" for line in lines).encode())
