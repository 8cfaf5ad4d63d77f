"""From settings to the parts of a run: data, order, tokenizer, model, step."""

import math
from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from vlm.config.schema import Config
from vlm.data.batch import Batch
from vlm.data.dataset import Dataset
from vlm.data.loader import training_batches
from vlm.data.questions import Questions
from vlm.data.transforms import TrainTransform
from vlm.errors import ConfigError
from vlm.heads.model import VisionLanguageModule, build_model
from vlm.losses.pairs import GPU_TILE_BYTES, TILE_BYTES
from vlm.models.linear import quicken
from vlm.optim import AveragedWeights, build_optimizers
from vlm.runtime import distributed
from vlm.runtime.device import Precision, choose_device, choose_precision, memory_bytes
from vlm.runtime.distributed import Ranks
from vlm.runtime.heap import Heap
from vlm.runtime.peak import peak_flops
from vlm.runtime.seeding import derive
from vlm.tokenizer import Tokenizer, build_tokenizer
from vlm.training.accounts import Accounts
from vlm.training.beginning import begin_with
from vlm.training.flops import count_flops
from vlm.training.memory import GIB, MemoryPlan, plan_memory
from vlm.training.objective import Objective
from vlm.training.sources import TrainingData, open_training_data
from vlm.training.step import TrainStep
from vlm.training.teaching import load_teacher
from vlm.training.trackers import Trackers
from vlm.training.wrapping import blocks, checkpoint_blocks, freeze, wrap

DEVICE_SHARE = 0.9  # of a GPU's memory: the rest is its context, the allocator's and NCCL's


@dataclass(frozen=True)
class Parts:
    """A run, ready to start at any step."""

    config: Config
    data: TrainingData
    tokenizer: Tokenizer
    num_steps: int
    step: TrainStep
    trackers: Trackers
    memory: MemoryPlan
    accounts: Accounts | None

    def batches(self, first_step: int, ranks: Ranks) -> Generator[Batch, None, None]:
        """This rank's batches from a step on, without end."""
        config = self.config
        augment = config.data.augment
        return training_batches(
            self.data.dataset,
            self.data.order,
            transform=TrainTransform(
                config.model.image.image_size,
                min_scale=augment.min_scale,
                max_aspect=augment.max_aspect,
                horizontal_flip=augment.horizontal_flip,
                color_jitter=augment.color_jitter,
                rotate_degrees=augment.rotate_degrees,
                erase=augment.erase,
            ),
            tokenizer=self.tokenizer,
            seed=config.train.seed,
            micro_batch_size=config.train.global_batch_size // ranks.world_size,
            first_micro_batch=first_step,
            rank=ranks.rank,
            world_size=ranks.world_size,
            ranks_per_node=ranks.local_world_size,
            num_workers=config.data.num_workers,
            cache_bytes=int(config.data.cache_gib * 2**30),
            shuffle_tags=augment.shuffle_tags,
            questions=Questions(config.data.questions, config.data.question_fraction)
            if config.data.questions
            else None,
            hard_negatives=config.data.hard_negatives,
            pin_memory=self.step.device.type == "cuda",
        )


def tokenizer_for(config: Config, dataset: Dataset) -> Tokenizer:
    """What model.text.tokenizer names; `bpe:SIZE` is trained on the training captions."""
    text = config.model.text
    return build_tokenizer(
        text.tokenizer, context_length=text.context_length, texts=dataset.captions
    )


def count_steps(config: Config, num_samples: int) -> int:
    """train.steps, or what train.epochs comes to.

    Raises:
        ConfigError: Neither is set.
    """
    train = config.train
    if train.steps is not None:
        return train.steps
    if train.epochs is None:
        raise ConfigError("give train.steps or train.epochs")
    return max(1, math.ceil(train.epochs * num_samples / train.global_batch_size))


def build_parts(config: Config, ranks: Ranks) -> Parts:
    """Everything a run needs, with fresh weights that depend on train.seed alone."""
    train, trackers = config.train, Trackers(config, is_main=ranks.is_main)
    device = choose_device(train.device, ranks.local_rank)
    distributed.start(ranks, device, timeout_s=config.run.rank_timeout_s)
    with distributed.main_first():
        data = open_training_data(config, log=print if ranks.is_main else lambda _: None)
    tokenizer = tokenizer_for(config, data.dataset)
    torch.manual_seed(derive("weights", train.seed))
    module = build_model(config.model, tokenizer)
    if train.init_from is not None:
        fresh = begin_with(module, train.init_from, tokenizer)
        if ranks.is_main and fresh:
            print(f"{train.init_from} has no {', '.join(fresh)}: fresh weights there")
    module.to(device)
    num_steps = count_steps(config, len(data.dataset))
    if ranks.is_main and config.optim.warmup_steps >= num_steps:
        print(
            f"warning: optim.warmup_steps ({config.optim.warmup_steps:,}) is not less than the "
            f"run's {num_steps:,} steps: the learning rate never gets to optim.lr"
        )
    step, memory, accounts = _build_step(config, module, tokenizer, num_steps, device, ranks)
    return Parts(config, data, tokenizer, num_steps, step, trackers, memory, accounts)


