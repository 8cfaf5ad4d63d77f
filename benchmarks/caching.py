"""A batch of 4,096 by gradient caching: its gradients, its memory, its rate.

    python benchmarks/caching.py               # about 5 minutes, 12 GiB

The quickstart's model in fp32, pictures and captions of noise. Memory is the peak of resident pages
of a step's forward and backward pass beyond what there was before it, the host's batch included;
seconds are with pages kept, as in `vlm train`.
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from record import record

from vlm.config.load import load_config
from vlm.data.batch import Batch
from vlm.data.tally import Tally
from vlm.runtime.distributed import Ranks
from vlm.runtime.heap import pages_kept, peak_resident_bytes, resident_bytes
from vlm.training.setup import Parts, build_parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/caching.json"))
    args = parser.parse_args()
    changes = {"train.precision": "fp32", "train.device": "cpu", "data.augment.shuffle_tags": False}
    parts = build_parts(load_config("emoji", changes), Ranks())
    sizes = (args.batch // 4, args.batch // 2, args.batch)
    memory = {size: backward(parts, noise(parts, size), args.micro_batch)["mib"] for size in sizes}
    batch, runs, gradients = noise(parts, args.batch), {"cached": [], "uncached": []}, {}
    for number in range(args.rounds):
        for name in list(runs)[:: -1 if number % 2 else 1]:
            size = args.micro_batch if name == "cached" else None
            alone = backward(parts, batch, size)
            with pages_kept(parts.step.device):
                for _ in range(2):  # the first takes the pages
                    measured = backward(parts, batch, size)
            gradients[name] = measured["gradients"]
            runs[name].append({"seconds": measured["seconds"], "mib": alone["mib"]})
            print(number, name, runs[name][-1], flush=True)
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for name, found in runs.items()
    }
    difference = max(
        float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))
        for ours, theirs in zip(gradients["cached"], gradients["uncached"], strict=True)
    )
    result = {
        "batch": args.batch,
        "micro_batch": args.micro_batch,
        "medians": medians,
        "ratio": medians["uncached"]["seconds"] / medians["cached"]["seconds"],
        "largest_relative_difference": difference,
        "mib_by_batch": memory,
    }
    record("caching", result, args.out)


def noise(parts: Parts, size: int) -> Batch:
    torch.manual_seed(0)
    side, length = parts.config.model.image.image_size, parts.tokenizer.context_length
    tokens = torch.randint(3, parts.tokenizer.vocab_size, (size, length))
    tokens[:, 0], tokens[:, -1] = parts.tokenizer.sot_id, parts.tokenizer.eot_id
    ids = torch.arange(size)
    images = torch.randint(256, (size, 3, side, side), dtype=torch.uint8)
    valid = torch.ones(size, dtype=torch.bool)
    return Batch(images, tokens, ids, ids, valid, Tally(), visits=ids)


def backward(parts: Parts, batch: Batch, micro_batch_size: int | None) -> dict[str, Any]:
    """Seconds, MiB and gradients of a forward and backward pass."""
    module = parts.step.module
    module.zero_grad(set_to_none=False)
    objective = replace(parts.step.objective, micro_batch_size=micro_batch_size)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before, began = resident_bytes(), time.perf_counter()
    objective(module, batch).loss.backward()
    return {
        "seconds": time.perf_counter() - began,
        "mib": (peak_resident_bytes() - before) / 2**20,
        "gradients": [p.grad.clone() for p in module.parameters() if p.grad is not None],
    }


if __name__ == "__main__":
    main()
