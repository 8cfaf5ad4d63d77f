"""From a batch to named loss terms, each a sum over valid units divided by the global count."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlm.config.schema import LossConfig
from vlm.data.batch import Batch
from vlm.data.questions import NOTHING
from vlm.data.transforms import normalize
from vlm.heads.language import LanguageTargets, language_targets
from vlm.heads.model import Captions, Outputs
from vlm.losses.caption import caption_targets
from vlm.losses.contrastive import info_nce, sigmoid_loss
from vlm.losses.distillation import Teacher, distillation_loss
from vlm.losses.hard_negatives import hard_negative_loss
from vlm.losses.pairs import TILE_BYTES, Pairs
from vlm.models.text_encoder import text_lengths, trim
from vlm.runtime import distributed
from vlm.training.teaching import TeacherModel


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
    """The weighted sum of the loss's terms, for any number of ranks.

    Args:
        loss: Weights and the treatment of duplicates.
        mean: Of the colours, for normalising on the device.
        std: Likewise.
        eot_id: Of the tokenizer.
        captions: Whether the model has a captioner.
        language: The attention of a text encoder with a language head; None without one.
        micro_batch_size: Samples that are in memory at a time; None for all.
        tile_bytes: Of logits that may exist at a time, by loss.
        teacher: Whose similarities are learned; None for none.
    """

    loss: LossConfig
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    eot_id: int
    captions: bool
    language: Literal["causal", "bidirectional"] | None = None
    micro_batch_size: int | None = None
    tile_bytes: int = TILE_BYTES
    teacher: TeacherModel | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        """Run the model and weigh its terms; `batch` is on the model's device."""
        pairs = self._pairs(batch)
        tokens = trim(batch.tokens, self.eot_id)
        captions = self._captions(tokens, batch)
        language = self._language(tokens, batch)
        outputs: Outputs = model(
            batch.images,
            tokens,
            captions,
            language,
            prepare=partial(normalize, mean=self.mean, std=self.std),
            visits=batch.visits,
            micro_batch_size=self.micro_batch_size,
            tile_bytes=self.tile_bytes,
            has_picture=None if batch.texts_alone is None else ~batch.texts_alone,
            negatives=batch.negatives and trim(batch.negatives.tokens, self.eot_id),
        )
        taught = self.teacher(batch.images, tokens) if self.teacher else None
        with torch.autocast(tokens.device.type, enabled=False):  # losses are fp32
            terms = self._pair_terms(outputs, batch, pairs, taught)
        for name, total, learned in (
            ("loss/caption", outputs.caption_loss, captions),
            ("loss/language", outputs.language_loss, language),
        ):
            if learned is not None and total is not None:
                terms[name] = _mean(total.float(), learned.mask)
        weights = {
            "loss/hard_negative": self.loss.hard_negative_weight,
            "loss/language": self.loss.language_weight,
            "loss/distill": self.loss.distill_weight,
            "loss/caption": self.loss.caption_weight,
        }
        loss = torch.stack([weights.get(name, 1.0) * term for name, term in terms.items()]).sum()
        usable = _has_text(batch)
        num_tokens = loss.new_full((), tokens.numel())
        shares = {
            **{name: term.detach().float() for name, term in terms.items()},
            "loss": loss.detach(),
            "num_valid": usable.sum().float(),
            "num_texts_alone": (usable & ~batch.valid).sum().float(),
            "num_bad": (~usable).sum().float(),
            "num_duplicates": pairs.num_duplicates(len(batch.valid)).float(),
            "num_tokens": num_tokens,
            "num_padding": num_tokens - text_lengths(tokens, self.eot_id).sum(),
            "logit_scale": outputs.logit_scale.detach().reshape(()) / distributed.world_size(),
        }
        return Terms(loss, shares)

    def _pair_terms(
        self, outputs: Outputs, batch: Batch, pairs: Pairs, taught: Teacher | None
    ) -> dict[str, Tensor]:
        """What is made of features."""
        texts = distributed.all_gather_with_gradient(outputs.text)
        terms = {"loss/contrastive": self._contrastive(outputs, texts, pairs)}
        if taught is not None:
            terms["loss/distill"] = self._distillation(outputs, texts, taught, pairs)
        if batch.negatives is not None and outputs.negative is not None:
            present = batch.negatives.present & batch.valid
            total = hard_negative_loss(
                outputs.image, outputs.text, outputs.negative, outputs.logit_scale, present
            )
            terms["loss/hard_negative"] = _mean(total, present)
        return terms

    def in_parts(self, size: int | None) -> "Objective":
        """The same, with so many samples in memory at a time, the teacher's included."""
        teacher = replace(self.teacher, micro_batch_size=size) if self.teacher else None
        return replace(self, micro_batch_size=size, teacher=teacher)

    def _pairs(self, batch: Batch) -> Pairs:
        """Of the global batch; made before the model runs, since making it waits for the device."""
        return Pairs(
            sample_ids=distributed.all_gather(batch.sample_ids),
            caption_ids=distributed.all_gather(batch.caption_ids),
            valid=distributed.all_gather(batch.valid.to(torch.uint8)).bool(),
            offset=distributed.rank() * len(batch.valid),
            duplicates=self.loss.duplicates,
        )

    def _captions(self, tokens: Tensor, batch: Batch) -> Captions | None:
        """Of every n-th pair of the global batch, however many ranks share it."""
        if not self.captions:
            return None
        every = self.loss.caption_every
        first = -distributed.rank() * len(tokens) % every
        rows = slice(first, None, every)
        valid = _has_text(batch)[rows]  # a text alone is learned beside image tokens that are 0
        if batch.head_texts is None:
            learned = caption_targets(tokens[rows], self.eot_id, valid)
            return Captions(first, every, True, *learned)
        inputs = trim(batch.head_texts.tokens, self.eot_id)[rows, :-1]
        targets = batch.head_texts.targets[rows, : inputs.shape[1]]
        mask = (targets != NOTHING) & valid[:, None]
        return Captions(first, every, False, inputs, targets, mask)

    def _language(self, tokens: Tensor, batch: Batch) -> LanguageTargets | None:
        """Of all texts."""
        if self.language is None:
            return None
        causal = self.language == "causal"
        return language_targets(tokens, self.eot_id, _has_text(batch), batch.visits, causal=causal)

    def _contrastive(self, outputs: Outputs, texts: Tensor, pairs: Pairs) -> Tensor:
        """The mean over the whole features and their Matryoshka prefixes; 0 of texts alone."""
        if pairs.is_empty:
            bias = 0.0 if outputs.logit_bias is None else outputs.logit_bias
            used = outputs.image.sum() + texts.sum() + outputs.logit_scale + bias
            return used * 0.0  # all parameters have a gradient, as DDP wants
        dims = {*self.loss.matryoshka_dims, outputs.image.shape[1]}
        losses = [
            self._of_features(prefix(outputs.image, dim), prefix(texts, dim), outputs, pairs)
            for dim in sorted(dims)
        ]
        return torch.stack(losses).mean()

    def _distillation(
        self, outputs: Outputs, texts: Tensor, taught: Teacher, pairs: Pairs
    ) -> Tensor:
        """0 of texts alone."""
        if pairs.is_empty:
            return outputs.image.sum() * 0.0
        scale, tile_bytes = outputs.logit_scale, self.tile_bytes
        return distillation_loss(outputs.image, texts, scale, taught, pairs, tile_bytes=tile_bytes)

    def _of_features(self, image: Tensor, texts: Tensor, outputs: Outputs, pairs: Pairs) -> Tensor:
        scale, tile_bytes = outputs.logit_scale, self.tile_bytes
        if outputs.logit_bias is not None:
            bias = outputs.logit_bias
            return sigmoid_loss(image, texts, scale, bias, pairs, tile_bytes=tile_bytes)
        smoothing = self.loss.label_smoothing
        return info_nce(
            image, texts, scale, pairs, label_smoothing=smoothing, tile_bytes=tile_bytes
        )


def _mean(total: Tensor, counts: Bool[Tensor, "..."]) -> Tensor:
    """This rank's share of a sum, over what counts on all ranks."""
    return total / distributed.all_reduce_sum(counts.sum()).clamp(min=1)


def _has_text(batch: Batch) -> Bool[Tensor, " B"]:
    """Which samples could be used: as pairs, or for their texts alone."""
    return batch.valid if batch.texts_alone is None else batch.valid | batch.texts_alone


def prefix(features: Float[Tensor, "B D"], dim: int) -> Float[Tensor, "B d"]:
    """The first dimensions, L2-normalised (Matryoshka, arXiv 2205.13147, equation 1)."""
    if dim == features.shape[1]:
        return features
    return torch.nn.functional.normalize(features[:, :dim], dim=1)
