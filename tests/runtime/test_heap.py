"""Memory that is free and still held, given back."""

import sys

import pytest
import torch

from vlm.runtime.heap import Heap, peak_resident_bytes, resident_bytes

MIB = 2**20


def leave_in_pieces():
    """400 MiB of tensors too small to be pages of their own; a twentieth stays, spread out."""
    tensors = [torch.ones(25_600) for _ in range(4096)]
    return tensors[::20] + tensors[-1:]


@pytest.mark.skipif(sys.platform != "linux", reason="a heap of GNU's C library")
def test_what_is_free_goes_back_when_there_is_too_much():
    stays = leave_in_pieces()
    before = resident_bytes()
    for enough in (Heap(limit=before, room=0, steps=8), Heap(limit=before // 2, room=0)):
        enough.tidy()
        assert resident_bytes() > before - 10 * MIB
    heap = Heap(limit=before * 7 // 8, room=0, steps=7)
    heap.tidy()
    assert resident_bytes() < before - 300 * MIB
    assert heap == Heap(limit=before * 7 // 8, room=0, steps=0)
    assert all(tensor.eq(1).all() for tensor in stays)


def test_what_stays_raises_the_limit():
    heap = Heap(limit=MIB, room=50 * MIB, steps=7)
    heap.tidy()
    assert heap.limit == pytest.approx(resident_bytes() + 50 * MIB, abs=20 * MIB)


def test_the_peak_is_no_less_than_what_is_there():
    assert peak_resident_bytes() >= resident_bytes() > 10 * MIB
