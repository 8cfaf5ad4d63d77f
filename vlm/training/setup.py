"""From settings to the parts of a run: data, order, tokenizer, model, step."""

import math
from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import nn

from vlm.config.schema import Config
from vlm.data.batch import Batch
from vlm.data.dataset import Dataset
from vlm.data.loader import training_batches
from vlm.data.transforms import TrainTransform
from vlm.errors import ConfigError
from vlm.heads.model import VisionLanguageModule, build_model
from vlm.optim import AveragedWeights, build_optimizers
from vlm.runtime import distributed
from vlm.runtime.device import choose_device, choose_precision
from vlm.runtime.distributed import Ranks
from vlm.runtime.seeding import derive
from vlm.tokenizer import Tokenizer, build_tokenizer
from vlm.training.objective import Objective
from vlm.training.sources import TrainingData, open_training_data
from vlm.training.step import TrainStep
from vlm.training.teaching import load_teacher
from vlm.training.trackers import Trackers
from vlm.training.wrapping import freeze, wrap


@dataclass(frozen=True)
class Parts:
    """A run, ready to start at any step."""

    config: Config
    data: TrainingData
    tokenizer: Tokenizer
    num_steps: int
    step: TrainStep
    trackers: Trackers

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
    trackers = Trackers(config, is_main=ranks.is_main)
    device = choose_device(config.train.device, ranks.local_rank)
    distributed.start(ranks, device, timeout_s=config.run.rank_timeout_s)
    with distributed.main_first():
        data = open_training_data(config, log=print if ranks.is_main else lambda _: None)
    tokenizer = tokenizer_for(config, data.dataset)
    torch.manual_seed(derive("weights", config.train.seed))
    module = build_model(config.model, tokenizer).to(device)
    num_steps = count_steps(config, len(data.dataset))
    step = _build_step(config, module, tokenizer, num_steps, device, ranks)
    return Parts(config, data, tokenizer, num_steps, step, trackers)


def _build_step(
    config: Config,
    module: VisionLanguageModule,
    tokenizer: Tokenizer,
    num_steps: int,
    device: torch.device,
    ranks: Ranks,
) -> TrainStep:
    optim, image = config.optim, config.model.image
    _refuse_batch_norm(module, ranks)
    freeze(module, optim.trainable_groups)
    model = wrap(module, config.train, device, ranks)  # before whatever holds its parameters
    precision = choose_precision(config.train.precision, device)
    module.encoders.image.use_fused_attention(device.type != "cpu" or precision != "bf16")
    return TrainStep(
        model=model,
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
        averaged=AveragedWeights(module, config.train.ema_decay)
        if config.train.ema_decay
        else None,
        objective=Objective(
            loss=config.loss,
            mean=image.mean,
            std=image.std,
            eot_id=tokenizer.eot_id,
            captions=module.captioner is not None,
            micro_batch_size=config.train.micro_batch_size,
            teacher=load_teacher(
                config.loss.distill, tokenizer, device, config.train.micro_batch_size
            )
            if config.loss.distill
            else None,
        ),
        optim=optim,
        num_steps=num_steps,
        precision=precision,
        seed=config.train.seed,
        device=device,
    )


def _refuse_batch_norm(module: nn.Module, ranks: Ranks) -> None:
    """Statistics of one rank's rows would make the result depend on the number of ranks."""
    norms = [n for n, m in module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if norms and ranks.world_size > 1:
        raise ConfigError(
            f"model.image.name: this backbone has batch norm ({norms[0]}), which would make the "
            "gradient depend on the number of ranks; train on one rank or use a Vision Transformer"
        )
