"""D3: a step that hangs ends, with its rank, its number and all stacks, whatever it hangs in."""

import os
import signal
import subprocess
import time

import pytest

TIMEOUT_S = 3


def children(pid):
    """The processes that a process has started."""
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/children") as file:
            found += [int(number) for number in file.read().split()]
    return found


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_stopped_loader_worker(config, run, environment, vlm_command, record):
    """Its run has a process of its own: the whole tree is looked at."""
    words = ("train.steps=100000", "data.num_workers=2", f"run.step_timeout_s={TIMEOUT_S}")
    process = subprocess.Popen(
        [*vlm_command, config, f"run.dir={run}", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step"):
            break
    # below the run are Python's resource tracker and the fork server, and below that the workers
    workers = [pid for child in children(process.pid) for pid in children(child)]
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    took_s = time.monotonic() - began
    assert process.returncode == 6, err
    assert "error: rank 0 hangs: step " in err
    assert f"waiting for data, for {TIMEOUT_S} s (run.step_timeout_s)" in err
    stacks = (run / "stacks-rank0.txt").read_text()
    assert "_fit" in stacks
    assert "dataloader.py" in stacks
    deadline = time.monotonic() + 5
    while any(is_alive(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    record("D3", f"stopped workers, step_timeout_s={TIMEOUT_S}", 1, f"exit 6 after {took_s:.1f} s")


@pytest.mark.parametrize("fault", ["sleep", pytest.param("stop", marks=pytest.mark.long)])
def test_a_rank_that_hangs_is_named_by_all_that_can(start, run, fault):
    ranks = start(f"run.step_timeout_s={TIMEOUT_S}", faults=[(fault, 5, 1)])
    watched = [0, 1] if fault == "sleep" else [0]
    assert ranks.wait(timeout_s=60, ranks=watched) == [6] * len(watched)
    other = "rank 1: step 5, computing" if fault == "sleep" else "no answer from rank 1"
    assert f"rank 0 hangs: step 5, computing, for {TIMEOUT_S} s" in ranks.errors()[0]
    assert other in ranks.errors()[0]
    if fault == "sleep":
        assert "in sleep" in (run / "stacks-rank1.txt").read_text()


def test_steps_that_end_in_time_leave_no_trace(start, run):
    """Each step has its own time: together they take longer than one may."""
    ranks = start("run.step_timeout_s=0.7", "train.steps=60", world_size=1)
    assert ranks.wait() == [0]
    assert not list(run.glob("stacks-*"))
