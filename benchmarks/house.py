"""A fresh clone: how long `make test`, `make check` and `make demo` take, and what the encoder is.

    python benchmarks/house.py            # everything; about 20 minutes
    python benchmarks/house.py --no-demo  # the test splits stay unseen

The demo's time leaves out the set-up, which `make demo` prints by itself.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import record
from torch.utils.flop_counter import FlopCounterMode

from vlm.config.load import load_config
from vlm.models.image_encoder import ImageEncoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-demo", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/house.json"))
    args = parser.parse_args()
    result: dict[str, Any] = {
        **encoder_shares(),
        "help_s": statistics.median(
            seconds([sys.executable, "-m", "vlm", "--help"]) for _ in range(5)
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", ".", folder], check=True)
        result["test_s"] = seconds(["make", "test"], folder)  # installation included
        result["check_s"] = seconds(["make", "check"], folder)
        if not args.no_demo:
            result["demo_s"] = seconds(["make", "demo"], folder)
    record("house", result, args.out)


def seconds(command: list[str], folder: str = ".") -> float:
    begun = time.perf_counter()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, env=environment)
    return round(time.perf_counter() - begun, 2)


def encoder_shares() -> dict[str, float]:
    """Attention blocks of the quickstart's image encoder, and their share of it."""
    image = load_config("configs/emoji.yaml").model.image
    encoder = ImageEncoder(
        image.name,
        image_size=image.image_size,
        embed_dim=192,
        pool=image.pool,
        stem_channels=image.stem_channels,
        kwargs=image.kwargs,
    )
    encoder.use_fused_attention(False)
    blocks = encoder.trunk.blocks
    with FlopCounterMode(display=False) as counter:
        encoder(torch.randn(1, 3, image.image_size, image.image_size))
    flops = counter.get_flop_counts()
    of_blocks = sum(
        sum(counts.values()) for name, counts in flops.items() if name.endswith("trunk.blocks")
    )
    parameters = sum(p.numel() for p in encoder.parameters())
    return {
        "vit_blocks": len(blocks),
        "vit_parameters": sum(p.numel() for p in blocks.parameters()) / parameters,
        "vit_flops": of_blocks / counter.get_total_flops(),
    }


if __name__ == "__main__":
    main()
