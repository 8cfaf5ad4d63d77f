"""Runs of one or two ranks, each a process without a launcher, with a fault at a step of a rank."""

import io
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

REPOSITORY = Path(__file__).parents[3]
CONFIG = f"""\
data: {{train: "{REPOSITORY}/datasets/emoji/val_artist-*.tar", num_workers: 0}}
model:
  embed_dim: 16
  image:
    name: vit_tiny_patch16_224
    image_size: 16
    pool: avg
    kwargs: {{embed_dim: 32, depth: 1, num_heads: 2, patch_size: 8, class_token: false}}
  text: {{tokenizer: "bpe:300", context_length: 12, width: 32, depth: 1, num_heads: 2}}
  captioner: {{width: 32, depth: 1, num_heads: 2}}
optim: {{name: adamw, lr: 1e-3, warmup_steps: 5}}
train: {{steps: 12, global_batch_size: 16, precision: fp32, device: cpu}}
run: {{save_every_steps: 4, log_every_steps: 1, step_timeout_s: 60, rank_timeout_s: 60}}
"""


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(CONFIG)
    return path


class Ranks:
    """The processes of one run."""

    def __init__(self, words, faults, folder, world_size):
        folder.mkdir(parents=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.logs = [folder / f"log-{rank}" for rank in range(world_size)]
        group = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.processes = [
            self._process(words, faults, {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(world_size)
        ]

    def _process(self, words, faults, environment):
        names = {
            "WORDS": words,
            "FAULTS": faults,
            "LOG": str(self.logs[int(environment["RANK"])]),
            "ENVIRONMENT": environment,
        }
        process = multiprocessing.get_context("forkserver").Process(
            target=runpy.run_path,
            args=(str(Path(__file__).with_name("driver.py")),),
            kwargs={"init_globals": names, "run_name": "__main__"},
        )
        process.start()
        return process

    def alive(self):
        return [rank for rank, process in enumerate(self.processes) if process.is_alive()]

    def said(self, rank):
        """The lines on a rank's standard output and error."""
        return self.logs[rank].read_text().splitlines() if self.logs[rank].exists() else []

    def errors(self):
        """The first line of every rank that is a problem, by rank."""
        found = {}
        for rank in range(len(self.logs)):
            for line in self.said(rank):
                if line.startswith("error: ") or "asked to stop" in line:
                    found.setdefault(rank, line)
        return found

    def wait(self, timeout_s=60, ranks=None):
        """The exit codes of these ranks, or of all."""
        deadline = time.monotonic() + timeout_s
        waited_for = [p for r, p in enumerate(self.processes) if ranks is None or r in ranks]
        for process in waited_for:
            process.join(max(0.0, deadline - time.monotonic()))
        said = ["\n".join(self.said(rank)[-15:]) for rank in range(len(self.logs))]
        assert not any(p.is_alive() for p in waited_for), "\n---\n".join(said)
        return [process.exitcode for process in waited_for]

    def until(self, text, rank=0, timeout_s=60):
        """Wait until a rank has said so."""
        deadline = time.monotonic() + timeout_s
        while not any(text in line for line in self.said(rank)):
            assert time.monotonic() < deadline, self.said(rank)
            assert self.processes[rank].is_alive(), self.said(rank)
            time.sleep(0.01)

    def close(self):
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()
            process.close()


@pytest.fixture(scope="session")
def _server():
    """Processes that fork with everything imported: 0.3 s in place of 4."""
    context = multiprocessing.get_context("forkserver")
    used = ["torch._dynamo", "vlm.data.loader", "vlm.training.loop"]
    context.set_forkserver_preload(used)


@pytest.fixture
def start(config, tmp_path, _server):
    """Start `vlm train`; `faults` are (name in driver.py, step, rank)."""
    started = []

    def start(*words, faults=(), world_size=2):
        words = [str(config), f"run.dir={tmp_path / 'run'}", *map(str, words)]
        folder = tmp_path / f"logs-{len(started)}"
        started.append(Ranks(words, list(faults), folder, world_size))
        return started[-1]

    yield start
    for ranks in started:
        ranks.close()


@pytest.fixture
def run(tmp_path):
    """The run folder of what `start` starts."""
    return tmp_path / "run"


@pytest.fixture
def metrics(run):
    """The lines of its metrics."""
    return lambda: [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def begin(config, run, environment):
    """Start a run by a command, in a process group of its own, and wait for its first step."""
    begun = []

    def begin(*words, launcher=(sys.executable,)):
        process = subprocess.Popen(
            [*launcher, "-m", "vlm", "train", config, f"run.dir={run}", *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        begun.append(process)
        for line in process.stdout:
            if line.startswith("step"):
                break
        return process

    yield begin
    for process in begun:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # workers, too: they hold the pipes
        process.communicate(timeout=20)


@pytest.fixture(scope="session")
def write_shard():
    """Write a tar of so many pictures."""

    def write_shard(path, number):
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for key in range(number):
                picture = io.BytesIO()
                Image.new("RGB", (16, 16), (key % 256, 90, 30)).save(picture, "PNG")
                members = {"png": picture.getvalue(), "txt": f"picture {key}".encode()}
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{key:04}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))

    return write_shard
