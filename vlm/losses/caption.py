"""Next-token cross-entropy of captions (CoCa, arXiv 2205.01917, equation 2)."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def caption_loss(
    logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Sum, not mean, of -log p(target): divide by the token count of the whole global batch.

    Args:
        logits: For the token that follows each position.
        targets: Those tokens.
        mask: True where a target counts.
    """
    return F.cross_entropy(logits[mask].float(), targets[mask], reduction="sum")


def caption_targets(
    tokens: Int[Tensor, "B L"], eot_id: int, valid: Bool[Tensor, " B"]
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Decoder inputs, their targets one position on, and which targets count (T = L - 1).

    The end-of-text token is a target, nothing after it is, and no token of an invalid sample.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    ended = torch.cumsum((inputs == eot_id).int(), dim=1) > 0
    return inputs, targets, ~ended & valid[:, None]
