"""A run's state as a checkpoint, and back: when to save, in a thread, and what failures mean."""

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from vlm import checkpoint
from vlm.config.schema import Config
from vlm.data.order import Order
from vlm.errors import CheckpointError, ConfigError, DataError, DiskError, Preempted
from vlm.heads.model import VisionLanguageModule, build_model
from vlm.optim import Muon
from vlm.runtime import distributed
from vlm.runtime.files import remove_leftovers
from vlm.runtime.sharded import local, part_of, whole
from vlm.training.run_log import MEASURED, RunLog
from vlm.training.setup import Parts
from vlm.training.step import TrainStep

_STATE: dict[type, tuple[str, ...]] = {  # what an optimiser keeps of a parameter
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
    Muon: ("momentum_buffer",),
}


class Saver:
    """Decides when to save, the same on all ranks; rank 0 writes, one save at a time.

    Where run.keep_best names what the suite measures, each measured step is saved, too.

    A failed save leaves older checkpoints intact and is tried again when the next is due; the third
    in a row ends the run, as does a failed last one. Leaving the `with` block waits for the last.

    Args:
        folder: Of the run's checkpoints.
        config: Of the run.
    """

    max_failures = 3

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder = folder
        self.config = config
        self.log: RunLog | None = None
        self.last_save = time.monotonic()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[Path] | None = None
        self._failures: list[DiskError] = []  # in a row

    @property
    def is_late(self) -> bool:
        """Whether rank 0's clock says that it is time; the others keep none."""
        minutes = self.config.run.save_every_minutes
        late = minutes > 0 and time.monotonic() - self.last_save > minutes * 60
        return late and distributed.rank() == 0

    def due(self, done: int, asked: bool) -> bool:
        """Whether to save after `done` steps: by count, or since it was found to be late.

        Args:
            done: Steps.
            asked: What `is_late` said to a step, as all ranks know since.

        Raises:
            DiskError: The save before has failed, for the third time in a row.
        """
        if self._pending is not None and self._pending.done():
            self._collect()
        run, every = self.config.run, self.config.eval.every_steps
        if run.save_every_steps and done % run.save_every_steps == 0:
            return True
        if every and done % every == 0 and _is_of_suite(run.keep_best):
            return True
        return asked

    def save(self, done: int, parts: Parts, counters: dict[str, Any]) -> None:
        """Write a checkpoint of `done` steps; with run.async_save, from a copy, in the thread.

        Raises:
            ConfigError: run.keep_best names what the log has not.
            DiskError: A save has failed for the third time in a row.
        """
        self.last_save = time.monotonic()
        self._collect()
        with distributed.agreed():
            metric = self._metric(done)
        groups = {name: _whole(tensors) for name, tensors in _groups(parts.step).items()}
        if distributed.rank() != 0:
            return
        run = self.config.run
        self._pending = self._thread.submit(
            checkpoint.save,
            self.folder,
            done,
            _snapshot(groups) if run.async_save else groups,
            {"step": done, **_data_state(parts), **metric, **counters},
            keep=run.keep_checkpoints,
            keep_best=run.keep_best,
        )
        if not run.async_save:
            self._collect()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """Wait; a failed last save is an error, unless a graver one ends the run."""
        self._thread.shutdown()
        stopped_by_error = error is not None and not isinstance(error, Preempted)
        try:
            self._collect()
        except DiskError:
            if not stopped_by_error:
                raise
        if self._failures and not stopped_by_error:
            raise self._failures[-1]

    def _collect(self) -> None:
        """Wait for the pending save, if there is one, and count it if it failed."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
            self._failures.clear()
        except DiskError as error:
            self._failures.append(error)
            if len(self._failures) >= self.max_failures:
                raise
            if self.log is not None:
                self.log.say(
                    f"warning: {error}; older checkpoints are intact, the next save tries again "
                    f"(failure {len(self._failures)} of {self.max_failures})"
                )

    def _metric(self, done: int) -> dict[str, Any]:
        """What run.keep_best names, in the last log line; None if not finite, or not measured."""
        rule = self.config.run.keep_best
        line = self.log.last if self.log else {}
        if rule is None or not line:
            return {}
        name = rule.partition(":")[2]
        was_measured = line["step"] == done and any(key.startswith(MEASURED) for key in line)
        if _is_of_suite(rule) and not was_measured:
            return {"metric": {"rule": rule, "value": None}}
        if not isinstance(line.get(name, ""), float | int | None):
            names = ", ".join(key for key, value in line.items() if not isinstance(value, str))
            raise ConfigError(f"run.keep_best: the log has no {name}; it has {names}")
        return {"metric": {"rule": rule, "value": line[name]}}


def _is_of_suite(rule: str | None) -> bool:
    """Whether a run.keep_best is of a metric of the suite, which few log lines have."""
    return rule is not None and rule.partition(":")[2].startswith(MEASURED)


def restore(folder: Path, parts: Parts) -> dict[str, Any] | None:
    """Load the newest checkpoint that verifies into `parts`; its state, None without any.

    Raises:
        DataError: It was made with another data set.
        ConfigError: It was made with another seed, batch size or number of streams.
        CheckpointError: All checkpoints are damaged, or the model has another shape.
    """
    with distributed.main_first():
        loaded = checkpoint.load_newest(folder)
        if distributed.rank() == 0:
            _tidy(folder, loaded)
    if loaded is None:
        return None
    _check_same_data(loaded, _data_state(parts))
    step = parts.step
    try:
        load_weights(step.module, loaded.groups["model"])
        _restore_optimizer(step, loaded.groups["optimizer"])
        if step.averaged is not None:
            averaged = loaded.groups.get("ema", loaded.groups["model"])  # it may begin only now
            for name, shadow in step.averaged.shadow.items():
                shadow.copy_(part_of(averaged[name], shadow))
            step.averaged.num_updates = loaded.state["ema_updates"]
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{loaded.path}: was saved by another model: {reason}; "
            "use the config it was made with (config.yaml in the run folder), or another run.dir"
        ) from error
    return loaded.state


def trained_module(parts: Parts) -> VisionLanguageModule:
    """A copy in host memory with averaged weights, if any; all ranks must ask for it together."""
    step = parts.step
    trained = {**step.module.state_dict(), **(step.averaged.shadow if step.averaged else {})}
    module = build_model(parts.config.model, parts.tokenizer)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():  # one whole tensor at a time on a device
            tensor.copy_(whole(trained[name]).reshape(tensor.shape))
    return module


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Whole tensors into a module, whose parameters FSDP2 may have spread over the ranks.

    Raises:
        RuntimeError: It has other names, or other shapes.
    """
    there = module.state_dict()
    parts = {n: part_of(t, there[n]) if n in there else t for n, t in tensors.items()}
    module.load_state_dict(parts)


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, on rank 0; spread ones one after the other, into host memory."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if distributed.rank() == 0:
            found[name] = full if full is tensor else full.cpu()
    return found


def _tidy(folder: Path, loaded: checkpoint.Checkpoint | None) -> None:
    """Say what is damaged and set it aside; delete what a kill left half written."""
    for path, problem in (loaded.skipped if loaded else {}).items():
        aside = checkpoint.set_aside(path)
        print(f"warning: {path} is passed over: {problem}; it is {aside.name} now", flush=True)
    for leftovers in (folder, folder.parent):
        if leftovers.is_dir():
            remove_leftovers(leftovers)


def _snapshot(groups: checkpoint.Groups) -> checkpoint.Groups:
    """A copy in host memory, which later steps do not change."""
    return {
        group: {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
        for group, tensors in groups.items()
    }


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
        keys = _STATE.get(type(owner.get(parameter)), ())  # none if it is frozen from here on
        if key in keys:  # else another optimiser goes on
            like = local(parameter) if key == "step" else parameter
            owner[parameter].state[parameter][key] = part_of(value, like)


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
