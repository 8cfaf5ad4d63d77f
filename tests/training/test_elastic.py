"""A run that is killed and resumed with other numbers of ranks: the same losses, every sample once.

The ledger is written by the ranks themselves, from the batches they were given.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from vlm.checkpoint import load_newest
from vlm.data.dataset import open_shards

RECORDER = Path(__file__).with_name("recorder.py")
DATA = Path(__file__).parents[2] / "datasets/emoji/val_artist-*.tar"
GLOBAL_BATCH = 16
# without Muon, which iterates in bf16: only the order of sums may differ
SETTINGS = (f"train.global_batch_size={GLOBAL_BATCH}", "optim.name=adamw", "run.save_every_steps=4")
NUM_STEPS = 60  # of 16 samples from 560: the second epoch begins in step 35


class Ranks:
    """Processes of one run, in a process group of their own each, started without a launcher."""

    def __init__(self, config, run, ledgers, world_size, environment, steps):
        self.ledgers = [ledgers / f"{rank}.jsonl" for rank in range(world_size)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ledgers.mkdir()
        words = ["train", str(config), f"run.dir={run}", "--resume", "auto", *SETTINGS]
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(RECORDER), *words, f"train.steps={steps}"],
                env={
                    **environment,
                    "LEDGER": str(ledger),
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                },
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            for rank, ledger in enumerate(self.ledgers)
        ]

    def kill_at(self, step):
        """SIGKILL every rank as soon as the first has taken `step`."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.steps_taken(0)[-1:] < [step]:
            assert self.processes[0].poll() is None, self.processes[0].stderr.read()
            time.sleep(0.01)
        for process in self.processes:
            os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.communicate()

    def finish(self):
        for process in self.processes:
            _, err = process.communicate(timeout=240)
            assert process.returncode == 0, err

    def steps_taken(self, rank):
        return [step for step, _ in self.entries(rank)]

    def entries(self, rank):
        path = self.ledgers[rank]
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]


def run_legs(config, tmp_path, environment, legs, steps):
    """Run with (ranks, step to be killed at, or None), one leg after the other; the ledger."""
    run, taken = tmp_path / "elastic", {}
    for number, (world_size, kill_step) in enumerate(legs):
        newest = load_newest(run / "checkpoints") if number else None
        first = newest.state["step"] if newest else 0
        ranks = Ranks(config, run, tmp_path / f"ledger-{number}", world_size, environment, steps)
        ranks.finish() if kill_step is None else ranks.kill_at(kill_step)
        assert ranks.steps_taken(0)[0] == first
        for rank in range(world_size):
            for step, ids in ranks.entries(rank):
                taken.setdefault(step, {})[number, rank] = ids
    # of the last leg that took a step, the ranks in order: what the run's weights have seen
    last = {step: max(leg for leg, _ in by) for step, by in taken.items()}
    return run, [
        sum((ids for (leg, _), ids in sorted(taken[step].items()) if leg == last[step]), [])
        for step in sorted(taken)
    ]


def check(config, environment, metrics, straight, tmp_path, legs, steps):
    run, ledger = run_legs(config, tmp_path, environment, legs, steps)
    num_samples = len(open_shards(str(DATA)))
    assert len(ledger) == steps
    assert {len(ids) for ids in ledger} == {GLOBAL_BATCH}
    stream = sum(ledger, [])
    for start in range(0, len(stream), num_samples):
        epoch = Counter(stream[start : start + num_samples])
        assert set(epoch.values()) == {1}
    complete = stream[: len(stream) // num_samples * num_samples]
    assert sorted(complete) == sorted(list(range(num_samples)) * (len(complete) // num_samples))
    assert ledger == straight[1]
    assert [line["step"] for line in metrics(run)] == list(range(1, steps + 1))
    for ours, theirs in zip(metrics(run), metrics(straight[0]), strict=True):
        for term in ("loss/contrastive", "loss/caption"):
            assert ours[term] == pytest.approx(theirs[term], rel=1e-5, abs=1e-5), ours["step"]


@pytest.fixture(scope="module")
def straight(config, environment, tmp_path_factory):
    """One rank, never stopped."""
    return run_legs(
        config, tmp_path_factory.mktemp("straight"), environment, [(1, None)], NUM_STEPS
    )


def test_two_ranks_then_one_then_two_are_one_run(config, environment, metrics, straight, tmp_path):
    legs = [(2, 17), (1, 38), (2, None)]
    check(config, environment, metrics, straight, tmp_path, legs, NUM_STEPS)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_random_world_sizes_and_kills_are_one_run(
    config, environment, metrics, straight, tmp_path, seed
):
    rng = random.Random(seed)
    kills = sorted(rng.sample(range(5, NUM_STEPS - 2), rng.randint(2, 4)))
    legs = [(rng.choice([1, 2, 4]), kill) for kill in [*kills, None]]
    check(config, environment, metrics, straight, tmp_path, legs, NUM_STEPS)
    shutil.rmtree(tmp_path / "elastic")
