"""`vlm train` against open_clip's own trainer, as users run them: same JPEG shards, same model.

    python benchmarks/train_e2e.py --peer-env /tmp/open_clip_env   # 20 minutes, on an idle machine

Both read the same shards of photographs (256 px, captions of 8 to 16 words) with two workers, in
bf16, logging every step; open_clip in an environment of its own, for its trainer needs another
`webdataset`. In turns, whole processes; a run's rate is the median of its steps but the first four.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from loader import NUM_SHARDS, SAMPLES_PER_SHARD, encoded_crops, fetch, peer_python, write_shards
from record import record

ROOT = Path(__file__).parent.parent
NUM_SKIPPED = 4
TINY = {
    "embed_dim": 192,
    "vision_cfg": {"image_size": 112, "layers": 12, "width": 192, "patch_size": 16},
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 192,
        "heads": 3,
        "layers": 12,
    },
}
OURS_TINY = {
    "model.embed_dim": 192,
    "model.image.image_size": 112,
    "model.image.kwargs.embed_dim": 192,
    "model.image.kwargs.num_heads": 3,
    "model.text.width": 192,
    "model.text.num_heads": 3,
}
MODELS: dict[str, tuple[str, dict[str, Any], int, int]] = {  # config, changes, batch, steps
    "ViT-B-32": ("clip_vit_b32", {}, 32, 16),
    "ViT-Ti-16": ("clip_vit_b16", OURS_TINY, 64, 30),
}
# open_clip's entry point behind the torchvision guard, with a model that it doesn't name
THEIRS = """\
import json, sys
from vlm.runtime import torchvision_guard
torchvision_guard.install()
import open_clip
open_clip.add_model_config(sys.argv[1])
from open_clip_train.main import main
main(sys.argv[2:])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-env", type=Path, required=True, help="set up if it is not there")
    parser.add_argument("--photos", type=Path, help="a folder of JPEG photographs")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train_e2e.json"))
    args = parser.parse_args()
    python = peer_python(args.peer_env)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = sorted((args.photos or fetch(folder)).rglob("*.jpg"))
        shards = write_shards(folder / "shards", encoded_crops(photos, 256))
        (folder / "ViT-Ti-16.json").write_text(json.dumps(TINY))
        step = step_ratio(folder / "step.json")
        rates = {
            model: measure(model, shards, folder, python, args.rounds) for model in args.models
        }
    ratio = {
        model: statistics.median(sides["vlm"]) / statistics.median(sides["open_clip"])
        for model, sides in rates.items()
    }
    result = {
        "photographs": len(photos),
        "samples_per_s": rates,
        "ratio": ratio,
        "of_step_ratio": ratio.get("ViT-B-32", 0.0) / step,
        "step_ratio": step,
    }
    record("train_e2e", result, args.out, "open_clip_torch")


def step_ratio(out: Path) -> float:
    """Of ViT-B/32's bare steps in bf16, here and now: the machine's speed changes with the hour."""
    script = str(ROOT / "benchmarks/train_step.py")
    words = ["--models", "ViT-B-32", "--precisions", "bf16", "--rounds", "5", "--out", str(out)]
    run([sys.executable, script, *words])
    ratio: float = json.loads(out.read_text())["ratio"]["ViT-B-32"]["bf16"]
    return ratio


def measure(
    model: str, shards: str, folder: Path, python: str, rounds: int
) -> dict[str, list[float]]:
    """Samples/s of each run of each side."""
    found: dict[str, list[float]] = {"vlm": [], "open_clip": []}
    for number in range(rounds):
        for side in list(found)[:: -1 if number % 2 else 1]:
            out = folder / f"{model}-{side}-{number}"
            rate = ours(model, shards, out) if side == "vlm" else theirs(model, shards, out, python)
            found[side].append(rate)
            print(model, number, side, round(rate, 2), flush=True)
    return found


def ours(model: str, shards: str, folder: Path) -> float:
    config, changes, batch, steps = MODELS[model]
    settings = {
        **changes,
        "data.train": shards,
        "data.num_workers": 2,
        "train.epochs": "null",
        "train.steps": steps,
        "train.global_batch_size": batch,
        "train.precision": "bf16",
        "train.device": "cpu",
        "data.streams": 1,
        "run.dir": folder,
        "run.log_every_steps": 1,
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    run([sys.executable, "-m", "vlm", "train", config, *words])
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return statistics.median(json.loads(line)["samples_per_s"] for line in lines[NUM_SKIPPED:])


def theirs(model: str, shards: str, folder: Path, python: str) -> float:
    _, _, batch, steps = MODELS[model]
    words = [
        f"--train-data={shards}",
        f"--train-num-samples={min(batch * steps, NUM_SHARDS * SAMPLES_PER_SHARD)}",
        "--dataset-type=webdataset",
        f"--model={model}",
        f"--batch-size={batch}",
        "--epochs=1",
        "--workers=2",
        "--precision=amp_bf16",
        "--device=cpu",
        "--log-every-n-steps=1",
        "--save-frequency=0",
        f"--logs={folder}",
        "--name=run",
    ]
    said = run([python, "-c", THEIRS, str(folder.parent), *words])
    seconds = [float(found) for found in re.findall(r"Batch \(t\): ([0-9.]+)", said)]
    return batch / statistics.median(seconds[NUM_SKIPPED:])


def run(command: list[str]) -> str:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stdout[-3000:])
    return done.stdout


if __name__ == "__main__":
    main()
