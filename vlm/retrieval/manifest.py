"""`index.json`: what an index consists of. It is replaced whole, by one writer at a time."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlm.errors import ConfigError, DataError
from vlm.runtime.files import locked, write_atomic

VERSION = 1
NAME = "index.json"
_NAMES = re.compile(r"segment-\d{6}|deleted-\d{6}\.json")  # nothing outside the folder
Entry = dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """The contents of an index.

    Attributes:
        embed_dim: D.
        model: Size and sha256 of each file of the model folder.
        segments: In order; of each its name, num_rows, fields, files, and the data's fingerprint.
        deleted: In order; of each its name, size, sha256, and num_segments: how many segments there
            were. Keys that come back in later ones are there again.
    """

    embed_dim: int
    model: dict[str, Entry]
    segments: list[Entry]
    deleted: list[Entry]

    def write(self, folder: Path) -> None:
        """Put it in the place of the manifest that is there.

        Raises:
            DiskError: It cannot be written.
        """
        values = {"version": VERSION, "model_sha256": self.model_sha256, **asdict(self)}
        write_atomic(folder / NAME, json.dumps(values, indent=1).encode())

    @property
    def model_sha256(self) -> str:
        """One hash for all files of the model."""
        hashes = {name: entry["sha256"] for name, entry in self.model.items()}
        return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an index.

    Raises:
        ConfigError: There is no such folder.
        DataError: The manifest is missing, damaged, or of a newer version.
    """
    path = folder / NAME
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such index; make one with: vlm index MODEL DATA {folder}")
    try:
        values = json.loads(path.read_bytes())
        version = values.pop("version")
        model_sha256 = values.pop("model_sha256")
        if version != VERSION:
            raise DataError(
                f"{path}: version {version}, and this vlm reads {VERSION}; build it anew"
            )
        manifest = Manifest(**values)
        _check(manifest, model_sha256)
    except FileNotFoundError:
        raise DataError(f"{path}: missing; {folder} is no index, or an incomplete copy") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged: {type(error).__name__}: {error}") from error
    return manifest


def _check(manifest: Manifest, model_sha256: str) -> None:
    names = [str(entry["name"]) for entry in [*manifest.segments, *manifest.deleted]]
    files = [name for e in manifest.segments for name in e["files"]] + list(manifest.model)
    if wrong := [name for name in names if not _NAMES.fullmatch(name)]:
        raise ValueError(f"{wrong[0]!r} is no part of an index")
    if wrong := [name for name in files if Path(name).name != name]:
        raise ValueError(f"{wrong[0]!r} is outside the folder")
    if manifest.model_sha256 != model_sha256:
        raise ValueError("model_sha256 is not that of the files listed")


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold an index for writing; the lock ends with the process, however that ends.

    Raises:
        ConfigError: Another process holds it.
        DiskError: The folder cannot be written.
    """
    with locked(folder / ".lock", wait=False) as held:
        if not held:
            raise ConfigError(f"{folder}: another process is writing to it; wait for it")
        yield
