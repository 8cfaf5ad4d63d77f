"""A run folder as a run begins: it is not overwritten, and it says what made it."""

import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

import vlm
from vlm.checkpoint import list_checkpoints
from vlm.config.load import dump_config
from vlm.errors import ConfigError
from vlm.runtime.files import write_atomic
from vlm.runtime.preemption import MARKER
from vlm.training.setup import Parts


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


def describe(folder: Path, parts: Parts) -> None:
    """config.yaml reruns the run; ledger.json says on what, command.json what made it."""
    (folder / MARKER).unlink(missing_ok=True)
    write_atomic(folder / "config.yaml", dump_config(parts.config).encode())
    write_atomic(folder / "ledger.json", parts.data.ledger())
    command = {
        "command": ["vlm", *sys.argv[1:]],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "vlm": vlm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    write_atomic(folder / "command.json", json.dumps(command, indent=1).encode())
