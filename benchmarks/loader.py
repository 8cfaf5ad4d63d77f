"""The training loader against open_clip's own, on photographs, with one and with two workers.

    python benchmarks/loader.py --peer-env /tmp/open_clip_env   # 30 minutes, on an idle machine

Both make 224 px crops of 0.9 to 1 of the area and tokens from the same shards: JPEG quality 95 with
256, 384 and 512 px on the shorter side, 240 crops of the 20 large photographs in the Debian
packages mate-backgrounds and lomiri-wallpapers-20.04 (`--photos FOLDER` takes any others), each
used several times with another caption. open_clip runs `open_clip_train.data.get_wds_dataset`, its
image transform and its tokenizer in an environment of its own, which the script sets up: its
training data needs webdataset 0.2.86. Every round starts one process for each pipeline, in turns.
Pixels are compared with Pillow's bicubic crop of the same box from the picture decoded whole.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from loader_run import IMAGE_SIZE, PIPELINES
from PIL import Image
from record import record

from vlm.data.order import draws_of_visit
from vlm.data.transforms import TrainTransform

SIDES, WORKERS = (256, 384, 512), (1, 2)
PACKAGES = ("mate-backgrounds", "lomiri-wallpapers-20.04")
PEER = ("torch", "torchvision", "open_clip_torch==3.3.0", "webdataset==0.2.86", "pandas")
NUM_SHARDS, SAMPLES_PER_SHARD, NUM_PICTURES = 8, 256, 240
WORDS = "a the red old small two dog boat house tree on under near with and sky table street"
ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-env", type=Path, required=True, help="set up if it is not there")
    parser.add_argument("--photos", type=Path, help="folder of large JPEG photographs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES)
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loader.json"))
    args = parser.parse_args()
    pythons = dict.fromkeys(PIPELINES, sys.executable) | {"open_clip": peer_python(args.peer_env)}
    result: dict[str, Any] = {
        "rounds": args.rounds,
        "photographs": str(args.photos or ", ".join(PACKAGES)),
    }
    with tempfile.TemporaryDirectory() as folder:
        photos = sorted((args.photos or fetch(Path(folder))).rglob("*.jpg"))
        sides = {
            str(side): measure(photos, side, Path(folder), args, pythons) for side in args.sides
        }
    before = json.loads(args.out.read_text())["sides"] if args.out.exists() else {}
    result["sides"] = dict(sorted((before | sides).items()))  # each says when it was measured
    record("loader", result, args.out, "opencv-python-headless")


def measure(
    photos: list[Path], side: int, folder: Path, args: argparse.Namespace, pythons: dict[str, str]
) -> dict[str, Any]:
    """All figures of one size of pictures."""
    pictures = list(encoded_crops(photos, side))
    shards = write_shards(folder / str(side), pictures)
    decode = rates(["decode"], shards, 0, args.rounds, pythons)["decode"]
    found: dict[str, Any] = {
        "started": time.strftime("%Y-%m-%d %H:%M"),
        "picture_bytes": round(statistics.mean(map(len, pictures))),
        "crop_difference": crop_difference(pictures),
        "decode": decode,
    }
    for workers in args.workers:
        names = [name for name in PIPELINES if name != "decode"]
        per_round = rates(names, shards, workers, args.rounds, pythons)
        medians = {name: statistics.median(values) for name, values in per_round.items()}
        found[f"workers_{workers}"] = {
            "samples_per_s": per_round,
            "medians": medians,
            "ratio": medians["vlm"] / medians["open_clip"],
            "ratio_normalized": medians["normalized"] / medians["open_clip"],
            "share_of_decode": medians["vlm"] / workers / statistics.median(decode),
        }
        print(side, workers, json.dumps(found[f"workers_{workers}"]), flush=True)
    return found


def rates(
    names: list[str], shards: str, workers: int, rounds: int, pythons: dict[str, str]
) -> dict[str, list[float]]:
    """Samples/s of each pipeline in each round; every other round goes backwards."""
    found: dict[str, list[float]] = {name: [] for name in names}
    samples = NUM_SHARDS * SAMPLES_PER_SHARD
    for number in range(rounds):
        for name in names[:: -1 if number % 2 else 1]:
            command = [pythons[name], str(ROOT / "benchmarks/loader_run.py"), name, shards]
            command += [f"--workers={workers}", f"--samples={samples}"]
            path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            environment = os.environ | {"PYTHONPATH": path}
            out = subprocess.check_output(command, text=True, env=environment)
            found[name].append(round(json.loads(out.splitlines()[-1])["samples_per_s"], 1))
    return found


def crop_difference(pictures: list[bytes]) -> dict[str, float]:
    """Mean absolute difference from Pillow's crop of the same box, in grey levels a picture."""
    transform = TrainTransform(IMAGE_SIZE)
    differences = []
    for number, data in enumerate(pictures):
        pixels = transform(data, draws_of_visit(0, 0, number))
        source, box = transform.load(data, draws_of_visit(0, 0, number))
        whole = Image.open(BytesIO(data))
        x, y = whole.width / source.shape[1], whole.height / source.shape[0]
        box = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
        expected = whole.resize(pixels.shape[1::-1], Image.Resampling.BICUBIC, box)
        differences.append(np.abs(pixels.astype(int) - np.asarray(expected)).mean())
    return {
        "mean": round(float(np.mean(differences)), 3),
        "p95": round(float(np.percentile(differences, 95)), 3),
    }


