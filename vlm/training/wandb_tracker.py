"""Weights & Biases: a run's curves, settings and results, kept in RUN/wandb or sent to a server."""

import dataclasses
import os
import secrets
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from vlm.config.schema import Config
from vlm.runtime.files import write_atomic

LOGIN_TIMEOUT_S = 30.0  # a question at the terminal that nobody answers
FINISH_TIMEOUT_S = 30.0  # what is not uploaded by then stays in the folder, for `wandb sync`

_SETTINGS = {  # quiet, and nothing about the machine, its user, the code or the console
    "silent": True,
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "save_code": False,
    "label_disable": True,
    "host": "",
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
    "finish_timeout": FINISH_TIMEOUT_S,
    "stop_fn": lambda: os.kill(os.getpid(), signal.SIGTERM),  # its page's stop: the run saves
}


class WandB:
    """One run of Weights & Biases, however many processes the run takes.

    Without WANDB_MODE in the environment nothing leaves the machine. Each process of an offline run
    has a file of its own, which `wandb sync` uploads in turn; each step is in one of them, once.

    Args:
        config: Of the run.
        last_step: Unused: what is there already, its own files or the server say.
        say: Prints a line.
    """

    def __init__(self, config: Config, last_step: int, say: Callable[[str], None]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # to its makers
        os.environ.setdefault("WANDB_DOCKER", "")  # else Kubernetes is asked for the image's name
        import wandb

        run_folder = Path(config.run.dir).resolve()
        folder = run_folder / "wandb"
        logged = _last_logged_step(folder)
        wandb.setup(settings=wandb.Settings(login_timeout=LOGIN_TIMEOUT_S))
        self._run = wandb.init(
            project=config.run.wandb_project,
            id=_run_id(folder),
            name=run_folder.name,
            dir=run_folder,
            resume="allow",
            reinit="create_new",
            config=dataclasses.asdict(config),
            settings=wandb.Settings(mode=os.environ.get("WANDB_MODE") or "offline", **_SETTINGS),
        )
        self._next_step = logged + 1 if self._run.offline else self._run.starting_step
        if self._run.offline:
            say(f"wandb: offline; to upload: wandb sync {folder}")
        elif not self._run.disabled:
            say(f"wandb: {self._run.url}")

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Log a step, if it is new."""
        if step >= self._next_step:
            self._run.log(numbers, step=step, commit=True)
            self._next_step = step + 1

    def summarize(self, step: int, numbers: dict[str, float]) -> None:
        """Add to the run's summary."""
        self._run.summary.update(numbers)

    def close(self) -> None:
        """Finish the run; it can be resumed."""
        import wandb

        try:
            self._run.finish()
        except Exception:  # its process is gone, and would be asked again when this one exits
            wandb.teardown()
            raise


def _run_id(folder: Path) -> str:
    """The same for all processes of the run."""
    path = folder / "run-id"
    if not path.exists():
        write_atomic(path, secrets.token_hex(4).encode())
    return path.read_text()


def _last_logged_step(folder: Path) -> int:
    """Of the offline files that there are; -1 without any.

    metrics.jsonl cannot say it: if the run is killed, up to 15 s of lines never reach the file.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    steps = [
        record.history.step.num
        for path in folder.glob("offline-run-*/*.wandb")
        for record in map(Record.FromString, _records(path.read_bytes()))
        if record.HasField("history")
    ]
    return max(steps, default=-1)


def _records(data: bytes) -> Iterator[bytes]:
    """What a .wandb file holds, up to where a kill cut it off.

    It is LevelDB's log format after 7 bytes: blocks of 32 KiB, in them pieces with a header of 7
    bytes (checksum, length, and whether it is a whole record, its first, middle or last piece).
    """
    block, header = 32 * 1024, struct.Struct("<IHB")
    place, record = 7, b""
    while place + header.size <= len(data):
        left = block - place % block
        if left < header.size:
            place += left
            continue
        _, length, kind = header.unpack_from(data, place)
        place += header.size + length
        if kind not in (1, 2, 3, 4) or place > len(data):
            return
        record += data[place - length : place]
        if kind in (1, 4):
            yield record
            record = b""
