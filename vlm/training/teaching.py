"""A teacher: a trained model whose similarities another one learns."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from vlm.data.transforms import normalize
from vlm.errors import ConfigError
from vlm.hub.load import load
from vlm.inference import VisionLanguageModel
from vlm.losses.distillation import Teacher
from vlm.runtime import distributed
from vlm.tokenizer import Tokenizer


@dataclass(frozen=True)
class TeacherModel:
    """Sees what the student sees, at its own image size.

    Args:
        model: Frozen.
        micro_batch_size: Samples that it encodes at a time; None for all.
    """

    model: VisionLanguageModel
    micro_batch_size: int | None = None

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "B 3 S S"], tokens: Int[Tensor, "B L"]) -> Teacher:
        """Its features of this rank's batch, and of all ranks' texts."""
        encoders, size = self.model.model.encoders, self.micro_batch_size or len(images)
        image = [
            encoders.encode_image(self._pixels(part), normalize=True)
            for part in torch.split(images, size)
        ]
        text = [encoders.encode_text(part, normalize=True) for part in torch.split(tokens, size)]
        texts = distributed.all_gather(torch.cat(text))
        return Teacher(torch.cat(image), texts, encoders.scale())

    def _pixels(self, images: UInt8[Tensor, "B 3 S S"]) -> Float[Tensor, "B 3 T T"]:
        settings = self.model.config.image
        pixels = normalize(images, mean=settings.mean, std=settings.std)
        side = (settings.image_size, settings.image_size)
        if pixels.shape[2:] == side:
            return pixels
        return F.interpolate(pixels, side, mode="bicubic", antialias=True)


def load_teacher(
    spec: str, tokenizer: Tokenizer, device: torch.device, micro_batch_size: int | None
) -> TeacherModel:
    """The model of a run or model folder.

    Raises:
        ConfigError: It is none, or reads other token ids than the student, or fewer of them.
    """
    model = load(spec, str(device))
    model.model.requires_grad_(False)
    theirs = model.tokenizer
    if not theirs.has_vocabulary_of(tokenizer):
        raise ConfigError(
            f"loss.distill: {spec} has another vocabulary; "
            f"set model.text.tokenizer to its tokenizer.json"
        )
    if theirs.context_length < tokenizer.context_length:
        raise ConfigError(
            f"loss.distill: {spec} reads {theirs.context_length} tokens; "
            f"set model.text.context_length to that, or less"
        )
    return TeacherModel(model, micro_batch_size)
