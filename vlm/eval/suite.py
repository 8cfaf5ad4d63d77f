"""A suite: a YAML file that lists tasks, and `evaluate`, which runs them on a model."""

import difflib
import io
import json
from collections import Counter
from collections.abc import Sequence
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
from vlm.eval.source import Outcome, Source
from vlm.eval.tasks import TASKS, Task
from vlm.hub.load import load
from vlm.inference import VisionLanguageModel
from vlm.retrieval.embed import Log
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
    is left out, with a line that says so.

    Args:
        model: A model, or the SPEC of one.
        suite: A YAML file, or a shipped one's name; data paths are relative to the working
            directory.
        out: Where the results go as JSON. What a report shows beside them (predictions, hits,
            captions) goes to `eval/TASK-SPLIT.json` in the same folder if the file is a run's
            `results.json`, else to `OUT's stem-eval/TASK-SPLIT.json`.
        device: Where a model from a SPEC computes.
        batch_size: Pictures at a time.
        log: Gets lines of progress, and the table of results.

    Raises:
        ConfigError: The suite or a setting in it is wrong, or no task fits the model.
        DataError: Data is missing, damaged, or lacks what a task needs.
        DiskError: The results cannot be written.
    """
    tasks = load_suite(suite)
    if not isinstance(model, VisionLanguageModel):
        model = load(model, device=device)
    results: list[Result] = []
    sources: dict[str, Source] = {}
    for task in _fitting(tasks, model, log):
        source, outcome = _run(task, model, sources, batch_size, log)
        results += _results(task, outcome)
        if out is not None:
            details = _details(task, outcome, source.dataset.fingerprint)
            _write(details_folder(Path(out)) / f"{task.name}.json", details)
    if out is not None:
        _write(Path(out), results)
    log(render(results))
    return results


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


def details_folder(out: Path) -> Path:
    """Where the details beside a results file are."""
    return out.with_name("eval" if out.name == "results.json" else f"{out.stem}-eval")


def render(results: Sequence[Result], *, width: int = 120) -> str:
    """Results as a table of plain text."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("task", "split", "metric"):
        table.add_column(name)
    for name in ("value", "95% interval", "chance", "n"):
        table.add_column(name, justify="right")
    for result in results:
        low, high = result["ci95"]
        is_rank = "rank" in result["metric"]
        value, low, high, chance = (
            f"{x:.1f}" if is_rank else f"{100 * x:.2f}%"
            for x in (result["value"], low, high, result["chance"])
        )
        names = (result[name] for name in ("task", "split", "metric"))
        table.add_row(*names, value, f"{low} .. {high}", chance, f"{result['n']:,}")
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
        return "split must be a short name of letters, digits, _, - and ."
    return f"{key} ({error['input']!r}): {error['msg'][0].lower()}{error['msg'][1:]}"


def _unknown(key: str, names: list[str], *, what: str = "key") -> str:
    near = difflib.get_close_matches(key, names, n=1)
    return f"unknown {what} {key[:80]!r}; " + (
        f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    )


def _fitting(tasks: list[Task], model: VisionLanguageModel, log: Log) -> list[Task]:
    fitting = [task for task in tasks if task.fits(model)]
    left_out = ", ".join(task.name for task in tasks if task not in fitting)
    reason = "this model has no captioner; model.captioner.width=... in its config trains one"
    if not fitting:
        raise ConfigError(f"no task of the suite fits ({left_out}): {reason}")
    if left_out:
        log(f"left out: {left_out}: {reason}")
    return fitting


def _run(
    task: Task, model: VisionLanguageModel, sources: dict[str, Source], batch_size: int, log: Log
) -> tuple[Source, Outcome]:
    """Run a task on its data, which is opened and embedded once for all tasks."""
    try:
        key = json.dumps(task.data)
        if key not in sources:
            dataset = open_data(task.data, log=log)
            sources[key] = Source(model, dataset, batch_size=batch_size, log=log, opened=sources)
        return sources[key], task.run(sources[key])
    except VlmError as error:
        raise type(error)([f"{task.name}: {problem}" for problem in error.problems]) from error


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


def _details(task: Task, outcome: Outcome, fingerprint: str) -> dict[str, Any]:
    head = {"task": task.task, "split": task.split, "protocol": outcome.protocol}
    return {**head, "data": task.data, "fingerprint": fingerprint, **outcome.details}


def _write(path: Path, values: Any) -> None:
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(path, text.encode())
