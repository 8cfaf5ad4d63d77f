"""A suite: a YAML file that lists tasks, and `evaluate`, which runs them on a model."""

import contextlib
import difflib
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from rich import box
from rich.console import Console
from rich.table import Table

from vlm.config.find import YamlError, find_suite, read_text, read_yaml
from vlm.curate.source import open_data
from vlm.errors import ConfigError, VlmError
from vlm.eval.card import interval, model_card, shown
from vlm.eval.finished import find, inputs_hash, keep, model_hash
from vlm.eval.results import Head, details_folder, write_json
from vlm.eval.results import Result as Row
from vlm.eval.source import Classifiers, Outcome, Source
from vlm.eval.tasks import TASKS, Task
from vlm.hub.load import load
from vlm.inference import VisionLanguageModel
from vlm.retrieval.embed import Log
from vlm.runtime import distributed
from vlm.runtime.files import write_atomic

Result = dict[str, Any]


def evaluate(
    model: VisionLanguageModel | str | Path,
    suite: str | Path,
    *,
    out: str | Path | None = None,
    device: str = "auto",
    batch_size: int = 64,
    log: Log = print,
) -> list[Result]:
    """The results of all tasks of a suite: task, split, metric, value, ci95, n, chance, protocol.

    The first result of a task and split is its primary one. A task that the model has no head for
    is left out, with a line that says so. All ranks, where there are several, must call this
    together: they share the pictures, and all get the results; rank 0 measures, writes and speaks.

    Args:
        model: A model, or the SPEC of one.
        suite: A YAML file, or a shipped one's name; data paths are relative to the working
            directory.
        out: Where the results go as JSON, once all tasks are finished; beside it a fragment of a
            model card, as Markdown. What else a task found (predictions, hits, captions, the scores
            of each sample) goes to `eval/TASK-SPLIT.json` and `.safetensors` in the same folder if
            the file is a run's `results.json`, else to `OUT's stem-eval/`, as soon as the task is
            finished. A task that is there already, of the same model, settings and data, is not
            measured again.
        device: Where a model from a SPEC computes.
        batch_size: Pictures at a time.
        log: Gets lines of progress, and the table of results.

    Raises:
        ConfigError: The suite or a setting in it is wrong, or no task fits the model.
        DataError: Data is missing, damaged, or lacks what a task needs.
        DiskError: The results cannot be written.
    """
    is_main = distributed.rank() == 0
    log = log if is_main else _silent
    with distributed.agreed():
        tasks = load_suite(suite)
        for task in tasks:
            with _named(task):
                task.check()
        if not isinstance(model, VisionLanguageModel):
            model = load(model, device=device)
        tasks = _fitting(tasks, model, log)
    out = Path(out) if out is not None else None
    session = _Session(model, out, batch_size, log)
    heads = [head for task in tasks for head in session.measure(task)]
    results: list[Result] = [row for head in heads for row in head.results or ()]
    with distributed.agreed():
        if is_main and out is not None:
            _write(out, heads, str(suite))
    if is_main:
        log(render(results))
    shared: list[list[Result]] = distributed.gather_json(results)
    return shared[0]


class _Session:
    """One model's way through the tasks of a suite."""

    def __init__(
        self, model: VisionLanguageModel, out: Path | None, batch_size: int, log: Log
    ) -> None:
        self.model = model
        self.folder = details_folder(out) if out is not None else None
        self.is_main = distributed.rank() == 0
        self.hash = model_hash(model) if self.is_main and out is not None else ""
        self.batch_size = batch_size
        self.log = log
        self.sources: dict[str, Source] = {}
        self.classifiers: Classifiers = {}  # of all tasks

    def measure(self, task: Task) -> list[Head]:
        """Its head, with its results, on rank 0; elsewhere none.

        Raises:
            VlmError: As the task's own, on all ranks.
        """
        source = self._source(task)
        with _named(task):
            others = [source.beside(data).dataset.fingerprint for data in task.other_data()]
        inputs, found = "", None
        if self.is_main and self.folder is not None:
            inputs = inputs_hash(task, self.hash, [source.dataset.fingerprint, *others])
            found = find(self.folder, task, inputs)
        if distributed.gather_json(found is not None)[0]:
            self.log(f"{task.name}: is finished already, from the same model, data and settings")
            return [found] if found is not None else []
        with _named(task):
            task.look(source)
        heads: list[Head] = []
        with distributed.agreed(), _named(task):
            if self.is_main:
                heads = [self._measured(task, source, inputs)]
        return heads

    def _source(self, task: Task) -> Source:
        """Its data, opened and seen once for all tasks; by rank 0 first, which may pack it."""
        key = json.dumps(task.data)
        for turn in (True, False) if key not in self.sources else ():
            with distributed.agreed(), _named(task):
                if turn is self.is_main:
                    dataset = open_data(task.data, log=self.log)
                    self.sources[key] = Source(
                        self.model,
                        dataset,
                        batch_size=self.batch_size,
                        log=self.log,
                        classifiers=self.classifiers,
                        opened=self.sources,
                    )
        return self.sources[key]

    def _measured(self, task: Task, source: Source, inputs: str) -> Head:
        source.alone = distributed.world_size() > 1
        outcome = task.run(source)
        source.alone = False
        head = Head(
            task=task.task,
            split=task.split,
            protocol=outcome.protocol,
            data=task.data,
            fingerprint=source.dataset.fingerprint,
            model=self.hash,
            inputs=inputs,
            parts=source.protocols.get(outcome.protocol),
            results=_results(task, outcome),
        )
        keep(self.folder, head, outcome)
        return head


