"""G: a signal to one rank, to all or to torchrun ends all at one step, saved; nothing is redone."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from vlm.checkpoint import list_checkpoints, load_newest

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
SUITE = '{tasks: [{task: zero_shot, split: val, data: "%s/datasets/emoji/val_artist-*.tar"}]}'


def saved_step(run):
    return load_newest(run / "checkpoints").state["step"]


def steps(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fault", ["terminate", pytest.param("usr1", marks=pytest.mark.long)])
def test_a_signal_to_one_rank_stops_all_at_one_step(start, run, record, fault, rank):
    ranks = start(faults=[(fault, 6, rank)])
    assert ranks.wait() == [75, 75]
    (line,) = ranks.errors().values()  # said once
    step = saved_step(run)
    assert line == f"asked to stop: saved at step {step} of 12; continue with --resume auto"
    assert step in (6, 7)
    assert (run / "PREEMPTED").read_text() == f"{line}\n"
    assert steps(run) == list(range(1, step + 1))  # none beyond what is saved
    resumed = start("--resume", "auto")
    assert resumed.wait() == [0, 0]
    assert not (run / "PREEMPTED").exists()
    assert steps(run) == list(range(1, 13))
    record("G", f"{fault}, rank {rank} of 2, in a step", 1, f"both exit 75 at step {step}")


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(s, marks=pytest.mark.long) for s in range(1, 8))]
)
def test_signals_at_random_times_lose_nothing(start, run, record, seed):
    """Two in a row, the second while the first is obeyed; start-up and evaluation included."""
    rng = random.Random(seed)
    ranks = start("train.steps=60")
    time.sleep(rng.uniform(0, 2))
    hit = [rng.choice([[0], [1], [0, 1]]) for _ in range(2)]
    for targets in hit:
        for rank in targets:
            if ranks.processes[rank].is_alive():
                os.kill(ranks.processes[rank].pid, signal.SIGTERM)
        time.sleep(rng.uniform(0, 0.05))
    codes = ranks.wait()
    assert codes in ([75, 75], [0, 0], [-15, -15]), [ranks.said(0)[-5:], ranks.said(1)[-5:]]


def test_a_second_signal_does_not_break_the_save(start, run, record):
    """A stream of them, from the first to the end."""
    ranks = start("train.steps=100000", world_size=1)
    ranks.until("step     2")
    num_signals = 0
    while ranks.processes[0].is_alive():
        os.kill(ranks.processes[0].pid, signal.SIGTERM)
        num_signals += 1
        time.sleep(0.002)
    assert ranks.wait() == [75]
    assert saved_step(run) == steps(run)[-1]
    record("G", f"{num_signals} signals, one every 2 ms, to the end", 1, "exit 75, saved whole")


def test_during_start_up_it_ends_with_75_and_what_was_saved_stays(start, run, record):
    assert start(world_size=1).wait() == [0]
    before = [p.name for p in list_checkpoints(run / "checkpoints")]
    ranks = start("train.steps=24", "--resume", "auto", world_size=1)
    time.sleep(0.15)
    while not ranks.said(0) and ranks.processes[0].is_alive():
        os.kill(ranks.processes[0].pid, signal.SIGTERM)
        time.sleep(0.05)
    assert ranks.wait() == [75]
    assert [p.name for p in list_checkpoints(run / "checkpoints")][-len(before) :] == before


def test_torchrun_passes_it_on(config, run, environment, record):
    """torchrun itself returns 1, so the marker is what a scheduler looks at."""
    process = subprocess.Popen(
        [*TORCHRUN, "-m", "vlm", "train", config, f"run.dir={run}", "train.steps=100000"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step"):
            break
    began = time.monotonic()
    process.terminate()
    out, _ = process.communicate(timeout=60)
    took_s = time.monotonic() - began
    assert process.returncode != 0
    assert took_s < 25
    assert out.count("\nasked to stop: saved at step ") == 1, out
    assert (run / "PREEMPTED").exists()
    assert saved_step(run) == steps(run)[-1]
    record(
        "G", "SIGTERM to torchrun, 2 ranks", 1, f"saved, marker, torchrun ends in {took_s:.1f} s"
    )
