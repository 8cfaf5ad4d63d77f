"""The text encoder: a Transformer, causal or bidirectional, and how it pools."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vlm.models.transformer import Activation, Block, KeysValues, init_blocks

TextPool = Literal["eot", "cls", "mean"]


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
        pool: "eot" (its last token, as CLIP), "cls" (a class token behind it, which sees all of it;
            CoCa, arXiv 2205.01917, section 3.2) or "mean" (of all tokens).
        causal: Tokens see those before them; else all of their text.
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
        causal: bool = True,
        activation: Activation = "gelu",
    ) -> None:
        super().__init__()
        self.eot_id = eot_id
        self.pool = pool
        self.causal = causal
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
        return self.from_embeddings(self.token_embedding(tokens), text_lengths(tokens, self.eot_id))

    def from_embeddings(
        self, embeddings: Float[Tensor, "B L W"], lengths: Int[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B L W"]]:
        """What `forward` makes of embedded tokens, some of which may be others than the text's."""
        num_tokens = embeddings.shape[1]
        x, mask = embeddings + self.positional_embedding[:num_tokens], None
        has_class = self.class_embedding is not None
        if self.class_embedding is not None:
            last = self.class_embedding + self.positional_embedding[-1]
            x = torch.cat([x, last.expand(len(x), 1, -1)], dim=1)
        if has_class or not self.causal:
            mask = _mask(lengths, x.shape[1], causal=self.causal, has_class=has_class)
        for block in self.blocks:
            x = block(x, mask=mask)
        features: Tensor = self.projection(self.norm(self._pooled(x, lengths)))
        return features, x[:, :num_tokens]

    def _pooled(self, x: Tensor, lengths: Int[Tensor, " B"]) -> Float[Tensor, "B W"]:
        if self.class_embedding is not None:
            return x[:, -1]
        if self.pool == "eot":
            return x[torch.arange(len(x), device=x.device), lengths - 1]
        inside = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        return (x * inside[:, :, None]).sum(dim=1) / lengths[:, None]

    def extend(
        self, tokens: Int[Tensor, "B T"], past: Sequence[KeysValues] | None, length: int
    ) -> tuple[Float[Tensor, "B T W"], list[KeysValues]]:
        """The last states of tokens that follow `length` others: one, or the first ones."""
        assert self.causal
        end = length + tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[length:end]
        kept = []
        for number, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            x, seen = block.extend(x, past[number] if past else None)
            kept.append(seen)
        return x, kept


def _mask(
    lengths: Int[Tensor, " B"], size: int, *, causal: bool, has_class: bool
) -> Bool[Tensor, "B 1 L L"]:
    """What is seen: what came before, or the text; the class token sees the text and itself."""
    places = torch.arange(size, device=lengths.device)
    text = places < lengths[:, None]  # [B, L]
    if causal:
        seen = (places <= places[:, None]).expand(len(lengths), -1, -1)
    else:  # padding sees itself, too, so that no softmax is over nothing
        seen = text[:, None] | torch.eye(size, dtype=torch.bool, device=lengths.device)
    if has_class:
        of_class = text | (places == size - 1)
        seen = torch.cat([seen[:, :-1], of_class[:, None]], dim=1)
    return seen[:, None]