def load_suite(path: str | Path) -> list[Task]:
    """The tasks of a suite: of a file, or of a name that `find_suite` knows.

    Raises:
        ConfigError: With a line for each thing that is wrong.
    """
    path = find_suite(path)
    try:
        document = read_yaml(read_text(path))
    except YamlError as error:
        raise ConfigError(f"{path}:{error.line}: {error}") from error
    problems = [f"{path}:{line}: {problem}" for line, problem in document.repeated]
    values = document.values
    if not isinstance(values, dict) or not isinstance(values.get("tasks"), list):
        raise ConfigError([*problems, f"{path}: a suite is `tasks:` and a list of tasks below it"])
    problems += [f"{path}: {_unknown(key, ['tasks'])}" for key in values if key != "tasks"]
    tasks: list[Task] = []
    for number, settings in enumerate(values["tasks"], start=1):
        try:
            tasks.append(_task(settings))
        except ConfigError as error:
            problems += [f"{path}: task {number}: {problem}" for problem in error.problems]
    counts = Counter(task.name for task in tasks)
    problems += [
        f"{path}: {name} is listed {count} times; give each its own split name"
        for name, count in counts.items()
        if count > 1
    ]
    if problems or not tasks:
        raise ConfigError(problems or f"{path}: the list of tasks is empty")
    return tasks


def check_suite(path: str | Path) -> None:
    """Open all that a suite names, and measure nothing.

    Raises:
        ConfigError: The suite, or a text file that it names, is wrong.
        DataError: Data is missing or damaged.
    """
    for task in load_suite(path):
        with _named(task):
            task.check()
            for data in (task.data, *task.other_data()):
                open_data(data)


def render(results: Sequence[Result], *, width: int = 120) -> str:
    """Results as a table of plain text."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("task", "split", "metric"):
        table.add_column(name)
    for name in ("value", "95% interval", "chance", "n"):
        table.add_column(name, justify="right")
    for result in results:
        metric = result["metric"]
        value, chance = (shown(metric, result[name]) for name in ("value", "chance"))
        names = (result[name] for name in ("task", "split", "metric"))
        table.add_row(*names, value, interval(metric, result["ci95"]), chance, f"{result['n']:,}")
    console = Console(file=io.StringIO(), width=width)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines() if line.strip())


def _task(settings: Any) -> Task:
    if not isinstance(settings, dict) or "task" not in settings:
        raise ConfigError(f"needs `task:`, one of {', '.join(TASKS)}")
    kind = TASKS.get(str(settings["task"]))
    if kind is None:
        raise ConfigError(_unknown(str(settings["task"]), list(TASKS), what="task"))
    try:
        return TypeAdapter(kind).validate_json(json.dumps(settings))
    except ValidationError as error:
        names = [field.name for field in fields(kind)]
        # The first of each key: one that may be a text or a list has an error for each.
        first = {e["loc"][0]: dict(e) for e in reversed(error.errors(include_url=False))}
        raise ConfigError([_problem(e, names) for e in first.values()]) from None


def _problem(error: dict[str, Any], names: list[str]) -> str:
    key, *inner = map(str, error["loc"])
    if error["type"] == "unexpected_keyword_argument":
        return f"{key} has no key {inner[0][:80]!r}" if inner else _unknown(key, names)
    if error["type"] == "missing":
        return f"needs `{'.'.join((key, *inner))}:`"
    if key == "split":
        if not isinstance(error["input"], str):
            return f"split ({error['input']}) must be a text; put it into quotes"
        return "split must be a short name of letters, digits, _, - and ."
    return f"{key} ({error['input']!r}): {error['msg'][0].lower()}{error['msg'][1:]}"


def _unknown(key: str, names: list[str], *, what: str = "key") -> str:
    near = difflib.get_close_matches(key, names, n=1)
    return f"unknown {what} {key[:80]!r}; " + (
        f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    )


def _fitting(tasks: list[Task], model: VisionLanguageModel, log: Log) -> list[Task]:
    fitting = [task for task in tasks if task.fits(model)]
    left_out: dict[str, list[str]] = {}
    for task in tasks:
        if task not in fitting:
            left_out.setdefault(task.lacking, []).append(task.name)
    lines = [f"{', '.join(names)}: this model has {reason}" for reason, names in left_out.items()]
    if not fitting:
        raise ConfigError([f"no task of the suite fits: {line}" for line in lines])
    for line in lines:
        log(f"left out: {line}")
    return fitting


@contextlib.contextmanager
def _named(task: Task) -> Iterator[None]:
    """Puts the task's name before a problem."""
    try:
        yield
    except VlmError as error:
        raise type(error)([f"{task.name}: {problem}" for problem in error.problems]) from error


def _silent(_line: str) -> None:
    """What other ranks log."""


def _results(task: Task, outcome: Outcome) -> list[Result]:
    return [
        {
            "task": task.task,
            "split": task.split,
            "metric": row.metric,
            "value": row.value,
            "ci95": list(row.ci95),
            "n": row.n,
            "chance": row.chance,
            "protocol": outcome.protocol,
        }
        for row in outcome.rows
    ]


def _write(out: Path, heads: list[Head], suite: str) -> None:
    """The results, and their table as a fragment of a model card."""
    rows = [row for head in heads for row in head.results or ()]
    typed = TypeAdapter(list[Row]).validate_json(json.dumps(rows))
    name = out.resolve().parent.name
    card = model_card(heads, typed, name=name, suite=suite, out=str(out))
    write_atomic(out.with_suffix(".md"), card.encode())
    write_json(out, rows)
