"""What ends a command before its end: problems of a user's and a request to stop, by exit code."""

from collections.abc import Sequence


class Outcome(BaseException):
    """How a command ends, if not well.

    Args:
        problems: One line, or all the lines of one input that has several problems.
    """

    exit_code = 1

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class VlmError(Outcome, Exception):
    """A problem a user can act on: a line names the thing, the value, the rule, the way out."""


class ConfigError(VlmError):
    """A wrong setting, argument or name."""

    exit_code = 2


class DataError(VlmError):
    """Data that is missing, damaged, or not what a checkpoint was made with."""

    exit_code = 3


class BadSampleQuotaError(VlmError):
    """More samples were bad than `data.max_bad_fraction` allows."""

    exit_code = 4


class CheckpointError(VlmError):
    """No checkpoint verifies, or the one asked for does not fit."""

    exit_code = 5


class RankFailureError(VlmError):
    """Another process of the run died or hung."""

    exit_code = 6


class NonFiniteError(VlmError):
    """More steps than the quota had a loss or gradient that is not finite."""

    exit_code = 7


class DiskError(VlmError):
    """No room, or no permission, to write."""

    exit_code = 74


class Preempted(Outcome):
    """The run was asked to stop; its state is saved.

    Like KeyboardInterrupt it comes at any place, so it is no Exception: whoever decodes a picture
    would take it for damage.
    """

    exit_code = 75
