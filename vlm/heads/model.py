"""The whole trainable model: encoders and captioning head in one module, built from settings."""

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor, nn

from vlm.config.schema import ModelConfig
from vlm.heads.captioner import Captioner
from vlm.models.dual_encoder import DualEncoder, Features
from vlm.models.image_encoder import ImageEncoder
from vlm.models.text_encoder import TextEncoder
from vlm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Outputs:
    """Features of both encoders, and the captioner's logits [b, T, V] where there is one."""

    features: Features
    caption_logits: Tensor | None


class VisionLanguageModule(nn.Module):
    """One module, so that DDP and FSDP wrap one `forward` and see every parameter once."""

    def __init__(self, encoders: DualEncoder, captioner: Captioner | None = None) -> None:
        super().__init__()
        self.encoders = encoders
        self.captioner = captioner

    def forward(
        self,
        pixels: Tensor,
        tokens: Int[Tensor, "B L"],
        caption_inputs: Int[Tensor, "b T"] | None = None,
    ) -> Outputs:
        """Encode a batch; caption its first b pictures, given the texts so far."""
        features: Features = self.encoders(pixels, tokens)
        if self.captioner is None or caption_inputs is None:
            return Outputs(features, None)
        image_tokens = features.image_tokens[: len(caption_inputs)]
        return Outputs(features, self.captioner(image_tokens, caption_inputs))


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
        activation=config.activation,
    )
    encoders = DualEncoder(
        image,
        text,
        init_logit_scale=config.init_logit_scale,
        max_logit_scale=config.max_logit_scale,
        init_logit_bias=config.init_logit_bias,
    )
    return VisionLanguageModule(encoders, _build_captioner(config, tokenizer, image.width))


def _build_captioner(
    config: ModelConfig, tokenizer: Tokenizer, image_width: int
) -> Captioner | None:
    if config.captioner is None:
        return None
    return Captioner(
        vocab_size=tokenizer.vocab_size,
        context_length=config.text.context_length,
        width=config.captioner.width,
        depth=config.captioner.depth,
        num_heads=config.captioner.num_heads,
        image_width=image_width,
    )
