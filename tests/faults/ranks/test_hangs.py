"""D3: a step that hangs ends, with its rank, its number and all stacks, whatever it hangs in."""

import os
import signal
import time
from contextlib import suppress

import pytest

TIMEOUT_S = 4


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


def check_ended(process, run, where, workers=()):
    """It exits with 6 and says where it was; how long that took."""
    began = time.monotonic()
    process.wait(timeout=60)
    took_s = time.monotonic() - began
    while any(is_alive(pid) for pid in workers):
        assert time.monotonic() < began + 60
        time.sleep(0.05)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # a fork server on its way out holds the pipes
    _, err = process.communicate(timeout=60)
    assert process.returncode == 6, err
    assert "error: rank 0 hangs: step " in err
    assert f"waiting for data, for {TIMEOUT_S} s (run.step_timeout_s)" in err
    stacks = (run / "stacks-rank0.txt").read_text()
    assert "_fit" in stacks
    assert where in stacks
    return f"exit 6 after {took_s:.1f} s"


@pytest.mark.parametrize("stopped", [2, pytest.param(1, marks=pytest.mark.long)])
def test_stopped_loader_workers(begin, run, record, stopped):
    words = ("train.steps=100000", "data.num_workers=2", f"run.step_timeout_s={TIMEOUT_S}")
    process = begin(*words)
    # below the run are Python's resource tracker and the fork server, and below that the workers
    workers = [pid for child in children(process.pid) for pid in children(child)]
    assert len(workers) == 2
    for pid in workers[:stopped]:
        os.kill(pid, signal.SIGSTOP)
    outcome = check_ended(process, run, "dataloader.py", workers)
    record(
        "D3", f"SIGSTOP to {stopped} of 2 loader workers, step_timeout_s={TIMEOUT_S}", 1, outcome
    )


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_disk_that_does_not_answer(begin, run, tmp_path, write_shard, record, num_workers):
    """Opening a pipe that nobody writes to waits for ever, as a network file system may."""
    shards = [tmp_path / f"{number:03}.tar" for number in range(100)]  # more than stay open
    for path in shards:
        write_shard(path, 4)
    words = ("train.steps=100000", f"data.num_workers={num_workers}", "run.save_every_steps=0")
    words += (f"run.step_timeout_s={TIMEOUT_S}", f"data.train={tmp_path}/*.tar")
    process = begin(*words)
    for path in shards:
        path.unlink()
        os.mkfifo(path)
    outcome = check_ended(process, run, "dataloader.py" if num_workers else "_open_tar")
    record("D3", f"a disk that does not answer, {num_workers} workers", 1, outcome)


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
    ranks = start("run.step_timeout_s=3", "train.steps=400", world_size=1)
    assert ranks.wait() == [0]
    assert not list(run.glob("stacks-*"))
