"""Exposed communication: what a rank waits for others, and nothing that is hidden."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
SCRIPT = Path(__file__).with_name("slow_rank.py")
SLEEP_S = 0.4  # the script's


@pytest.fixture(scope="module")
def waited(config, environment, tmp_path_factory):
    """Seconds that each rank waited, by case."""
    run = tmp_path_factory.mktemp("slow") / "run"
    done = subprocess.run(
        [*TORCHRUN, SCRIPT, config, run],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {(row["case"], row["rank"]): row for row in rows}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("where", ["forward", "backward", "profiled"])
def test_a_rank_waits_for_one_that_is_slow(waited, strategy, where):
    even = waited[strategy, 0]["waited"]
    late = waited[f"{strategy} {where}", 0]["waited"]
    assert SLEEP_S * 0.9 < late < SLEEP_S + even + 0.3
    assert waited[f"{strategy} {where}", 1]["waited"] < SLEEP_S / 2


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_hidden_does_not_count(waited, rank):
    row = waited["hidden", rank]
    assert row["waited"] < SLEEP_S / 4 < SLEEP_S < row["took"]
