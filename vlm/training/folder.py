"""A run folder as a run begins: it is not overwritten, and it says what made it."""

import json
import platform
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch

import vlm
from vlm.checkpoint import list_checkpoints
from vlm.config.find import read_yaml
from vlm.config.load import dump_config
from vlm.config.sections import flatten
from vlm.errors import ConfigError
from vlm.runtime.device import machine
from vlm.runtime.files import write_atomic
from vlm.runtime.preemption import MARKER
from vlm.training.setup import Parts

_ASIDE = {  # what a run that goes on beyond its end keeps, under the step it ended with
    "model": "model-{:08}",
    "results.json": "results-{:08}.json",
    "results.md": "results-{:08}.md",
    "eval": "results-{:08}-eval",
}


def refuse_overwriting(folder: Path, resume: str) -> None:
    """Let a run begin only where there is none, unless it is to be continued.

    Raises:
        ConfigError: There is one.
    """
    if resume == "never" and (
        list_checkpoints(folder / "checkpoints") or (folder / "model").exists()
    ):
        raise ConfigError(
            f"{folder} holds a run already; continue it with --resume auto, "
            "or start another with run.dir=FOLDER"
        )


def describe(folder: Path, parts: Parts, first_step: int) -> None:
    """config.yaml reruns the run; ledger.json says on what, command.json what made it.

    Settings that differ from those before are told. Of a run that has nothing left to train, what
    made it stays; of one that goes on beyond its end, the model gets the name of its step.
    """
    (folder / MARKER).unlink(missing_ok=True)
    if first_step >= parts.num_steps:
        print(f"{folder} has taken its {parts.num_steps} steps: nothing is left to train")
        return
    for name, aside_name in _ASIDE.items():
        if first_step and (folder / name).exists():
            path = folder / name
            aside = path.rename(folder / aside_name.format(first_step))
            print(f"{path} is {aside.name} now, for the run goes on")
    config = dump_config(parts.config)
    for line in _changes(folder / "config.yaml", config) if first_step else ():
        print(line)
    write_atomic(folder / "config.yaml", config.encode())
    write_atomic(folder / "ledger.json", parts.data.ledger())
    command = {
        "command": ["vlm", *sys.argv[1:]],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "vlm": vlm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": machine(parts.step.device),
        "predicted_memory_gib": round(parts.memory.total / 2**30, 3),
    }
    write_atomic(folder / "command.json", json.dumps(command, indent=1).encode())


def _changes(path: Path, config: str) -> Iterator[str]:
    """Yields a line for each setting that is another than in the file."""
    if not path.exists():
        return
    before, now = (dict(flatten(read_yaml(text).values)) for text in (path.read_text(), config))
    for key, value in now.items():
        if before.get(key) != value:
            yield f"{key} was {json.dumps(before.get(key))}, is {json.dumps(value)} from here on"
