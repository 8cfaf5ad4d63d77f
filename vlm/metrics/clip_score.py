"""CLIPScore: how near a caption is to its picture, without any reference."""

from jaxtyping import Float
from torch import Tensor

SCALE = 2.5


def clip_score(
    image_features: Float[Tensor, "*N D"], text_features: Float[Tensor, "*N D"]
) -> Float[Tensor, "*N"]:
    """2.5 max(cos, 0) of each pair of L2-normalised rows, in 0..2.5 (2104.08718, section 3).

    The paper takes OpenAI's CLIP ViT-B/32 and begins each caption with "A photo depicts". Features
    are the caller's here; a model that scores its own captions judges itself.
    """
    return SCALE * (image_features * text_features).sum(-1).clamp(min=0)
