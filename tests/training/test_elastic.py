"""A run that is killed and resumed with other numbers of ranks: the same losses, every sample once.

The ledger is written by the ranks themselves, from the batches they were given.
"""

import json
import random
import time
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest

from vlm.checkpoint import load_newest
from vlm.data.dataset import open_shards

DATA = Path(__file__).parents[2] / "datasets/emoji/val_artist-*.tar"
GLOBAL_BATCH = 16
NUM_STEPS = 40  # from 560 samples: the second epoch begins in step 35
# without Muon, which iterates in bf16: only the order of sums may differ
SETTINGS = (
    f"train.global_batch_size={GLOBAL_BATCH}",
    f"train.steps={NUM_STEPS}",
    "optim.name=adamw",
    "run.save_every_steps=4",
)


RECORDER = Path(__file__).with_name("recorder.py")


def kill_at(ranks, step):
    """SIGKILL every rank as soon as the first has taken `step`."""
    while not (taken := entries(ranks, 0)) or taken[-1][0] < step:
        assert ranks.processes[0].is_alive(), ranks.text
        time.sleep(0.01)
    ranks.kill()


def entries(ranks, rank):
    """Steps, and the ids of their samples, that a rank has noted."""
    path = ranks.logs[rank].with_suffix(".ledger")
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]


def run_legs(config, fork_ranks, tmp_path, legs):
    """Run with (ranks, step to be killed at, or None), one leg after the other; the ledger."""
    run, taken = tmp_path / "run", {}
    for number, (world_size, kill_step) in enumerate(legs):
        newest = load_newest(run / "checkpoints") if number else None
        words = ["train", str(config), f"run.dir={run}", "--resume", "auto", *SETTINGS]
        ranks = fork_ranks(world_size, RECORDER, WORDS=words)
        ranks.finish() if kill_step is None else kill_at(ranks, kill_step)
        assert entries(ranks, 0)[0][0] == (newest.state["step"] if newest else 0)
        for rank in range(world_size):
            for step, ids in entries(ranks, rank):
                taken.setdefault(step, {})[number, rank] = ids
    return run, [_final(taken[step]) for step in sorted(taken)]


def _final(taken):
    """The ids of a step, rank by rank, of the last leg that took it: what the weights have seen."""
    last = max(leg for leg, _ in taken)
    return list(chain(*(ids for (leg, _), ids in sorted(taken.items()) if leg == last)))


def check(config, fork_ranks, metrics, straight, tmp_path, record, legs):
    run, ledger = run_legs(config, fork_ranks, tmp_path, legs)
    assert [len(ids) for ids in ledger] == [GLOBAL_BATCH] * NUM_STEPS
    num_samples, stream = len(open_shards(str(DATA))), list(chain(*ledger))
    assert sorted(stream[:num_samples]) == list(range(num_samples))  # exactly once
    for start in range(num_samples, len(stream), num_samples):
        assert max(Counter(stream[start : start + num_samples]).values()) == 1
    assert ledger == straight[1]
    assert [line["step"] for line in metrics(run)] == list(range(1, NUM_STEPS + 1))
    for ours, theirs in zip(metrics(run), metrics(straight[0]), strict=True):
        for term in ("loss/contrastive", "loss/caption"):
            assert ours[term] == pytest.approx(theirs[term], rel=1e-5, abs=1e-5), ours["step"]
    ranks = ", ".join(str(world_size) for world_size, _ in legs)
    record(
        "B2", f"killed between legs of {ranks} ranks", len(legs) - 1, "same losses, same samples"
    )


@pytest.fixture(scope="module")
def straight(config, fork_ranks, tmp_path_factory):
    """One rank, never stopped."""
    return run_legs(config, fork_ranks, tmp_path_factory.mktemp("straight"), [(1, None)])


def test_two_ranks_then_one_then_two_are_one_run(
    config, fork_ranks, metrics, straight, tmp_path, record
):
    legs = [(2, 9), (1, 21), (2, None)]
    check(config, fork_ranks, metrics, straight, tmp_path, record, legs)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_random_numbers_of_ranks_and_kills_are_one_run(
    config, fork_ranks, metrics, straight, tmp_path, record, seed
):
    rng = random.Random(seed)
    kills = sorted(rng.sample(range(5, NUM_STEPS - 2), rng.randint(2, 4)))
    legs = [(rng.choice([1, 2, 4]), kill) for kill in [*kills, None]]
    check(config, fork_ranks, metrics, straight, tmp_path, record, legs)
