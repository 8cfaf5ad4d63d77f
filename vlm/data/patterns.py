"""From a shard pattern to the files that it names."""

import difflib
import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from vlm.errors import ConfigError, DataError

MAX_EXPANSION = (
    100_000  # files one pattern may name; the largest public sets have half as many shards
)

BRACES = re.compile(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}")


def expand(pattern: str | Sequence[str]) -> list[Path]:
    """Returns the local files that a shard pattern names, each once, sorted by name.

    Args:
        pattern: Globs (`train-*.tar`, `**/*.tar`), ranges (`train-{0000..0003}.tar`) and lists
            (`{train,val}.tar`), or several of these.

    Raises:
        ConfigError: A URL, a command, or more than `MAX_EXPANSION` names.
        DataError: Something that a pattern names is not there; all such patterns are told.
    """
    paths: dict[Path, Path] = {}
    problems: list[str] = []
    for one in [pattern] if isinstance(pattern, str) else pattern:
        try:
            paths |= {path.resolve(): path for path in _expand_one(one)}
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return sorted(paths.values(), key=lambda path: (path.name, str(path)))


def _expand_one(pattern: str) -> list[Path]:
    if os.path.isfile(pattern):
        return [Path(pattern)]
    if pattern == "-":
        raise ConfigError('"-": samples are read by random access; shards must be files')
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", pattern):
        raise ConfigError(f'"{pattern}": remote shards are not supported yet; name local files')
    found, missing = [], []
    for name in _alternatives(os.path.expanduser(pattern)):
        hits = _files(name)
        found += hits
        if not hits:
            missing.append(name)
    if not found:
        raise DataError(f'no shard matches "{pattern}"; {neighbours(missing[0])}')
    if missing:
        names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise DataError(f'"{pattern}": {len(missing)} of its shards are missing: {names}')
    return found


def _files(name: str) -> list[Path]:
    if not glob.has_magic(name):
        return [Path(name)] if os.path.isfile(name) else []
    # compressed tars are listed too, to be refused by name rather than passed over
    shard = re.compile(r"\.(tar|tar\.(gz|bz2|xz|zst)|tgz|tbz2?|txz)$")
    hits = glob.glob(name, recursive=True)
    return [Path(hit) for hit in hits if shard.search(hit) and os.path.isfile(hit)]


def _alternatives(pattern: str) -> list[str]:
    """The pattern without braces, once for each combination of what they hold."""
    pending, done = [pattern], list[str]()
    while pending:
        name = pending.pop()
        match = BRACES.search(name)
        if match is None:
            done.append(name)
            continue
        options = _options(*match.groups())
        if len(options) + len(pending) + len(done) > MAX_EXPANSION:
            raise ConfigError(f'"{pattern}": names more than {MAX_EXPANSION} shards')
        before, after = name[: match.start()], name[match.end() :]
        pending += [before + option + after for option in reversed(options)]
    return list(dict.fromkeys(done))


def _options(first: str | None, last: str | None, listed: str | None) -> list[str]:
    if first is None or last is None:
        return (listed or "").split(",")
    low, high = int(first), int(last)
    width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
    step = 1 if high >= low else -1
    numbers = range(low, high + step, step)[: MAX_EXPANSION + 1]  # a longer one is refused
    return [f"{number:0{width}}" for number in numbers]


def neighbours(name: str) -> str:
    """What there is in the folder where a name or pattern was looked for."""
    folder = Path(name).parent
    while glob.has_magic(str(folder)):
        folder = folder.parent
    if not folder.is_dir():
        return f"there is no folder {folder}"
    names = [entry for entry in os.listdir(folder) if not entry.endswith(".idx")]
    tars = sorted(entry for entry in names if entry.endswith(".tar"))
    near = difflib.get_close_matches(Path(name).name, names, n=3, cutoff=0.5) or tars[:3]
    shown = ", ".join(near) if near else "no shards"
    return f"the folder {folder} holds {shown}"
