"""Checkpoints, whole or absent: safetensors and JSON, written aside, renamed, verified.

`step-00000100/` holds one safetensors file a group (model, optimizer, ema), `state.json`, and
`manifest.json` with the size and sha256 of each, written last. A kill at any instant leaves the old
checkpoints or the new one; `load_newest` takes the newest that verifies.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from vlm.errors import CheckpointError, DiskError
from vlm.runtime.files import (
    check_room,
    disk_error,
    remove_leftovers,
    sha256_file,
    sync_folder,
    write_synced,
    written_whole,
)
from vlm.runtime.version import installed_version

VERSION = 2  # of the manifest
_NAME = re.compile(r"step-\d{8,}")
_FILE = re.compile(r"[a-z]+\.(safetensors|json)")
Groups = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """What was loaded: tensors by group and name, the JSON state, where from, what was not.

    Attributes:
        skipped: Newer checkpoints that are damaged, and what is wrong with each.
    """

    path: Path
    groups: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    skipped: dict[Path, str]


def save(
    folder: Path,
    step: int,
    groups: Groups,
    state: Mapping[str, Any],
    *,
    keep: int,
    keep_best: str | None = None,
) -> Path:
    """Write `folder/step-N`, verify it, then delete all but the newest `keep` and the best.

    Args:
        folder: Of all checkpoints of a run.
        step: Number of steps done.
        groups: Tensors by group and name.
        state: JSON-able counters; "fingerprint" goes into the manifest too, "metric" is for `best`.
        keep: At least 2, so that a damaged newest one is not the last.
        keep_best: `best`'s rule.

    Raises:
        DiskError: There is no room, or writing fails; older checkpoints are as they were.
    """
    final = folder / f"step-{step:08d}"
    needed = sum(t.nbytes for tensors in groups.values() for t in tensors.values())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)  # of a killed save; they may be what fills the disk
        check_room(folder, needed, num_files=len(groups) + 3)
        with written_whole(final) as temporary:
            _write(temporary, step, groups, state)
            if final.exists():  # the same step again; what is there was passed over as damaged
                _delete(final)
    except OSError as error:
        raise disk_error(final, error, needed) from error
    problem = verify(final)
    try:
        if problem:
            _delete(final)
            raise DiskError(f"{final}: does not read back as written: {problem}")
        _prune(folder, keep, best(folder, keep_best))
    except OSError as error:
        raise DiskError(f"{folder}: cannot delete old checkpoints: {error.strerror}") from error
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """All of a run's, oldest first, damaged ones included."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def best(folder: Path, rule: str | None) -> Path | None:
    """The checkpoint of the least ("min:NAME") or greatest ("max:NAME") metric; of equals the last.

    The value is the state's own `{"metric": {"rule": ..., "value": ...}}`; without a value, or
    under another rule, a checkpoint is no candidate.
    """
    values = {}
    for path in list_checkpoints(folder) if rule else []:
        metric = read_metric(path)
        if metric is not None and metric["rule"] == rule and metric["value"] is not None:
            values[path] = metric["value"] if str(rule).startswith("max:") else -metric["value"]
    return max(values, key=lambda path: (values[path], path), default=None)


def read_metric(path: Path) -> dict[str, Any] | None:
    """The rule and value that a checkpoint was saved with; None without, or if unreadable."""
    try:
        metric: dict[str, Any] | None = json.loads((path / "state.json").read_bytes())["metric"]
        return metric
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; None where there is none at all.

    Raises:
        CheckpointError: There are checkpoints, and all are damaged.
    """
    skipped: dict[Path, str] = {}
    for path in reversed(list_checkpoints(folder)):
        problem = verify(path)
        if problem is None:
            return _load(path, skipped)
        skipped[path] = problem
    if skipped:
        problems = [f"{path}: {problem}" for path, problem in skipped.items()]
        raise CheckpointError([*problems, f"{folder}: no usable checkpoint"])
    return None


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it neither counts as kept nor stands in the way.

    Raises:
        DiskError: It cannot be renamed.
    """
    aside = path.with_name(f"{path.name}.damaged-{uuid.uuid4().hex[:8]}")
    try:
        return path.rename(aside)
    except OSError as error:
        raise DiskError(f"{path}: cannot rename: {error.strerror}") from error


def verify(path: Path, *, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint; None if it holds the manifest's files, byte for byte.

    Args:
        path: The checkpoint's folder.
        hashes: False compares names and sizes alone, without reading the tensors.
    """
    try:
        files = _read_manifest(path / "manifest.json")["files"]
        if {f.name for f in path.iterdir()} != {*files, "manifest.json"}:
            return f"manifest.json: the folder has other files than {', '.join(sorted(files))}"
        for name, expected in files.items():
            if (path / name).stat().st_size != expected["size_bytes"]:
                return f"{name} has another size than was written"
            if hashes and sha256_file(path / name) != expected["sha256"]:
                return f"{name} has other bytes than were written"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"manifest.json: {error}"
    return None


def _load(path: Path, skipped: dict[Path, str]) -> Checkpoint:
    """Read one checkpoint that `verify` has passed."""
    try:
        groups = {f.stem: load_file(f) for f in sorted(path.glob("*.safetensors"))}
        state = json.loads((path / "state.json").read_bytes())
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot read: {error}") from error
    return Checkpoint(path, groups, state, skipped)


def _write(folder: Path, step: int, groups: Groups, state: Mapping[str, Any]) -> None:
    files = {}
    for group, tensors in groups.items():
        # as bytes, not by save_file: the hash is of what was in memory, and errors are OSError
        data = tensor_bytes({name: t.detach().contiguous().cpu() for name, t in tensors.items()})
        files[f"{group}.safetensors"] = _write_file(folder / f"{group}.safetensors", data)
    text = json.dumps(state, indent=1, sort_keys=True).encode()
    files["state.json"] = _write_file(folder / "state.json", text)
    manifest = {
        "version": VERSION,
        "step": step,
        "fingerprint": state.get("fingerprint"),
        "vlm": installed_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "files": files,
    }
    _write_file(folder / "manifest.json", _manifest_bytes(manifest))


def _write_file(path: Path, data: bytes) -> dict[str, Any]:
    """Write, sync and forget: `verify` is to read from the disk, not from the page cache."""
    write_synced(path, data)
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """The manifest with its own hash: it vouches for the other files, this for itself."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**rest, "sha256": digest}, indent=1, sort_keys=True).encode()


def _read_manifest(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    manifest: dict[str, Any] = json.loads(data)
    if manifest["version"] != VERSION:
        raise ValueError(f"version {manifest['version']}, this vlm reads {VERSION}")
    if _manifest_bytes(manifest) != data:
        raise ValueError("it has other bytes than were written")
    if not all(_FILE.fullmatch(name) for name in manifest["files"]):
        raise ValueError("it names files that no checkpoint has")
    return manifest


def _prune(folder: Path, keep: int, pinned: Path | None) -> None:
    for old in list_checkpoints(folder)[:-keep]:
        if old != pinned:
            _delete(old)


def _delete(path: Path) -> None:
    """Rename, then delete: a kill leaves the whole checkpoint or none."""
    trash = path.rename(path.with_name(f".trash-{path.name}-{uuid.uuid4().hex[:8]}"))
    sync_folder(path.parent)
    shutil.rmtree(trash)
