"""Language modelling with the text encoder: the next token, or tokens that were masked."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vlm.models.draws import uniform
from vlm.models.text_encoder import TextEncoder, text_lengths

MASKED = 0.15  # of a text's tokens (BERT, arXiv 1810.04805, section 3.1)


class LanguageTargets(NamedTuple):
    """What the text encoder predicts; positions of a causal one predict the token after them.

    Attributes:
        targets: The tokens.
        mask: Which of them count.
        hidden: Which positions show the mask instead of their token; None for a causal encoder.
    """

    targets: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    hidden: Bool[Tensor, "B T"] | None

    def of_rows(self, rows: slice) -> "LanguageTargets":
        """Those of a micro-batch."""
        hidden = None if self.hidden is None else self.hidden[rows]
        return LanguageTargets(self.targets[rows], self.mask[rows], hidden)


class LanguageHead(nn.Module):
    """From the text encoder's states to what its token embeddings are multiplied with.

    Args:
        width: W of the text encoder.
        masked: Whether tokens are masked, which needs an embedding for the mask.
    """

    def __init__(self, width: int, *, masked: bool) -> None:
        super().__init__()
        self.mask_embedding = nn.Parameter(torch.zeros(width)) if masked else None
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.transform.weight, std=width**-0.5)
        nn.init.zeros_(self.transform.bias)

    def forward(self, states: Float[Tensor, "B L W"]) -> Float[Tensor, "B L W"]:
        """As BERT's: a layer, GELU and a norm."""
        normed: Tensor = self.norm(nn.functional.gelu(self.transform(states)))
        return normed


def language_targets(
    tokens: Int[Tensor, "B L"],
    eot_id: int,
    valid: Bool[Tensor, " B"],
    visits: Int[Tensor, " B"],
    *,
    causal: bool,
) -> LanguageTargets:
    """What is predicted of each text; nothing of invalid ones, and no padding.

    A causal encoder predicts every token but the first. A bidirectional one predicts `MASKED` of
    them, which it doesn't see, drawn from the visit: the same in any micro-batch and on any rank.
    BERT shows 10% of them as they are and 10% as other tokens, against a mismatch that matters
    where a classifier is trained on top; here the contrastive loss sees whole texts.
    """
    places = torch.arange(tokens.shape[1], device=tokens.device)
    inside = (places < text_lengths(tokens, eot_id)[:, None]) & valid[:, None]
    inside[:, 0] = False  # the start of every text
    if causal:
        return LanguageTargets(tokens[:, 1:], inside[:, 1:], None)
    hidden = inside & (uniform(visits, tokens.shape[1]) < MASKED)
    return LanguageTargets(tokens, hidden, hidden)


def language_states(
    encoder: TextEncoder,
    head: LanguageHead,
    tokens: Int[Tensor, "B L"],
    targets: LanguageTargets,
    states: Float[Tensor, "B L W"],
) -> Float[Tensor, "B T W"]:
    """What predicts the targets; a bidirectional encoder runs again, with the mask.

    Args:
        encoder: The text encoder.
        head: On top of it.
        tokens: Of the texts.
        targets: From `language_targets`.
        states: The encoder's last ones, of the texts as they are.
    """
    if targets.hidden is not None:
        assert head.mask_embedding is not None
        embeddings = encoder.token_embedding(tokens)
        mask = head.mask_embedding.to(embeddings.dtype)
        embeddings = torch.where(targets.hidden[:, :, None], mask, embeddings)
        states = encoder.from_embeddings(embeddings, text_lengths(tokens, encoder.eot_id))[1]
    out: Tensor = head(states[:, : targets.targets.shape[1]])
    return out
