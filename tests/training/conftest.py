"""A tiny run on real shards, as a config file, and a way to start it in a process of its own."""

import json
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
def start(config, vlm_on):
    """Start `vlm train`, on one rank or several."""
    return lambda *words, world_size=1: vlm_on(world_size, "train", config, *words)


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
    start(f"run.dir={folder}").finish()
    return folder
