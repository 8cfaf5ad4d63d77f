"""Pre-norm Transformer blocks with a fused QKV projection."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

Activation = Literal["gelu", "quick_gelu"]


class KeysValues(NamedTuple):
    """What attention reads: kept while a text grows, so that no position is computed twice."""

    keys: Float[Tensor, "B H N K"]
    values: Float[Tensor, "B H N K"]


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x): what OpenAI's weights were trained with."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Activate, element by element."""
        return x * torch.sigmoid(1.702 * x)


def attention(
    q: Float[Tensor, "B H L K"],
    k: Float[Tensor, "B H N K"],
    v: Float[Tensor, "B H N K"],
    *,
    causal: bool = False,
    mask: Bool[Tensor, "B 1 L N"] | None = None,
) -> Float[Tensor, "B H L K"]:
    """softmax(q k^T / sqrt(K)) v, by whatever is fastest; `mask` is True where a key is seen.

    PyTorch's fused kernel, but for bf16 on the CPU: there plain matrix products are faster at the
    lengths of captions and small images (benchmarks/quickstart_parts.py).
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    mixed: Tensor = scores.softmax(dim=-1).to(v.dtype) @ v
    return mixed


class SelfAttention(nn.Module):
    """Multi-head self-attention: one matrix for Q, K and V, and PyTorch's fused kernel.

    Args:
        width: W, divisible by `num_heads`.
        num_heads: H.
        causal: Position i attends to positions 0..i only.
    """

    def __init__(self, width: int, num_heads: int, *, causal: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "B L W"], mask: Bool[Tensor, "B 1 L L"] | None = None
    ) -> Float[Tensor, "B L W"]:
        """Mix positions; a `mask` says itself what each sees."""
        q, k, v = self._heads(x)
        return self._merge(attention(q, k, v, causal=self.causal and mask is None, mask=mask))

    def extend(
        self, x: Float[Tensor, "B L W"], past: KeysValues | None
    ) -> tuple[Float[Tensor, "B L W"], KeysValues]:
        """The positions that follow `past`: one, or any number where nothing came before."""
        q, k, v = self._heads(x)
        if past is not None:
            k, v = torch.cat([past.keys, k], dim=2), torch.cat([past.values, v], dim=2)
        return self._merge(attention(q, k, v, causal=past is None)), KeysValues(k, v)

    def _heads(self, x: Tensor) -> Float[Tensor, "3 B H L K"]:
        heads: Tensor = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        return heads.permute(2, 0, 3, 1, 4)

    def _merge(self, mixed: Float[Tensor, "B H L K"]) -> Tensor:
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class CrossAttention(nn.Module):
    """Text positions attend to all image tokens.

    Args:
        width: W of the text positions.
        context_width: Wi of the image tokens.
        num_heads: H.
    """

    def __init__(self, width: int, context_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(context_width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "B L W"], context: Float[Tensor, "B N Wi"]
    ) -> Float[Tensor, "B L W"]:
        """Read the image."""
        return self.read(x, self.keys_values(context))

    def keys_values(self, context: Float[Tensor, "B N Wi"]) -> KeysValues:
        """Of the image, for any number of texts about it."""
        heads = self.kv(context).unflatten(-1, (2, self.num_heads, -1))
        return KeysValues(*heads.permute(2, 0, 3, 1, 4))

    def read(self, x: Float[Tensor, "B L W"], image: KeysValues) -> Float[Tensor, "B L W"]:
        """What the positions make of it."""
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        out: Tensor = self.out(attention(q, *image).transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Sequential):
    """Two layers, four times as wide inside."""

    def __init__(self, width: int, activation: Activation = "gelu") -> None:
        act = QuickGELU() if activation == "quick_gelu" else nn.GELU()
        super().__init__(nn.Linear(width, 4 * width), act, nn.Linear(4 * width, width))


class Block(nn.Module):
    """x + attention(norm(x)), x + mlp(norm(x)); with `context_width`, cross-attention between."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        causal: bool = True,
        activation: Activation = "gelu",
        context_width: int | None = None,
    ) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = SelfAttention(width, num_heads, causal=causal)
        self.norm_cross = None if context_width is None else nn.LayerNorm(width)
        self.cross = (
            None if context_width is None else CrossAttention(width, context_width, num_heads)
        )
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = Mlp(width, activation)

    def forward(
        self,
        x: Float[Tensor, "B L W"],
        context: Float[Tensor, "B N Wi"] | None = None,
        mask: Bool[Tensor, "B 1 L L"] | None = None,
    ) -> Float[Tensor, "B L W"]:
        """One layer; `context` is required exactly when the block has cross-attention."""
        x = x + self.attention(self.norm_attention(x), mask)
        if self.cross is not None and self.norm_cross is not None:
            assert context is not None
            x = x + self.cross(self.norm_cross(x), context)
        x = x + self.mlp(self.norm_mlp(x))
        return x

    def extend(
        self, x: Float[Tensor, "B L W"], past: KeysValues | None, image: KeysValues | None = None
    ) -> tuple[Float[Tensor, "B L W"], KeysValues]:
        """The layer on positions that follow `past`; `image` is of its cross-attention."""
        mixed, past = self.attention.extend(self.norm_attention(x), past)
        x = x + mixed
        if self.cross is not None and self.norm_cross is not None:
            assert image is not None
            x = x + self.cross.read(self.norm_cross(x), image)
        return x + self.mlp(self.norm_mlp(x)), past


def init_blocks(blocks: nn.ModuleList, width: int) -> None:
    """CLIP's initialisation (openai/CLIP, model.py): output layers shrink with depth."""
    out_std = width**-0.5 * (2 * len(blocks)) ** -0.5
    for name, parameter in blocks.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif name.endswith(("out.weight", "mlp.2.weight")):
            nn.init.normal_(parameter, std=out_std)
        elif name.endswith("mlp.0.weight"):
            nn.init.normal_(parameter, std=(2 * width) ** -0.5)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
