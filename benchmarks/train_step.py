"""A training step against open_clip's, and against the floor: needed FLOPs at the matrix rate.

    python benchmarks/train_step.py            # about 25 minutes, 12 GiB

Both sides in one process, in turns, on the same batches of noise with captions of 8 to 24 tokens,
from equal weights. open_clip's side is the step of its own trainer (`open_clip_train.train`): text
at 77 tokens, its loss, its AdamW groups; its pictures come normalised. Ours is `TrainStep`, which
normalises, clips and guards, and keeps its pages as in `vlm train`; open_clip's heap has the C
library's usual ways, with the largest of its thresholds, unless `--peer-keeps-pages`. A turn is
three steps, of which the last counts: the memory that the side before gave back is taken by the
first ones. A round is a turn of each side and a product of matrices.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from vlm.config.load import load_config
from vlm.data.batch import Batch
from vlm.data.tally import Tally
from vlm.data.transforms import normalize
from vlm.hub.open_clip import translate
from vlm.runtime import onednn, torchvision_guard
from vlm.runtime.device import arithmetic
from vlm.runtime.distributed import Ranks
from vlm.runtime.heap import pages_kept
from vlm.training.setup import Parts, build_parts

torchvision_guard.install()
import open_clip  # behind the guard
from record import record

SHARDS = "datasets/emoji/val_artist-*.tar"
SMALL = {  # ViT-S/16 of open_clip
    "model.embed_dim": 384,
    "model.image.kwargs.embed_dim": 384,
    "model.image.kwargs.num_heads": 6,
    "model.text.width": 384,
    "model.text.num_heads": 6,
}
TINY = {  # for benchmarks/gpu.py --small
    "model.embed_dim": 32,
    "model.image.image_size": 32,
    "model.image.kwargs": {"embed_dim": 64, "depth": 2, "num_heads": 1, "patch_size": 16},
    "model.text": {"width": 64, "depth": 2, "num_heads": 1},
}
OF_TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT-B-32": ("clip_vit_b32", {}),
    "ViT-B-16": ("clip_vit_b16", {}),
    "ViT-S-16": ("clip_vit_b16", SMALL),
    "ViT-L-14": ("clip_vit_l14", {}),
    "tiny": ("clip_vit_b32", TINY),
}
SETTINGS = {"lr": 5e-4, "betas": (0.9, 0.98), "eps": 1e-6}  # open_clip's for a ViT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ["ViT-B-32", "ViT-B-16", "ViT-S-16"]
    parser.add_argument("--models", nargs="+", default=default, choices=list(MODELS))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-keeps-pages", action="store_true", help="as vlm does")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train_step.json"))
    args = parser.parse_args()
    found = {
        model: {
            p: measure(model, p, args.batch, args.rounds, peer_keeps_pages=args.peer_keeps_pages)
            for p in args.precisions
        }
        for model in args.models
    }

    def column(key: str) -> dict[str, dict[str, float]]:
        return {
            model: {p: cell[key] for p, cell in cells.items()} for model, cells in found.items()
        }

    result = {
        "batch": args.batch,
        "peer_keeps_pages": args.peer_keeps_pages,
        "cells": found,
        "ratio": column("ratio"),
        "of_floor": column("of_floor"),
    }
    record("train_step", result, args.out, "open_clip_torch")


def measure(
    name: str, precision: str, size: int, rounds: int, *, peer_keeps_pages: bool = False
) -> dict[str, float]:
    """Samples/s of both sides, the matrix rate, and what they come to."""
    torch.manual_seed(0)
    theirs = open_clip_model(name)
    parts = parts_for(name, precision, size)
    weights = translate(theirs.state_dict())
    parts.step.module.load_state_dict(weights)
    batch = noise(parts, size)
    steps = {"open_clip": peer(theirs, batch, parts), "vlm": lambda n: ours(parts, batch, n)}
    losses = {side: step(0) for side, step in steps.items()}
    taken: dict[str, list[float]] = {side: [] for side in steps}
    rates = []
    for number in range(rounds):
        for side in list(steps)[:: 1 if number % 2 else -1]:
            keeps = side == "vlm" or peer_keeps_pages
            with pages_kept(parts.step.device) if keeps else nullcontext():
                taken[side].append(turn(steps[side], number))
        rates.append(matrix_rate(precision))
    seconds = {side: statistics.median(times) for side, times in taken.items()}
    with pages_kept(parts.step.device):
        in_products = products(parts, batch, precision)
    needed, rate = needed_flops(parts, batch), statistics.median(rates)
    cell = {
        **{f"{side}_per_s": size / s for side, s in seconds.items()},
        "ratio": seconds["open_clip"] / seconds["vlm"],
        "matrix_gflops": rate / 1e9,
        "needed_gflop_a_sample": needed / size / 1e9,
        "of_floor": needed / rate / seconds["vlm"],
        "products_s": in_products,
        "step_s": seconds["vlm"],
        "first_loss_difference": abs(losses["open_clip"] - losses["vlm"]),
    }
    print(name, precision, json.dumps({k: round(v, 5) for k, v in cell.items()}), flush=True)
    return cell


def turn(step: Callable[[int], float], number: int, steps: int = 3) -> float:
    """Seconds of the last of some steps."""
    for each in range(steps):
        began = time.perf_counter()
        step(1 + number * steps + each)
    return time.perf_counter() - began


def open_clip_model(name: str) -> torch.nn.Module:
    if name == "tiny":
        return open_clip.CLIP(**OF_TINY)
    model: torch.nn.Module = open_clip.create_model(name, precision="fp32", device="cpu")
    return model


def parts_for(name: str, precision: str, size: int, **more: Any) -> Parts:
    config, changes = MODELS[name]
    changes = {
        **changes,
        "data.train": SHARDS,
        "train.precision": precision,
        "train.device": "cpu",
        "train.global_batch_size": size,
        "train.epochs": None,
        "train.steps": 10_000,
        "loss.duplicates": "negative",
        **more,
    }
    return build_parts(load_config(config, changes), Ranks())


def noise(parts: Parts, size: int, shortest: int = 8, longest: int = 24) -> Batch:
    torch.manual_seed(1)
    text = parts.config.model.text
    side = parts.config.model.image.image_size
    tokens = torch.full((size, text.context_length), parts.tokenizer.pad_id)
    for row, length in zip(
        tokens, torch.randint(shortest, longest + 1, (size,)).tolist(), strict=True
    ):
        row[:length] = torch.randint(1, parts.tokenizer.sot_id, (length,))
        row[0], row[length - 1] = parts.tokenizer.sot_id, parts.tokenizer.eot_id
    ids = torch.arange(size)
    images = torch.randint(256, (size, 3, side, side), dtype=torch.uint8)
    valid = torch.ones(size, dtype=torch.bool)
    return Batch(images, tokens, ids, ids, valid, Tally(), visits=ids)


def ours(parts: Parts, batch: Batch, number: int) -> float:
    return parts.step(number, batch).terms["loss"]


def peer(model: torch.nn.Module, batch: Batch, parts: Parts) -> Callable[[int], float]:
    """A step as `open_clip_train.train.train_one_epoch` takes it."""
    gains = [p for n, p in model.named_parameters() if p.ndim < 2 or "ln" in n or "bias" in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim < 2 or "ln" in n or "bias" in n)]
    groups = [{"params": gains, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, **SETTINGS)
    loss_of = open_clip.ClipLoss()
    image = parts.config.model.image
    pixels = normalize(batch.images, mean=image.mean, std=image.std)

    def step(number: int) -> float:
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS["lr"] * (number + 1) / 2000
        optimizer.zero_grad()
        with arithmetic(parts.step.precision, pixels.device):
            image, text, scale = model(pixels, batch.tokens)
            loss = loss_of(image, text, scale)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return loss.item()

    return step


def matrix_rate(precision: str, side: int = 2048, repeats: int = 3) -> float:
    """FLOP/s of a product of square matrices."""
    a = torch.randn(side, side, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    b = a.clone()
    return 2 * side**3 / seconds_of(lambda: multiply(a, b), repeats)


def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A linear layer's product, by the library that is quickest here."""
    by_onednn = x.dtype == torch.float32 and onednn.is_quickest_in_fp32()
    return onednn.linear(x, weight) if by_onednn else x @ weight.T


