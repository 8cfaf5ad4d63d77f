"""Deleted pictures: lists of keys that are gone from the segments before them, and what is left."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from vlm.retrieval.segment import Segment, check_files
from vlm.runtime.files import sync_folder, write_synced

Live = Bool[np.ndarray, " _"] | None  # which rows of a segment are not deleted; None for all


def live_rows(
    folder: Path, deleted: Sequence[dict[str, Any]], segments: Sequence[Segment]
) -> list[Live]:
    """The `Live` of each segment, after all lists of deleted keys.

    Raises:
        DataError: A list is missing or damaged.
    """
    live: list[Live] = [None] * len(segments)
    for entry in deleted:
        check_files(folder, {entry["name"]: entry}, whole=True)
        keys = json.loads((folder / entry["name"]).read_bytes())
        for number in range(entry["num_segments"]):
            dead = segments[number].rows_of(keys)
            kept = live[number]
            live[number] = ~dead if kept is None else kept & ~dead
    return live


def live_keys(segments: Sequence[Segment], live: Sequence[Live]) -> set[str]:
    """The keys of all pictures that can be found."""
    keys: set[str] = set()
    for segment, kept in zip(segments, live, strict=True):
        of_segment = segment.keys if kept is None else segment.keys.filter(kept)
        keys.update(of_segment.to_pylist())
    return keys


def deleted_keys(segments: Sequence[Segment], live: Sequence[Live]) -> set[str]:
    """The keys of those pictures that cannot be found."""
    return live_keys(segments, [None] * len(segments)) - live_keys(segments, live)


def bury(folder: Path, keys: Sequence[str], *, num_segments: int) -> dict[str, Any]:
    """Write a list of deleted keys; returns its entry."""
    path = folder / f"deleted-{next_number(folder, 'deleted-*'):06d}.json"
    data = json.dumps(sorted(set(keys)), ensure_ascii=False).encode()
    write_synced(path, data)
    sync_folder(folder)
    size_and_hash = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return {"name": path.name, "num_segments": num_segments, **size_and_hash}


def next_number(folder: Path, pattern: str) -> int:
    """Above every number in use, also by what a killed writer left behind."""
    names = (path.name for path in folder.glob(pattern))
    return 1 + max((int("".join(filter(str.isdigit, name))) for name in names), default=-1)
