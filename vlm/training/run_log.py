"""What a run says while it goes: a bar or plain lines, and metrics.jsonl always."""

import contextlib
import errno
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlm.errors import DiskError
from vlm.runtime.files import read_json_lines, write_atomic
from vlm.training.accounts import Accounts
from vlm.training.step import StepResult
from vlm.training.trackers import Trackers

MEASURED = "eval/"  # begins the names of the suite's metrics


class RunLog:
    """Writes one line of metrics every few steps.

    Args:
        path: metrics.jsonl; None on ranks that do not speak.
        num_steps: Of the whole run.
        global_batch_size: For samples/s.
        every_steps: Between lines; the first and the last step always have one.
        start_step: Of this process; lines of later steps, from a run that was killed, are dropped.
        trackers: Get every line, too; those that are kept, first.
        accounts: What a line says of the machine.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        num_steps: int,
        global_batch_size: int,
        every_steps: int,
        start_step: int = 0,
        trackers: Trackers | None = None,
        accounts: Accounts | None = None,
    ) -> None:
        self.path = path
        self.num_steps = num_steps
        self.global_batch_size = global_batch_size
        self.every_steps = every_steps
        self.window = _Window(start_step)
        kept = _drop_later_lines(path, start_step) if path else []
        self.elapsed_before = float(kept[-1]["time_s"]) if kept else 0.0
        self.started = time.perf_counter()
        self.last: dict[str, Any] = {}  # line
        self._unwritten = ""
        self.bar = _bar(num_steps, start_step) if path and sys.stderr.isatty() else None
        self.trackers = trackers
        self.accounts = accounts
        if trackers is not None:
            trackers.start(kept, self.say)

    def write(
        self,
        step: int,
        result: StepResult,
        *,
        data_wait_s: float,
        counters: Mapping[str, Any],
        measured: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Note a step (0-based); speak if it is one that speaks, or after which was measured."""
        self.window.data_wait_s += data_wait_s
        self.window.communication_s += result.communication_s
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=step + 1)
        done = step + 1
        speaks = done % self.every_steps == 0 or done in (1, self.num_steps) or bool(measured)
        if self.path is None or not speaks:
            return
        line = self.last = {**self._line(done, result, counters), **measured}
        self._append(json.dumps(line, allow_nan=False) + "\n")
        self.say(_readable(line, self.num_steps))
        if self.trackers is not None:
            self.trackers.log(line)
        self.window = _Window(done)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is inside is no part of the steps' time."""
        began = time.perf_counter()
        yield
        self.window.started += time.perf_counter() - began

    def say(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self.path is None:
            return
        if self.bar is not None:
            self.bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Take the bar down.

        Raises:
            DiskError: Lines are left that could not be written.
        """
        if self.bar is not None:
            self.bar.stop()
        self._append("")
        if self._unwritten:
            raise DiskError(f"{self.path}: cannot write its last lines; make room and resume")

    def _append(self, text: str) -> None:
        """Write whole lines or none: on a full disk they wait in memory for the next try."""
        waiting, self._unwritten = self._unwritten, self._unwritten + text
        if self.path is None or not self._unwritten:
            return
        try:
            with self.path.open("ab", buffering=0) as file:
                start, data = file.tell(), self._unwritten.encode()
                if file.write(data) < len(data):
                    file.truncate(start)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._unwritten = ""
        except OSError as error:
            if not waiting:
                self.say(f"warning: {self.path}: {error.strerror}; its lines wait in memory")

    def _line(self, done: int, result: StepResult, counters: Mapping[str, Any]) -> dict[str, Any]:
        seconds = time.perf_counter() - self.window.started
        steps = done - self.window.first_step
        rate = steps / seconds
        accounts: dict[str, float] = {}
        if self.accounts:
            alone = result.num_texts_alone
            accounts = self.accounts.line(result.num_tokens, 1 / rate, num_texts_alone=alone)
        return {
            "step": done,
            "time_s": round(self.elapsed_before + time.perf_counter() - self.started, 3),
            **{name: _finite(value) for name, value in result.terms.items()},
            "lr": result.lr,
            "grad_norm": _finite(result.grad_norm),
            "logit_scale": _finite(result.logit_scale),
            "samples_per_s": round(rate * self.global_batch_size, 2),
            "data_wait": round(self.window.data_wait_s / seconds, 4),
            "communication": round(self.window.communication_s / seconds, 4),
            "padding_waste": round(result.padding_waste, 4),
            **accounts,
            "duplicates": result.num_duplicates,
            **counters,
            "eta_s": round((self.num_steps - done) / rate, 1),
        }


@dataclass
class _Window:
    """The steps since the last line."""

    first_step: int
    data_wait_s: float = 0.0
    communication_s: float = 0.0
    started: float = field(default_factory=time.perf_counter)


def _drop_later_lines(path: Path, start_step: int) -> list[dict[str, Any]]:
    """The lines up to `start_step`; the file holds no others now, so that each step stands once."""
    kept = [line for line in read_json_lines(path) if line["step"] <= start_step]
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    return kept


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _readable(line: dict[str, Any], num_steps: int) -> str:
    losses = "  ".join(
        f"{name.removeprefix('loss/')} {value:.4f}"
        for name, value in line.items()
        if name.startswith("loss") and value is not None
    )
    return (
        f"step {line['step']:>{len(str(num_steps))}}/{num_steps}  {losses}  lr {line['lr']:.2e}  "
        f"grad {line['grad_norm'] or math.nan:.2f}  scale {line['logit_scale'] or math.nan:.1f}  "
        f"{line['samples_per_s']:.0f} samples/s  wait {line['data_wait']:.0%}  "
        f"comm {line['communication']:.0%}  pad {line['padding_waste']:.0%}  "
        f"mfu {line.get('mfu', math.nan):.0%}  "
        f"bad {line['bad_samples']}  skipped {line['skipped_steps']}  eta {_clock(line['eta_s'])}"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _bar(num_steps: int, start_step: int) -> Progress:
    bar = Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    bar.add_task("training", total=num_steps, completed=start_step)
    bar.start()
    return bar
