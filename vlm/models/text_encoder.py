"""The text encoder: a causal Transformer, pooled at the end-of-text token."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlm.models.transformer import Activation, Block, init_blocks


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
        eot_id: Where to pool.
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
        activation: Activation = "gelu",
    ) -> None:
        super().__init__()
        self.eot_id = eot_id
        self.context_length = context_length
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.blocks = nn.ModuleList(
            Block(width, num_heads, activation=activation) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, embed_dim, bias=False)
        self._init_weights(width)

    def _init_weights(self, width: int) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.projection.weight, std=width**-0.5)
        init_blocks(self.blocks, width)

    def forward(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        """Features, not normalised; any L up to `context_length`."""
        return self.from_embeddings(self.token_embedding(tokens), text_lengths(tokens, self.eot_id))

    def from_embeddings(
        self, embeddings: Float[Tensor, "B L W"], lengths: Int[Tensor, " B"]
    ) -> Float[Tensor, "B D"]:
        """What `forward` makes of embedded tokens, so that gradients for these can be had."""
        x = embeddings + self.positional_embedding[: embeddings.shape[1]]
        for block in self.blocks:
            x = block(x)
        ends = lengths - 1
        pooled = x[torch.arange(len(x), device=x.device), ends]  # [B, W]
        features: Tensor = self.projection(self.norm(pooled))
        return features
