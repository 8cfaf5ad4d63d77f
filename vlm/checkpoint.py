"""Checkpoints, whole or absent: safetensors and JSON, written aside, renamed, verified.

`step-00000100/` holds one safetensors file a group (model, optimizer, ema), `state.json`, and
`manifest.json` with the size and sha256 of each, written last. A kill at any instant leaves the old
checkpoints or the new one; `load_newest` takes the newest that verifies.
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm.errors import CheckpointError, DiskError
from vlm.runtime.files import sha256_file, sync_folder, write_synced

_NAME = re.compile(r"step-\d{8,}")
Groups = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """What was loaded: tensors by group and name, the JSON state, and where from."""

    path: Path
    groups: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(folder: Path, step: int, groups: Groups, state: Mapping[str, Any], *, keep: int) -> Path:
    """Write `folder/step-N`, verify it, then delete all but the newest `keep` checkpoints.

    Args:
        folder: Of all checkpoints of a run.
        step: Number of steps done.
        groups: Tensors by group and name.
        state: JSON-able counters.
        keep: At least 2, so that a damaged newest one is not the last.

    Raises:
        DiskError: There is no room, or writing fails.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f"{final.name}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_room(folder, groups)
        temporary.mkdir()
        _write(temporary, groups, state)
        if final.exists():  # the same step again, after a resume from an older one
            shutil.rmtree(final)
        temporary.rename(final)
        sync_folder(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise DiskError(f"{final}: cannot save: {error.strerror or error}") from error
    problem = verify(final)
    if problem:
        raise DiskError(f"{final}: does not read back as written: {problem}")
    _prune(folder, keep)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """All of a run's, oldest first, damaged ones included."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; None where there is none at all.

    Raises:
        CheckpointError: There are checkpoints, and all are damaged.
    """
    problems = []
    for path in reversed(list_checkpoints(folder)):
        problem = verify(path)
        if problem is None:
            return load(path)
        problems.append(f"{path}: {problem}")
    if problems:
        raise CheckpointError([*problems, f"{folder}: no usable checkpoint"])
    return None


def load(path: Path) -> Checkpoint:
    """Read one checkpoint that `verify` has passed.

    Raises:
        CheckpointError: Its hashes are right, but what was hashed is no checkpoint.
    """
    try:
        groups = {f.stem: load_file(f) for f in sorted(path.glob("*.safetensors"))}
        state = json.loads((path / "state.json").read_bytes())
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return Checkpoint(path, groups, state)


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if all sizes and hashes are the manifest's."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        files: dict[str, dict[str, Any]] = manifest["files"]
        for name, expected in files.items():
            if (path / name).stat().st_size != expected["size_bytes"]:
                return f"{name} has another size than was written"
            if sha256_file(path / name) != expected["sha256"]:
                return f"{name} has other bytes than were written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"manifest.json: {error}"
    return None


def _write(folder: Path, groups: Groups, state: Mapping[str, Any]) -> None:
    for group, tensors in groups.items():
        path = folder / f"{group}.safetensors"
        save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    write_synced(folder / "state.json", json.dumps(state, indent=1, sort_keys=True).encode())
    files = {
        f.name: {"size_bytes": f.stat().st_size, "sha256": sha256_file(f)}
        for f in sorted(folder.iterdir())
    }
    manifest = json.dumps({"version": 1, "files": files}, indent=1).encode()
    write_synced(folder / "manifest.json", manifest)
    sync_folder(folder)


def _check_room(folder: Path, groups: Groups) -> None:
    needed = sum(t.nbytes for tensors in groups.values() for t in tensors.values()) * 1.2
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskError(
            f"{folder}: disk full: a checkpoint needs {needed / 2**20:.0f} MiB, "
            f"{free / 2**20:.0f} MiB are free"
        )


def _prune(folder: Path, keep: int) -> None:
    for old in list_checkpoints(folder)[:-keep]:
        trash = old.rename(folder / f".trash-{old.name}")
        shutil.rmtree(trash)
    for leftover in [*folder.glob("step-*.tmp-*"), *folder.glob(".trash-*")]:
        shutil.rmtree(leftover)
