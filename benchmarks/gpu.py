"""Everything that wants a GPU, in 8 minutes on one: parity, steps, losses; a table and JSON.

    python benchmarks/gpu.py                   # on one CUDA device
    python benchmarks/gpu.py --small           # the same on the CPU, with tiny models: does it run?

Checks the parity table of the losses on the device; measures a training step against open_clip's
(samples/s, MFU, peak memory), compiled and not, with captions of 8 to 24 tokens and with full ones;
and the tiled loss against a dense one, a chunked one, and `memeff` where that is installed. What
does not fit into memory is null. Stops to begin new measurements after `--minutes`.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import train_step
from record import record
from rich.console import Console
from rich.table import Table
from tiled_loss import cross_entropies, features, tiled
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlm.runtime.device import machine, synchronize

ROOT = Path(__file__).parent.parent
BATCHES = {"ViT-B-32": (256, 1024), "ViT-B-16": (128, 512), "ViT-L-14": (64, 256)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--out", type=Path, help="of the JSON")
    args = parser.parse_args()
    began = time.monotonic()
    device = torch.device("cpu" if args.small else "cuda")
    result: dict[str, Any] = {
        "parity": parity(device),
        "loss": {},
        "steps": [],
    }
    plan = [*losses(device, small=args.small), *steps(device, small=args.small)]
    for number, (kind, name, measure) in enumerate(plan):
        if time.monotonic() - began > 60 * args.minutes:
            result["left_out"] = [name for _, name, _ in plan[number:]]
            break
        found = fitting(measure)
        print(name, json.dumps(found), flush=True)
        if kind == "loss":
            result["loss"][name] = found
        else:
            result["steps"].append({"what": name, **(found or {})})
    show(result, device)
    out = args.out or ROOT / f"benchmarks/results/{'gpu_small' if args.small else 'gpu'}.json"
    record("gpu", result, out, device=device.type)


def parity(device: torch.device) -> dict[str, float]:
    """The worst error of the parity table's cells on this device, by type."""
    command = [sys.executable, str(ROOT / "tests/losses/parity.py"), "0", "1", "", device.type]
    said = subprocess.check_output(command, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    worst: dict[str, float] = {}
    for line in said.splitlines():
        cell = json.loads(line)
        dtype = cell["cell"][-1]
        worst[dtype] = max(worst.get(dtype, 0.0), cell["loss"], cell["gradients"])
    return worst


def fitting(measure: Callable[[], dict[str, float]]) -> dict[str, float] | None:
    """What is measured; None where memory is too small."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        return None
    finally:
        gc.collect()  # compiled blocks hold themselves
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


Plan = Iterator[tuple[str, str, Callable[[], dict[str, float]]]]


def losses(device: torch.device, *, small: bool) -> Plan:
    """Forward and backward of InfoNCE, D = 512."""
    kinds = {"tiled": tiled, "dense": cross_entropies, "chunked": chunked}
    try:
        kinds["memeff"] = memeff()
    except ImportError:
        print("memeff is not installed: left out", flush=True)
    for size in (512,) if small else (8192, 32768, 65536):
        for name, loss in kinds.items():

            def run(loss: Any = loss, size: int = size) -> dict[str, float]:
                inputs = [x.detach().to(device).requires_grad_() for x in features(size, 512)]
                return timed(lambda: loss(*inputs), device, rounds=5)

            yield "loss", f"{name}, {size}", run


def chunked(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """Cross-entropies of 1,024 rows at a time, each computed again in the backward pass."""

    def part(queries: Tensor, keys: Tensor, start: int) -> Tensor:
        labels = torch.arange(start, start + len(queries), device=keys.device)
        return F.cross_entropy(scale * queries @ keys.T, labels, reduction="sum")

    total = torch.zeros((), device=image.device)
    for queries, keys in ((image, text), (text, image)):
        for start in range(0, len(queries), 1024):
            rows = queries[start : start + 1024]
            total = total + checkpoint(part, rows, keys, start, use_reentrant=False)
    loss = total / (2 * len(image))
    return (loss.detach(), *torch.autograd.grad(loss, (image, text, scale)))


def memeff() -> Callable[..., tuple[Tensor, ...]]:
    """The Triton kernels of the package `memeff` 0.3; their temperature is no parameter."""
    from memeff import MemoryEfficientCLIPLoss  # type: ignore[import-not-found]  # CUDA only

    loss_of = MemoryEfficientCLIPLoss(temperature=1 / 20)

    def run(image: Tensor, text: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        loss = loss_of(image, text)
        return (loss.detach(), *torch.autograd.grad(loss, (image, text)))

    return run


def steps(device: torch.device, *, small: bool) -> Plan:
    """A step of each side; ours compiled and not, trimmed and not."""
    for model, sizes in {"tiny": (8,)}.items() if small else BATCHES.items():
        for size in sizes:
            for side, compiles, full in (
                ("open_clip", False, False),
                ("vlm", True, False),
                ("vlm", False, False),
                ("vlm", True, True),
            ):
                words = [side, model, str(size)]
                words += ["compiled"] * compiles + ["full captions"] * full

                def run(
                    model: str = model,
                    size: int = size,
                    side: str = side,
                    compiles: bool = compiles and not small,
                    full: bool = full,
                ) -> dict[str, float]:
                    return step_of(side, model, size, device, compiles=compiles, full=full)

                yield "step", ", ".join(words), run


def step_of(
    side: str, model: str, size: int, device: torch.device, *, compiles: bool, full: bool
) -> dict[str, float]:
    changes = {"train.device": device.type, "train.compile": "always" if compiles else "never"}
    if side == "open_clip":  # ours is there for the batch and the schedule, and takes no room
        changes["train.device"] = "cpu"
    parts = train_step.parts_for(model, "bf16", size, **changes)
    batch = train_step.noise(parts, size, shortest=77 if full else 8, longest=77 if full else 24)
    batch = batch.to(device)
    if side == "vlm":
        found = timed(lambda: train_step.ours(parts, batch, 0), device, rounds=10)
    else:
        theirs = train_step.open_clip_model(model).to(device)
        step = train_step.peer(theirs, batch, parts)
        found = timed(lambda: step(0), device, rounds=10)
    assert parts.accounts is not None
    length = 77 if full else 24
    line = parts.accounts.line(size * length, found["seconds"])
    found["samples_per_s"] = size / found["seconds"]
    found["mfu"] = line["mfu"]  # of what is needed, so of the trimmed batch for both sides
    return found


def timed(run: Callable[[], object], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds, and the peak GiB of tensors."""
    for _ in range(3):
        run()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(rounds):
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return {"seconds": statistics.median(times), "peak_gib": round(peak, 3)}


def show(result: dict[str, Any], device: torch.device) -> None:
    table = Table("what", "ms", "samples/s", "MFU", "peak GiB", title=machine(device))
    rows = [{"what": name, **(found or {})} for name, found in result["loss"].items()]
    for row in (*rows, *result["steps"]):
        if "seconds" not in row:
            table.add_row(row["what"], "out of memory")
            continue
        rate, mfu = row.get("samples_per_s"), row.get("mfu")
        table.add_row(
            row["what"],
            f"{1e3 * row['seconds']:.1f}",
            f"{rate:,.0f}" if rate else "",
            f"{mfu:.1%}" if mfu else "",
            f"{row['peak_gib']:.2f}",
        )
    Console(width=100).print(table)
    print("parity, worst error:", result["parity"])


if __name__ == "__main__":
    main()
