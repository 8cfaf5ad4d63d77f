"""G: a signal to one rank, to all or to torchrun ends all at one step, saved; nothing is redone."""

import io
import json
import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Timer

import pytest
from PIL import Image

from vlm.checkpoint import list_checkpoints, load_newest
from vlm.data.decode import decode_image
from vlm.errors import Preempted
from vlm.runtime.preemption import stop_signals

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
EMOJI = Path(__file__).parents[3] / "datasets/emoji"
SUITE = f"""\
tasks:
- {{task: retrieval, split: val, data: "{EMOJI}/val_artist-*.tar"}}
- {{task: caption, split: val, data: "{EMOJI}/val_artist-*.tar"}}
"""


def saved_step(run):
    return load_newest(run / "checkpoints").state["step"]


def steps(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def wait_for(path, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def is_caught(pid):
    """Whether the process has a handler of SIGTERM."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.long), 1])
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


@pytest.mark.parametrize("seed", [pytest.param(s, marks=pytest.mark.long) for s in range(12)])
def test_signals_at_random_times_lose_nothing(start, run, record, seed):
    """Two in a row, the second while the first is obeyed, to one rank or to both."""
    rng = random.Random(seed)
    ranks = start("train.steps=40")
    wait_for(run / "config.yaml")
    time.sleep(rng.uniform(0, 1.5))
    for targets in (rng.choice([[0], [1], [0, 1]]) for _ in range(2)):
        for rank in targets:
            if ranks.processes[rank].is_alive():
                os.kill(ranks.processes[rank].pid, signal.SIGTERM)
        time.sleep(rng.uniform(0, 0.05))
    codes = ranks.wait()
    assert codes in ([75, 75], [0, 0], [75, 0]), [ranks.said(0)[-5:], ranks.said(1)[-5:]]
    if codes[0] == 75:
        assert (run / "PREEMPTED").exists()
        assert saved_step(run) == steps(run)[-1]
    record("G", "two SIGTERMs at a random time to one or both of 2 ranks", 1, f"exit {codes}")


def test_a_second_signal_does_not_break_the_save(start, run, record):
    """A stream of them, from the first to the end."""
    ranks = start("train.steps=100000", world_size=1)
    ranks.until("step     2")
    num_signals, deadline = 0, time.monotonic() + 60
    while ranks.processes[0].is_alive() and time.monotonic() < deadline:
        with suppress(ProcessLookupError):  # it has ended since
            os.kill(ranks.processes[0].pid, signal.SIGTERM)
        num_signals += 1
        time.sleep(0.002)
    assert ranks.wait() == [75], ranks.text[-2000:]
    assert saved_step(run) == steps(run)[-1]
    record("G", f"{num_signals} signals, one every 2 ms, to the end", 1, "exit 75, saved whole")


def test_signals_arrive_though_the_parent_had_blocked_them(tmp_path):
    """Its mask is inherited, as from a fork server of loader workers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        with pytest.raises(Preempted), stop_signals(tmp_path):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_during_start_up_it_ends_with_75_and_what_was_saved_stays(start, run, record):
    assert start(world_size=1).wait() == [0]
    before = [p.name for p in list_checkpoints(run / "checkpoints")]
    ranks = start("train.steps=24", "--resume", "auto", world_size=1)
    while not is_caught(ranks.processes[0].pid):
        time.sleep(0.001)
    os.kill(ranks.processes[0].pid, signal.SIGTERM)
    assert ranks.wait() == [75]
    assert steps(run)[-1] == 12
    assert (run / "PREEMPTED").exists()
    assert [p.name for p in list_checkpoints(run / "checkpoints")][-len(before) :] == before
    record("G", "SIGTERM during start-up of a resumed run", 1, "exit 75, checkpoints stay")


def test_during_evaluation_it_ends_and_the_next_start_measures(start, run, tmp_path, record):
    suite = tmp_path / "suite.yaml"
    suite.write_text(SUITE)
    ranks = start(f"eval.suite={suite}")
    wait_for(run / "model")
    os.kill(ranks.processes[0].pid, signal.SIGTERM)
    assert ranks.wait()[0] == 75
    assert (run / "PREEMPTED").exists()
    assert saved_step(run) == 12
    assert not (run / "results.json").exists()
    assert start(f"eval.suite={suite}", "--resume", "auto").wait() == [0, 0]
    assert not (run / "PREEMPTED").exists()
    assert json.loads((run / "results.json").read_text())
    record("G", "SIGTERM to rank 0, during evaluation", 1, "exit 75; the next start measures")


def decode_for_ever(data):
    while True:
        decode_image(data)


def test_no_picture_takes_a_signal_for_damage(tmp_path, record):
    rng, file = random.Random(0), io.BytesIO()
    Image.effect_noise((300, 200), 50).save(file, "PNG")
    for _ in range(50):
        timer = Timer(rng.uniform(0.005, 0.03), os.kill, (os.getpid(), signal.SIGTERM))
        with stop_signals(tmp_path):
            timer.start()
            with pytest.raises(Preempted):
                decode_for_ever(file.getvalue())
    record("G", "SIGTERM while a picture is decoded", 50, "no bad sample, exit 75")


@pytest.mark.long
def test_a_signal_to_the_whole_group_finds_its_workers_working(begin, run, record):
    """As `timeout` or a scheduler sends it: to the run, its workers and their fork server."""
    words = ("data.num_workers=2", "train.steps=100000")
    process = begin(*words)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert err.startswith("asked to stop: saved at step ")
    assert err.count("\n") == 1
    assert saved_step(run) == steps(run)[-1]
    record("G", "SIGTERM to the process group, 2 loader workers", 1, "exit 75, saved")


def test_torchrun_passes_it_on(begin, run, record):
    """torchrun itself returns 1, so the marker is what a scheduler looks at."""
    process = begin("train.steps=100000", launcher=TORCHRUN)
    began = time.monotonic()
    process.terminate()
    _, err = process.communicate(timeout=60)
    took_s = time.monotonic() - began
    assert process.returncode != 0
    assert took_s < 25
    assert err.count("asked to stop: saved at step ") == 1, err
    assert (run / "PREEMPTED").exists()
    assert saved_step(run) == steps(run)[-1]
    record(
        "G", "SIGTERM to torchrun, 2 ranks", 1, f"saved, marker, torchrun ends in {took_s:.1f} s"
    )
