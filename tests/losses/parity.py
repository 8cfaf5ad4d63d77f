"""One rank of the parity table: every cell's worst error against the loops, printed by rank 0.

    python parity.py RANK WORLD_SIZE STORE [DEVICE]

Two towers of a layer or two stand for the encoders, in the module that training uses: the loss and
the gradients of all parameters, temperature and bias included, summed over ranks, against one
process with the whole batch. "accumulation 4" encodes a rank's samples in four micro-batches.
"""

import json
import runpy
import sys
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import normalize

from vlm.heads.captioner import Captioner
from vlm.heads.model import Captions, VisionLanguageModule
from vlm.losses.caption import caption_targets
from vlm.losses.contrastive import info_nce, sigmoid_loss
from vlm.losses.pairs import Pairs
from vlm.models.dual_encoder import Features
from vlm.runtime import distributed

REFERENCE = runpy.run_path(str(Path(__file__).with_name("reference.py")))
G, WIDTH, DIM, LENGTH, VOCABULARY, EOT = 192, 10, 8, 9, 30, 2
LOSSES = {"InfoNCE": "info_nce", "sigmoid": "sigmoid", "captions": "captions"}
KINDS = ("plain", "positive + mask", "ignore + mask", "negative + mask")
TILES = {"dense": 2**40, "tile 7": 7, "tile 64": 64}  # rows
ACCUMULATION = (1, 4)


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.context = nn.Linear(WIDTH, DIM), nn.Linear(WIDTH, 2 * DIM)
        self.text = nn.Embedding(VOCABULARY, DIM)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.logit_bias = nn.Parameter(torch.tensor(-3.0))

    def scale(self):
        return self.logit_scale.exp()

    def bias(self):
        return self.logit_bias

    def forward(self, images, tokens, _visits=None):
        image, text = normalize(self.image(images), dim=1), self.text(tokens).mean(1)
        context = self.context(images).unflatten(1, (2, DIM)).tanh()
        return Features(image, normalize(text, dim=1), self.scale(), self.bias(), context, text)


def module():
    torch.manual_seed(0)
    captioner = Captioner(
        vocab_size=VOCABULARY,
        context_length=LENGTH,
        width=DIM,
        depth=1,
        num_heads=2,
        image_width=DIM,
    )
    return VisionLanguageModule(Towers(), captioner).double()


def samples():
    """Pictures, and texts of 3 to 9 tokens."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(G, WIDTH, generator=generator, dtype=torch.float64)
    tokens = torch.full((G, LENGTH), EOT)
    for row, length in zip(
        tokens, torch.randint(2, LENGTH, (G,), generator=generator), strict=True
    ):
        row[: int(length)] = torch.randint(3, VOCABULARY, (int(length),), generator=generator)
    return images, tokens


def pairs_of(kind, rows, rank, device):
    generator = torch.Generator().manual_seed(1)
    ids, captions, valid = torch.arange(G), 1000 + torch.arange(G), torch.ones(G, dtype=torch.bool)
    if kind != "plain":
        captions = torch.randint(0, 60, (G,), generator=generator)
        ids[5] = ids[100]
        valid = torch.rand(G, generator=generator) > 0.1
    duplicates = "positive" if kind == "plain" else kind.split(" ")[0]
    ids, captions, valid = (tensor.to(device) for tensor in (ids, captions, valid))
    return Pairs(ids, captions, valid, offset=rank * rows, duplicates=duplicates)


def expected(loss, model, images, tokens, pairs, smoothing):
    if loss == "captions":
        return REFERENCE["captions"](model, images, tokens, pairs.valid, EOT)
    made = model.encoders(images, tokens)
    towers = (made.image, made.text, made.logit_scale, made.logit_bias)
    return REFERENCE[LOSSES[loss]](*towers, pairs, smoothing)


def ours(loss, model, images, tokens, pairs, smoothing, tile_rows, accumulation):
    """This rank's share."""
    mine, captions = slice(pairs.offset, pairs.offset + len(images)), None
    if loss == "captions":
        captions = Captions(0, 1, True, *caption_targets(tokens, EOT, pairs.valid[mine]))
    columns = VOCABULARY if captions else G
    tile_bytes = tile_rows * columns * images.element_size()
    outputs = model(
        images,
        tokens,
        captions,
        prepare=lambda pixels: pixels,
        micro_batch_size=len(images) // accumulation,
        tile_bytes=tile_bytes,
    )
    if captions is not None:
        return outputs.caption_loss / distributed.all_reduce_sum(captions.mask.sum())
    texts, scale = distributed.all_gather_with_gradient(outputs.text), outputs.logit_scale
    if loss == "sigmoid":
        bias = outputs.logit_bias
        return sigmoid_loss(outputs.image, texts, scale, bias, pairs, tile_bytes=tile_bytes)
    return info_nce(
        outputs.image, texts, scale, pairs, label_smoothing=smoothing, tile_bytes=tile_bytes
    )


def gradients(loss, model):
    parameters = list(model.parameters())
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


def truth(loss, model, images, tokens, kind, smoothing, device):
    """Loss and gradients by loops in fp64, and how far off the same loops are in fp32."""
    values = []
    for dtype in (torch.float64, torch.float32):
        model, pairs = model.to(dtype), pairs_of(kind, G, 0, device)
        whole = expected(loss, model, images.to(dtype), tokens, pairs, smoothing)
        values.append([whole.detach(), *gradients(whole, model)])
    return values[0], max(errors_of(values[1], values[0])[1:])


def errors_of(found, right):
    """The largest error of any element, over 1 + the largest element."""
    return [
        float((value - true).abs().max() / (1 + true.abs().max()))
        for value, true in zip(found, right, strict=True)
    ]


def main(rank, world_size, store, device="cpu"):
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
        )
    rows = G // world_size
    mine = slice(rank * rows, (rank + 1) * rows)
    for loss, kind in product(LOSSES, KINDS):
        smoothing = 0.1 if kind == "ignore + mask" and loss == "InfoNCE" else 0.0
        model, (images, tokens) = module().to(device), (t.to(device) for t in samples())
        if rank == 0:
            right, own = truth(loss, model, images, tokens, kind, smoothing, device)
        for dtype, tile, accumulation in product(
            (torch.float64, torch.float32), TILES, ACCUMULATION
        ):
            model.to(dtype)
            share = ours(
                loss,
                model,
                images[mine].to(dtype),
                tokens[mine],
                pairs_of(kind, rows, rank, device),
                smoothing,
                TILES[tile],
                accumulation,
            )
            found = [share.detach(), *gradients(share, model)]
            flat = distributed.all_reduce_sum(torch.cat([value.flatten() for value in found]))
            if rank == 0:
                parts = flat.split([value.numel() for value in found])
                found = [part.view_as(value) for part, value in zip(parts, found, strict=True)]
                errors = errors_of(found, right)
                cell = [loss, kind, tile, accumulation, str(dtype).removeprefix("torch.")]
                worst = {"loss": errors[0], "gradients": max(errors[1:]), "own_of_fp32": own}
                print(json.dumps({"cell": cell, **worst}))
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
