"""200 fp32 steps from equal weights on equal batches: open_clip's losses are ours."""

import math

import open_clip
import pytest
import torch

from vlm.config.load import load_config
from vlm.data.batch import Batch
from vlm.data.tally import Tally
from vlm.data.transforms import normalize
from vlm.hub.open_clip import translate
from vlm.runtime.distributed import Ranks
from vlm.training.setup import build_parts

STEPS, ROWS = 200, 16
THEIRS = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
OURS = {
    "model.embed_dim": 24,
    "model.captioner": None,
    "model.image.name": "vit_base_patch32_clip_224",
    "model.image.pool": "token",
    "model.image.kwargs": {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 8},
    "model.text": {
        "tokenizer": "clip",
        "context_length": 20,
        "width": 32,
        "depth": 2,
        "num_heads": 2,
    },
    "loss.duplicates": "negative",
    "optim": {"name": "adamw", "lr": 1e-3, "warmup_steps": 20, "clip_grad_norm": 0.0},
    "train.steps": STEPS,
    "train.ema_decay": 0.0,
}


@pytest.fixture(scope="module")
def sides(config):
    torch.manual_seed(0)
    parts = build_parts(load_config(config, OURS), Ranks())
    theirs = open_clip.CLIP(**THEIRS)
    parts.step.module.load_state_dict(translate(theirs.state_dict()))
    return parts, theirs


def batch(parts, number):
    generator = torch.Generator().manual_seed(number % 4)  # a few, so that there is much to learn
    tokens = torch.full((ROWS, 20), parts.tokenizer.pad_id)
    for row, length in zip(tokens, torch.randint(4, 15, (ROWS,), generator=generator), strict=True):
        row[:length] = torch.randint(1, 400, (int(length),), generator=generator)
        row[0], row[length - 1] = parts.tokenizer.sot_id, parts.tokenizer.eot_id
    images = torch.randint(256, (ROWS, 3, 16, 16), generator=generator, dtype=torch.uint8)
    ids = torch.arange(ROWS)
    valid = torch.ones(ROWS, dtype=torch.bool)
    return Batch(images, tokens, ids, ids, valid, Tally(), visits=ids)


def optimizer_of(theirs):
    """As `open_clip_train.main` makes it."""
    gains = [p for n, p in theirs.named_parameters() if p.ndim < 2 or "ln" in n or "bias" in n]
    rest = [p for p in theirs.parameters() if not any(p is gain for gain in gains)]
    groups = [{"params": gains, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.2}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6)


def test_losses_stay_together(sides):
    parts, theirs = sides
    optimizer, loss_of, image = optimizer_of(theirs), open_clip.ClipLoss(), parts.config.model.image
    differences, losses = [], []
    for step in range(STEPS):
        samples = batch(parts, step)
        result = parts.step(step, samples)
        for group in optimizer.param_groups:
            group["lr"] = result.lr
        optimizer.zero_grad()
        pixels = normalize(samples.images, mean=image.mean, std=image.std)
        loss = loss_of(*theirs(pixels, samples.tokens))
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            theirs.logit_scale.clamp_(0, math.log(100))
        differences.append(abs(loss.item() - result.terms["loss"]))
        losses.append(loss.item())
    assert differences[0] < 1e-4
    assert max(differences) < 1e-3
    assert losses[-1] < losses[0] / 4  # there was something to agree on
