"""A tiny run on real shards, as a config file, and ways to start it in its own process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
CONFIG = f"""\
data: {{train: "{REPOSITORY}/datasets/emoji/val_artist-*.tar", num_workers: 0}}
model:
  embed_dim: 16
  image:
    name: vit_tiny_patch16_224
    image_size: 16
    pool: avg
    kwargs: {{embed_dim: 32, depth: 1, num_heads: 2, patch_size: 8, class_token: false}}
  text: {{tokenizer: "bpe:400", context_length: 12, width: 32, depth: 1, num_heads: 2}}
  captioner: {{width: 32, depth: 1, num_heads: 2}}
optim: {{name: muon, lr: 1e-3, warmup_steps: 5}}
train: {{steps: 30, global_batch_size: 16, precision: fp32, device: cpu, ema_decay: 0.9}}
run: {{save_every_steps: 4, log_every_steps: 1}}
"""


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="session")
def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}


@pytest.fixture(scope="session")
def start(config, environment):
    """Start `vlm train` in a process group of its own."""

    def start(*words, launcher=(sys.executable, "-m", "vlm")):
        compiles = "train.compile=always" in words  # torch.compile warns of itself
        return subprocess.Popen(
            [*launcher, "train", str(config), *map(str, words)],
            env={**environment, "PYTHONWARNINGS": "default"} if compiles else environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.fixture(scope="session")
def metrics():
    """The lines of a run's metrics."""

    def metrics(run):
        lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return metrics


@pytest.fixture(scope="session")
def finished_run(start, tmp_path_factory):
    """A run that nothing interrupted; tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    process = start(f"run.dir={folder}")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return folder
