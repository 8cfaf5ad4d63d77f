"""`vlm compare RUN...`: what two or more runs measured, side by side, with paired tests."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm.eval.compare import Comparison

HELP = "set runs side by side: how their primary metrics differ from the first's, tested"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="a run folder with results.json, or a results file"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="Markdown file of the same")


def run(args: argparse.Namespace) -> int:
    """Compare, and print the tables.

    Raises:
        ConfigError: A run has no results, nothing can be compared, or --out exists.
        DataError: A file is damaged.
    """
    from vlm.eval.compare import compare, markdown, notes
    from vlm.retrieval.tables import refuse_existing, write_new

    refuse_existing(args.out)
    comparison = compare(args.runs)
    _print(comparison)
    for line in notes(comparison):
        print(line)
    if args.out is not None:
        write_new(args.out, markdown(comparison))
        print(f"written: {args.out}")
    return 0


def _print(comparison: "Comparison") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from vlm.eval.compare import COLUMNS, NUMBERS, cells

    def table(columns: list[str], rows: list[list[str]], right: tuple[int, ...] = ()) -> Table:
        made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for number, name in enumerate(columns):
            made.add_column(Text(name), justify="right" if number in right else "left")
        for row in rows:
            made.add_row(*map(Text, row))  # Text: what is in brackets is no style
        return made

    console = Console(highlight=False, width=None if Console().is_terminal else 200)
    if comparison.settings:
        settings = [[key, *values] for key, values in comparison.settings]
        console.print(table(["setting", *comparison.names], settings))
    console.print(table(list(COLUMNS), [cells(row) for row in comparison.rows], NUMBERS))
