"""What ends a run that has gone wrong, rather than letting it waste hours."""

from collections import Counter, deque

from vlm.errors import BadSampleQuotaError, NonFiniteError
from vlm.training.step import StepResult


class NonFiniteGuard:
    """Ends the run when more than `quota` of the last `window` steps were skipped."""

    def __init__(self, quota: int = 3, window: int = 100) -> None:
        self.quota = quota
        self.recent: deque[int] = deque()
        self.window = window
        self.num_skipped = 0

    def check(self, step: int, result: StepResult) -> None:
        """Count a step.

        Raises:
            NonFiniteError: The quota is passed.
        """
        if not result.skipped:
            return
        self.num_skipped += 1
        self.recent.append(step)
        while self.recent[0] <= step - self.window:
            self.recent.popleft()
        if len(self.recent) > self.quota:
            raise NonFiniteError(
                f"{len(self.recent)} of the last {self.window} steps had a loss or gradient that "
                f"is not finite (the last at step {step}); lower optim.lr (now {result.lr:g}) or "
                "lengthen optim.warmup_steps; the newest checkpoint is from before"
            )


class BadSampleGuard:
    """Counts bad samples by reason and ends the run when they pass a share of all."""

    def __init__(self, max_fraction: float, counts: Counter[str] | None = None) -> None:
        self.max_fraction = max_fraction
        self.counts = counts or Counter()

    def check(self, num_seen: int, bad: dict[str, int]) -> None:
        """Add a batch's counts.

        Args:
            num_seen: Samples since the run's start, all ranks.
            bad: Of all ranks, by reason.

        Raises:
            BadSampleQuotaError: The share is passed; at least 100 samples must have been seen.
        """
        self.counts.update(bad)
        total = self.counts.total()
        if num_seen >= 100 and total > self.max_fraction * num_seen:
            table = ", ".join(f"{reason} {n}" for reason, n in self.counts.most_common())
            raise BadSampleQuotaError(
                f"{total} of {num_seen} samples were bad, more than "
                f"data.max_bad_fraction={self.max_fraction:g}: {table}"
            )
