"""The parts of a page that need no pictures: head, results, configuration."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

import vlm
from vlm.eval.results import Result
from vlm.metrics.units import unit_of
from vlm.report import chart
from vlm.report.html import Html, element, join
from vlm.report.inputs import Inputs, number
from vlm.report.numbers import duration, is_rank, listed, metric, metric_name

TASKS = {
    "zero_shot": "Zero-shot",
    "retrieval": "Retrieval",
    "caption": "Captions",
    "probe": "Linear probe",
    "knn": "Nearest neighbours",
}
_SAYINGS = {
    ("zero_shot", "acc1"): "names {value} of the pictures of {split} right at the first try",
    ("retrieval", "text_to_image_recall@10"): (
        "finds a right picture among the first ten for {value} of the captions of {split}"
    ),
    ("caption", "token_f1"): "describes the pictures of {split} with a token F1 of {value}",
}


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: Its heading; its anchor too.
        body: What it holds; None where its inputs are absent.
        absent: How to get them.
    """

    name: str
    body: Html | None
    absent: Html | None = None

    @property
    def anchor(self) -> str:
        """Where a link to it leads."""
        return self.name.lower().replace(" ", "-")

    def render(self) -> Html:
        """The section, or one quiet line."""
        if self.body is None:
            return element("p", f"{self.name}: ", self.absent, class_="absent")
        heading = element("h2", self.name)
        return element("section", heading, self.body, id=self.anchor)


def how_to_measure(inputs: Inputs, lacking: str) -> Html:
    """What is lacking, and the command that measures a run."""
    command = f"vlm eval {inputs.folder} SUITE --out {inputs.folder / 'results.json'}"
    return join(f"{lacking}; ", element("code", command))


def head(inputs: Inputs) -> Html:
    """The run's name, the verdict, and the facts."""
    facts = [
        element("div", element("dt", name), element("dd", value)) for name, value in _facts(inputs)
    ]
    return element(
        "header",
        element("p", "Training run", class_="kicker"),
        element("h1", inputs.name),
        element("p", verdict(inputs), class_="verdict"),
        _command(inputs.command),
        element("dl", *facts, class_="facts") if facts else None,
    )


def verdict(inputs: Inputs) -> str:
    """One sentence: the primary metric of each task's first split, with chance; else the loss."""
    firsts: dict[str, Result] = {}
    for result in inputs.primary:
        firsts.setdefault(result.task, result)
    if firsts:
        return f"It {listed([_saying(result) for result in firsts.values()])}."
    losses = [
        (step, loss)
        for line in inputs.metrics
        if (step := number(line, "step")) is not None and (loss := number(line, "loss")) is not None
    ]
    if losses:
        return (
            f"Trained to a loss of {losses[-1][1]:.3f} at step {losses[-1][0]:,.0f}; not measured."
        )
    return "Neither trained nor measured yet."


def _saying(result: Result) -> str:
    default = f"reaches {{value}} {metric_name(result.metric)} on {{split}}"
    saying = _SAYINGS.get((result.task, result.metric), default)
    value, chance = (metric(result.metric, x) for x in (result.value, result.chance))
    low, high = result.ci95
    is_better = high < result.chance if is_rank(result.metric) else low > result.chance
    note = f"chance {chance}" if is_better else f"chance {chance}: no better than that"
    return f"{saying.format(value=value, split=result.split)} ({note})"


def _command(command: dict[str, Any]) -> Html | None:
    words = command.get("command")
    if not isinstance(words, list):
        return None
    return element("pre", element("code", shlex.join(map(str, words))), class_="command")


def _facts(inputs: Inputs) -> Iterator[tuple[str, str]]:
    log = inputs.folder / "metrics.jsonl"
    if inputs.metrics:
        when = datetime.fromtimestamp(log.stat().st_mtime, UTC)
        last = inputs.metrics[-1]
        yield "Last step logged", f"{when:%Y-%m-%d %H:%M} UTC"
        if seconds := number(last, "time_s"):
            yield "Duration", duration(seconds)
        yield from _amounts(inputs, last)
    versions = [f"{name} {inputs.command[name]}" for name in _VERSIONS if name in inputs.command]
    if versions:
        yield "Versions", ", ".join(versions)
    if machine := inputs.command.get("machine"):
        yield "Machine", str(machine)


