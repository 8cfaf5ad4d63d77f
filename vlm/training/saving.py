"""A run's state as a checkpoint, and back."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm import checkpoint
from vlm.config.schema import Config
from vlm.data.order import Order
from vlm.errors import CheckpointError, ConfigError, DataError
from vlm.runtime import distributed
from vlm.training.setup import Parts
from vlm.training.step import TrainStep


@dataclass
class Saver:
    """Decides when to save, the same on all ranks; rank 0 writes."""

    folder: Path
    config: Config
    last_save: float = field(default_factory=time.monotonic)

    def due(self, done: int, device: torch.device) -> bool:
        """Whether to save after `done` steps: by count, or by rank 0's clock."""
        run = self.config.run
        if run.save_every_steps and done % run.save_every_steps == 0:
            return True
        if not run.save_every_minutes:
            return False
        late = time.monotonic() - self.last_save > run.save_every_minutes * 60
        flag = torch.tensor(float(late and distributed.rank() == 0), device=device)
        return bool(distributed.all_reduce_max(flag))

    def save(self, done: int, parts: Parts, counters: dict[str, Any]) -> None:
        """Write a checkpoint of `done` steps."""
        self.last_save = time.monotonic()
        if distributed.rank() == 0:
            checkpoint.save(
                self.folder,
                done,
                _groups(parts.step),
                {"step": done, **_data_state(parts), **counters},
                keep=self.config.run.keep_checkpoints,
            )
        distributed.barrier()


def restore(folder: Path, parts: Parts) -> dict[str, Any] | None:
    """Load the newest checkpoint that verifies into `parts`; its state, None without any.

    Raises:
        DataError: It was made with another data set.
        ConfigError: It was made with another seed, batch size or number of streams.
        CheckpointError: All checkpoints are damaged, or the model has another shape.
    """
    loaded = checkpoint.load_newest(folder)
    if loaded is None:
        return None
    _check_same_data(loaded, _data_state(parts))
    step = parts.step
    try:
        step.module.load_state_dict(loaded.groups["model"])
        _restore_optimizer(step, loaded.groups["optimizer"])
        if step.averaged is not None:
            for name, shadow in step.averaged.shadow.items():
                shadow.copy_(loaded.groups["ema"][name])
            step.averaged.num_updates = loaded.state["ema_updates"]
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{loaded.path}: was saved by another model: {reason}; "
            "use the config it was made with (config.yaml in the run folder), or another run.dir"
        ) from error
    return loaded.state


def _groups(step: TrainStep) -> dict[str, dict[str, Tensor]]:
    groups = {"model": dict(step.module.state_dict()), "optimizer": _optimizer_tensors(step)}
    if step.averaged is not None:
        groups["ema"] = step.averaged.shadow
    return groups


def _optimizer_tensors(step: TrainStep) -> dict[str, Tensor]:
    """Moments and counts as `NAME/exp_avg` and so on, by parameter name."""
    tensors = {}
    for name, parameter in step.module.named_parameters():
        for optimizer in step.optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}/{key}"] = value
    return tensors


def _restore_optimizer(step: TrainStep, tensors: dict[str, Tensor]) -> None:
    """Put each tensor back where its optimiser keeps it, on the parameter's device."""
    parameters = dict(step.module.named_parameters())
    owner = {
        parameter: optimizer
        for optimizer in step.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for path, value in tensors.items():
        name, key = path.rsplit("/", 1)
        parameter = parameters[name]
        owner[parameter].state[parameter][key] = value.to(parameter.device)


def _data_state(parts: Parts) -> dict[str, Any]:
    """The data's whole state but for the position, which is step times global batch size."""
    averaged = parts.step.averaged
    return {
        **parts.data.state,
        "global_batch_size": parts.config.train.global_batch_size,
        "streams": parts.config.data.streams,
        "seed": parts.config.train.seed,
        "order_version": Order.version,
        "ema_updates": averaged.num_updates if averaged else 0,
    }


def _check_same_data(loaded: checkpoint.Checkpoint, now: dict[str, Any]) -> None:
    then = loaded.state
    if then["fingerprint"] != now["fingerprint"]:
        raise DataError(
            f"{loaded.path}: was made with another data set (fingerprint "
            f"{then['fingerprint'][:12]}, data.train has {now['fingerprint'][:12]}); "
            "restore the data, or start anew with another run.dir"
        )
    keys = {
        "mixture": "data.train's samples and weights, source by source,",
        "global_batch_size": "train.global_batch_size",
        "streams": "data.streams",
        "seed": "train.seed",
        "order_version": "the order's version",
    }
    changed = [
        f"{loaded.path}: {label} was {then.get(key)}, is {now[key]}; samples would repeat or be "
        f"lost; set it back, or start anew with another run.dir"
        for key, label in keys.items()
        if then.get(key) != now[key]
    ]
    if changed:
        raise ConfigError(changed)
