"""Loss and gradients of every parameter are those of one process with the whole batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("parity.py")
NUM_CELLS = 3 * 4 * 2 * 3 * 2  # losses, pairs, types, tiles, accumulation


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_cell_of_the_parity_table(tmp_path, world_size):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), str(world_size), tmp_path / "store"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    said = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world_size, said
    lines = said[0][0].splitlines()
    cells = [json.loads(line) for line in lines if line.startswith("{")]  # gloo speaks, too
    assert len(cells) == NUM_CELLS
    for cell in cells:
        is_double = cell["cell"][-1] == "float64"
        assert cell["loss"] < (1e-10 if is_double else 1e-6), cell
        own = 4 * cell["own_of_fp32"] + 1e-8  # what plain fp32 loops are off by, four times
        assert cell["gradients"] < (1e-10 if is_double else own), cell