_VERSIONS = ("vlm", "torch", "python")


def _amounts(inputs: Inputs, last: dict[str, Any]) -> Iterator[tuple[str, str]]:
    step, size = number(last, "step"), inputs.setting("train.global_batch_size")
    if step is None:
        return
    skipped = number(last, "skipped_steps")
    yield "Steps", f"{step:,.0f}" + (f" ({skipped:,.0f} skipped)" if skipped else "")
    if type(size) is int:
        bad = number(last, "bad_samples")
        yield "Samples seen", f"{step * size:,.0f}" + (f" ({bad:,.0f} bad)" if bad else "")


def results(inputs: Inputs) -> Section:
    """The table of all results."""
    if not inputs.results:
        return Section("Results", None, how_to_measure(inputs, "no results yet"))
    names = ("metric", "value", "", "95% interval", "chance", "n")
    head = element("tr", *(_column(name) for name in names))
    groups = groupby(inputs.results, key=lambda result: (result.task, result.split))
    table = element(
        "table",
        element("caption", "Results of each task", class_="visually-hidden"),
        element("thead", head),
        *(_group(list(rows)) for _, rows in groups),
    )
    scroller = element(
        "div", table, class_="scroller", tabindex=0, role="region", aria_label="Results"
    )
    return Section("Results", join(element("p", _LEGEND, class_="remark"), scroller))


_LEGEND = join(
    "The primary metric of a task is bold. A bar is the value from 0 to 100%, ",
    element("span", "the line across its end", class_="key"),
    " the 95% interval, ",
    element("span", "the upright tick", class_="key chance-key"),
    " what a model reaches that does not look. Of a rank or a calibration error, less is better. ",
    "CIDEr-D goes from 0 to 10, CLIPScore from 0 to 2.5.",
)


def _column(name: str) -> Html:
    if not name:
        return element("td", class_="drawn")
    return element("th", name, scope="col", class_="" if name == "metric" else "number")


def _group(rows: Sequence[Result]) -> Html:
    first = rows[0]
    name = join(TASKS.get(first.task, first.task), " ", element("span", first.split))
    protocol = element("small", "protocol ", element("code", first.protocol))
    head = element("th", name, " ", protocol, colspan=6, scope="rowgroup")
    return element(
        "tbody", element("tr", head, class_="group"), *(_row(row, row is first) for row in rows)
    )


def _row(row: Result, is_primary: bool) -> Html:
    low, high, chance = (metric(row.metric, x) for x in (*row.ci95, row.chance))
    is_share = unit_of(row.metric) == "share"
    drawing = chart.bar(row.metric, row.value, row.ci95, row.chance) if is_share else None
    return element(
        "tr",
        element("th", metric_name(row.metric), scope="row"),
        element("td", metric(row.metric, row.value), class_="number value"),
        element("td", drawing, class_="drawn"),
        element("td", f"{low} \N{EN DASH} {high}", class_="number"),
        element("td", chance, class_="number"),
        element("td", f"{row.n:,}", class_="number"),
        class_="primary" if is_primary else None,
    )


def configuration(inputs: Inputs) -> Section:
    """The resolved config and the environment."""
    if not inputs.config and not inputs.command:
        return Section("Configuration", None, join("this folder has no config.yaml"))
    environment = [
        element("div", element("dt", name), element("dd", str(value)))
        for name, value in inputs.command.items()
        if name != "command"
    ]
    return Section(
        "Configuration",
        join(
            _fold("config.yaml", element("pre", element("code", inputs.config)))
            if inputs.config
            else None,
            _fold("Environment", element("dl", *environment)) if environment else None,
        ),
    )


def _fold(title: str, body: Html) -> Html:
    return element("details", element("summary", title), body)


def foot() -> Html:
    """What wrote the page."""
    return element("footer", element("p", f"Written by vlm report, vlm {vlm.__version__}."))
