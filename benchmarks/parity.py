"""Prints the parity table into docs/losses.md: every cell's worst error against loops over pairs.

    python benchmarks/parity.py                # 1 minute

Runs `tests/losses/parity.py` on 1, 2 and 4 gloo ranks, as the tests do.
"""

import json
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tests/losses/parity.py"
PAGE = ROOT / "docs/losses.md"
MARKS = ("<!-- parity: begin -->\n", "<!-- parity: end -->\n")


def main() -> None:
    rows = [
        "| loss | batch | ranks | tiles | micro-batches | fp64: loss, gradients | fp32 |",
        "|---|---|---|---|---|---|---|",
    ]
    for world_size in (1, 2, 4):
        rows += map(str, table(cells(world_size), world_size))
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    PAGE.write_text(before + MARKS[0] + "\n".join(rows) + "\n" + MARKS[1] + after)
    print("\n".join(rows))


def cells(world_size: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(
                [sys.executable, SCRIPT, str(rank), str(world_size), f"{folder}/store"],
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(world_size)
        ]
        said = [rank.communicate()[0] for rank in ranks]
    return [json.loads(line) for line in said[0].splitlines()]


def table(found: list[dict[str, Any]], world_size: int) -> list[str]:
    """A line for each loss, batch and tile, with both types of numbers."""

    def place(cell: dict[str, Any]) -> list[str]:
        return list(cell["cell"][:4])

    lines = []
    for (loss, batch, tile, parts), group in groupby(sorted(found, key=place), key=place):
        errors = {cell["cell"][4]: f"{cell['loss']:.0e}, {cell['gradients']:.0e}" for cell in group}
        what = f"| {loss} | {batch} | {world_size} | {tile} | {parts} "
        lines.append(f"{what}| {errors['float64']} | {errors['float32']} |")
    return lines


if __name__ == "__main__":
    main()
