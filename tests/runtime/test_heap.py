"""Memory that is free and still held, given back."""

import ctypes
import json
import os
import subprocess
import sys

import pytest
import torch

from vlm.runtime.heap import Heap, peak_resident_bytes, resident_bytes

MIB = 2**20
on_gnu = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="a heap of GNU's C library",
)


def leave_in_pieces():
    """400 MiB of tensors too small to be pages of their own; a twentieth stays, spread out."""
    tensors = [torch.ones(25_600) for _ in range(4096)]
    return tensors[::20] + tensors[-1:]


@on_gnu
def test_what_is_free_goes_back_when_there_is_too_much():
    stays = leave_in_pieces()
    before = resident_bytes()
    for enough in (Heap(planned=before, room=0, steps=4), Heap(planned=before // 2, room=0)):
        enough.tidy()
        assert resident_bytes() > before - 10 * MIB
    heap = Heap(planned=before * 7 // 8, room=0, steps=3)
    heap.tidy()
    assert heap.stays < before - 300 * MIB
    assert resident_bytes() < before - 300 * MIB
    assert heap.steps == 0
    assert all(tensor.eq(1).all() for tensor in stays)


def test_what_stays_counts_from_then_on():
    heap = Heap(planned=MIB, room=50 * MIB, steps=3)
    heap.tidy()
    assert heap.stays == pytest.approx(resident_bytes(), abs=20 * MIB)
    heap.steps = 3
    heap.tidy()  # within what stays and the room
    assert heap.steps == 4


def test_the_peak_is_no_less_than_what_is_there():
    there = resident_bytes()
    assert peak_resident_bytes() >= there > 10 * MIB


STEPS = """
import json, sys, torch
from vlm.runtime.heap import pages_kept, resident_bytes

def held_after_a_step(number=8, mib=100):
    tensors = [torch.ones(mib * 2**18) for _ in range(number)]
    del tensors
    return resident_bytes() / 2**20

device = torch.device(sys.argv[1])
held = {"before": held_after_a_step()}
with pages_kept(device):
    held["first"] = held_after_a_step()
    with pages_kept(torch.device("meta")), pages_kept(device):
        pass
    held["second"] = held_after_a_step()  # the outer one goes on
held["after"] = resident_bytes() / 2**20
held["later"] = held_after_a_step(1, 1600)  # has no room in what the heap was
print(json.dumps(held))
"""


@on_gnu
@pytest.mark.parametrize(
    ("device", "environment", "kept"),
    [
        ("cpu", {}, 800),
        ("meta", {}, 0),
        ("cpu", {"MALLOC_TRIM_THRESHOLD_": "67108864"}, 0),  # the user decides
        ("cpu", {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=65536"}, 0),
    ],
)
def test_pages_are_kept_within(device, environment, kept):
    """In a process of its own: a heap is what all that came before made of it."""
    done = subprocess.run(
        [sys.executable, "-c", STEPS, device],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    held = json.loads(done.stdout)
    assert held["first"] == pytest.approx(held["before"] + kept, abs=100)
    assert kept - 100 < held["second"] - held["before"] < kept * 7 / 4 + 100  # the same pages
    assert held["after"] == pytest.approx(held["before"], abs=100)
    assert held["later"] == pytest.approx(held["before"], abs=100)
