"""The image encoder: any timm backbone, pooled and projected; optionally a convolutional stem."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.models.draws import integers
from vlm.runtime import torchvision_guard

Pool = Literal["token", "avg", "map", "queries"]
# what makes timm.create_model fetch weights, or load them from a file, pickles too in some versions
LOADING = frozenset({"pretrained", "pretrained_cfg", "checkpoint_path", "cache_dir"})


class ConvStem(nn.Module):
    """Stride-2 3x3 convolutions in place of a patch embedding (Xiao et al., arXiv 2106.14881).

    A local bias that small models trained on few pictures need. timm calls it as it calls its own
    `PatchEmbed`: the patch size must be 2 to the number of convolutions.

    Args:
        img_size: Pixels a side.
        patch_size: Total stride.
        in_chans: Colours.
        embed_dim: W of the tokens.
        channels: Output channels of each convolution; a 1x1 convolution to `embed_dim` follows.
    """

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        *,
        channels: Sequence[int],
        **_: Any,  # timm passes options of PatchEmbed that have no meaning here
    ) -> None:
        super().__init__()
        if patch_size != 2 ** len(channels):
            raise ConfigError(
                f"model.image.stem_channels: {len(channels)} convolutions of stride 2 make patches "
                f"of {2 ** len(channels)} pixels, but patch_size is {patch_size}; "
                f"set model.image.kwargs.patch_size={2 ** len(channels)}"
            )
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1)
            for before, after in zip([in_chans, *channels[:-1]], channels, strict=True)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(after) for after in channels)
        self.projection = nn.Linear(channels[-1], embed_dim)

    def forward(self, x: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B N W"]:
        """Pixels to tokens.

        Channels are last in memory throughout: with gradients in another layout oneDNN's bf16
        convolution backward is slower (benchmarks/quickstart_parts.py).
        """
        x = x.contiguous(memory_format=torch.channels_last)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = convolution(x).permute(0, 2, 3, 1)  # [B, h, w, C], the order in memory
            x = F.gelu(norm(x).to(x.dtype)).permute(0, 3, 1, 2)
        tokens: Tensor = self.projection(x.permute(0, 2, 3, 1).flatten(1, 2))
        return tokens


class PatchProjection(nn.Module):
    """A convolution whose stride is its kernel, as the matrix product that it is.

    Its weights keep their names and shapes. oneDNN's backward pass of the bf16 convolution is slow
    (benchmarks/quickstart_parts.py, "patches").

    Args:
        convolution: What it computes; its parameters are taken over.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.patch_size = convolution.kernel_size
        self.weight = convolution.weight  # [W, 3, p, q]
        self.bias = convolution.bias

    def forward(self, x: Float[Tensor, "B C H S"]) -> Float[Tensor, "B W h s"]:
        """One vector a patch."""
        (height, width), (num, colours, *_) = self.patch_size, x.shape
        rows, columns = x.shape[2] // height, x.shape[3] // width
        x = x[:, :, : rows * height, : columns * width]
        x = x.reshape(num, colours, rows, height, columns, width)
        patches = x.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class PatchDropout(nn.Module):
    """Leaves out patches in training (FLIP, arXiv 2212.00794, section 3), by (seed, epoch, sample).

    Which ones stay does not depend on the number of ranks, on micro-batches or on a resumption.

    Args:
        rate: Share that is left out.
        num_prefix_tokens: Class and register tokens, which stay.

    Attributes:
        visits: [B], a number for each sample's visit, set before each forward pass.
    """

    def __init__(self, rate: float, num_prefix_tokens: int) -> None:
        super().__init__()
        self.rate = rate
        self.num_prefix_tokens = num_prefix_tokens
        self.visits: Tensor | None = None

    def forward(self, x: Float[Tensor, "B N W"]) -> Float[Tensor, "B M W"]:
        """The prefix, and the patches that stay."""
        if not self.training:
            return x
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        rows = torch.arange(len(x), device=x.device) if self.visits is None else self.visits
        draws = integers(rows, patches.shape[1])
        num_kept = max(1, int(patches.shape[1] * (1 - self.rate)))
        kept = draws.argsort(dim=1)[:, :num_kept, None].expand(-1, -1, x.shape[2])
        return torch.cat([prefix, patches.gather(1, kept)], dim=1)


class AttentionPool(nn.Module):
    """A learned query attends to all tokens (MAP, arXiv 2106.04560, without its MLP)."""

    def __init__(self, width: int, num_heads: int = 8) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)

    def forward(self, tokens: Float[Tensor, "B N W"]) -> Float[Tensor, "B W"]:
        """One vector an image."""
        query = self.query.expand(len(tokens), -1, -1)
        pooled: Tensor = self.attention(query, tokens, tokens, need_weights=False)[0][:, 0]
        return pooled


class QueryPool(nn.Module):
    """Learned queries attend to all tokens (CoCa, arXiv 2205.01917, section 3.2).

    As open_clip arranges them: the first is the image's, the others are what a captioner reads.

    Args:
        width: W of the tokens.
        embed_dim: D of the queries.
        num_queries: Q.
        num_heads: Of the attention.
    """

    def __init__(self, width: int, embed_dim: int, num_queries: int, num_heads: int = 8) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(num_queries, embed_dim))
        self.norm_query = nn.LayerNorm(embed_dim)
        self.norm_tokens = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(
            embed_dim, num_heads, kdim=width, vdim=width, batch_first=True
        )
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, tokens: Float[Tensor, "B N W"]) -> Float[Tensor, "B Q D"]:
        """What each query finds."""
        tokens = self.norm_tokens(tokens)
        queries = self.norm_query(self.query).expand(len(tokens), -1, -1)
        found: Tensor = self.norm(self.attention(queries, tokens, tokens, need_weights=False)[0])
        return found


