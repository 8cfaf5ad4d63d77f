"""results.md: what an evaluation measured, as a fragment of a model card."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from vlm.config.find import write_yaml
from vlm.eval.results import Head, Result
from vlm.metrics.units import unit_of

MARKER = "<!-- written by vlm eval -->"
_TYPES = {  # the hub's names of tasks; of others their own
    "zero_shot": "zero-shot-image-classification",
    "caption": "image-to-text",
    "questions": "visual-question-answering",
}
_COLUMNS = ("task", "split", "metric", "value", "95% interval", "chance", "n", "protocol")


def model_card(
    heads: Sequence[Head], results: Sequence[Result], *, name: str, suite: str, out: str
) -> str:
    """Markdown with the hub's `model-index` as front matter, and a table of all results.

    Args:
        heads: Of the tasks, for their data and model.
        results: All rows.
        name: The model's.
        suite: As the command gave it.
        out: Likewise.
    """
    fingerprints = {f"{head.task}-{head.split}": head.fingerprint for head in heads}
    front = write_yaml({"model-index": [{"name": name, "results": _index(results, fingerprints)}]})
    data = dict.fromkeys(
        f"- Data `{_data(head)}`, fingerprint `{head.fingerprint}`" for head in heads
    )
    lines = [
        "---",
        front.rstrip(),
        "---",
        "",
        MARKER,
        "",
        "## Evaluation",
        "",
        *table(_COLUMNS, [_row(result) for result in results], right=(3, 4, 5, 6)),
        "",
        "Intervals come from 1,000 resamples of whole concepts, or of pictures where none share",
        "one; chance is what a model reaches that does not look. Results with equal protocols may",
        "be compared.",
        "",
        f"- Model: sha256 `{heads[0].model}` of weights, architecture, preprocessing and tokenizer",
        *data,
        f"- To reproduce: `vlm eval MODEL {suite} --out {out}`",
        "",
    ]
    return "\n".join(lines)


def is_card(path: Path) -> bool:
    """Whether a file was written by this module."""
    return MARKER in path.read_text(errors="replace")


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()
) -> list[str]:
    """The lines of a Markdown table.

    Args:
        columns: Their names.
        rows: Their texts; a bar in one is escaped.
        right: Which columns hold numbers.
    """
    rule = ["---:" if i in right else "---" for i in range(len(columns))]
    return [f"| {' | '.join(map(_cell, row))} |" for row in (columns, rule, *rows)]


def shown(metric: str, value: float) -> str:
    """A number as a reader expects it, by its metric's unit."""
    kind = unit_of(metric)
    if kind == "share":
        return f"{100 * value:.2f}%"
    return f"{value:.3f}" if kind == "points" else f"{value:.1f}"


def interval(metric: str, ci95: Sequence[float]) -> str:
    """An interval, likewise."""
    return " .. ".join(shown(metric, end) for end in ci95)


def _index(results: Sequence[Result], fingerprints: Mapping[str, str]) -> list[dict[str, object]]:
    return [
        {
            "task": {"type": _TYPES.get(task, task.replace("_", "-")), "name": task},
            "dataset": {"type": split, "name": split, "revision": fingerprints[f"{task}-{split}"]},
            "metrics": [
                {"type": row.metric, "name": row.metric, "value": row.value} for row in rows
            ],
        }
        for (task, split), rows in groupby(results, key=lambda row: (row.task, row.split))
    ]


def _row(result: Result) -> list[str]:
    metric = result.metric
    return [
        result.task,
        result.split,
        metric,
        shown(metric, result.value),
        interval(metric, result.ci95),
        shown(metric, result.chance),
        f"{result.n:,}",
        f"`{result.protocol}`",
    ]


def _data(head: Head) -> str:
    return head.data if isinstance(head.data, str) else ", ".join(head.data)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
