"""One rank of two, of which rank 1 is slow somewhere; each prints how long it waited.

Its upper-case names are set by test_communication.py.
"""

import contextlib
import json
import os
import sys
import time
from contextlib import closing

import torch
from torch.nn.parallel import DistributedDataParallel

from vlm.config.load import load_config
from vlm.runtime import distributed
from vlm.runtime.communication import Clock, backward, heard_by
from vlm.training.marks import OTHER, RANKS, Marks, marked
from vlm.training.setup import build_parts

SLEEP_S = 0.8


class Slow(torch.nn.Module):
    """Sleeps where it is, in the forward or in the backward pass."""

    def __init__(self, forward_s=0.0, backward_s=0.0):
        super().__init__()
        self.forward_s, self.backward_s = forward_s, backward_s

    def forward(self, x):
        time.sleep(self.forward_s)
        x = x * 1.0
        x.register_hook(lambda _: time.sleep(self.backward_s))
        return x


@contextlib.contextmanager
def slow(block, where):
    """Rank 1 sleeps in a Transformer block."""
    module = Slow(**{f"{where}_s": SLEEP_S * distributed.rank()}) if where else Slow()
    with contextlib.ExitStack() as stack:
        hook = block.register_forward_hook(lambda _, __, output: module(output), prepend=True)
        stack.callback(hook.remove)
        yield


def say(case, waited, took=0.0):
    print(json.dumps({"case": case, "waited": waited, "took": took}))


def steps(config, ranks, folder):
    """Training steps, one slow in the forward, one in the backward pass."""
    for strategy in ("ddp", "fsdp"):
        overrides = [f"train.strategy={strategy}", "optim.name=adamw", f"run.dir={folder}"]
        parts = build_parts(load_config(config, overrides), ranks)
        with closing(parts.batches(0, ranks)) as batches:
            parts.step(0, next(batches))
            for number, where in enumerate(("", "forward", "backward"), start=1):
                batch = next(batches)
                distributed.barrier()
                with slow(parts.step.module.encoders.text.blocks[0], where):
                    result = parts.step(number, batch)
                say(f"{strategy} {where}".strip(), result.communication_s)
            distributed.barrier()
            marks = Marks(parts.step.device)
            with (
                marked(parts.step, marks),
                slow(parts.step.module.encoders.text.blocks[0], "forward"),
            ):
                marks.start(OTHER)
                parts.step(number, batch)
                marks.stop()
            say(f"{strategy} profiled", marks.seconds[RANKS])


def hidden(rank):
    """Rank 1 is late with the gradients of the last layer, while rank 0 works on the first."""
    layers = [torch.nn.Linear(64, 64) for _ in range(2)]
    late = Slow(backward_s=SLEEP_S * (rank == 1))
    busy = Slow(backward_s=SLEEP_S * (rank == 0))
    network = torch.nn.Sequential(layers[0], busy, layers[1], late)
    wrapped = DistributedDataParallel(network, bucket_cap_mb=0.001)
    for _ in range(3):  # buckets are made anew after the first
        distributed.barrier()
        clock, began = Clock(torch.device("cpu")), time.perf_counter()
        with heard_by(clock):
            backward(wrapped(torch.ones(2, 64)).sum())
    say("hidden", clock.seconds, time.perf_counter() - began)


if __name__ == "__main__":
    sys.stdout = sys.stderr = open(LOG, "w", buffering=1)  # noqa: F821, SIM115
    os.environ.update(ENVIRONMENT)  # noqa: F821
    torch.set_num_threads(1)
    ranks = distributed.ranks_from_environment()
    steps(CONFIG, ranks, FOLDER)  # noqa: F821
    hidden(ranks.rank)
    distributed.stop()
