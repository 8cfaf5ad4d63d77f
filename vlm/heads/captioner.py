"""The captioning head: a decoder that reads the image encoder's tokens, greedily."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlm.models.transformer import Block, init_blocks


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

    def logits(
        self, image_tokens: Float[Tensor, "B N Wi"], tokens: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B T V"]:
        """Of the token after each position."""
        hidden: Tensor = self(image_tokens, tokens)
        return hidden @ self.token_embedding.weight.T

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


@torch.inference_mode()
def greedy(
    captioner: Captioner,
    image_tokens: Float[Tensor, "B N Wi"],
    prompt: Int[Tensor, "B P"],
    *,
    eot_id: int,
    max_length: int,
) -> Int[Tensor, "B T"]:
    """The likeliest token at each step, until all captions have ended or are `max_length` long.

    Args:
        captioner: The head.
        image_tokens: What it reads.
        prompt: How each caption begins: at least the start-of-text token.
        eot_id: Ends a caption; what follows it is filled with it.
        max_length: Of the result, prompt included.
    """
    tokens = prompt
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    while tokens.shape[1] < max_length and not ended.all():
        following = captioner.logits(image_tokens, tokens)[:, -1].argmax(dim=-1)
        following = torch.where(ended, eot_id, following)
        ended |= following == eot_id
        tokens = torch.cat([tokens, following[:, None]], dim=1)
    return tokens
