"""Batches of uint8 pictures: of training with tokens, of evaluation with what belongs to them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from vlm.data.tally import Place, Tally

EvalSample = tuple[str, tuple[str, ...], dict[str, Any]]  # key, captions, meta


@dataclass(frozen=True)
class HeadTexts:
    """What the captioner learns where it is not the captions alone: answers to questions, too.

    Attributes:
        tokens: As those of the batch: a caption, or questions and their answers.
        targets: What follows each token; -1 where nothing is learned.
    """

    tokens: Int[Tensor, "B L"]
    targets: Int[Tensor, "B L"]


@dataclass(frozen=True)
class Negatives:
    """Texts that are nearly true of the pictures, and false.

    Attributes:
        tokens: As those of the batch.
        present: False where a sample has none.
    """

    tokens: Int[Tensor, "B L"]
    present: Bool[Tensor, " B"]


@dataclass(frozen=True)
class Batch:
    """A micro-batch of training; `images` are in channels_last memory format.

    Attributes:
        images: Zeros where not valid.
        tokens: Padded to the context length; those of an empty text where not valid.
        sample_ids: Global ids, of invalid samples too.
        caption_ids: A hash of the chosen caption after cleaning; 0 where not valid.
        valid: False where a sample could not be used; it keeps its slot.
        bad: What could not be used, by reason.
        visits: A number for each (seed, epoch, sample id): what the device draws follows from it.
        head_texts: What the captioner learns; None: the captions.
        texts_alone: Which have a text and no picture: not valid as pairs, but learned by captioner
            and language head. None: no sample of the data is one.
        negatives: What a picture's caption is told from, beside other pictures' captions.
    """

    images: UInt8[Tensor, "B 3 S S"]
    tokens: Int[Tensor, "B L"]
    sample_ids: Int[Tensor, " B"]
    caption_ids: Int[Tensor, " B"]
    valid: Bool[Tensor, " B"]
    bad: Tally[Place]
    visits: Int[Tensor, " B"]
    head_texts: HeadTexts | None = None
    texts_alone: Bool[Tensor, " B"] | None = None
    negatives: Negatives | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device; asynchronous from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        texts, negatives = self.head_texts, self.negatives
        return Batch(
            function(self.images),
            function(self.tokens),
            function(self.sample_ids),
            function(self.caption_ids),
            function(self.valid),
            self.bad,
            function(self.visits),
            texts and HeadTexts(function(texts.tokens), function(texts.targets)),
            None if self.texts_alone is None else function(self.texts_alone),
            negatives and Negatives(function(negatives.tokens), function(negatives.present)),
        )


@dataclass(frozen=True)
class EvalBatch:
    """A batch of evaluation: pictures, and the (key, captions, meta) that belong to them.

    Invalid samples keep their slot: zeros in `images`, and what could be read of them in `samples`.
    """

    images: UInt8[Tensor, "B 3 S S"]
    sample_ids: Int[Tensor, " B"]
    valid: Bool[Tensor, " B"]
    samples: list[EvalSample]
    bad: dict[str, int]
