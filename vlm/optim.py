"""AdamW and Muon with groups by rule, the learning-rate schedule, and averaged weights."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.runtime.sharded import local

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
    lr_scale: Mapping[str, float] | None = None,
) -> list[torch.optim.Optimizer]:
    """Fused AdamW over decayed and other parameters; with "muon", Muon over the hidden matrices.

    Muon's updates have AdamW's size, so one learning rate serves both.

    Args:
        model: Whose parameters; frozen ones are left out.
        name: Of the optimiser.
        lr: Of all groups, times their "lr_scale".
        weight_decay: Decoupled.
        betas: AdamW's.
        eps: AdamW's.
        lr_scale: Factors by the beginning of parameters' names ("captioner"); the longest counts.

    Raises:
        ConfigError: No parameter's name begins like a key of `lr_scale`.
    """
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    scales = _scales([n for n, _ in model.named_parameters()], lr_scale or {})
    for n, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_muon = name == "muon" and is_hidden_matrix(n, parameter)
            decay = weight_decay if decays(n, parameter) else 0.0
            groups.setdefault((by_muon, decay, scales[n]), []).append(parameter)
    settings = {
        by_muon: [
            {"params": parameters, "weight_decay": decay, "lr_scale": scale}
            for (muon, decay, scale), parameters in groups.items()
            if muon is by_muon
        ]
        for by_muon in (False, True)
    }
    optimizers: list[torch.optim.Optimizer] = []
    if settings[False]:
        optimizers.append(
            torch.optim.AdamW(settings[False], lr=lr, betas=betas, eps=eps, fused=True)
        )
    if settings[True]:
        optimizers.append(Muon(settings[True], lr=lr, weight_decay=weight_decay))
    return optimizers


def _scales(names: Iterable[str], lr_scale: Mapping[str, float]) -> dict[str, float]:
    """Each parameter's factor: that of the longest prefix of its name, else 1."""
    scales, used = {}, set[str]()
    for name in names:
        prefixes = [p for p in lr_scale if name == p or name.startswith(f"{p}.")]
        used.update(prefixes)
        scales[name] = lr_scale[max(prefixes, key=len)] if prefixes else 1.0
    if unknown := sorted(set(lr_scale) - used):
        parts = sorted({name.split(".")[0] for name in scales})
        raise ConfigError(
            f"optim.lr_scale: no parameter's name begins with {', '.join(unknown)}; "
            f"the parts are {', '.join(parts)}"
        )
    return scales


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024), at the size of AdamW's updates (2502.16982).

    `torch.optim.Muon(..., adjust_lr_fn="match_rms_adamw")`, with equal shapes stacked: small
    matrices one at a time keep no core busy (benchmarks/quickstart_parts.py).

    Args:
        params: Matrices, or groups of them.
        lr: As for AdamW.
        weight_decay: Decoupled.
        momentum: Nesterov's.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for parameters in by_shape.values():
                self._update(
                    parameters,
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    momentum=group["momentum"],
                )

    def _update(
        self, parameters: list[Tensor], *, lr: float, weight_decay: float, momentum: float
    ) -> None:
        """One update of matrices of one shape."""
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, buffers, momentum)
        updates = orthogonalize(torch.stack(ahead)).to(parameters[0].dtype).unbind()
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        size = 0.2 * math.sqrt(max(parameters[0].shape))
        torch._foreach_add_(parameters, updates, alpha=-lr * size)


def orthogonalize(matrices: Float[Tensor, "K M N"], steps: int = 5) -> Float[Tensor, "K M N"]:
    """U V^T of each matrix U S V^T, roughly: singular values come out between 0.7 and 1.2, in bf16.

    Newton-Schulz iteration with the coefficients of Jordan et al. 2024, which trade exactness for
    steep convergence.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # so that no singular value is > 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


Schedule = Literal["cosine", "constant", "wsd"]


def lr_at(
    step: int,
    *,
    lr: float,
    steps: int,
    warmup_steps: int,
    min_lr_fraction: float,
    schedule: Schedule = "cosine",
    decay_fraction: float = 0.2,
) -> float:
    """Linear warm-up over the first `warmup_steps`, then what the schedule says.

    A function of the step and the settings alone: a run that goes on with another length has from
    there on the learning rate of a run of that length.

    Args:
        step: 0-based; step 0 already learns.
        lr: At the peak.
        steps: Of the whole run.
        warmup_steps: Of them, rising ones.
        min_lr_fraction: Of `lr`, what a schedule that decays would reach at step `steps`.
        schedule: "cosine" decays all the way; "constant" stays; "wsd" (warm-up, stable, decay)
            stays and then decays by 1 - sqrt (arXiv 2405.18392, section 3), so that a run can be
            made longer from any checkpoint before the decay.
        decay_fraction: Of all steps, the last ones, which decay under "wsd".
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    start = warmup_steps if schedule == "cosine" else steps - round(decay_fraction * steps)
    start = max(start, warmup_steps)
    progress = min(1.0, max(0, step - start) / max(1, steps - start))
    left = 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "wsd":
        left = 1 - math.sqrt(progress)
    return lr * (min_lr_fraction + (1 - min_lr_fraction) * left)


def set_lr(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    """Give every group this learning rate, times its own "lr_scale"."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)


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
        named = [(local(self.shadow[n]), local(p.detach())) for n, p in named_parameters]
        torch._foreach_lerp_([s for s, _ in named], [p for _, p in named], 1 - decay)
