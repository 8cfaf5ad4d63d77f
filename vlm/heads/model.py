"""The whole trainable model: encoders and captioning head in one module, built from settings."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlm.config.schema import ModelConfig
from vlm.errors import ConfigError
from vlm.heads.captioner import Captioner
from vlm.heads.coca import Coca, CocaDecoder
from vlm.heads.language import LanguageHead, LanguageTargets, language_states
from vlm.losses.caption import caption_loss, computed_again
from vlm.losses.pairs import TILE_BYTES
from vlm.models.dual_encoder import DualEncoder, Features
from vlm.models.image_encoder import ImageEncoder
from vlm.models.text_encoder import TextEncoder
from vlm.tokenizer import Tokenizer


class _Part(NamedTuple):
    """Of a micro-batch: features, those of false texts too, and summed losses."""

    image: Tensor
    text: Tensor
    negative: Tensor
    caption_loss: Tensor
    language_loss: Tensor


class Captions(NamedTuple):
    """What is captioned: every n-th picture, and its text as `caption_targets` splits it.

    Attributes:
        first: Row of the first of them.
        every: n.
        of_texts: The inputs are the encoders' own tokens.
        inputs: Of the decoder.
        targets: The tokens that follow.
        mask: Which of them count.
    """

    first: int
    every: int
    of_texts: bool
    inputs: Int[Tensor, "b T"]
    targets: Int[Tensor, "b T"]
    mask: Bool[Tensor, "b T"]


@dataclass(frozen=True)
class Outputs:
    """What losses are made of.

    Attributes:
        image: [B, D], L2-normalised.
        text: [B, D], likewise.
        logit_scale: [], already exponentiated and clamped.
        logit_bias: []; None where the model has none.
        caption_loss: [], summed over tokens; None without captions.
        language_loss: [], summed over tokens; None without targets.
        negative: [B, D], of the texts that are nearly true, L2-normalised; None without.
    """

    image: Tensor
    text: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None
    caption_loss: Tensor | None
    language_loss: Tensor | None
    negative: Tensor | None = None


class VisionLanguageModule(nn.Module):
    """One module, so that DDP and FSDP wrap one `forward` and see every parameter once."""

    def __init__(
        self,
        encoders: DualEncoder,
        captioner: Captioner | Coca | None = None,
        language_head: LanguageHead | None = None,
    ) -> None:
        super().__init__()
        self.encoders = encoders
        self.captioner = captioner
        self.language_head = language_head

    def decoder(self) -> Captioner | CocaDecoder:
        """What writes texts.

        Raises:
            ConfigError: The model has no captioner.
        """
        if self.captioner is None:
            raise ConfigError(
                "this model has no captioner; train one with a model.captioner in the config"
            )
        if isinstance(self.captioner, Coca):
            return CocaDecoder(self.encoders.text, self.captioner)
        return self.captioner

    def forward(
        self,
        images: UInt8[Tensor, "B 3 S S"],
        tokens: Int[Tensor, "B L"],
        captions: Captions | None = None,
        language: LanguageTargets | None = None,
        *,
        prepare: Callable[[Tensor], Tensor],
        visits: Int[Tensor, " B"] | None = None,
        micro_batch_size: int | None = None,
        tile_bytes: int = TILE_BYTES,
        has_picture: Bool[Tensor, " B"] | None = None,
        negatives: Int[Tensor, "B M"] | None = None,
    ) -> Outputs:
        """Encode a batch, and caption pictures of it.

        With `micro_batch_size`, that many samples at a time. The backward pass begins with the last
        of these micro-batches; of the others only features are kept, and each is computed again,
        with the same random numbers (gradient caching, arXiv 2101.06983, section 3). The loss and
        its gradient are those of the whole batch, in the memory of a part, for a second forward
        pass of the others.

        Args:
            images: As they are loaded.
            tokens: Of the texts.
            captions: What the captioner learns.
            language: What the language head learns.
            prepare: From images to normalised pixels; a part at a time.
            visits: What patch dropout follows from.
            micro_batch_size: Samples that are in memory at a time; None for all.
            tile_bytes: Of the captioner's logits that may exist at a time.
            has_picture: Whose images are to be encoded; features of the others are 0. None: all.
            negatives: Tokens of texts that are nearly true of the pictures.
        """
        size = micro_batch_size or len(images)
        encode_twice: Callable[..., _Part] = partial(
            checkpoint, self._encode, use_reentrant=False, context_fn=_value_then_gradient
        )
        stops = range(len(images), 0, -size)  # the last one is whole
        slices = [slice(max(0, stop - size), stop) for stop in reversed(stops)]
        parts = [
            (self._encode if rows is slices[-1] else encode_twice)(
                prepare,
                images[rows],
                tokens[rows],
                None if visits is None else visits[rows],
                captions and _of_rows(captions, rows),
                language and language.of_rows(rows),
                tile_bytes,
                None if has_picture is None else has_picture[rows],
                None if negatives is None else negatives[rows],
            )
            for rows in slices
        ]
        image, text, negative, caption_losses, language_losses = zip(*parts, strict=True)
        return Outputs(
            torch.cat(image),
            torch.cat(text),
            self.encoders.scale(),
            self.encoders.bias(),
            torch.stack(caption_losses).sum() if captions else None,
            torch.stack(language_losses).sum() if language else None,
            None if negatives is None else torch.cat(negative),
        )

    def _encode(
        self,
        prepare: Callable[[Tensor], Tensor],
        images: Tensor,
        tokens: Tensor,
        visits: Tensor | None,
        captions: Captions | None,
        language: LanguageTargets | None,
        tile_bytes: int,
        has_picture: Tensor | None,
        negatives: Tensor | None,
    ) -> _Part:
        shown = None if has_picture is None else _rows_to_encode(has_picture)
        if shown is not None:
            images, visits = images[shown], None if visits is None else visits[shown]
        features: Features = self.encoders(prepare(images), tokens, visits)
        if shown is not None and has_picture is not None:
            features = features.spread(shown, has_picture)
        of_captions = of_language = features.image.new_zeros(())
        if captions is not None:
            of_captions = self._caption_loss(features, captions, tile_bytes)
        if language is not None:
            of_language = self._language_loss(features, tokens, language, tile_bytes)
        of_negatives = features.text[:0]
        if negatives is not None:
            of_negatives = self.encoders.encode_text(negatives, normalize=True)
        return _Part(features.image, features.text, of_negatives, of_captions, of_language)

    def _caption_loss(self, features: Features, captions: Captions, tile_bytes: int) -> Tensor:
        assert self.captioner is not None
        vocabulary = self.captioner.vocabulary
        rows = slice(captions.first, None, captions.every)
        read: Tensor = captions.inputs
        if isinstance(self.captioner, Coca):
            text = self.encoders.text
            states = features.text_states[rows] if captions.of_texts else text(read)[1]
            read = states[:, : read.shape[1]]
        hidden = self.captioner(features.image_tokens[rows], read)
        return caption_loss(
            hidden, vocabulary, captions.targets, captions.mask, tile_bytes=tile_bytes
        )

    def _language_loss(
        self, features: Features, tokens: Tensor, language: LanguageTargets, tile_bytes: int
    ) -> Tensor:
        assert self.language_head is not None
        text, states = self.encoders.text, features.text_states
        hidden = language_states(text, self.language_head, tokens, language, states)
        vocabulary = text.token_embedding.weight
        return caption_loss(
            hidden, vocabulary, language.targets, language.mask, tile_bytes=tile_bytes
        )


def _value_then_gradient() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around a micro-batch: the first time, and when the backward pass computes it again."""
    return computed_again(), nullcontext()


