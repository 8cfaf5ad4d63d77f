"""Does it learn as well as open_clip? Same data order and wall time, each at its best lr.

    python benchmarks/learning.py --seconds 90

Ours is configs/emoji.yaml without its captioner. Theirs is an open_clip CLIP of the same widths
and depths (native ViT towers, patch embedding, padded texts) with open_clip's own loss, decay
groups and betas; it gets the same batches: same pictures, same augmentation, same tokens. Step
times are measured interleaved; open_clip runs in fp32 or under bf16 autocast, whichever is faster
here, and each side gets as many steps as fit into the wall time.
The learning rate is the best of the same five on the validation splits (mean of both accuracies),
then three seeds.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm.runtime import torchvision_guard

torchvision_guard.install()

from open_clip.loss import ClipLoss
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from record import record

from vlm.config.load import load_config
from vlm.config.schema import Config
from vlm.curate.source import open_data
from vlm.data.batch import Batch
from vlm.data.loader import evaluation_batches
from vlm.data.transforms import EvalTransform, normalize
from vlm.optim import lr_at, set_lr
from vlm.runtime.device import arithmetic
from vlm.runtime.distributed import Ranks
from vlm.training.setup import Parts, build_parts

LRS = (3e-4, 6e-4, 1e-3, 2e-3, 4e-3)
SPLITS = ("val_artist", "val_concept")
Encode = Callable[[Tensor], Tensor]
Step = Callable[[int, Batch], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=90.0, help="wall time of one training run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/learning.json"))
    args = parser.parse_args()
    step_s = measure_steps()
    precision = {side: min(times, key=times.__getitem__) for side, times in step_s.items()}
    num_steps = {side: int(args.seconds / step_s[side][precision[side]]) for side in SIDES}
    print(f"step times {step_s}, steps {num_steps}", flush=True)
    settled = {side: partial(run, side, precision[side], num_steps[side]) for side in SIDES}
    best, scores = {}, {}
    for side in SIDES:
        swept = {lr: settled[side](lr, seed=0) for lr in LRS}
        best[side] = max(LRS, key=lambda lr: statistics.mean(swept[lr].values()))
        rest = [settled[side](best[side], seed=seed) for seed in range(1, args.seeds)]
        scores[side] = [swept[best[side]], *rest]
    medians = {
        side: {split: statistics.median(s[split] for s in scores[side]) for split in SPLITS}
        for side in SIDES
    }
    result = {
        "seconds": args.seconds,
        "step_s": step_s,
        "precision": precision,
        "num_steps": num_steps,
        "best_lr": best,
        "acc1": scores,
        "median_acc1": medians,
        "ratio": {s: medians["ours"][s] / max(1e-9, medians["open_clip"][s]) for s in SPLITS},
    }
    record("learning", result, args.out, "open_clip_torch")


def settings(seed: int, lr: float, num_steps: int, precision: str) -> Config:
    config = load_config(
        "configs/emoji.yaml",
        [
            "model.captioner=null",
            "optim.lr_scale={}",
            f"optim.lr={lr}",
            f"train.seed={seed}",
            f"train.precision={precision}",
        ],
    )
    return replace(config, train=replace(config.train, steps=num_steps))


def measure_steps(rounds: int = 12) -> dict[str, dict[str, float]]:
    """Median seconds a step by side and precision, all interleaved on the same batches."""
    chosen = [("ours", "auto"), ("open_clip", "fp32"), ("open_clip", "bf16")]
    steps = {}
    for side, precision in chosen:
        parts = build_parts(settings(0, 1e-3, 1000, precision), Ranks())
        steps[side, precision] = SIDES[side](parts, 1e-3, 1000)[0]
    times: dict[tuple[str, str], list[float]] = {key: [] for key in chosen}
    with closing(parts.batches(0, Ranks())) as batches:
        for number in range(rounds):
            batch = next(batches)
            for key, step in steps.items():
                begun = time.perf_counter()
                step(number, batch)
                times[key].append(time.perf_counter() - begun)
    medians = {key: statistics.median(values[2:]) for key, values in times.items()}
    return {side: {p: s for (of, p), s in medians.items() if of == side} for side in SIDES}


def run(side: str, precision: str, num_steps: int, lr: float, *, seed: int) -> dict[str, float]:
    """Train one side; its accuracy on each validation split."""
    parts = build_parts(settings(seed, lr, num_steps, precision), Ranks())
    step, finish = SIDES[side](parts, lr, num_steps)
    begun = time.perf_counter()
    with closing(parts.batches(0, Ranks())) as batches:
        for number in range(num_steps):
            step(number, next(batches))
    seconds = time.perf_counter() - begun
    encode_image, encode_text = finish()
    scores = {split: accuracy(split, parts, encode_image, encode_text) for split in SPLITS}
    print(f"{side} lr {lr:g} seed {seed}: {scores} in {seconds:.0f} s", flush=True)
    return scores


def ours(
    parts: Parts, _lr: float, _num_steps: int
) -> tuple[Step, Callable[[], tuple[Encode, Encode]]]:
    def finish() -> tuple[Encode, Encode]:
        step = parts.step
        if step.averaged is not None:
            step.module.load_state_dict({**step.module.state_dict(), **step.averaged.shadow})
        encoders = step.module.eval().encoders
        return encoders.encode_image, encoders.encode_text

    def step(number: int, batch: Batch) -> None:
        parts.step(number, batch)

    return step, finish


def theirs(
    parts: Parts, lr: float, num_steps: int
) -> tuple[Step, Callable[[], tuple[Encode, Encode]]]:
    config = parts.config
    image, text = config.model.image, config.model.text
    torch.manual_seed(config.train.seed)
    model = CLIP(
        config.model.embed_dim,
        CLIPVisionCfg(
            image_size=image.image_size,
            layers=int(image.kwargs["depth"]),
            width=int(image.kwargs["embed_dim"]),
            head_width=int(image.kwargs["embed_dim"]) // int(image.kwargs["num_heads"]),
            patch_size=int(image.kwargs["patch_size"]),
        ),
        CLIPTextCfg(
            context_length=text.context_length,
            vocab_size=parts.tokenizer.vocab_size,
            width=text.width,
            heads=text.num_heads,
            layers=text.depth,
        ),
    )
    optimizer = torch.optim.AdamW(
        open_clip_groups(model), lr=lr, betas=(0.9, 0.98), eps=1e-6, fused=True
    )
    loss, optim = ClipLoss(), config.optim

    def step(number: int, batch: Batch) -> None:
        model.train()
        set_lr(
            [optimizer],
            lr_at(
                number, lr=lr, steps=num_steps, warmup_steps=optim.warmup_steps, min_lr_fraction=0.0
            ),
        )
        with arithmetic(parts.step.precision, parts.step.device):
            features = model(
                normalize(batch.images, image.mean, image.std), largest_at_end(batch.tokens)
            )
            total = loss(*features)
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))

    def largest_at_end(tokens: Tensor) -> Tensor:
        """open_clip pools at the largest id: ids turn round, so that the end token is that."""
        top = parts.tokenizer.vocab_size - 1
        return torch.where(tokens == parts.tokenizer.eot_id, top, (tokens - 3) % top)

    def finish() -> tuple[Encode, Encode]:
        model.eval()
        return model.encode_image, lambda tokens: model.encode_text(largest_at_end(tokens))

    return step, finish


def open_clip_groups(model: nn.Module) -> list[dict[str, Any]]:
    """open_clip_train/main.py's rule."""

    def spared(name: str, parameter: Tensor) -> bool:
        words = ("bn", "ln", "bias", "logit_scale")
        return parameter.ndim < 2 or any(word in name for word in words)

    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if spared(n, p)], "weight_decay": 0.0},
        {"params": [p for n, p in named if not spared(n, p)], "weight_decay": 0.2},
    ]


@torch.inference_mode()
def accuracy(split: str, parts: Parts, encode_image: Encode, encode_text: Encode) -> float:
    """Top-1 among the split's own labels, bare names as prompts."""
    image = parts.config.model.image
    rows, labels = [], []
    for batch in validation(split, image.image_size):
        rows.append(encode_image(normalize(batch.images, image.mean, image.std)).float())
        labels += [meta["label"] for _, _, meta in batch.samples]
    names = sorted(set(labels))
    text = nn.functional.normalize(encode_text(parts.tokenizer(names)).float(), dim=-1)
    picked = (torch.cat(rows) @ text.T).argmax(dim=1)
    truth = torch.tensor([names.index(label) for label in labels])
    return float((picked == truth).float().mean())


def validation(split: str, size: int) -> Iterator[Any]:
    dataset = open_data(f"datasets/emoji/{split}-*.tar", log=lambda _: None)
    return evaluation_batches(dataset, transform=EvalTransform(size), batch_size=256)


SIDES = {"ours": ours, "open_clip": theirs}

if __name__ == "__main__":
    main()
