"""AdamW and Muon with groups by rule, the learning-rate schedule, and averaged weights."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

_NO_DECAY = ("positional_embedding", "pos_embed", "cls_token", "reg_token", "query")


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, kernels and token embeddings.

    Not to gains, biases, the temperature, and what is added to tokens (CLIP, 2103.00020, section
    2.5: "all weights that are not gains or biases").
    """
    return parameter.ndim >= 2 and name.rsplit(".", 1)[-1] not in _NO_DECAY


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes it: a matrix inside a Transformer block, no embedding or projection."""
    return parameter.ndim == 2 and ".blocks." in name


def build_optimizers(
    model: nn.Module,
    *,
    name: Literal["adamw", "muon"],
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> list[torch.optim.Optimizer]:
    """Fused AdamW over decayed and other parameters; with "muon", Muon over the hidden matrices.

    Muon orthogonalises its momentum (Jordan et al. 2024) and is scaled to AdamW's update size, so
    that one learning rate serves both (Liu et al., arXiv 2502.16982, section 2.2).
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    muon = [p for n, p in named if name == "muon" and is_hidden_matrix(n, p)]
    named = [(n, p) for n, p in named if not (name == "muon" and is_hidden_matrix(n, p))]
    groups = [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    ]
    if muon:
        scale = "match_rms_adamw"
        optimizers.append(
            torch.optim.Muon(muon, lr=lr, weight_decay=weight_decay, adjust_lr_fn=scale)
        )
    return optimizers


def lr_at(step: int, *, lr: float, steps: int, warmup_steps: int, min_lr_fraction: float) -> float:
    """Linear warm-up over the first `warmup_steps`, then cosine decay to `min_lr_fraction` of `lr`.

    Args:
        step: 0-based; step 0 already learns.
        lr: At the peak.
        steps: Of the whole run.
        warmup_steps: Of them, rising ones.
        min_lr_fraction: What is left at the last step.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return lr * (min_lr_fraction + (1 - min_lr_fraction) * cosine)


def set_lr(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    """Give every group this learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


class AveragedWeights:
    """An exponential moving average of a model's parameters, warmed up so that it is useful early.

    At update t the decay is min(decay, (1 + t) / (10 + t)) (Polyak averaging as in TensorFlow's
    `ExponentialMovingAverage` with `num_updates`).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.shadow = {n: p.detach().clone() for n, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Move towards the parameters."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        named = [(self.shadow[n], p.detach()) for n, p in named_parameters]
        torch._foreach_lerp_([s for s, _ in named], [p for _, p in named], 1 - decay)
