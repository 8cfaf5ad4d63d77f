"""A1, A3: killed at any instant of a save, the older or the newer checkpoint loads."""

import random
import re
import time
from collections import Counter

import pytest
import torch

from vlm import checkpoint

TRACE = "trace=%file,%desc"  # all calls that can change a disk


def is_whole(loaded):
    """Whether the tensors are those that fork_server.py saves for the step."""
    step = loaded.state["step"]
    values = torch.arange(30_000, dtype=torch.float32) + step
    return (
        loaded.groups["model"]["weight"].equal(values)
        and loaded.groups["optimizer"]["weight/step"].equal(values)
        and loaded.path.name == f"step-{step:08d}"
    )


@pytest.mark.parametrize("kills", [8, pytest.param(50, marks=pytest.mark.long)])
def test_saves_killed_at_random_instants(fork, tmp_path, record, kills):
    rng = random.Random(kills)
    first, killed = 1, 0
    while killed < kills:
        child = fork("save", folder=str(tmp_path), first=first, last=first + 500)
        time.sleep(rng.uniform(0.002, 0.2))
        child.send_kill()
        code, out = child.wait()
        assert code == -9, out
        killed += 1
        loaded = checkpoint.load_newest(tmp_path)
        assert loaded is None or (is_whole(loaded) and not loaded.skipped)
        first = loaded.state["step"] + 1 if loaded else 1
    child = fork("save", folder=str(tmp_path), first=first, last=first)
    assert child.wait()[0] == 0, child.out.read_text()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[-1] == f"step-{first:08d}"
    assert len(names) == 2, "leftovers of a kill"
    record("A1", "SIGKILL while saving in a loop", killed, "newest whole, loads")


def calls_of_a_save(log):
    """(name, number of it in its thread) of each call of the thread that saves."""
    lines = [match for line in log.splitlines() if (match := re.match(r"(\d+) +(\w+)\(", line))]
    saver = next(m[1] for m in lines if "fsync" in m[2])
    counts, calls = Counter(), []
    for match in lines:
        if match[1] == saver:
            counts[match[2]] += 1
            calls.append((match[2], counts[match[2]]))
    return calls


@pytest.mark.system("strace")
@pytest.mark.parametrize("kills", [10, pytest.param(None, marks=pytest.mark.long)])
def test_a_save_killed_at_its_system_calls(fork, traced, tmp_path, record, kills):
    """The third save, which also deletes the first; `kills` of its calls, or every one."""
    folder = tmp_path / "calls"
    assert fork("save", folder=str(folder), first=1, last=2).wait()[0] == 0
    code, out, log = traced("save", "-e", TRACE, folder=str(folder), first=3, last=3)
    assert code == 0, out
    calls = calls_of_a_save(log)
    assert {"mkdir", "write", "fsync", "rename", "rmdir"} <= {name for name, _ in calls}
    chosen = calls if kills is None else random.Random(0).sample(calls, kills)
    steps = Counter()
    for name, when in chosen:
        folder = tmp_path / f"{name}-{when}"
        assert fork("save", folder=str(folder), first=1, last=2).wait()[0] == 0
        inject = f"inject={name}:signal=KILL:when={when}"
        code, out, _ = traced(
            "save", "-e", TRACE, "-e", inject, folder=str(folder), first=3, last=3
        )
        assert code == -9, f"{inject} did not fire: {out}"
        loaded = checkpoint.load_newest(folder)
        assert is_whole(loaded), inject
        assert not loaded.skipped, inject
        steps[loaded.state["step"]] += 1
        child = fork("save", folder=str(folder), first=4, last=4)
        assert child.wait()[0] == 0, child.out.read_text()
        assert checkpoint.load_newest(folder).state["step"] == 4
        assert len(list(folder.iterdir())) == 2, "leftovers of a kill"
    assert set(steps) == {2, 3}
    record(
        "A3",
        f"SIGKILL at {'each' if kills is None else 'some'} of a save's {len(calls)} file calls",
        len(chosen),
        f"loads the older {steps[2]}, the newer {steps[3]}, nothing else",
    )