def seconds_of(call: Callable[[], object], repeats: int) -> float:
    """Of the quickest."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def products(parts: Parts, batch: Batch, precision: str) -> float:
    """Seconds that the products of all blocks' linear layers take, each shape alone."""
    encoders, dtype = parts.step.module.encoders, torch.float32
    if precision == "bf16":
        dtype = torch.bfloat16
    image, text = parts.config.model.image, parts.config.model.text
    patches = encoders.image.trunk.patch_embed.num_patches + 1
    longest = int((batch.tokens == parts.tokenizer.eot_id).int().argmax(1).max()) + 1
    towers = ((encoders.image.width, patches, 12), (text.width, longest, text.depth))
    assert image.pool == "token"
    return sum(
        depth * seconds_of_linear(len(batch.tokens) * length, inner, outer, dtype)
        for width, length, depth in towers
        for inner, outer in ((width, 3 * width), (width, width), (width, 4 * width))
        for _ in range(1 if outer < 4 * width else 2)  # the MLP's second is its first, turned
    )


def seconds_of_linear(rows: int, inner: int, outer: int, dtype: torch.dtype) -> float:
    """Of its forward product and the two of its backward pass; the best of five each."""
    x, gradient = (torch.randn(rows, width, dtype=dtype) for width in (inner, outer))
    weight = torch.randn(outer, inner, dtype=dtype)
    forward = seconds_of(lambda: multiply(x, weight), 5)
    of_input = seconds_of(lambda: multiply(gradient, weight.T), 5)
    return forward + of_input + seconds_of(lambda: gradient.T @ x, 5)


def needed_flops(parts: Parts, batch: Batch) -> float:
    """Of forward and backward, at the batch's longest caption: three times the forward pass."""
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: linear_flops}
    )
    with counter, torch.no_grad():
        parts.step.objective(parts.step.module, batch)
    return 3.0 * counter.get_total_flops()


def linear_flops(x: torch.Size, weight: torch.Size, *rest: Any, **more: Any) -> int:
    """Of oneDNN's linear layer, of which the counter knows nothing."""
    return 2 * math.prod(x) * weight[0]


if __name__ == "__main__":
    main()