def encoded_crops(photos: list[Path], side: int) -> list[bytes]:
    """Random crops of the photographs, `side` px on the shorter side, JPEG quality 95."""
    rng = random.Random(0)
    found = []
    for path in photos:
        photo = Image.open(path).convert("RGB")
        for _ in range(-(-NUM_PICTURES // len(photos))):
            aspect = math.exp(rng.uniform(math.log(2 / 3), math.log(3 / 2)))
            height = rng.uniform(0.6, 1) * min(photo.height, photo.width / aspect)
            width = height * aspect
            left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
            size = (max(side, round(side * aspect)), max(side, round(side / aspect)))
            box = (left, top, left + width, top + height)
            crop = photo.resize(size, Image.Resampling.LANCZOS, box, reducing_gap=3.0)
            file = BytesIO()
            crop.save(file, "JPEG", quality=95)
            found.append(file.getvalue())
    return found


def write_shards(folder: Path, pictures: list[bytes]) -> str:
    """The pictures in turn, each time with another caption; returns the shards' pattern."""
    rng = random.Random(1)
    folder.mkdir()
    order = [i % len(pictures) for i in range(NUM_SHARDS * SAMPLES_PER_SHARD)]
    rng.shuffle(order)
    for shard in range(NUM_SHARDS):
        with webdataset.TarWriter(str(folder / f"{shard:04}.tar")) as tar:
            for number in range(shard * SAMPLES_PER_SHARD, (shard + 1) * SAMPLES_PER_SHARD):
                words = rng.choices(WORDS.split(), k=rng.randint(8, 16))
                sample = {"jpg": pictures[order[number]], "txt": " ".join([*words, str(number)])}
                tar.write({"__key__": f"{number:06}"} | sample)
    return f"{folder}/{{0000..{NUM_SHARDS - 1:04}}}.tar"


def fetch(folder: Path) -> Path:
    """The photographs of the Debian packages."""
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True, stdout=sys.stderr)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(package), str(folder / "photos")], check=True)
    return folder / "photos"


def peer_python(folder: Path) -> str:
    """The interpreter of open_clip's environment, which is set up if it is not there."""
    python = folder / "bin/python"
    done = folder / "done"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pins = (ROOT / "constraints.txt").read_text().splitlines()
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(p for p in pins if not p.startswith("webdataset")) + "\n")
        install = ["-m", "pip", "install", "--quiet", "-c", str(constraints), *PEER]
        subprocess.run([str(python), *install], check=True, stdout=sys.stderr)
        done.touch()
    return str(python)


if __name__ == "__main__":
    main()
