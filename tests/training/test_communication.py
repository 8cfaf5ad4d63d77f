"""Exposed communication: what a rank waits for others, and nothing that is hidden."""

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("slow_rank.py")
SLEEP_S = 0.8  # the script's


@pytest.fixture(scope="module")
def waited(config, fork_ranks, tmp_path_factory):
    """Seconds that each rank waited, by case."""
    folder = tmp_path_factory.mktemp("slow") / "run"
    ranks = fork_ranks(2, SCRIPT, CONFIG=str(config), FOLDER=str(folder))
    ranks.finish()
    rows = [
        {**json.loads(line), "rank": rank}
        for rank in range(2)
        for line in ranks.said(rank)
        if line.startswith("{")
    ]
    return {(row["case"], row["rank"]): row for row in rows}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("where", ["forward", "backward", "profiled"])
def test_a_rank_waits_for_one_that_is_slow(waited, strategy, where):
    late, slow = (waited[f"{strategy} {where}", rank]["waited"] for rank in range(2))
    assert late > 0.6 * SLEEP_S  # what rank 0 still computes meanwhile is no wait
    assert slow < late - SLEEP_S / 4  # a busy machine makes all ranks wait


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_hidden_does_not_count(waited, rank):
    row = waited["hidden", rank]
    assert row["waited"] < SLEEP_S / 2 < SLEEP_S < row["took"]