def _build_step(
    config: Config,
    module: VisionLanguageModule,
    tokenizer: Tokenizer,
    num_steps: int,
    device: torch.device,
    ranks: Ranks,
) -> tuple[TrainStep, MemoryPlan, Accounts | None]:
    """The step, and what it will take; counted on the bare module, before anything wraps it."""
    train, optim = config.train, config.optim
    _refuse_batch_norm(module, config, ranks)
    freeze(module, optim.trainable_groups)
    precision = choose_precision(train.precision, device)
    module.encoders.image.use_fused_attention(device.type != "cpu" or precision != "bf16")
    objective = _build_objective(config, module, tokenizer, device)
    flops = count_flops(module, objective) if ranks.is_main else None
    memory = _plan_memory(config, module, objective, tokenizer, precision, ranks)
    budget = train.memory_budget_gib
    if budget is None and train.micro_batch_size is None and not _batch_norms(module):
        budget = _device_budget(memory, device)
    if budget is not None:
        memory = memory.within(budget)
        objective = objective.in_parts(memory.micro_batch_size)
        if train.memory_budget_gib is None and ranks.is_main:
            print(
                f"a step of {memory.rows:,} samples a rank has no room in {budget:.0f} GiB: "
                f"{memory.micro_batch_size:,} at a time, with equal gradients "
                "(train.micro_batch_size chooses)"
            )
    accounts = None
    if flops is not None:
        peak = peak_flops(device, precision)
        accounts = Accounts(flops, peak, config, objective, ranks.world_size, device)
    if device.type == "cpu":
        quicken(module)
    gradients = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    step = TrainStep(
        model=wrap(module, train, device, ranks),  # before whatever holds its parameters
        module=module,
        optimizers=build_optimizers(
            module,
            name=optim.name,
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            lr_scale=optim.lr_scale,
        ),
        averaged=AveragedWeights(module, train.ema_decay) if train.ema_decay else None,
        objective=objective,
        optim=optim,
        num_steps=num_steps,
        precision=precision,
        seed=train.seed,
        device=device,
        heap=Heap(memory.total, memory.of_step + gradients) if device.type == "cpu" else None,
    )
    return step, memory, accounts


def _device_budget(memory: MemoryPlan, device: torch.device) -> float | None:
    """What the smallest rank's GPU has, in GiB, if the plan asks for more."""
    there = memory_bytes(device)
    if there is None:
        return None
    room = DEVICE_SHARE * -int(distributed.all_reduce_max(torch.tensor(-there, device=device)))
    return room / GIB if memory.total > room else None


def _plan_memory(
    config: Config,
    module: VisionLanguageModule,
    objective: Objective,
    tokenizer: Tokenizer,
    precision: Precision,
    ranks: Ranks,
) -> MemoryPlan:
    """The rank's memory; from here on blocks are checkpointed, if they are to be."""
    train, loss = config.train, config.loss
    plan = partial(
        plan_memory,
        module,
        objective,
        rows=train.global_batch_size // ranks.world_size,
        global_rows=train.global_batch_size,
        num_logits=4 * (1 + len(loss.matryoshka_dims)) + 8 * (loss.distill is not None),
        averages=train.ema_decay > 0,
        shards=ranks.world_size if train.strategy == "fsdp" else 1,
        precision=precision,
        context_length=tokenizer.context_length,
        pad_id=tokenizer.pad_id,
        negatives=config.data.hard_negatives is not None,
    )
    memory = plan()
    if not train.checkpoint_activations:
        return memory
    one_block = memory.per_row / max(1, len(list(blocks(module.encoders.image))))
    checkpoint_blocks(module)
    memory = plan()
    # what is inside a block is there while it is computed again
    return replace(memory, per_row=memory.per_row + one_block)


def _build_objective(
    config: Config,
    module: VisionLanguageModule,
    tokenizer: Tokenizer,
    device: torch.device,
) -> Objective:
    image, text = config.model.image, config.model.text
    size, teacher = config.train.micro_batch_size, None
    if config.loss.distill is not None:
        teacher = load_teacher(config.loss.distill, tokenizer, device, size)
    return Objective(
        loss=config.loss,
        mean=image.mean,
        std=image.std,
        eot_id=tokenizer.eot_id,
        captions=module.captioner is not None,
        language=text.attention if text.language_head else None,
        micro_batch_size=size,
        tile_bytes=TILE_BYTES if device.type == "cpu" else GPU_TILE_BYTES,
        teacher=teacher,
    )


def _refuse_batch_norm(module: nn.Module, config: Config, ranks: Ranks) -> None:
    """Its statistics are of the rows that are computed together, and count every pass."""
    norms = _batch_norms(module)
    if not norms:
        return
    has_it = f"model.image.name: this backbone has batch norm ({norms[0]})"
    if ranks.world_size > 1:
        raise ConfigError(
            f"{has_it}, which would make the gradient depend on the number of ranks; train on one "
            "rank or use a Vision Transformer"
        )
    train = config.train
    again = {
        "train.micro_batch_size": train.micro_batch_size is not None,
        "train.memory_budget_gib": train.memory_budget_gib is not None,
        "train.checkpoint_activations": train.checkpoint_activations,
    }
    for key, is_set in again.items():
        if is_set:
            raise ConfigError(
                f"{has_it}, which would see a sample twice; remove {key}, or use a "
                "Vision Transformer"
            )


def _batch_norms(module: nn.Module) -> list[str]:
    norm = nn.modules.batchnorm._BatchNorm
    return [name for name, inner in module.named_modules() if isinstance(inner, norm)]
