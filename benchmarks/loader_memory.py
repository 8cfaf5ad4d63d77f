"""A reading worker's memory over a million samples: flat, or the slope says what leaks.

    python benchmarks/loader_memory.py     # about 5 minutes, one worker

One worker of the training loader reads 64 small pictures of every format again and again, two of
them broken; its resident memory is sampled, and a line is fitted to all but the first fifth.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from io import BytesIO
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image
from record import record

from vlm.data.dataset import open_shards
from vlm.data.loader import training_batches
from vlm.data.order import SampleOrder
from vlm.data.transforms import TrainTransform
from vlm.tokenizer import clip_tokenizer

BATCH_SIZE, SAMPLES_PER_READING = 16, 400
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loader_memory.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        readings = np.array(list(rss_readings(write_shard(Path(folder)), args.samples)))
    samples, seconds, rss = readings[len(readings) // 5 :].T
    per_sample = float(np.polyfit(samples, rss, 1)[0])
    result = {
        "samples": args.samples,
        "samples_per_s": float(np.ptp(samples) / np.ptp(seconds)),
        "rss_mib": [round(float(bound(rss)) / 2**20, 2) for bound in (np.min, np.max)],
        "bytes_per_sample": per_sample,
        "mib_per_minute": per_sample * np.ptp(samples) / np.ptp(seconds) * 60 / 2**20,
    }
    record("loader_memory", result, args.out)


def rss_readings(shard: str, num_samples: int) -> Iterator[tuple[int, float, int]]:
    """Samples so far, seconds, resident bytes of the worker."""
    dataset = open_shards(shard, log=lambda _: None)
    batches = training_batches(
        dataset,
        SampleOrder(dataset.shard_sizes, seed=0, streams=1, global_batch_size=BATCH_SIZE),
        transform=TrainTransform(32, min_scale=0.5, horizontal_flip=0.5, color_jitter=0.2),
        tokenizer=clip_tokenizer(),
        seed=0,
        micro_batch_size=BATCH_SIZE,
        num_workers=1,
    )
    with closing(batches):
        (worker,) = multiprocessing.active_children()
        for number, _ in enumerate(batches):
            if number * BATCH_SIZE % SAMPLES_PER_READING == 0:
                status = Path(f"/proc/{worker.pid}/status").read_text()
                rss_kib = next(line for line in status.splitlines() if line.startswith("VmRSS"))
                yield number * BATCH_SIZE, time.perf_counter(), int(rss_kib.split()[1]) * 1024
            if number * BATCH_SIZE >= num_samples:
                return


def write_shard(folder: Path) -> str:
    rng = np.random.default_rng(0)
    path = folder / "pictures.tar"
    with webdataset.TarWriter(str(path)) as tar:
        for number in range(64):
            suffix = list(FORMATS)[number % len(FORMATS)]
            file = BytesIO()
            pixels = rng.integers(256, size=(40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file, FORMATS[suffix])
            data = file.getvalue()[: 300 if number < 2 else None]
            tar.write({"__key__": f"{number:02}", suffix: data, "txt": f"picture {number}"})
    return str(path)


if __name__ == "__main__":
    main()
