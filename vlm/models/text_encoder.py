"""The text encoder: a causal Transformer, pooled at the end-of-text token or a class token."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vlm.models.transformer import Activation, Block, KeysValues, init_blocks

TextPool = Literal["eot", "cls"]


def text_lengths(tokens: Int[Tensor, "B L"], eot_id: int) -> Int[Tensor, " B"]:
    """Number of tokens up to and including the first end-of-text token."""
    return (tokens == eot_id).int().argmax(dim=1) + 1


def trim(tokens: Int[Tensor, "B L"], eot_id: int) -> Int[Tensor, "B T"]:
    """The tokens without the columns that are padding in every row.

    Equal to running the padded batch: under causal attention no position before the end-of-text
    token sees what follows it. CLIP pads all texts to 77 tokens.
    """
    return tokens[:, : int(text_lengths(tokens, eot_id).max())] if len(tokens) else tokens


class TextEncoder(nn.Module):
    """Texts to features of the shared space.

    Args:
        vocab_size: V.
        context_length: Longest text in tokens, start and end included.
        width: W.
        depth: Number of blocks.
        num_heads: H.
        embed_dim: D.
        eot_id: Ends a text.
        pool: "eot" (its last token, as CLIP) or "cls" (a class token behind it, which sees all of
            it; CoCa, arXiv 2205.01917, section 3.2).
        activation: Of the MLPs.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        context_length: int,
        width: int,
        depth: int,
        num_heads: int,
        embed_dim: int,
        eot_id: int,
        pool: TextPool = "eot",
        activation: Activation = "gelu",
    ) -> None:
        super().__init__()
        self.eot_id = eot_id
        self.class_embedding = nn.Parameter(torch.empty(width)) if pool == "cls" else None
        self.context_length = context_length
        self.token_embedding = nn.Embedding(vocab_size, width)
        num_positions = context_length + (pool == "cls")
        self.positional_embedding = nn.Parameter(torch.empty(num_positions, width))
        self.blocks = nn.ModuleList(
            Block(width, num_heads, activation=activation) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, embed_dim, bias=False)
        self._init_weights(width)

    def _init_weights(self, width: int) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        if self.class_embedding is not None:
            nn.init.normal_(self.class_embedding, std=0.01)
        nn.init.normal_(self.projection.weight, std=width**-0.5)
        init_blocks(self.blocks, width)

    def forward(
        self, tokens: Int[Tensor, "B L"]
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B L W"]]:
        """Features, not normalised, and the last states; any L up to `context_length`."""
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        lengths, mask = text_lengths(tokens, self.eot_id), None
        if self.class_embedding is not None:
            last = self.class_embedding + self.positional_embedding[-1]
            x = torch.cat([x, last.expand(len(x), 1, -1)], dim=1)
            mask = _class_mask(lengths, tokens.shape[1])
        for block in self.blocks:
            x = block(x, mask=mask)
        if mask is not None:
            pooled, x = x[:, -1], x[:, :-1]
        else:
            pooled = x[torch.arange(len(x), device=x.device), lengths - 1]  # [B, W]
        features: Tensor = self.projection(self.norm(pooled))
        return features, x

    def states(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L W"]:
        """The last states alone, of any texts."""
        x: Tensor = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return x

    def extend(
        self, tokens: Int[Tensor, "B T"], past: Sequence[KeysValues] | None, length: int
    ) -> tuple[Float[Tensor, "B T W"], list[KeysValues]]:
        """The last states of tokens that follow `length` others: one, or the first ones."""
        end = length + tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[length:end]
        kept = []
        for number, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            x, seen = block.extend(x, past[number] if past else None)
            kept.append(seen)
        return x, kept


def _class_mask(lengths: Int[Tensor, " B"], length: int) -> Bool[Tensor, "B 1 L L"]:
    """Tokens see what comes before them; the class token, last, sees the text and itself."""
    places = torch.arange(length + 1, device=lengths.device)
    causal = places <= places[:, None]
    of_class = (places < lengths[:, None]) | (places == length)  # [B, L]
    is_class = places[:, None] == length  # [L, 1]
    return torch.where(is_class, of_class[:, None], causal)[:, None]
