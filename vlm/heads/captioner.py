"""The captioning head: a decoder that reads the image encoder's tokens."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlm.models.transformer import Block, CrossAttention, KeysValues, init_blocks


@dataclass(frozen=True)
class Growing:
    """Texts that are being written, and what need not be computed again.

    Attributes:
        images: Keys and values of the pictures, for each cross-attention.
        past: Those of the texts so far, for each self-attention; None before the first token.
        length: Tokens so far.
    """

    images: list[KeysValues]
    past: list[KeysValues] | None = None
    length: int = 0

    def repeated(self, times: int) -> "Growing":
        """Each text so many times in a row."""
        past = self.past and [
            KeysValues(*(t.repeat_interleave(times, 0) for t in kv)) for kv in self.past
        ]
        images = [KeysValues(*(t.repeat_interleave(times, 0) for t in kv)) for kv in self.images]
        return replace(self, images=images, past=past)

    def chosen(self, rows: Int[Tensor, " B"]) -> "Growing":
        """Other texts in their places, each about the picture of the one before it."""
        past = self.past and [KeysValues(*(t[rows] for t in kv)) for kv in self.past]
        return replace(self, past=past)


class Captioner(nn.Module):
    """Next-token logits of a caption, given a picture's tokens.

    The multimodal decoder of CoCa (arXiv 2205.01917, section 3.2), here without a unimodal half.

    Args:
        vocab_size: V; input and output embeddings are one matrix.
        context_length: Longest caption in tokens.
        width: W.
        depth: Number of blocks, each with self-attention, cross-attention and an MLP.
        num_heads: H.
        image_width: Wi of the image tokens.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        context_length: int,
        width: int,
        depth: int,
        num_heads: int,
        image_width: int,
    ) -> None:
        super().__init__()
        self.context_length = context_length
        self.norm_image = nn.LayerNorm(image_width)
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.blocks = nn.ModuleList(
            Block(width, num_heads, context_width=image_width) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        init_blocks(self.blocks, width)

    @property
    def vocabulary(self) -> Float[Tensor, "V W"]:
        """Output embeddings: logits are `hidden @ vocabulary.T`."""
        return self.token_embedding.weight

    def forward(
        self, image_tokens: Float[Tensor, "B N Wi"], tokens: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B T W"]:
        """What the logits are made of; the loss makes them for some positions at a time."""
        context = self.norm_image(image_tokens)
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, context)
        normed: Tensor = self.norm(x)
        return normed

    def begin(self, image_tokens: Float[Tensor, "B N Wi"]) -> Growing:
        """Texts about pictures, before their first token."""
        context = self.norm_image(image_tokens)
        crosses = [block.get_submodule("cross") for block in self.blocks]
        return Growing([c.keys_values(context) for c in crosses if isinstance(c, CrossAttention)])

    def extend(
        self, texts: Growing, tokens: Int[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B V"], Growing]:
        """Logits of what follows the texts with these tokens: one more each, or their beginning."""
        end = texts.length + tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[texts.length : end]
        past = []
        for number, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            x, seen = block.extend(
                x, texts.past[number] if texts.past else None, texts.images[number]
            )
            past.append(seen)
        logits = self.norm(x[:, -1]) @ self.vocabulary.T
        return logits, replace(texts, past=past, length=end)
