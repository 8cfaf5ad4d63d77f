"""`vlm.train`: the loop that everything else attaches to, on one process or under torchrun."""

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlm.config.load import load_config
from vlm.config.schema import Config
from vlm.errors import Preempted
from vlm.inference import VisionLanguageModel
from vlm.runtime import distributed
from vlm.runtime.heap import pages_kept
from vlm.runtime.preemption import StopSignals, stop_signals
from vlm.runtime.watch import Watch, watched
from vlm.training.evaluation import Evaluation, trained_model
from vlm.training.folder import describe, refuse_overwriting
from vlm.training.guards import Guards
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
        RankFailureError: Another rank died or hangs.
        Preempted: SIGTERM or SIGUSR1 came to any rank; what was done is saved.
    """
    settings = config if isinstance(config, Config) else load_config(config, overrides)
    ranks = distributed.ranks_from_environment()
    folder = Path(settings.run.dir)
    refuse_overwriting(folder, resume)
    with (
        stop_signals(folder) as stop,
        watched(folder, ranks, stop, step_timeout_s=settings.run.step_timeout_s) as watch,
    ):
        parts = build_parts(settings, ranks)
        evaluation = Evaluation(parts, folder)
        with closing(parts.trackers):
            with stop.deferred():
                _fit(parts, evaluation, folder, ranks, stop, watch)
            watch.end("after the last step")
            return _finish(parts, evaluation, folder, ranks)


def _fit(
    parts: Parts,
    evaluation: Evaluation,
    folder: Path,
    ranks: distributed.Ranks,
    stop: StopSignals,
    watch: Watch,
) -> None:
    """Steps until the run's end, from wherever its newest checkpoint stands."""
    settings = parts.config
    state = restore(folder / "checkpoints", parts) or {"step": 0, "guards": {}}
    first: int = state["step"]
    if ranks.is_main:
        describe(folder, parts, first)
    size = settings.train.global_batch_size
    guards = Guards(
        state["guards"],
        folder=folder if ranks.is_main else None,
        max_bad_fraction=settings.data.max_bad_fraction,
        epoch_size=len(parts.data.dataset),
        global_batch_size=size,
    )
    log = RunLog(
        folder / "metrics.jsonl" if ranks.is_main else None,
        num_steps=parts.num_steps,
        global_batch_size=size,
        every_steps=settings.run.log_every_steps,
        start_step=first,
        trackers=parts.trackers,
        accounts=parts.accounts,
    )
    if first:
        log.say(f"resuming {folder} at step {first} of {parts.num_steps}")
    saver = Saver(folder / "checkpoints", settings)
    saver.log = log
    with (
        pages_kept(parts.step.device),
        closing(log),
        saver,
        closing(parts.batches(first, ranks)) as batches,
    ):
        for step in range(first, parts.num_steps):
            done = step + 1
            watch.begin(done, "waiting for data")
            waiting = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - waiting
            watch.phase = "computing"
            result = parts.step(step, batch, stop=stop.requested, save=saver.is_late)
            for line in guards.check(done, result):
                log.say(line)
            counters = guards.counters() | parts.data.counters(done * size)
            measured = evaluation.after(done, result, log=log, watch=watch)
            log.write(step, result, data_wait_s=waited, counters=counters, measured=measured)
            if done == parts.num_steps or result.stop or saver.due(done, result.save):
                watch.begin(done, "saving")
                saver.save(done, parts, {"guards": guards.state()})
            if result.stop:
                raise Preempted(
                    f"asked to stop: saved at step {done} of {parts.num_steps}; "
                    "continue with --resume auto"
                )


def _finish(parts: Parts, evaluation: Evaluation, folder: Path, ranks: distributed.Ranks) -> Run:
    """The model folder (averaged weights, if there are any) and the suite's results."""
    model = trained_model(parts)
    if ranks.is_main and not (folder / "model").exists():
        model.save(folder / "model")
    return Run(folder, model, evaluation.at_end(model))
