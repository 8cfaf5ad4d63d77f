"""One optimiser step; skipped on all ranks where the loss or a gradient is not finite."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vlm.config.schema import OptimConfig
from vlm.data.batch import Batch
from vlm.data.tally import Place, Tally, tally_of_places
from vlm.heads.model import VisionLanguageModule
from vlm.optim import AveragedWeights, lr_at, set_lr
from vlm.runtime import distributed
from vlm.runtime.communication import Clock, backward, heard_by
from vlm.runtime.device import Precision, arithmetic
from vlm.runtime.heap import Heap
from vlm.runtime.seeding import seed_step
from vlm.runtime.sharded import whole
from vlm.training.objective import Objective, Terms


@dataclass(frozen=True)
class StepResult:
    """What a step did, in numbers that are equal on all ranks, but for `communication_s`.

    Attributes:
        terms: Global loss and its terms.
        grad_norm: Before clipping.
        skipped: The loss or a gradient was not finite; no weight changed.
        lr: Used by this step.
        logit_scale: Used by this step.
        num_valid: Samples that counted, texts alone included.
        num_duplicates: Matches beyond each sample's own.
        num_tokens: Positions of texts, after trimming.
        padding_waste: Share of them that were padding.
        bad: Samples that could not be used, by reason.
        stop: Some rank was asked to stop: all do, after this step.
        save: Some rank found that it is time to save: all do, likewise.
        num_texts_alone: Samples without a picture.
        communication_s: In which this rank waited for others.
    """

    terms: dict[str, float]
    grad_norm: float
    skipped: bool
    lr: float
    logit_scale: float
    num_valid: int
    num_duplicates: int
    num_tokens: int
    padding_waste: float
    bad: Tally[Place]
    stop: bool = False
    save: bool = False
    num_texts_alone: int = 0
    communication_s: float = 0.0


@dataclass(frozen=True)
class TrainStep:
    """Everything a step touches.

    Args:
        model: `module`, or what wraps it (DDP).
        module: The bare model.
        optimizers: Over the module's parameters, each in one of them.
        averaged: Moving average, or None.
        objective: Batch to loss.
        optim: Settings of the schedule and of clipping.
        num_steps: Of the whole run.
        precision: Of the forward pass.
        seed: Of the run.
        device: Where the batch goes.
        heap: Of this process, if tensors live there: on the CPU.
    """

    model: nn.Module
    module: VisionLanguageModule
    optimizers: list[torch.optim.Optimizer]
    averaged: AveragedWeights | None
    objective: Objective
    optim: OptimConfig
    num_steps: int
    precision: Precision
    seed: int
    device: torch.device
    heap: Heap | None = None

    def __call__(
        self, step: int, batch: Batch, *, stop: bool = False, save: bool = False
    ) -> StepResult:
        """Take step number `step` (0-based) on this rank's part of its global batch.

        Args:
            step: Its number.
            batch: This rank's.
            stop: Whether this rank was asked to stop; it rides on the step's own reduction.
            save: Whether this rank finds that it is time to save; likewise.
        """
        waits = Clock(self.device)
        with heard_by(waits):
            result = self._take(step, batch, {"num_stopping": stop, "num_saving": save})
        if self.heap is not None:
            self.heap.tidy()
        return replace(result, communication_s=waits.seconds)

    def _take(self, step: int, batch: Batch, asks: dict[str, bool]) -> StepResult:
        seed_step(self.seed, step, distributed.rank())
        lr = self._lr(step)
        set_lr(self.optimizers, lr)
        batch = batch.to(self.device)
        with arithmetic(self.precision, self.device):
            terms = self.objective(self.model, batch)
        # DDP averages gradients over ranks; the loss is a sum over ranks
        backward(terms.loss * distributed.world_size())
        grad_norm = self._clip()
        values = _reduce(terms, grad_norm, asks)
        skipped = not values["finite"] or values["num_valid"] < 2
        if not skipped:
            if values["num_valid"] == values["num_texts_alone"]:
                self._leave_alone_what_had_no_part()
            self._update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return StepResult(
            terms={name: v for name, v in values.items() if name.startswith("loss")},
            grad_norm=values["grad_norm"],
            skipped=skipped,
            lr=lr,
            logit_scale=values["logit_scale"],
            num_valid=int(values["num_valid"]),
            num_duplicates=int(values["num_duplicates"]),
            num_tokens=int(values["num_tokens"]),
            padding_waste=values["num_padding"] / values["num_tokens"],
            bad=_gather(batch.bad) if values["num_bad"] else Tally(),
            stop=values["num_stopping"] > 0,
            save=values["num_saving"] > 0,
            num_texts_alone=int(values["num_texts_alone"]),
        )

    def _lr(self, step: int) -> float:
        return lr_at(
            step,
            lr=self.optim.lr,
            steps=self.num_steps,
            warmup_steps=self.optim.warmup_steps,
            min_lr_fraction=self.optim.min_lr_fraction,
            schedule=self.optim.schedule,
            decay_fraction=self.optim.decay_fraction,
        )

    def _clip(self) -> Tensor:
        learning = [p for p in self.module.parameters() if p.grad is not None]
        gradients = [p.grad for p in learning if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients, foreach=True))
        limit = self.optim.clip_grad_norm
        if limit and (norm.device.type != "cpu" or norm > limit):  # elsewhere, to ask is to wait
            torch.nn.utils.clip_grads_with_norm_(learning, limit, norm, foreach=True)
        return norm

    def _leave_alone_what_had_no_part(self) -> None:
        """Of texts alone: a gradient of 0 would still decay weights, and follow old momentum."""
        for parameter in self.module.parameters():
            if parameter.grad is not None and not whole(parameter.grad.abs().sum()):
                parameter.grad = None

    def _update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        self.module.encoders.clamp_()
        if self.averaged is not None:
            self.averaged.update(self.module.named_parameters())


def _reduce(terms: Terms, grad_norm: Tensor, asks: dict[str, bool]) -> dict[str, float]:
    """All shares summed over ranks in one collective; "finite" holds only if it does everywhere."""
    bad = ~(torch.isfinite(terms.loss) & torch.isfinite(grad_norm))
    asked = {name: torch.full_like(grad_norm, here) for name, here in asks.items()}
    norm = grad_norm / distributed.world_size()  # read here: later it would wait for the update
    shares = {**terms.shares, **asked, "num_bad_ranks": bad, "grad_norm": norm}
    stacked = torch.stack([share.float() for share in shares.values()])
    values = dict(zip(shares, distributed.all_reduce_sum(stacked).tolist(), strict=True))
    values["finite"] = float(values.pop("num_bad_ranks") == 0)
    return values


def _gather(mine: Tally[Place]) -> Tally[Place]:
    """All ranks' bad samples."""
    together: Tally[Place] = Tally()
    for values in distributed.gather_json(mine.as_json()):
        together.merge(tally_of_places(values))
    return together
