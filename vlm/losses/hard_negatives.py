"""A picture's own caption against one that is nearly true of it, and false."""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def hard_negative_loss(
    image: Float[Tensor, "B D"],
    text: Float[Tensor, "B D"],
    negative: Float[Tensor, "B D"],
    logit_scale: Float[Tensor, ""],
    present: Bool[Tensor, " B"],
) -> Float[Tensor, ""]:
    """Sum of -log softmax over the two captions: the negatives loss of SVLC.

    Doveh et al., arXiv 2211.11733. Beside the contrastive loss, whose negatives are
    other pictures' captions, and which therefore is content with which objects are there.

    Args:
        image: L2-normalised features of the pictures.
        text: Of their captions.
        negative: Of the false captions.
        logit_scale: The inverse temperature; a bias would cancel.
        present: Which rows have one.
    """
    nearer = (image * (negative - text)).sum(dim=1)  # to the false caption than to the true one
    return F.softplus(logit_scale * nearer).where(present, 0.0).sum()
