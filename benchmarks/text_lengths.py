"""A run's memory as captions vary in length, against the plan; with the heap tidied and without.

    python benchmarks/text_lengths.py          # about 6 minutes, 6 GiB

ViT-S/16 of open_clip, bf16, batch 32: steps on noise whose captions have another length every
other step, which no data set is like, with pages kept as in `vlm train`. Each side has a process of
its own, since a peak is a process's, and one runs after the other: seconds say what tidying costs
only roughly.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from record import record
from train_step import noise, parts_for

from vlm.runtime.heap import pages_kept, peak_resident_bytes
from vlm.training.memory import GIB

LENGTHS = [24, 23, 22, 21, 20, 32, 40, 25, 48, 26, 56, 27, 64, 28, 72, 30, 16, 77]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=["tidied", "left"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/text_lengths.json"))
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run(is_tidied=args.side == "tidied")))
        return
    sides = {}
    for side in ("tidied", "left"):
        command = [sys.executable, __file__, "--side", side]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        sides[side] = json.loads(done.stdout.splitlines()[-1])
        print(side, sides[side], flush=True)
    result = {
        "lengths": LENGTHS,
        "sides": sides,
        "ratio": sides["tidied"]["peak_gib"] / sides["tidied"]["planned_gib"],
    }
    record("text_lengths", result, args.out)


def run(*, is_tidied: bool) -> dict[str, Any]:
    parts = parts_for("ViT-S-16", "bf16", 32)
    heap = parts.step.heap
    assert heap is not None
    if not is_tidied:
        heap.planned = 2**62
    taken = []
    with pages_kept(parts.step.device):
        for number, length in enumerate(length for length in LENGTHS for _ in range(2)):
            batch = noise(parts, 32, length, length)
            began = time.perf_counter()
            parts.step(number, batch)
            taken.append(time.perf_counter() - began)
    return {
        "planned_gib": parts.memory.total / GIB,
        "peak_gib": peak_resident_bytes() / GIB,
        "step_s": statistics.fmean(taken),
    }


if __name__ == "__main__":
    main()
