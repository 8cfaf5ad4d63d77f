"""From a batch to named loss terms, each a sum over valid units divided by the global count."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlm.config.schema import LossConfig
from vlm.data.batch import Batch
from vlm.data.transforms import normalize
from vlm.heads.model import Outputs
from vlm.losses.caption import caption_loss, caption_targets
from vlm.losses.contrastive import info_nce, sigmoid_loss
from vlm.losses.pairs import Pairs
from vlm.models.dual_encoder import Features
from vlm.models.text_encoder import text_lengths, trim
from vlm.runtime import distributed


@dataclass(frozen=True)
class Terms:
    """What one forward pass says.

    Attributes:
        loss: [], this rank's share: the sum over ranks is the global batch's loss.
        shares: Detached shares of each named term and count; they add up over ranks.
    """

    loss: Tensor
    shares: dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """contrastive + caption_weight * caption, for any number of ranks.

    Args:
        loss: Weights and the treatment of duplicates.
        mean: Of the colours, for normalising on the device.
        std: Likewise.
        eot_id: Of the tokenizer.
        captions: Whether the model has a captioner.
    """

    loss: LossConfig
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    eot_id: int
    captions: bool

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        """Run the model and weigh its terms; `batch` is on the model's device."""
        pairs = self._pairs(batch)
        tokens = trim(batch.tokens, self.eot_id)
        inputs, targets, mask = caption_targets(tokens, self.eot_id, batch.valid)
        captioned = round(len(tokens) * self.loss.caption_fraction) if self.captions else 0
        outputs: Outputs = model(
            normalize(batch.images, self.mean, self.std),
            tokens,
            inputs[:captioned] if captioned else None,
        )
        with torch.autocast(tokens.device.type, enabled=False):  # losses are fp32
            terms = {"loss/contrastive": self._contrastive(outputs.features, pairs)}
            if outputs.caption_logits is not None:
                mask = mask[:captioned]
                count = distributed.all_reduce_sum(mask.sum()).clamp(min=1)
                summed = caption_loss(outputs.caption_logits, targets[:captioned], mask)
                terms["loss/caption"] = summed / count
        loss = terms["loss/contrastive"]
        if "loss/caption" in terms:
            loss = loss + self.loss.caption_weight * terms["loss/caption"]
        num_tokens = torch.tensor(float(tokens.numel()), device=tokens.device)
        shares = {
            **{name: term.detach().float() for name, term in terms.items()},
            "loss": loss.detach(),
            "num_valid": batch.valid.sum().float(),
            "num_bad": (~batch.valid).sum().float(),
            "num_duplicates": pairs.num_duplicates(len(batch.valid)).float(),
            "num_tokens": num_tokens,
            "num_padding": num_tokens - text_lengths(tokens, self.eot_id).sum(),
        }
        return Terms(loss, shares)

    def _pairs(self, batch: Batch) -> Pairs:
        """Of the global batch; made before the model runs, since making it waits for the device."""
        return Pairs(
            sample_ids=distributed.all_gather(batch.sample_ids),
            caption_ids=distributed.all_gather(batch.caption_ids),
            valid=distributed.all_gather(batch.valid.to(torch.uint8)).bool(),
            offset=distributed.rank() * len(batch.valid),
            duplicates=self.loss.duplicates,
        )

    def _contrastive(self, features: Features, pairs: Pairs) -> Tensor:
        texts = distributed.all_gather_with_gradient(features.text)
        if features.logit_bias is not None:
            return sigmoid_loss(
                features.image, texts, features.logit_scale, features.logit_bias, pairs
            )
        smoothing = self.loss.label_smoothing
        return info_nce(
            features.image, texts, features.logit_scale, pairs, label_smoothing=smoothing
        )
