"""Randomness without state: every seed is a function of where the run is."""

import hashlib

import torch


def derive(*parts: int | str) -> int:
    """A 63-bit seed from a path of numbers and names, equal on every machine."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout for one step, so that a resumed run draws what the uninterrupted one drew."""
    torch.manual_seed(derive("step", seed, step, rank))
