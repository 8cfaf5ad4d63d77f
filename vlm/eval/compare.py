"""Runs side by side: primary metrics, how they differ from the first's, and how sure that is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm.config.find import YamlError, read_text, read_yaml, shown
from vlm.config.sections import flatten
from vlm.errors import ConfigError
from vlm.eval import card
from vlm.eval.paired import Difference, holm, paired_difference
from vlm.eval.results import (
    Head,
    Result,
    Samples,
    details_folder,
    primary,
    read_head,
    read_results,
    read_samples,
)

MAX_SETTINGS = 40  # that differ


@dataclass(frozen=True)
class Measured:
    """A run, or a file of results.

    Attributes:
        name: As it was given.
        file: Its results.
        primary: Its first result of each TASK-SPLIT.
        settings: Its config, by dotted keys; empty where there is none.
    """

    name: str
    file: Path
    primary: dict[str, Result]
    settings: dict[str, Any]

    def head(self, task: str) -> Head | None:
        """What its details say of a task; None where they are not those of its results."""
        head = read_head(details_folder(self.file), task)
        return head if head is not None and head.protocol == self.primary[task].protocol else None

    def samples(self, task: str) -> Samples | None:
        """The scores of its primary metric, sample by sample."""
        head = self.head(task)
        if head is None:
            return None
        return read_samples(details_folder(self.file), head, self.primary[task].metric)


@dataclass(frozen=True)
class Compared:
    """A task's primary metric in one of the runs.

    Attributes:
        run: Its name.
        result: Of it.
        gain: Its value less the first run's; None in the first run.
        difference: The gain, tested; None where the samples of both are not there.
        corrected_p: The p-value, corrected for the number of tests.
    """

    run: str
    result: Result
    gain: float | None = None
    difference: Difference | None = None
    corrected_p: float | None = None


@dataclass(frozen=True)
class Comparison:
    """All that can be compared, and why the rest cannot.

    Attributes:
        settings: Those that differ: key, and its value in each run.
        names: Of the runs.
        rows: By task, the first run first.
        left_out: A line for each task that is not compared.
    """

    settings: list[tuple[str, list[str]]]
    names: list[str]
    rows: list[Compared]
    left_out: list[str]


def compare(runs: Sequence[str | Path]) -> Comparison:
    """Two or more runs or results files, each against the first.

    Raises:
        ConfigError: There are fewer than two, one has no results, or no task can be compared.
        DataError: A file is damaged.
    """
    if len(runs) < 2:
        raise ConfigError("give two runs or more to compare")
    measured = [_read(run) for run in runs]
    first, others = measured[0], measured[1:]
    rows: list[Compared] = []
    left_out: list[str] = []
    for task in dict.fromkeys(task for each in measured for task in each.primary):
        if reasons := list(_obstacles(task, measured)):
            left_out += reasons
            continue
        rows.append(Compared(first.name, first.primary[task]))
        rows += [_compared(task, first, other) for other in others]
    if not rows:
        raise ConfigError(["nothing can be compared", *left_out])
    return Comparison(_settings(measured), [m.name for m in measured], _corrected(rows), left_out)


def _read(run: str | Path) -> Measured:
    path = Path(run)
    file = path / "results.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; vlm eval {run} SUITE --out {file} measures a run")
    config = file.with_name("config.yaml")
    return Measured(str(run), file, primary(read_results(file)), _flat(config))


def _flat(config: Path) -> dict[str, Any]:
    try:
        values = read_yaml(read_text(config)).values if config.is_file() else {}
    except YamlError as error:
        raise ConfigError(f"{config}:{error.line}: {error}") from error
    return dict(flatten(values)) if isinstance(values, dict) else {}


def _settings(runs: Sequence[Measured]) -> list[tuple[str, list[str]]]:
    """The settings that differ among those with a config, other than where a run lives."""
    with_config = [run for run in runs if run.settings]
    keys = dict.fromkeys(key for run in with_config for key in run.settings)
    found = [
        (key, [shown(run.settings.get(key)) if run.settings else "?" for run in runs])
        for key in keys
        if key != "run.dir"
        and any(run.settings.get(key) != with_config[0].settings.get(key) for run in with_config)
    ]
    return found[:MAX_SETTINGS]


def _obstacles(task: str, runs: Sequence[Measured]) -> Iterator[str]:
    """Yields why the runs cannot be compared by a task."""
    first = runs[0]
    if missing := [run.name for run in runs if task not in run.primary]:
        yield f"{task}: not measured in {', '.join(missing)}"
        return
    for other in runs[1:]:
        ours, theirs = first.primary[task], other.primary[task]
        if ours.protocol != theirs.protocol:
            what = _what_differs(first.head(task), other.head(task))
            yield f"{task}: {first.name} and {other.name} were measured differently: {what}"
        elif ours.metric != theirs.metric:
            what = f"{ours.metric} and {theirs.metric}"
            yield f"{task}: {first.name} and {other.name} have other primary metrics: {what}"


def _what_differs(first: Head | None, other: Head | None) -> str:
    if first is None or other is None or first.parts is None or other.parts is None:
        return "their protocols differ; details that say in what are missing"
    ours, theirs = dict(flatten(first.parts)), dict(flatten(other.parts))
    keys = [k for k in dict.fromkeys([*ours, *theirs]) if ours.get(k) != theirs.get(k)]
    return "; ".join(f"{k} {shown(ours.get(k))} and {shown(theirs.get(k))}" for k in keys)


def _compared(task: str, first: Measured, other: Measured) -> Compared:
    ours, theirs = first.samples(task), other.samples(task)
    result = other.primary[task]
    difference = None
    if ours is not None and theirs is not None:
        difference = paired_difference(ours, theirs)
    return Compared(other.name, result, result.value - first.primary[task].value, difference)


def _corrected(rows: list[Compared]) -> list[Compared]:
    corrected = iter(holm([row.difference.p for row in rows if row.difference is not None]))
    return [
        row if row.difference is None else replace(row, corrected_p=next(corrected)) for row in rows
    ]


COLUMNS = (
    *("task", "metric", "n", "run", "value", "95% interval"),
    *("difference", "95% interval", "p", "p (Holm)"),
)
NUMBERS = (2, 4, 5, 6, 7, 8, 9)  # columns of numbers


def cells(row: Compared) -> list[str]:
    """A row of the table."""
    result, metric = row.result, row.result.metric
    is_first = row.gain is None
    tested = ["", "", ""]
    if row.difference is not None and row.corrected_p is not None:
        ends = (_signed(metric, end) for end in row.difference.ci95)
        tested = [" .. ".join(ends), _p(row.difference.p), _p(row.corrected_p)]
    return [
        result.name if is_first else "",
        metric if is_first else "",
        f"{result.n:,}" if is_first else "",
        row.run,
        card.shown(metric, result.value),
        card.interval(metric, result.ci95),
        "" if row.gain is None else _signed(metric, row.gain),
        *tested,
    ]


def notes(comparison: Comparison) -> list[str]:
    """What a reader has to know: of the tests, and of what is not compared."""
    tests = [row for row in comparison.rows if row.difference is not None]
    first = comparison.names[0]
    lines = []
    if tests:
        lines.append(
            f"Differences are to {first}, on the same samples: intervals from 1,000 resamples of "
            "whole clusters, the same for both; p from flipped signs of the clusters' differences. "
            f"Of {len(tests)} tests, chance alone makes {0.05 * len(tests):.2g} smaller than 0.05; "
            "p (Holm) allows for that."
        )
    untested = dict.fromkeys(
        row.result.name
        for row in comparison.rows
        if row.gain is not None and row.difference is None
    )
    if untested:
        lines.append(f"Not tested, for scores of each sample are missing: {', '.join(untested)}.")
    return [*lines, *(f"Not compared: {line}." for line in comparison.left_out)]


def markdown(comparison: Comparison) -> str:
    """The comparison as a page."""
    lines = [f"# {' and '.join(comparison.names)}", ""]
    if comparison.settings:
        settings = [[f"`{key}`", *values] for key, values in comparison.settings]
        lines += [*card.table(["setting", *comparison.names], settings), ""]
    rows = [cells(row) for row in comparison.rows]
    lines += [*card.table(COLUMNS, rows, right=NUMBERS), ""]
    return "\n".join([*lines, *(f"{note}\n" for note in notes(comparison))])


def _signed(metric: str, value: float) -> str:
    return f"+{card.shown(metric, value)}" if value >= 0 else card.shown(metric, value)


def _p(p: float) -> str:
    return f"{p:.4f}" if p >= 0.0001 else f"{p:.0e}"
