"""One file that stands for many indexed shards, so that start-up reads it and none of theirs.

`shards.json` lies in the folder of the index files that it joins, and has two lines of JSON:

    line 1  format, version, sha256 of line 2, num_shards, num_samples
    line 2  columns: of the indexes; rejects: by reason, for each shard that has any; texts_alone:
            the places of shards without pictures; and of every shard, in one list a kind: path
            (from the folder, where it lies under it), num_samples, size_bytes, mtime_ns, sha256,
            crc32 (of its index file)

It is derived: `vlm data index --out` writes it from the index files. A tar's size is checked when
it is opened, an index file's crc32 when it is mapped.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.data.index_file import SUFFIX, ShardIndex
from vlm.errors import ConfigError, DataError

FORMAT, VERSION = "vlm-joined-index", 2
NAME = "shards.json"
_LISTED = ("num_samples", "size_bytes", "mtime_ns", "sha256", "crc32")


def is_joined(name: str) -> bool:
    """Whether DATA names a joined index."""
    return name.endswith(".json")


def encode_joined(shards: Sequence[ShardIndex], folder: Path | None) -> bytes:
    """Returns the joined index of shards whose indexes lie in one folder.

    Args:
        shards: Their indexes hold the same columns.
        folder: Where the indexes lie; None if that is at a URL, beside the tars.
    """
    content: dict[str, Any] = {
        "columns": shards[0].columns,
        "rejects": {row: shard.rejects for row, shard in enumerate(shards) if shard.rejects},
        "texts_alone": [row for row, shard in enumerate(shards) if shard.texts_alone],
        "path": [_spelled(shard.path, folder) for shard in shards],
        **{name: [getattr(shard, name) for shard in shards] for name in _LISTED},
    }
    line = json.dumps(content, separators=(",", ":")).encode()
    header = {
        "format": FORMAT,
        "version": VERSION,
        "sha256": hashlib.sha256(line).hexdigest(),
        "num_shards": len(shards),
        "num_samples": sum(shard.num_samples for shard in shards),
    }
    return json.dumps(header).encode() + b"\n" + line + b"\n"


def _spelled(path: Path, folder: Path | None) -> str:
    if folder is None:
        return path.name
    absolute, root = path.absolute(), folder.absolute()
    return str(absolute.relative_to(root) if absolute.is_relative_to(root) else absolute)


def decode_joined(content: bytes, folder: Path, name: str) -> list[ShardIndex]:
    """Returns the indexes that a joined index stands for, none of them opened.

    Args:
        content: Of the file.
        folder: Where it lies.
        name: What to call it in an error.

    Raises:
        DataError: It is damaged, of another version, or something else.
    """
    first, _, line = content.partition(b"\n")
    line = line.removesuffix(b"\n")
    try:
        header = json.loads(first)
        if header["format"] != FORMAT:
            raise KeyError
    except (ValueError, KeyError, TypeError):
        raise DataError(
            f"{name}: is no joined index; name the {NAME} that vlm data index --out wrote"
        ) from None
    if header["version"] != VERSION:
        raise DataError(f"{name}: has version {header['version']}, not {VERSION}; {_AGAIN}")
    if header["sha256"] != hashlib.sha256(line).hexdigest():
        raise DataError(f"{name}: is damaged, its sha256 is wrong; {_AGAIN}")
    return _shards(json.loads(line), folder)


_AGAIN = "delete it, and run vlm data index --out again"


def _shards(content: dict[str, Any], folder: Path) -> list[ShardIndex]:
    columns, rejects = tuple(content["columns"]), content["rejects"]
    texts_alone = frozenset(content["texts_alone"])
    none: dict[str, int] = {}
    rows = zip(content["path"], *(content[name] for name in _LISTED), strict=True)
    return [
        ShardIndex(
            folder / path,
            folder / (os.path.basename(path) + SUFFIX),
            num_samples=num_samples,
            size_bytes=size_bytes,
            mtime_ns=mtime_ns,
            sha256=sha256,
            crc32=crc32,
            columns=columns,
            rejects=rejects.get(str(row), none),
            texts_alone=row in texts_alone,
        )
        for row, (path, num_samples, size_bytes, mtime_ns, sha256, crc32) in enumerate(rows)
    ]


def read_joined(name: str) -> list[ShardIndex]:
    """Returns the indexes that a joined index file stands for, none of them opened.

    Raises:
        ConfigError: It is a URL.
        DataError: It is missing, damaged, of another version, or something else.
    """
    if "://" in name:
        raise ConfigError(
            f"{name}: a joined index is read from disk alone; name the remote shards themselves, "
            "as in https://host/{0000..0123}.tar"
        )
    path = Path(name)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    return decode_joined(content, path.parent, str(path))
