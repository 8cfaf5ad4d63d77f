"""What a run makes of its machine: FLOPs needed of those possible, recomputation, peak memory."""

from dataclasses import dataclass

import torch

from vlm.config.schema import Config
from vlm.runtime.heap import peak_resident_bytes, resident_bytes
from vlm.runtime.peak import Peak
from vlm.training.flops import ModelFlops
from vlm.training.objective import Objective


@dataclass(frozen=True)
class Accounts:
    """Of one rank; the others' are about equal.

    Attributes:
        flops: Of the model.
        peak: Of the device.
        config: Of the run.
        objective: Whose micro-batches and tiles count.
        world_size: Number of ranks.
        device: Whose memory counts.
    """

    flops: ModelFlops
    peak: Peak
    config: Config
    objective: Objective
    world_size: int
    device: torch.device

    def line(
        self, num_tokens: int, seconds: float, *, num_texts_alone: int = 0
    ) -> dict[str, float]:
        """Of a step, for the log.

        `mfu` is the share of the peak's FLOPs that went into what is needed (PaLM, arXiv
        2204.02311, appendix B; here padding beyond the longest text and recomputation are not
        needed); `recomputed` the share of the computed FLOPs that were computed before.

        Args:
            num_tokens: Positions of the global batch's texts, trimmed.
            seconds: That the step took, the wait for data included.
            num_texts_alone: Samples of the global batch without a picture.
        """
        train, loss = self.config.train, self.config.loss
        rows = train.global_batch_size // self.world_size
        has_captioner = self.config.model.captioner is not None
        step = self.flops.step(
            rows,
            num_tokens / train.global_batch_size,
            negatives=rows if self.config.data.hard_negatives else 0,
            pictures=rows - num_texts_alone / self.world_size,
            captioned_rows=rows / loss.caption_every if has_captioner else 0,
            global_rows=train.global_batch_size,
            micro_batch_size=self.objective.micro_batch_size,
            tile_bytes=self.objective.tile_bytes,
        )
        again = step.recomputed
        if train.checkpoint_activations:  # blocks, which are nearly all
            again += step.image.forward + step.text.forward + step.captioner.forward
        return {
            "mfu": round(step.needed / seconds / self.peak.flops_per_s, 4),
            "recomputed": round(again / (step.needed + again), 4),
            "peak_memory_gib": round(peak_memory_bytes(self.device) / 2**30, 3),
        }


def current_memory_bytes(device: torch.device) -> int:
    """What tensors take on a GPU, or this process on the CPU; from here on the peak is counted."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return resident_bytes()


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that tensors took on a GPU, or this process on the CPU, so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()
