"""Next-token cross-entropy of captions (CoCa, arXiv 2205.01917, equation 2)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from vlm.losses.pairs import TILE_BYTES

MULTIPLE = 64  # rows of a product: oneDNN compiles and keeps a kernel for each number of them

_IS_COMPUTED_AGAIN = ContextVar("computed_again", default=False)


@contextmanager
def computed_again() -> Iterator[None]:
    """A caption loss within gives its value alone: computed a second time, it has a gradient."""
    token = _IS_COMPUTED_AGAIN.set(True)
    try:
        yield
    finally:
        _IS_COMPUTED_AGAIN.reset(token)


def caption_loss(
    hidden: Float[Tensor, "B T W"],
    weight: Float[Tensor, "V W"],
    targets: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    tile_bytes: int = TILE_BYTES,
) -> Float[Tensor, ""]:
    """Sum, not mean, of -log p(target): divide by the token count of the whole global batch.

    Logits are `hidden @ weight.T`, made for some positions at a time, and their gradient with them
    (within `computed_again` it is NaN): memory does not grow with the number of positions times V.

    Args:
        hidden: The decoder's last states, one for the token that follows each position.
        weight: Output embeddings of the vocabulary.
        targets: Those tokens.
        mask: True where a target counts.
        tile_bytes: Of logits that may exist at a time; as many as `weight` takes, at least, since
            its gradient is added up once a tile, and those of 64 positions.
    """
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch's own
        hidden[mask], weight, targets[mask], tile_bytes
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum over rows; a gradient is found on the way and only scaled by the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, tile_bytes: int
    ) -> Tensor:
        dtype, num_rows = _autocast_dtype(hidden), len(hidden)
        more = -num_rows % MULTIPLE
        x, w = pad(hidden.to(dtype), (0, 0, 0, more)), weight.to(dtype)
        wants_gradient = any(ctx.needs_input_grad) and not _IS_COMPUTED_AGAIN.get()
        of_hidden, of_weight = (t.new_full((), math.nan).expand_as(t) for t in (hidden, weight))
        if wants_gradient:
            of_hidden, of_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        wanted = pad(targets, (0, more))[:, None]
        loss = torch.zeros((), device=hidden.device, dtype=_at_least_fp32(hidden.dtype))
        height = max(hidden.shape[1], tile_bytes // (4 * len(weight)))
        height = max(1, height // MULTIPLE) * MULTIPLE
        for start in range(0, len(x), height):
            rows = slice(start, start + height)
            count = min(num_rows - start, rows.stop - start)  # what follows is padding
            logits = (x[rows] @ w.T).to(loss.dtype)
            logsumexp, target = logits.logsumexp(1, keepdim=True), wanted[rows]
            loss += (logsumexp - logits.gather(1, target))[:count].sum()
            if wants_gradient:
                of_logits = logits.sub_(logsumexp).exp_()
                of_logits.scatter_add_(1, target, -torch.ones_like(logsumexp))
                of_logits = of_logits.to(dtype)
                of_hidden[rows] = (of_logits @ w)[:count]
                of_weight += of_logits.T @ x[rows]
        ctx.save_for_backward(of_hidden, of_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight = ctx.saved_tensors
        return of_hidden * upstream[0], of_weight * upstream[0], None, None


def _autocast_dtype(tensor: Tensor) -> torch.dtype:
    """In which a product with it is computed here."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def caption_targets(
    tokens: Int[Tensor, "B L"],
    eot_id: int,
    valid: Bool[Tensor, " B"],
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Decoder inputs, their targets one position on, and which targets count (T = L - 1).

    The end-of-text token is a target, nothing after it is, and no token of an invalid sample.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    ended = torch.cumsum((inputs == eot_id).int(), dim=1) > 0
    return inputs, targets, ~ended & valid[:, None]
