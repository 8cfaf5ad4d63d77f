"""Two encoders, one embedding space, and the temperature that sharpens it."""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vlm.models.image_encoder import ImageEncoder
from vlm.models.text_encoder import TextEncoder


@dataclass(frozen=True)
class Features:
    """What the encoders make of a batch; features are L2-normalised.

    Attributes:
        image: [B, D].
        text: [B, D].
        logit_scale: [], already exponentiated and clamped.
        logit_bias: []; None where the model has none.
        image_tokens: [B, N, W].
        text_states: [B, L, Wt], the text encoder's last.
    """

    image: Tensor
    text: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None
    image_tokens: Tensor
    text_states: Tensor

    def spread(self, rows: Int[Tensor, " b"], has_picture: Bool[Tensor, " B"]) -> "Features":
        """Those of a batch of as many pictures as texts, of which only `rows` were encoded.

        What is not a picture's is 0, also where it was encoded.
        """

        def spread(encoded: Tensor) -> Tensor:
            blank = encoded.new_zeros(len(has_picture), *encoded.shape[1:])
            absent = ~has_picture.view(-1, *[1] * (encoded.dim() - 1))
            return blank.index_copy(0, rows, encoded).masked_fill(absent, 0.0)

        return replace(self, image=spread(self.image), image_tokens=spread(self.image_tokens))


class DualEncoder(nn.Module):
    """A CLIP model (arXiv 2103.00020, figure 3).

    Args:
        image: The image encoder.
        text: The text encoder, of the same D.
        init_logit_scale: Inverse temperature at the start; learned in log space.
        max_logit_scale: Clamp; CLIP, section 2.5: 100.
        init_logit_bias: At the start, of the sigmoid loss (2303.15343, section 3.3); None for none.
    """

    def __init__(
        self,
        image: ImageEncoder,
        text: TextEncoder,
        *,
        init_logit_scale: float = 1 / 0.07,
        max_logit_scale: float = 100.0,
        init_logit_bias: float | None = None,
    ) -> None:
        super().__init__()
        self.image = image
        self.text = text
        self.logit_scale = nn.Parameter(torch.tensor(math.log(init_logit_scale)))
        self.max_logit_scale = max_logit_scale
        self.logit_bias: nn.Parameter | None = None
        if init_logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor(init_logit_bias))

    def scale(self) -> Float[Tensor, ""]:
        """The inverse temperature; `logit_scale` has shape [1] where FSDP2 shards it."""
        return self.logit_scale.exp().sum()  # not reshape: FSDP2 warns of views

    def bias(self) -> Float[Tensor, ""] | None:
        """The sigmoid loss's bias; None where the model has none."""
        return None if self.logit_bias is None else self.logit_bias.sum()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring the temperature back within its bounds, after each update.

        Not in the graph: a clamped value has no gradient and would never come back.
        """
        self.logit_scale.clamp_(0.0, math.log(self.max_logit_scale))

    def encode_image(
        self, pixels: Float[Tensor, "B 3 S S"], *, normalize: bool = False
    ) -> Float[Tensor, "B D"]:
        """Features of pictures that are preprocessed already."""
        features: Tensor = self.image(pixels)[0]
        return _unit(features) if normalize else features

    def encode_text(
        self, tokens: Int[Tensor, "B L"], *, normalize: bool = False
    ) -> Float[Tensor, "B D"]:
        """Features of tokenised texts."""
        features: Tensor = self.text(tokens)[0]
        return _unit(features) if normalize else features

    def forward(
        self,
        pixels: Float[Tensor, "P 3 S S"],
        tokens: Int[Tensor, "B L"],
        visits: Int[Tensor, " P"] | None = None,
    ) -> Features:
        """Both sides of a batch, P = B but for texts alone; by `visits` patches are dropped."""
        image, image_tokens = self.image(pixels, visits)
        text, text_states = self.text(tokens)
        unit = (_unit(image), _unit(text))
        return Features(*unit, self.scale(), self.bias(), image_tokens, text_states)


def _unit(features: Tensor) -> Tensor:
    """Rows of length 1, in fp32: bf16's 8 bits of mantissa would blur the logits."""
    return F.normalize(features.float(), dim=-1)