class ImageEncoder(nn.Module):
    """Pictures to features of the shared space, and to the tokens that the captioner reads.

    Args:
        name: timm's name of the backbone.
        image_size: S.
        embed_dim: D.
        pool: "token" (the class token), "avg" (mean of patch tokens), "map" (attention) or
            "queries" (attention of many, which the captioner reads in place of the tokens).
        num_queries: Of "queries".
        stem_channels: If any, a `ConvStem` replaces the patch embedding of a Vision Transformer.
        patch_dropout: Share of patches left out in training (FLIP, arXiv 2212.00794).
        kwargs: For `timm.create_model`, such as `embed_dim`, `depth`, `patch_size`.

    Raises:
        ConfigError: timm has no such backbone, or it refuses the settings.
    """

    def __init__(
        self,
        name: str,
        *,
        image_size: int,
        embed_dim: int,
        pool: Pool = "token",
        num_queries: int = 256,
        stem_channels: Sequence[int] = (),
        patch_dropout: float = 0.0,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        settings = dict(kwargs or {})
        if stem_channels:
            settings["embed_layer"] = partial(ConvStem, channels=tuple(stem_channels))
        trunk: Any = _create_trunk(name, image_size, settings)
        _project_patches(trunk)
        self.trunk = trunk
        self.image_size = image_size
        self.width: int = trunk.num_features
        self.num_prefix_tokens: int = getattr(trunk, "num_prefix_tokens", 0)
        self.patch_dropout: PatchDropout | None = None
        if patch_dropout:
            from timm.models.vision_transformer import VisionTransformer

            if not isinstance(trunk, VisionTransformer):
                raise ConfigError(f"model.image.patch_dropout: {name} has no patches to leave out")
            self.patch_dropout = PatchDropout(patch_dropout, self.num_prefix_tokens)
            trunk.register_module("patch_drop", self.patch_dropout)
        if pool == "token" and not self.num_prefix_tokens:
            raise ConfigError(f"model.image.pool: {name} has no class token; use avg or map")
        self.pool = pool
        self.attention_pool = AttentionPool(self.width) if pool == "map" else None
        self.query_pool: QueryPool | None = None
        self.token_width = self.width
        if pool == "queries":
            self.query_pool = QueryPool(self.width, embed_dim, num_queries)
            self.token_width = embed_dim
        self.projection = nn.Linear(self.token_width, embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=self.token_width**-0.5)

    def use_fused_attention(self, fused: bool) -> None:
        """Choose timm's fused or plain attention, as `vlm.models.transformer.attention` does."""
        for module in self.trunk.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused

    def tokens(self, pixels: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B N W"]:
        """What the captioner reads: the backbone's last tokens, or what queries made of them."""
        return self._tokens(pixels)[1]

    def _tokens(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """What is pooled, and the tokens."""
        tokens = self._last_tokens(pixels)
        if self.query_pool is None:
            return self._pool(tokens), tokens
        found = self.query_pool(tokens)
        return found[:, 0], found[:, 1:]

    def _last_tokens(self, pixels: Tensor) -> Tensor:
        """The backbone's, class token first where there is one."""
        x: Tensor = self.trunk.forward_features(pixels)
        if x.ndim == 4:  # a grid: [B, W, h, w] of convolutional backbones, [B, h, w, W] of Swin
            x = x.flatten(2).transpose(1, 2) if x.shape[1] == self.width else x.flatten(1, 2)
        return x

    def forward(
        self, pixels: Float[Tensor, "B 3 S S"], visits: Int[Tensor, " B"] | None = None
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B N W"]]:
        """Features, not normalised, and tokens; `visits` decide what patch dropout leaves out."""
        if self.patch_dropout is not None:
            self.patch_dropout.visits = visits
        pooled, tokens = self._tokens(pixels)
        features: Tensor = self.projection(pooled)
        return features, tokens

    def _pool(self, tokens: Tensor) -> Tensor:
        if self.pool == "token":
            return tokens[:, 0]
        if self.attention_pool is not None:
            pooled: Tensor = self.attention_pool(tokens)
            return pooled
        return tokens[:, self.num_prefix_tokens :].mean(dim=1)


def _project_patches(trunk: nn.Module) -> None:
    """Give patch embeddings a matrix product in place of their convolution."""
    from timm.layers.patch_embed import PatchEmbed

    embeddings = [module for module in trunk.modules() if isinstance(module, PatchEmbed)]
    for embedding in embeddings:
        convolution = embedding.get_submodule("proj")
        if isinstance(convolution, nn.Conv2d) and convolution.stride == convolution.kernel_size:
            embedding.register_module("proj", PatchProjection(convolution))


def _create_trunk(name: str, image_size: int, settings: dict[str, Any]) -> nn.Module:
    torchvision_guard.install()
    import timm

    if loading := sorted(LOADING & settings.keys()):
        raise ConfigError(
            f"model.image.kwargs.{loading[0]}: a backbone is made without weights, so that no "
            "config fetches or unpickles any; remove it"
        )
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:3]
        raise ConfigError(f'model.image.name: timm has no "{name}"; near: {", ".join(near)}')
    pretrained: Any = timm.get_pretrained_cfg(name)  # not None: the model exists
    if pretrained.fixed_input_size:
        settings["img_size"] = image_size
    try:
        trunk: nn.Module = timm.create_model(name, num_classes=0, global_pool="", **settings)
    except (TypeError, AssertionError, ValueError) as error:
        raise ConfigError(f"model.image: timm refuses {name} with {settings}: {error}") from error
    return trunk
