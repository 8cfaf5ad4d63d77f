"""`vlm.train`: the loop that everything else attaches to, on one process or under torchrun."""

import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

import vlm
from vlm.checkpoint import list_checkpoints
from vlm.config.load import dump_config, load_config
from vlm.config.schema import Config
from vlm.errors import ConfigError
from vlm.eval.suite import evaluate
from vlm.inference import VisionLanguageModel
from vlm.runtime import distributed
from vlm.runtime.files import write_atomic
from vlm.training.guards import BadSampleGuard, NonFiniteGuard
from vlm.training.run_log import RunLog
from vlm.training.saving import Saver, restore
from vlm.training.setup import Parts, build_parts

Overrides = Sequence[str] | Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A finished run: where it lives, its model, and what the suite measured."""

    folder: Path
    model: VisionLanguageModel
    results: list[dict[str, Any]]


def train(
    config: str | Path | Config,
    overrides: Overrides = (),
    *,
    resume: Literal["auto", "never"] = "never",
) -> Run:
    """Train a model; the same call the command line makes.

    Args:
        config: A shipped config's name, a YAML file, or a `Config`.
        overrides: `section.key=value` strings, or a mapping of dotted keys to values.
        resume: "auto" continues the run folder's newest checkpoint, if there is one.

    Raises:
        ConfigError: A setting is wrong, or the run folder holds a run already.
        DataError: The data is missing, damaged or not what the checkpoint was made with.
        BadSampleQuotaError, NonFiniteError, CheckpointError, DiskError: As their exit codes say.
    """
    settings = config if isinstance(config, Config) else load_config(config, overrides)
    ranks = distributed.ranks_from_environment()
    folder = Path(settings.run.dir)
    _refuse_overwriting(folder, resume)
    parts = build_parts(settings, ranks)
    try:
        if ranks.is_main:
            _describe(folder, parts)
        with Saver(folder / "checkpoints", settings) as saver:
            _fit(parts, folder, ranks, saver)
        return _finish(parts, folder, ranks)
    finally:
        distributed.stop()


def _fit(parts: Parts, folder: Path, ranks: distributed.Ranks, saver: Saver) -> None:
    """Steps until the run's end, from wherever its newest checkpoint stands."""
    settings = parts.config
    state = restore(folder / "checkpoints", parts) or {"step": 0, "bad": {}}
    first: int = state["step"]
    bad_guard = BadSampleGuard(settings.data.max_bad_fraction, Counter(state["bad"]))
    finite_guard = NonFiniteGuard()
    size = settings.train.global_batch_size
    log = RunLog(
        folder / "metrics.jsonl" if ranks.is_main else None,
        num_steps=parts.num_steps,
        global_batch_size=size,
        every_steps=settings.run.log_every_steps,
        start_step=first,
    )
    saver.log = log
    if first:
        log.say(f"resuming {folder} at step {first} of {parts.num_steps}")
    batches = parts.batches(first, ranks)
    for step in range(first, parts.num_steps):
        waiting = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - waiting
        result = parts.step(step, batch)
        bad_guard.check((step + 1) * size, result.bad)
        finite_guard.check(step, result)
        passes = parts.data.passes((step + 1) * size)
        log.write(step, result, data_wait_s=waited, num_bad=bad_guard.counts.total(), passes=passes)
        done = step + 1
        if done == parts.num_steps or saver.due(done, parts.step.device):
            saver.save(done, parts, {"bad": dict(bad_guard.counts)})
    log.close()


def _finish(parts: Parts, folder: Path, ranks: distributed.Ranks) -> Run:
    """The model folder (averaged weights, if there are any) and the suite's results."""
    step = parts.step
    if step.averaged is not None:
        step.module.load_state_dict({**step.module.state_dict(), **step.averaged.shadow})
    model = VisionLanguageModel(step.module, parts.config.model, parts.tokenizer, step.device)
    results: list[dict[str, Any]] = []
    if ranks.is_main:
        if not (folder / "model").exists():
            model.save(folder / "model")
        if parts.config.eval.suite is not None:
            results = evaluate(model, parts.config.eval.suite, out=folder / "results.json")
    distributed.barrier()
    return Run(folder, model, results)


def _refuse_overwriting(folder: Path, resume: str) -> None:
    if resume == "never" and (
        list_checkpoints(folder / "checkpoints") or (folder / "model").exists()
    ):
        raise ConfigError(
            f"{folder} holds a run already; continue it with --resume auto, "
            "or start another with run.dir=FOLDER"
        )


def _describe(folder: Path, parts: Parts) -> None:
    """config.yaml reruns the run; ledger.json says on what, command.json what made it."""
    write_atomic(folder / "config.yaml", dump_config(parts.config).encode())
    write_atomic(folder / "ledger.json", parts.data.ledger())
    command = {
        "command": ["vlm", *sys.argv[1:]],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "vlm": vlm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    write_atomic(folder / "command.json", json.dumps(command, indent=1).encode())
