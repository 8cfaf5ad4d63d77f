"""AdamW with decay groups by rule, the learning-rate schedule, and averaged weights."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_NO_DECAY = ("positional_embedding", "pos_embed", "cls_token", "reg_token", "query")


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, kernels and token embeddings.

    Not to gains, biases, the temperature, and what is added to tokens (CLIP, 2103.00020, section 2.5:
    "all weights that are not gains or biases").
    """
    return parameter.ndim >= 2 and name.rsplit(".", 1)[-1] not in _NO_DECAY


def build_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> torch.optim.AdamW:
    """Fused AdamW over two groups: decayed and not."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


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


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group this learning rate."""
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
