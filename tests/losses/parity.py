"""One rank of the parity table: every cell's worst error against the loops, printed by rank 0.

    python parity.py RANK WORLD_SIZE STORE

Two towers of one layer each stand for the encoders: the loss and the gradients of all parameters,
temperature and bias included, summed over ranks, against one process with the whole batch.
"""

import json
import runpy
import sys
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from vlm.losses.contrastive import info_nce, sigmoid_loss
from vlm.losses.pairs import Pairs
from vlm.runtime import distributed

REFERENCE = runpy.run_path(str(Path(__file__).with_name("reference.py")))
G, WIDTH, DIM = 192, 10, 8
LOSSES = {"InfoNCE": "info_nce", "sigmoid": "sigmoid"}
TILES = {"dense": 2**40, "tile 7": 7, "tile 64": 64}  # rows


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(WIDTH, DIM), nn.Linear(WIDTH, DIM)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.bias = nn.Parameter(torch.tensor(-3.0))

    def forward(self, x):
        image, text = self.image(x[0]), self.text(x[1])
        unit = nn.functional.normalize
        return unit(image, dim=1), unit(text, dim=1), self.scale.exp(), self.bias


def pairs_of(kind, rows, rank):
    generator = torch.Generator().manual_seed(1)
    ids, captions, valid = torch.arange(G), 1000 + torch.arange(G), torch.ones(G, dtype=torch.bool)
    if kind != "plain":
        captions = torch.randint(0, 60, (G,), generator=generator)
        ids[5] = ids[100]
        valid = torch.rand(G, generator=generator) > 0.1
    duplicates = "positive" if kind == "plain" else kind.split(" ")[0]
    return Pairs(ids, captions, valid, offset=rank * rows, duplicates=duplicates)


def ours(loss, towers, x, pairs, tile_rows, smoothing):
    """This rank's share."""
    image, text, scale, bias = towers(x)
    texts = distributed.all_gather_with_gradient(text)
    tile_bytes = tile_rows * G * image.element_size()
    if loss == "sigmoid":
        return sigmoid_loss(image, texts, scale, bias, pairs, tile_bytes=tile_bytes)
    return info_nce(image, texts, scale, pairs, label_smoothing=smoothing, tile_bytes=tile_bytes)


def gradients(loss, towers):
    parameters = list(towers.parameters())
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


def main(rank, world_size, store):
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
        )
    rows = G // world_size
    kinds = ["plain", "positive + mask", "ignore + mask", "negative + mask"]
    for loss, kind, dtype in product(LOSSES, kinds, (torch.float64, torch.float32)):
        torch.manual_seed(0)
        towers = Towers().double()
        x = torch.randn(2, G, WIDTH, dtype=torch.float64)
        smoothing = 0.1 if kind == "ignore + mask" and loss == "InfoNCE" else 0.0
        whole = REFERENCE[LOSSES[loss]](*towers(x), pairs_of(kind, G, 0), smoothing)
        expected = [whole.detach(), *gradients(whole, towers)]
        towers, x = towers.to(dtype), x.to(dtype)
        for tile, tile_rows in TILES.items():
            pairs = pairs_of(kind, rows, rank)
            share = ours(loss, towers, x[:, rank * rows :][:, :rows], pairs, tile_rows, smoothing)
            found = [share.detach(), *gradients(share, towers)]
            errors = [
                (distributed.all_reduce_sum(value) - right).abs().max() / (1 + right.abs().max())
                for value, right in zip(found, expected, strict=True)
            ]
            if rank == 0:
                cell = [loss, kind, tile, str(dtype).removeprefix("torch.")]
                print(
                    json.dumps(
                        {
                            "cell": cell,
                            "loss": float(errors[0]),
                            "gradients": float(max(errors[1:])),
                        }
                    )
                )
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
