"""Weights of open_clip's and OpenAI's Vision Transformers, under the names they have here."""

import re
from collections.abc import Mapping

from torch import Tensor

_NAMES = (  # of open_clip, as patterns, and here
    (r"logit_(scale|bias)", r"encoders.logit_\1"),
    (r"visual\.class_embedding", "encoders.image.trunk.cls_token"),
    (r"visual\.positional_embedding", "encoders.image.trunk.pos_embed"),
    (r"visual\.conv1\.weight", "encoders.image.trunk.patch_embed.proj.weight"),
    (r"visual\.ln_pre\.(.+)", r"encoders.image.trunk.norm_pre.\1"),
    (r"visual\.ln_post\.(.+)", r"encoders.image.trunk.norm.\1"),
    (r"visual\.proj", "encoders.image.projection.weight"),
    (r"visual\.transformer\.resblocks\.(\d+)\.(.+)", r"encoders.image.trunk.blocks.\1.\2"),
    (r"(token_embedding\.weight|positional_embedding)", r"encoders.text.\1"),
    (r"ln_final\.(.+)", r"encoders.text.norm.\1"),
    (r"text_projection", "encoders.text.projection.weight"),
    (r"transformer\.resblocks\.(\d+)\.(.+)", r"encoders.text.blocks.\1.\2"),
)
_IN_BLOCKS = {  # the part of a block: (timm's, for pictures; ours, for texts)
    "ln_1": ("norm1", "norm_attention"),
    "attn.in_proj": ("attn.qkv", "attention.qkv"),
    "attn.out_proj": ("attn.proj", "attention.out"),
    "ln_2": ("norm2", "norm_mlp"),
    "mlp.c_fc": ("mlp.fc1", "mlp.0"),
    "mlp.c_proj": ("mlp.fc2", "mlp.2"),
}


def translate(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of `VisionLanguageModule` from one of `open_clip.CLIP` with a ViT.

    Args:
        weights: Of a model whose image tower is open_clip's own Vision Transformer, pooled at the
            class token.

    Raises:
        KeyError: It has weights that no part here takes.
    """
    translated = {_name(name): tensor for name, tensor in weights.items() if name != "attn_mask"}
    for projection in ("encoders.image.projection.weight", "encoders.text.projection.weight"):
        translated[projection] = translated[projection].T  # theirs is multiplied from the right
    for name in ("encoders.image.trunk.cls_token", "encoders.image.trunk.pos_embed"):
        translated[name] = translated[name].reshape(1, -1, translated[name].shape[-1])
    return translated


def _name(theirs: str) -> str:
    for pattern, ours in _NAMES:
        if match := re.fullmatch(pattern, theirs):
            name = match.expand(ours)
            return _in_block(name) if "blocks" in name else name
    raise KeyError(f"{theirs}: open_clip's Vision Transformer CLIP has no such weight")


def _in_block(name: str) -> str:
    is_text = name.startswith("encoders.text")
    for theirs, ours in _IN_BLOCKS.items():
        if f".{theirs}" in name:
            # in_proj_weight has no dot of its own
            return name.replace(theirs, ours[is_text]).replace("qkv_", "qkv.")
    raise KeyError(f"{name}: open_clip's blocks have no such weight")
