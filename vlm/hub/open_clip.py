"""Weights of open_clip's CLIP and CoCa with a Vision Transformer, under their names here."""

import re
from collections.abc import Mapping

import torch
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
    (r"cls_emb", "encoders.text.class_embedding"),
    (r"visual\.attn_pool\.query", "encoders.image.query_pool.query"),
    (r"visual\.attn_pool\.attn\.(.+)", r"encoders.image.query_pool.attention.\1"),
    (r"visual\.attn_pool\.ln_q\.(.+)", r"encoders.image.query_pool.norm_query.\1"),
    (r"visual\.attn_pool\.ln_k\.(.+)", r"encoders.image.query_pool.norm_tokens.\1"),
    (r"text_decoder\.ln_final\.(.+)", r"captioner.norm.\1"),
    (r"text_decoder\.text_projection", "captioner.projection.weight"),
    (r"text_decoder\.resblocks\.(\d+)\.(.+)", r"captioner.blocks.\1.block.\2"),
    (r"text_decoder\.cross_attn\.(\d+)\.(.+)", r"captioner.blocks.\1.cross.\2"),
)
_OF_COCA = ((r"visual\.ln_post\.(.+)", r"encoders.image.query_pool.norm.\1"),)  # before the above
_IN_BLOCKS = {  # the part of a block: (timm's, for pictures; ours, for texts; the reading one)
    "ln_1_kv": ("", "", "norm_image"),
    "ln_1": ("norm1", "norm_attention", "norm_cross"),
    "attn.in_proj": ("attn.qkv", "attention.qkv", "cross.in_proj"),
    "attn.out_proj": ("attn.proj", "attention.out", "cross.out"),
    "ln_2": ("norm2", "norm_mlp", "norm_mlp"),
    "mlp.c_fc": ("mlp.fc1", "mlp.0", "mlp.0"),
    "mlp.c_proj": ("mlp.fc2", "mlp.2", "mlp.2"),
}
_FROM_THE_RIGHT = (  # theirs are multiplied so
    "encoders.image.projection.weight",
    "encoders.text.projection.weight",
    "captioner.projection.weight",
)


def translate(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of `VisionLanguageModule` from one of `open_clip.CLIP` or `CoCa` with a ViT.

    CoCa's text features differ where a text is padded: open_clip's mask for the class token is off
    by one (see its `correct_cls_mask`). Captions don't depend on it.

    Args:
        weights: Of a model whose image tower is open_clip's own Vision Transformer, pooled at the
            class token or by CoCa's queries.

    Raises:
        KeyError: It has weights that no part here takes.
    """
    is_coca = any(name.startswith("text_decoder.") for name in weights)
    names = (*_OF_COCA, *_NAMES) if is_coca else _NAMES
    found = {
        _name(n.removeprefix("text."), names): t for n, t in weights.items() if n != "attn_mask"
    }
    for projection in _FROM_THE_RIGHT:
        if projection in found:
            found[projection] = found[projection].T
    for name in ("encoders.image.trunk.cls_token", "encoders.image.trunk.pos_embed"):
        found[name] = found[name].reshape(1, -1, found[name].shape[-1])
    for name in [name for name in found if ".cross.in_proj" in name]:
        first, _, kind = name.rpartition("in_proj_")
        query, *rest = found.pop(name).chunk(3)
        found |= {f"{first}q.{kind}": query, f"{first}kv.{kind}": torch.cat(rest)}
    return found


def _name(theirs: str, names: tuple[tuple[str, str], ...]) -> str:
    for pattern, ours in names:
        if match := re.fullmatch(pattern, theirs):
            name = match.expand(ours)
            return _in_block(name) if "blocks" in name else name
    raise KeyError(f"{theirs}: open_clip's CLIP and CoCa have no such weight")


def _in_block(name: str) -> str:
    kind = 0 if name.startswith("encoders.image") else 1
    if name.startswith("captioner") and ".cross." in name:
        name, kind = name.replace(".cross.", "."), 2
    for theirs, ours in _IN_BLOCKS.items():
        if f".{theirs}" in name:
            # in_proj_weight has no dot of its own
            return name.replace(theirs, ours[kind]).replace("qkv_", "qkv.")
    raise KeyError(f"{name}: open_clip's blocks have no such weight")
