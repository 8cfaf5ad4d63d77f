"""Runs of one or two ranks, each a process without a launcher, with a fault at a step of a rank."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
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


@pytest.fixture
def start(config, run, fork_ranks):
    """Start `vlm train`; `faults` are (name in driver.py, step, rank)."""

    def start(*words, faults=(), world_size=2):
        words = [str(config), f"run.dir={run}", *map(str, words)]
        driver = Path(__file__).with_name("driver.py")
        return fork_ranks(world_size, driver, WORDS=words, FAULTS=list(faults))

    return start


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
