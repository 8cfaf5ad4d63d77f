"""The bars a release must pass: command, figure, bar, and PASS, FAIL or NOT RUN.

    python benchmarks/accept.py

Figures come from `benchmarks/results/`, where each command leaves its JSON; a figure that nobody
measured is NOT RUN.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


class Row(NamedTuple):
    """One bar: what is measured by which command, how to read it from its JSON, and the bar."""

    what: str
    command: str
    result: str
    read: Callable[[dict[str, Any]], float]
    at_least: float | None = None
    at_most: float | None = None


def median(name: str) -> Callable[[dict[str, Any]], float]:
    return lambda result: result["median"][name]


def times_chance(name: str) -> Callable[[dict[str, Any]], float]:
    return lambda result: result["median"][name] / result["chance"][name]


DEMO, LEARNING, HOUSE = "benchmarks/demo.py", "benchmarks/learning.py", "benchmarks/house.py"
T2I = "retrieval/val_artist/text_to_image_recall@10"
ROWS = [
    Row(
        "make demo, fresh clone, no download: s", HOUSE, "house", lambda r: r["demo_s"], at_most=480
    ),
    Row("training of the demo: s", DEMO, "demo", lambda r: max(r["seconds_training"]), at_most=240),
    Row("zero_shot/val_artist/acc1", DEMO, "demo", median("zero_shot/val_artist/acc1"), 0.18),
    Row(T2I, DEMO, "demo", median(T2I), 0.45),
    Row("zero_shot/val_concept/acc1", DEMO, "demo", median("zero_shot/val_concept/acc1"), 0.08),
    Row(
        "caption/val_artist/token_f1, times chance",
        DEMO,
        "demo",
        times_chance("caption/val_artist/token_f1"),
        3.0,
    ),
    Row("ViT: attention blocks", HOUSE, "house", lambda r: r["vit_blocks"], 4),
    Row("ViT: share of encoder's parameters", HOUSE, "house", lambda r: r["vit_parameters"], 0.5),
    Row("ViT: share of encoder's FLOPs", HOUSE, "house", lambda r: r["vit_flops"], 0.5),
    Row(
        "ours / open_clip, val_artist",
        LEARNING,
        "learning",
        lambda r: r["ratio"]["val_artist"],
        1.0,
    ),
    Row(
        "ours / open_clip, val_concept",
        LEARNING,
        "learning",
        lambda r: r["ratio"]["val_concept"],
        1.0,
    ),
    Row("make test, fresh clone: s", HOUSE, "house", lambda r: r["test_s"], at_most=360),
    Row("make check: s", HOUSE, "house", lambda r: r["check_s"], at_most=60),
    Row("vlm --help: s", HOUSE, "house", lambda r: r["help_s"], at_most=0.3),
]


def main() -> None:
    table = Table("what", "command", "figure", "bar", "")
    for row in ROWS:
        figure, verdict = judge(row)
        bar = f"≥ {row.at_least:g}" if row.at_least is not None else f"≤ {row.at_most:g}"
        table.add_row(row.what, row.command, figure, bar, verdict)
    console = Console(width=120)
    console.print(table)
    console.print(
        "By test: kill -9 and resume to the same bits, one and two ranks (tests/training);"
    )
    console.print("the wheel on a user's table (tests/test_wheel.py); error messages (tests/).")


def judge(row: Row) -> tuple[str, str]:
    path = RESULTS / f"{row.result}.json"
    try:
        figure = row.read(json.loads(path.read_text()))
    except (OSError, KeyError):
        return "", "NOT RUN"
    low = row.at_least is None or figure >= row.at_least
    high = row.at_most is None or figure <= row.at_most
    return f"{figure:.3g}", "PASS" if low and high else "FAIL"


if __name__ == "__main__":
    main()
