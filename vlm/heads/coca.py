"""CoCa's head: the text encoder's states, continued by a decoder that reads the picture."""

from dataclasses import dataclass, replace

from jaxtyping import Float, Int
from torch import Tensor, nn

from vlm.heads.captioner import Growing
from vlm.models.text_encoder import TextEncoder
from vlm.models.transformer import Block, CrossAttention, KeysValues, Mlp, init_blocks


class CocaLayer(nn.Module):
    """A causal block, then cross-attention with an MLP of its own, all pre-norm and residual."""

    def __init__(self, width: int, num_heads: int, image_width: int) -> None:
        super().__init__()
        self.block = Block(width, num_heads)
        self.norm_cross = nn.LayerNorm(width)
        self.norm_image = nn.LayerNorm(image_width)
        self.cross = CrossAttention(width, image_width, num_heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(
        self, x: Float[Tensor, "B T W"], image_tokens: Float[Tensor, "B N Wi"]
    ) -> Float[Tensor, "B T W"]:
        """One layer."""
        return self.read(self.block(x), self.keys_values(image_tokens))

    def keys_values(self, image_tokens: Float[Tensor, "B N Wi"]) -> KeysValues:
        """Of the picture."""
        return self.cross.keys_values(self.norm_image(image_tokens))

    def read(self, x: Float[Tensor, "B T W"], image: KeysValues) -> Float[Tensor, "B T W"]:
        """The second half."""
        x = x + self.cross.read(self.norm_cross(x), image)
        out: Tensor = x + self.mlp(self.norm_mlp(x))
        return out


class Coca(nn.Module):
    """Next-token logits of a caption, given a picture's tokens and the text encoder's states.

    The upper half of CoCa's decoupled decoder (arXiv 2205.01917, section 3.2), as open_clip builds
    it, with an output projection that is initialised.

    Args:
        vocab_size: V.
        context_length: Longest caption in tokens.
        width: W, the text encoder's.
        depth: Number of layers.
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
        self.blocks = nn.ModuleList(CocaLayer(width, num_heads, image_width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, vocab_size, bias=False)
        init_blocks(self.blocks, width)
        nn.init.normal_(self.projection.weight, std=width**-0.5)

    @property
    def vocabulary(self) -> Float[Tensor, "V W"]:
        """Output embeddings: logits are `hidden @ vocabulary.T`."""
        return self.projection.weight

    def forward(
        self, image_tokens: Float[Tensor, "B N Wi"], states: Float[Tensor, "B T W"]
    ) -> Float[Tensor, "B T W"]:
        """What the logits are made of; the loss makes them for some positions at a time."""
        for layer in self.blocks:
            states = layer(states, image_tokens)
        normed: Tensor = self.norm(states)
        return normed


@dataclass(frozen=True)
class CocaDecoder:
    """The text encoder and the head, as one decoder for `vlm.heads.generate`."""

    text: TextEncoder
    head: Coca

    @property
    def context_length(self) -> int:
        """Longest text in tokens."""
        return self.head.context_length

    def begin(self, image_tokens: Float[Tensor, "B N Wi"]) -> Growing:
        """Texts about pictures, before their first token."""
        return Growing([layer.keys_values(image_tokens) for layer in self._layers()])

    def extend(
        self, texts: Growing, tokens: Int[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B V"], Growing]:
        """Logits of what follows the texts with these tokens: one more each, or their beginning."""
        layers, past = self._layers(), texts.past
        x, seen = self.text.extend(tokens, past and past[: -len(layers)], texts.length)
        for number, layer in enumerate(layers):
            x, kept = layer.block.extend(x, past[number - len(layers)] if past else None)
            x = layer.read(x, texts.images[number])
            seen.append(kept)
        logits = self.head.norm(x[:, -1]) @ self.head.vocabulary.T
        return logits, replace(texts, past=seen, length=texts.length + tokens.shape[1])

    def _layers(self) -> list[CocaLayer]:
        return [layer for layer in self.head.blocks if isinstance(layer, CocaLayer)]
