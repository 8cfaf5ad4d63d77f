"""What a run's experiment trackers get to see: its settings, its log's lines, its results."""

import contextlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from vlm.config.schema import Config
from vlm.config.sections import flatten
from vlm.errors import ConfigError
from vlm.training.tensorboard_tracker import TensorBoard
from vlm.training.wandb_tracker import WandB

Line = Mapping[str, Any]  # of metrics.jsonl
Numbers = dict[str, float]
Say = Callable[[str], None]


class Tracker(Protocol):
    """Where curves go. What it raises is caught, and it gets no more calls but `close`."""

    def log(self, step: int, numbers: Numbers) -> None:
        """Add a point to each curve. Steps rise; a resumed run begins with those of its log."""

    def summarize(self, step: int, numbers: Numbers) -> None:
        """Note what was measured when training ended, after `step`."""

    def close(self) -> None:
        """Write what is left."""


_TRACKERS: dict[str, Callable[[Config, int, Say], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
}


class Trackers:
    """All trackers of a run. One that fails is dropped with a warning, and the run goes on.

    Args:
        config: `run.trackers` names them.
        is_main: Other ranks have none.

    Raises:
        ConfigError: One is not installed.
    """

    def __init__(self, config: Config, *, is_main: bool) -> None:
        _refuse_missing(config.run.trackers)
        self._config = config
        self._names = tuple(dict.fromkeys(config.run.trackers)) if is_main else ()
        self._open: dict[str, Tracker] = {}
        self._say: Say = print

    def start(self, lines: Sequence[Line], say: Say) -> None:
        """Open them; what of the log so far they lack is passed on.

        Args:
            lines: Of the log: a resumed run's, up to its checkpoint.
            say: Prints a line.
        """
        self._say = say
        last_step = lines[-1]["step"] if lines else 0
        for name in self._names:
            with self._guarded(name):
                self._open[name] = _TRACKERS[name](self._config, last_step, say)
        for line in lines:
            self.log(line)

    def log(self, line: Line) -> None:
        """Pass on every finite number of a line."""
        numbers = dict(_numbers({key: value for key, value in line.items() if key != "step"}))
        self._each(lambda tracker: tracker.log(line["step"], numbers))

    def finish(self, step: int, results: Sequence[Mapping[str, Any]]) -> None:
        """Pass on the numbers of results.json, as `eval/TASK-SPLIT/METRIC`, `.../n`, ..."""
        numbers: Numbers = {}
        for result in results:
            name = f"eval/{result['task']}-{result['split']}/{result['metric']}"
            low, high = result["ci95"]
            values = {**result, "ci95_low": low, "ci95_high": high}
            found = dict(_numbers(values))
            numbers[name] = found.pop("value")  # goes on where the log's curve of this name ends
            numbers |= {f"{name}/{key}": value for key, value in found.items()}
        if numbers:
            self._each(lambda tracker: tracker.summarize(step, numbers))

    def close(self) -> None:
        """Close them; those that wait for a network wait half a minute at most."""
        self._each(lambda tracker: tracker.close())
        self._open.clear()

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            with self._guarded(name):
                act(tracker)

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is: no tracker is worth a run
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            self._say(f"warning: {name}: {reason}; it is dropped, and the run goes on")
            if tracker := self._open.pop(name, None):
                with contextlib.suppress(Exception):
                    tracker.close()


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in flatten(values, separator="/"):
        if isinstance(value, int | float) and math.isfinite(value):
            yield name, float(value)


def _refuse_missing(names: Iterable[str]) -> None:
    specs = {name: importlib.util.find_spec(name) for name in names}
    # a folder of that name has a spec, too, but no origin
    missing = [name for name, spec in specs.items() if spec is None or spec.origin is None]
    if missing:
        raise ConfigError(
            f"run.trackers: not installed: {', '.join(missing)}; "
            "pip install 'vlm[track]', or take it out of run.trackers"
        )
