"""Pre-norm Transformer blocks with a fused QKV projection."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Activation = Literal["gelu", "quick_gelu"]


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
) -> Float[Tensor, "B H L K"]:
    """softmax(q k^T / sqrt(K)) v, by whatever is fastest.

    PyTorch's fused kernel, but for bf16 on the CPU: there plain matrix products are faster at the
    lengths of captions and small images (benchmarks/quickstart_parts.py).
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
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

    def forward(self, x: Float[Tensor, "B L W"]) -> Float[Tensor, "B L W"]:
        """Mix positions."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = attention(q, k, v, causal=self.causal)  # [B, H, L, W/H]
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
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(context).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.out(attention(q, k, v).transpose(1, 2).flatten(2))
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
        self, x: Float[Tensor, "B L W"], context: Float[Tensor, "B N Wi"] | None = None
    ) -> Float[Tensor, "B L W"]:
        """One layer; `context` is required exactly when the block has cross-attention."""
        x = x + self.attention(self.norm_attention(x))
        if self.cross is not None and self.norm_cross is not None:
            assert context is not None
            x = x + self.cross(self.norm_cross(x), context)
        x = x + self.mlp(self.norm_mlp(x))
        return x


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
