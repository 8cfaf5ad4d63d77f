"""Writes clean_losses.json, each step's loss of 20 seeds: record_losses.py CONFIG FOLDER."""

import json
import sys
from pathlib import Path

import torch

from vlm.runtime import torchvision_guard

torchvision_guard.install()

from vlm.training.loop import train  # noqa: E402

NUM_STEPS = 120

if __name__ == "__main__":
    torch.set_num_threads(1)
    config, folder = sys.argv[1:]
    runs = []
    for seed in range(20):
        run = Path(folder) / str(seed)
        words = [f"run.dir={run}", f"train.seed={seed}", f"train.steps={NUM_STEPS}"]
        train(config, [*words, "run.save_every_steps=0"])
        lines = (run / "metrics.jsonl").read_text().splitlines()
        runs.append([round(json.loads(line)["loss"], 4) for line in lines])
    out = "[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n"
    Path(__file__).with_name("clean_losses.json").write_text(out)
