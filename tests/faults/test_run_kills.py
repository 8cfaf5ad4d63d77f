"""A1, A2: training runs killed at random instants end in the bits of one that nothing stopped."""

import json
import random
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from vlm import checkpoint

EVERY = 3  # steps between the saves of the config
EQUAL = ("step", "loss", "loss/contrastive", "lr", "grad_norm", "logit_scale")


class Runs:
    """Starts and restarts the run of a folder, on one rank or two."""

    def __init__(self, fork, config, ranks, overrides):
        self.fork, self.config, self.ranks, self.overrides = fork, str(config), ranks, overrides

    def start(self, folder):
        """A process a rank, as torchrun's environment has them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        overrides = [f"run.dir={folder}", *self.overrides]
        children = []
        for rank in range(self.ranks):
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.ranks}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            env = {name: str(value) for name, value in env.items()} if self.ranks > 1 else {}
            children.append(self.fork("run", env=env, config=self.config, overrides=overrides))
        return children

    def finish(self, folder):
        for child in self.start(folder):
            code, out = child.wait()
            assert code == 0, out


def lines(folder):
    path = folder / "metrics.jsonl"
    texts = path.read_text().splitlines() if path.exists() else []
    return [json.loads(text) for text in texts if text.endswith("}")]


def outcome(folder):
    """All that must be equal to the bit: model, checkpoint, counters, and the log's numbers."""
    newest = checkpoint.load_newest(folder / "checkpoints")
    files = sorted(f for f in newest.path.iterdir() if f.name != "manifest.json")
    return {
        "model": (folder / "model/model.safetensors").read_bytes(),
        **{f.name: f.read_bytes() for f in files},
        "log": [{key: line[key] for key in EQUAL} for line in lines(folder)],
    }


def check_restart(out, before, damage):
    """The restart went on from a checkpoint that is at most `damage` steps behind the log."""
    match = re.search(r"resuming .* at step (\d+) of", out)
    first = int(match[1]) if match else 0
    assert "passed over" not in out
    if "step" in out:  # it came as far as the first step
        assert first >= before - damage, (first, before)


def shared_memory():
    return {path.name for path in Path("/dev/shm").iterdir() if path.name.startswith("torch_")}


def check_kills(runs, whole, tmp_path, kills, *, damage, seed):
    """Kill and restart until `kills` kills have hit; the number of runs that came to their end."""
    rng = random.Random(seed)
    expected = outcome(whole)
    killed, finished, number, before = 0, 0, 0, 0
    folder = tmp_path / "run-0"
    memory = shared_memory()
    while killed < kills or finished == 0:
        children = runs.start(folder)
        target = rng.randint(0, 40)  # of 30 steps: some runs come to their end
        while len(lines(folder)) < target and any(child.poll() is None for child in children):
            time.sleep(0.005)
        if killed < kills:
            time.sleep(rng.uniform(0, 0.1))
            for child in children:  # all before any is waited for
                child.send_kill()
        ended = [child.wait() for child in children]
        if any(code == -signal.SIGKILL for code, _ in ended):
            killed += 1
            check_restart(children[0].out.read_text(), before, damage)
            before = len(lines(folder))
            continue
        assert [code for code, _ in ended] == [0] * len(children), ended
        check_restart(children[0].out.read_text(), before, damage)
        assert outcome(folder) == expected
        # three: a kill after the last save's rename leaves its pruning undone
        assert len(checkpoint.list_checkpoints(folder / "checkpoints")) in (2, 3)
        assert not [p for p in folder.rglob("*") if ".tmp-" in p.name or ".trash-" in p.name]
        assert shared_memory() <= memory
        finished, number, before = finished + 1, number + 1, 0
        shutil.rmtree(folder)
        folder = tmp_path / f"run-{number}"
    return finished


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("saving", "kills"),
    [("async", 2), pytest.param("async", 25, marks=LONG), pytest.param("sync", 25, marks=LONG)],
)
def test_killed_runs_end_in_the_same_bits(fork, config, tmp_path, record, saving, kills):
    runs = Runs(fork, config, 1, [f"run.async_save={'true' if saving == 'async' else 'false'}"])
    other = Runs(fork, config, 1, [f"run.async_save={'true' if saving == 'sync' else 'false'}"])
    other.finish(tmp_path / "whole")  # so that both ways of saving are compared, too
    # the save that a kill hits is lost; so is, in the thread, up to the next one's beginning
    damage = 2 * EVERY if saving == "async" else EVERY
    finished = check_kills(runs, tmp_path / "whole", tmp_path, kills, damage=damage, seed=saving)
    record(
        "A1",
        f"SIGKILL of a training run, {saving} saves",
        kills,
        f"{finished} runs came to the end, bit-equal; at most {damage} steps redone",
    )


@pytest.mark.parametrize("kills", [pytest.param(20, marks=LONG)])
def test_killed_runs_of_two_ranks_end_in_the_same_bits(fork, config, tmp_path, record, kills):
    runs = Runs(fork, config, 2, [])
    runs.finish(tmp_path / "whole")
    finished = check_kills(runs, tmp_path / "whole", tmp_path, kills, damage=2 * EVERY, seed=2)
    record(
        "A2",
        "SIGKILL of both ranks of a run over gloo",
        kills,
        f"{finished} runs came to the end, bit-equal; at most {2 * EVERY} steps redone",
    )
