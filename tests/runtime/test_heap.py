"""Memory that is free and still held, given back."""

import ctypes
import sys

import pytest
import torch

from vlm.runtime.heap import Heap, peak_resident_bytes, resident_bytes

MIB = 2**20


def leave_in_pieces():
    """400 MiB of tensors too small to be pages of their own; a twentieth stays, spread out."""
    tensors = [torch.ones(25_600) for _ in range(4096)]
    return tensors[::20] + tensors[-1:]


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="a heap of GNU's C library",
)
def test_what_is_free_goes_back_when_there_is_too_much():
    stays = leave_in_pieces()
    before = resident_bytes()
    for enough in (Heap(planned=before, room=0, steps=8), Heap(planned=before // 2, room=0)):
        enough.tidy()
        assert resident_bytes() > before - 10 * MIB
    heap = Heap(planned=before * 7 // 8, room=0, steps=7)
    heap.tidy()
    assert heap.stays < before - 300 * MIB
    assert resident_bytes() < before - 300 * MIB
    assert heap.steps == 0
    assert all(tensor.eq(1).all() for tensor in stays)


def test_what_stays_counts_from_then_on():
    heap = Heap(planned=MIB, room=50 * MIB, steps=7)
    heap.tidy()
    assert heap.stays == pytest.approx(resident_bytes(), abs=20 * MIB)
    heap.steps = 7
    heap.tidy()  # within what stays and the room
    assert heap.steps == 8


def test_the_peak_is_no_less_than_what_is_there():
    there = resident_bytes()
    assert peak_resident_bytes() >= there > 10 * MIB
