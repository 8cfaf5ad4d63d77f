"""The suite of a run: measured every so many steps on the weights of the moment, and at the end."""

import contextlib
from pathlib import Path
from typing import Any

import torch

from vlm.errors import ConfigError, DataError, DiskError
from vlm.eval.results import write_json
from vlm.eval.suite import check_suite, evaluate
from vlm.inference import VisionLanguageModel
from vlm.runtime import distributed
from vlm.runtime.device import arithmetic
from vlm.runtime.watch import Watch
from vlm.training.run_log import MEASURED, RunLog
from vlm.training.saving import trained_module
from vlm.training.setup import Parts
from vlm.training.step import StepResult

Results = list[dict[str, Any]]


class Evaluation:
    """Measures a run; training goes on as if it had not.

    The weights are copied into a model of their own: averaged where there are averages, gathered
    where they lie spread, outside of what wraps or compiles the model that is trained.

    Args:
        parts: Of the run.
        folder: The run's.

    Raises:
        ConfigError, DataError: The suite, or what it names, is wrong: better now than later.
    """

    def __init__(self, parts: Parts, folder: Path) -> None:
        self.parts = parts
        self.folder = folder
        self.suite = parts.config.eval.suite
        if self.suite is not None:
            with distributed.agreed():
                if distributed.rank() == 0:
                    check_suite(self.suite)

    def after(
        self, done: int, result: StepResult, *, log: RunLog, watch: Watch
    ) -> dict[str, float]:
        """What is measured after `done` steps, by name in the log; empty where nothing is due.

        The last step's is `at_end`; a step that ends the run early is not measured. What cannot be
        measured is said, and training goes on.
        """
        every = self.parts.config.eval.every_steps
        if not every or done % every or done == self.parts.num_steps or result.stop:
            return {}
        watch.end("measuring")  # takes its time; ranks wait for each other, and no longer
        try:
            with log.paused(), _unseen(self.parts.step.device):
                results = self._measure(trained_model(self.parts), None, lambda line: None)
        except (ConfigError, DataError, DiskError) as error:
            log.say(f"warning: step {done} is not measured: {'; '.join(error.problems)}")
            return {}
        if distributed.rank() == 0:
            write_json(self.folder / "evals" / f"step-{done:08}.json", results)
            log.say(f"step {done}: {_primary(results)}")
        return {
            f"{MEASURED}{row['task']}-{row['split']}/{row['metric']}": row["value"]
            for row in results
        }

    def at_end(self, model: VisionLanguageModel) -> Results:
        """The results of the trained model, in results.json and with the trackers."""
        if self.suite is None:
            return []
        results = self._measure(model, self.folder / "results.json", print)
        self.parts.trackers.finish(self.parts.num_steps, results)
        return results

    def _measure(self, model: VisionLanguageModel, out: Path | None, log: Any) -> Results:
        assert self.suite is not None, "config/rules.py asks for it"
        with arithmetic("fp32", model.device):  # as `vlm eval` computes
            return evaluate(model, self.suite, out=out, log=log)


def trained_model(parts: Parts) -> VisionLanguageModel:
    """A copy of the model as it is now; all ranks must ask for it together."""
    with _unseen(parts.step.device):
        module = trained_module(parts)
    return VisionLanguageModel(module, parts.config.model, parts.tokenizer, parts.step.device)


def _unseen(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Whatever draws random numbers inside, those after it are the same."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _primary(results: Results) -> str:
    """The first metric of each task, in one line."""
    firsts = {f"{row['task']}-{row['split']}": row for row in reversed(results)}
    return "  ".join(
        f"{name} {row['metric']} {row['value']:.4f}" for name, row in reversed(firsts.items())
    )