def _rows_to_encode(has_picture: Bool[Tensor, " B"]) -> Int[Tensor, " b"]:
    """Rows with a picture; two at least, since all ranks must run all parts, batch norm too."""
    num = max(2, int(has_picture.sum()))
    return has_picture.int().argsort(descending=True, stable=True)[:num]


def _of_rows(captions: Captions, rows: slice) -> Captions:
    """Those of a micro-batch. Where it has none, the captioner still runs: all ranks must."""
    first, every, of_texts, *tensors = captions
    start, stop = (math.ceil((row - first) / every) for row in (rows.start, rows.stop))
    start = max(0, start)
    first += start * every - rows.start
    return Captions(first, every, of_texts, *(t[start:stop] for t in tensors))


def build_model(config: ModelConfig, tokenizer: Tokenizer) -> VisionLanguageModule:
    """A model with fresh weights.

    Raises:
        ConfigError: The backbone does not exist or does not fit its settings.
    """
    image = ImageEncoder(
        config.image.name,
        image_size=config.image.image_size,
        embed_dim=config.embed_dim,
        pool=config.image.pool,
        num_queries=config.image.num_queries,
        stem_channels=config.image.stem_channels,
        patch_dropout=config.image.patch_dropout,
        kwargs=config.image.kwargs,
    )
    text = TextEncoder(
        vocab_size=tokenizer.vocab_size,
        context_length=config.text.context_length,
        width=config.text.width,
        depth=config.text.depth,
        num_heads=config.text.num_heads,
        embed_dim=config.embed_dim,
        eot_id=tokenizer.eot_id,
        pool=config.text.pool,
        causal=config.text.attention == "causal",
        activation=config.activation,
    )
    encoders = DualEncoder(
        image,
        text,
        init_logit_scale=config.init_logit_scale,
        max_logit_scale=config.max_logit_scale,
        init_logit_bias=config.init_logit_bias,
    )
    captioner = _build_captioner(config, tokenizer, image.token_width)
    language_head = None
    if config.text.language_head:
        language_head = LanguageHead(config.text.width, masked=not text.causal)
    return VisionLanguageModule(encoders, captioner, language_head)


def _build_captioner(
    config: ModelConfig, tokenizer: Tokenizer, image_width: int
) -> Captioner | Coca | None:
    if config.captioner is None:
        return None
    head = Coca if config.captioner.kind == "coca" else Captioner
    return head(
        vocab_size=tokenizer.vocab_size,
        context_length=config.text.context_length,
        width=config.captioner.width,
        depth=config.captioner.depth,
        num_heads=config.captioner.num_heads,
        image_width=image_width,
    )
