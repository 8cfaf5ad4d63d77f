"""The tiled InfoNCE against two cross-entropies and against a dense version fused by hand.

    python benchmarks/tiled_loss.py            # about 5 minutes, 10 GiB

Forward and backward, fp32, one process, the three in turns. Memory is the peak of resident pages
beyond the inputs and their gradients. `--largest 65536` adds one run of that batch, tiled.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from record import record
from torch import Tensor

from vlm.losses.contrastive import info_nce
from vlm.losses.pairs import GPU_TILE_BYTES, TILE_BYTES, Pairs
from vlm.runtime.heap import peak_resident_bytes, resident_bytes

Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16384)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--largest", type=int, default=65536, help="0: not tried")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tiled_loss.json"))
    args = parser.parse_args()
    inputs = features(args.batch, args.dim)
    steps: dict[str, Step] = {"tiled": tiled, "fused": fused, "cross_entropies": cross_entropies}
    for step in steps.values():
        step(*features(256, args.dim))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    worst = 0.0
    for number in range(args.rounds):
        results = {}
        for name in list(steps)[:: -1 if number % 2 else 1]:
            measured, results[name] = measure(steps[name], inputs)
            found[name].append(measured)
            print(number, name, measured, flush=True)
        if number == 0:
            pairs = zip(results["tiled"], results["cross_entropies"], strict=True)
            worst = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
        del results
    medians = {
        name: {key: statistics.median(m[key] for m in runs) for key in runs[0]}
        for name, runs in found.items()
    }
    result = {
        "batch": args.batch,
        "dim": args.dim,
        "medians": medians,
        "of_cross_entropies": medians["tiled"]["seconds"] / medians["cross_entropies"]["seconds"],
        "of_fused": medians["tiled"]["seconds"] / medians["fused"]["seconds"],
        "largest_difference": worst,
    }
    del inputs
    if args.largest:
        measured, _ = measure(tiled, features(args.largest, args.dim))
        result["largest"] = {"batch": args.largest, **measured}
    record("tiled_loss", result, args.out)


def features(batch: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures and texts that are somewhat alike, and a temperature; all want gradients."""
    torch.manual_seed(0)
    image = F.normalize(torch.randn(batch, dim), dim=1)
    text = F.normalize(image + torch.randn(batch, dim) / dim**0.5, dim=1)
    return image.requires_grad_(), text.requires_grad_(), torch.tensor(20.0, requires_grad=True)


def measure(
    step: Step, inputs: tuple[Tensor, Tensor, Tensor]
) -> tuple[dict[str, float], tuple[Tensor, ...]]:
    """Seconds, MiB beyond inputs and gradients; the loss and the gradients."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before, began = resident_bytes(), time.perf_counter()
    result = step(*inputs)
    seconds = time.perf_counter() - began
    gradients = sum(tensor.nbytes for tensor in result)
    peak = peak_resident_bytes()
    return {
        "seconds": seconds,
        "mib": (peak - before - gradients) / 2**20,
        "gib": peak / 2**30,  # of the whole process
    }, result


def tiled(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    ids = torch.arange(len(image), device=image.device)
    pairs = Pairs(ids, ids, torch.ones_like(ids, dtype=torch.bool))
    tile_bytes = TILE_BYTES if image.device.type == "cpu" else GPU_TILE_BYTES
    loss = info_nce(image, text, scale, pairs, tile_bytes=tile_bytes)
    return (loss.detach(), *torch.autograd.grad(loss, (image, text, scale)))


def cross_entropies(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """As CLIP's figure 3 has it, and open_clip's loss computes it."""
    labels = torch.arange(len(image), device=image.device)
    logits_per_image, logits_per_text = scale * image @ text.T, scale * text @ image.T
    loss = (
        F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)
    ) / 2
    return (loss.detach(), *torch.autograd.grad(loss, (image, text, scale)))


@torch.no_grad()
def fused(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """One product, both softmaxes, in place; memory for three matrices of logits."""
    size = len(image)
    logits = (scale * image) @ text.T
    rows, columns = logits.logsumexp(1), logits.logsumexp(0)
    loss = (rows + columns - 2 * logits.diagonal()).sum() / (2 * size)
    of_logits = (logits - rows[:, None]).exp_()
    of_logits += logits.sub_(columns).exp_()
    of_logits.diagonal().sub_(2)
    of_image = of_logits @ text
    of_scale = (of_image * image).sum() / (2 * size)
    weight = scale / (2 * size)
    return loss, of_image.mul_(weight), (of_logits.T @ image).mul_(weight), of_scale


if __name__ == "__main__":
    main()
