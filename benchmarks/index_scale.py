"""A set the size of LAION-400M: how long opening its index and restoring an order take.

    python benchmarks/index_scale.py

Writes the joined index of 41,455 made-up shards with 407 million samples, and measures in a fresh
process: opening it as a data set, and from there the samples of a step at a random place of a
random epoch, as a resumed run needs them. The target: under 200 ms and 200 MB.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from record import record

from vlm.data.dataset import open_shards
from vlm.data.index_file import ShardIndex
from vlm.data.joined import NAME, encode_joined
from vlm.data.order import SampleOrder

NUM_SHARDS, NUM_SAMPLES = 41_455, 407_000_000
GLOBAL_BATCH_SIZE, STREAMS = 32_768, 64
NUM_RESTORES = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/index_scale.json"))
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    result: dict[str, Any] = {
        "num_shards": NUM_SHARDS,
        "num_samples": NUM_SAMPLES,
        "global_batch_size": GLOBAL_BATCH_SIZE,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / NAME
        path.write_bytes(encode_joined(made_up_shards(), Path(folder)))
        result["index_mb"] = round(path.stat().st_size / 1e6, 1)
        command = [sys.executable, __file__, "--measure", str(path)]
        measured = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    result |= json.loads(measured.stdout)
    record("index_scale", result, args.out, "numpy")


def made_up_shards() -> list[ShardIndex]:
    """Shards of 8,000 to 11,600 samples or so."""
    rng = np.random.default_rng(0)
    shares = rng.uniform(0.8, 1.16, NUM_SHARDS)
    sizes = rng.multinomial(NUM_SAMPLES, shares / shares.sum())
    return [
        ShardIndex(
            Path(f"{number:05}.tar"),
            Path(f"{number:05}.tar.idx"),
            num_samples=size,
            size_bytes=size * 30_000,
            mtime_ns=1_700_000_000_000_000_000 + number,
            sha256=rng.bytes(32).hex(),
            crc32=number,
            columns=("similarity",),
            rejects={"image.truncated": 3} if number % 10 == 0 else {},
        )
        for number, size in enumerate(sizes.tolist())
    ]


def measure(path: Path) -> dict[str, Any]:
    """Times and memory in this process, which has done nothing else."""
    before_mb = peak_mb()
    begun = time.perf_counter()
    dataset = open_shards(str(path), log=lambda line: None)
    sizes = dataset.shard_sizes
    open_ms = 1000 * (time.perf_counter() - begun)
    assert (len(sizes), len(dataset)) == (NUM_SHARDS, NUM_SAMPLES)
    steps = np.random.default_rng(1).integers(0, 5 * NUM_SAMPLES // GLOBAL_BATCH_SIZE, NUM_RESTORES)
    restores = {
        f"restore_{streams}_streams_ms": milliseconds(
            lambda step, streams=streams: restore(sizes, step, streams), steps.tolist()
        )
        for streams in (1, STREAMS)
    }
    return {
        "open_ms": round(open_ms, 1),
        **restores,
        "peak_rss_mb": round(peak_mb(), 1),
        "peak_rss_of_imports_mb": round(before_mb, 1),
    }


def restore(sizes: list[int], step: int, streams: int) -> None:
    """The samples of a step, from nothing but the sizes of the shards."""
    order = SampleOrder(sizes, seed=0, streams=streams, global_batch_size=GLOBAL_BATCH_SIZE)
    order.batch(step)


def milliseconds(function: Callable[[int], object], steps: list[int]) -> dict[str, float]:
    times = []
    for step in steps:
        begun = time.perf_counter()
        function(step)
        times.append(1000 * (time.perf_counter() - begun))
    return {"median": round(statistics.median(times), 1), "max": round(max(times), 1)}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    main()
