"""What some choices save on a CPU: stacked Muon, plain attention, channels last and others.

    python benchmarks/quickstart_parts.py

Each choice is timed against its alternative, on the quickstart's shapes or on those of a ViT-B,
turn by turn, in bf16 as training is; the figures are medians in ms.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import record
from torch import Tensor, nn

from vlm.config.load import load_config
from vlm.heads.model import build_model
from vlm.models.image_encoder import ConvStem, PatchProjection
from vlm.models.linear import weight_gradient
from vlm.models.transformer import attention
from vlm.optim import Muon, is_hidden_matrix
from vlm.runtime import onednn
from vlm.tokenizer import Tokenizer, train_bpe

Pair = dict[str, Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/quickstart_parts.json")
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    config = load_config("configs/emoji.yaml")
    batch, heads = config.train.global_batch_size, config.model.text.num_heads
    length = config.model.text.context_length
    num_patches = (config.model.image.image_size // 16) ** 2
    cases = {
        "muon": muon(),
        f"attention, {num_patches} image tokens": attentions(batch, heads, num_patches),
        f"attention, {length} text tokens": attentions(batch, heads, length, causal=True),
        "attention, 197 tokens": attentions(batch // 8, heads, 197),
        "conv stem": conv_stem(batch, config.model.image.image_size),
        "patches of ViT-B/32": patches(32, 224),
        "weight gradient, ViT-B/16, 768 to 3,072": weight_gradients(32 * 197, 768, 3072),
        "weight gradient, ViT-B/16, 3,072 to 768": weight_gradients(32 * 197, 3072, 768),
        "weight gradient, ViT-B/32, 3,072 to 768": weight_gradients(32 * 50, 3072, 768),
        "linear layer in fp32, ViT-B/16": linear_layers(32 * 197, 768, 3072),
        "linear layer in fp32, ViT-B/32": linear_layers(32 * 50, 768, 3072),
    }
    result: dict[str, Any] = {
        "median_ms": {name: medians_ms(pair, args.rounds) for name, pair in cases.items()},
    }
    record("quickstart_parts", result, args.out)


def medians_ms(pair: Pair, rounds: int) -> dict[str, float]:
    """Each side's median, the sides taking turns; the first three rounds are warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in pair}
    for _ in range(rounds + 3):
        for name, run in pair.items():
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    return {name: round(1e3 * statistics.median(times[3:]), 3) for name, times in seconds.items()}


def muon() -> Pair:
    """One update of the quickstart's hidden matrices: equal shapes stacked, or one at a time."""
    module = build_model(load_config("configs/emoji.yaml").model, tokenizer())
    matrices = [p for n, p in module.named_parameters() if is_hidden_matrix(n, p)]
    for parameter in matrices:
        parameter.grad = torch.randn_like(parameter)
    one_by_one = torch.optim.Muon(matrices, lr=1e-3, adjust_lr_fn="match_rms_adamw")
    return {
        "stacked": Muon(matrices, lr=1e-3, weight_decay=0.1).step,
        "one by one": one_by_one.step,
    }


def tokenizer() -> Tokenizer:
    """Any: the token embedding is none of Muon's matrices."""
    return train_bpe(["a red bird"], vocab_size=300, context_length=12)


def attentions(batch: int, heads: int, length: int, *, causal: bool = False) -> Pair:
    """Forward and backward, by matrix products or by PyTorch's fused kernel."""
    q, k, v = (
        torch.randn(batch, heads, length, 64, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    return {
        "plain": lambda: attention(q, k, v, causal=causal).sum().backward(),
        "fused": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal).sum().backward(),
    }


def patches(batch: int, image_size: int) -> Pair:
    """Forward and backward in bf16, as a matrix product or as a convolution."""
    convolution = nn.Conv2d(3, 768, 32, stride=32, bias=False)
    pixels = torch.randn(batch, 3, image_size, image_size)

    def run(forward: Callable[[Tensor], Tensor]) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = forward(pixels).sum()
        loss.backward()

    product = PatchProjection(convolution)
    return {"product": lambda: run(product), "convolution": lambda: run(convolution)}


def weight_gradients(rows: int, width_in: int, width_out: int) -> Pair:
    """Of a linear layer, from the gradient of its output."""
    x, of_out = (torch.randn(rows, width).bfloat16() for width in (width_in, width_out))
    return {
        "transposed first": lambda: weight_gradient(of_out, x),
        "one product": lambda: (of_out.T @ x).float(),
    }


def linear_layers(rows: int, width_in: int, width_out: int) -> Pair:
    """Forward, by oneDNN or by PyTorch's own choice."""
    x, weight = torch.randn(rows, width_in), torch.randn(width_out, width_in)
    return {
        "oneDNN": lambda: onednn.linear(x, weight),
        "F.linear": lambda: F.linear(x, weight),
    }


def conv_stem(batch: int, image_size: int) -> Pair:
    """Forward and backward, channels last in memory, or first."""
    channels = load_config("configs/emoji.yaml").model.image.stem_channels
    stem = ConvStem(image_size, 2 ** len(channels), 3, channels[-1], channels=channels)
    pixels = torch.randn(batch, 3, image_size, image_size)

    def run(forward: Callable[[Tensor], Tensor]) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = forward(pixels).sum()
        loss.backward()

    def channels_first(x: Tensor) -> Tensor:
        for convolution, norm in zip(stem.convolutions, stem.norms, strict=True):
            x = convolution(x)
            normed = norm(x.permute(0, 2, 3, 1)).to(x.dtype)
            x = F.gelu(normed.permute(0, 3, 1, 2).contiguous())
        tokens: Tensor = stem.projection(x.flatten(2).transpose(1, 2))
        return tokens

    return {"channels last": lambda: run(stem), "channels first": lambda: run(channels_first)}


if __name__ == "__main__":
    main()
