"""TensorBoard: a run's curves, settings and results as event files in RUN/tensorboard."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm.config.schema import Config
from vlm.config.sections import flatten


class TensorBoard:
    """Writes an event file, each line at once.

    Not with torch's SummaryWriter: that writes in a thread, up to two minutes late, which nothing
    survives if the run is killed; a full disk is a traceback of that thread.

    Args:
        config: Of the run; becomes its hyper-parameters, by dotted keys.
        last_step: Of the log that the run goes on from. Points from there on are hidden, for they
            come again; earlier ones are skipped if an earlier process of the run wrote them.
        say: Unused: there is nothing to tell.
    """

    def __init__(self, config: Config, last_step: int, say: Callable[[str], None]) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = Path(config.run.dir) / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        self._first_step = last_step if any(folder.iterdir()) else 0
        # TensorBoard reads the files in the order of their names
        self._file = (folder / f"events.out.tfevents.{time.time():.6f}").open("xb")
        self._writer = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        start = SessionLog(status=SessionLog.START)  # hides what has this step or a later one
        self._write(step=self._first_step, session_log=start)
        self._write(step=self._first_step, summary=hparams_pb(_hyper_parameters(config)))

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Write one event of all numbers."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        if step < self._first_step:
            return
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in numbers.items()]
        self._write(step=step, summary=Summary(value=values))

    summarize = log

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _write(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._writer.flush()


def _hyper_parameters(config: Config) -> dict[str, bool | int | float | str]:
    """By dotted key; what is no number and no text as JSON."""
    return {
        key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for key, value in flatten(dataclasses.asdict(config))
    }
