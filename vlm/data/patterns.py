"""From a shard pattern to the files and URLs that it names."""

import difflib
import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from vlm.data.grouping import IMAGE_SUFFIXES
from vlm.data.streams import SCHEME, check_url, is_http, list_urls
from vlm.errors import ConfigError, DataError

MAX_EXPANSION = (
    100_000  # files one pattern may name; the largest public sets have half as many shards
)

# compressed tars are listed too, to be refused by name rather than passed over
SHARD = re.compile(r"\.(tar|tar\.(gz|bz2|xz|zst)|tgz|tbz2?|txz)$")
BRACES = re.compile(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}")


def expand(pattern: str | Sequence[str]) -> list[Path | str]:
    """Returns the files, as paths, and URLs, as text, that a shard pattern names; each once.

    They are sorted by name. Whether a URL holds anything shows when it is opened.

    Args:
        pattern: Globs (`train-*.tar`, `**/*.tar`), ranges (`train-{0000..0003}.tar`) and lists
            (`{train,val}.tar`), or several of these. URLs may have globs where they can be listed,
            which http cannot.

    Raises:
        ConfigError: A command, a URL that cannot be, or more than `MAX_EXPANSION` names.
        DataError: Something that a pattern names is not there; all such patterns are told.
    """
    names: dict[Path | str, Path | str] = {}
    problems: list[str] = []
    for one in [pattern] if isinstance(pattern, str) else pattern:
        try:
            names |= {_same(name): name for name in _expand_one(one)}
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return sorted(names.values(), key=lambda name: (str(name).rpartition("/")[2], str(name)))


def _same(name: Path | str) -> Path | str:
    return name if isinstance(name, str) else name.resolve()


def _expand_one(pattern: str) -> Sequence[Path | str]:
    if os.path.isfile(pattern):
        return [Path(pattern)]
    if pattern == "-":
        raise ConfigError('"-": samples are read by random access; shards must be files')
    if SCHEME.match(pattern):
        check_url(pattern)
        return [url for name in _alternatives(pattern) for url in _urls(name)]
    found, missing = list[Path](), []
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
    hits = glob.glob(name, recursive=True)
    return [Path(hit) for hit in hits if SHARD.search(hit) and os.path.isfile(hit)]


def _urls(name: str) -> list[str]:
    """A URL, or those that a glob in it finds."""
    if is_http(name):
        if "*" in name:
            raise ConfigError(
                f'"{name}": a web server cannot be listed; name ranges: {{0000..0123}}'
            )
        return [name]
    if not glob.has_magic(name):
        return [name]
    found = [url for url in list_urls(name) if SHARD.search(url)]
    if not found:
        raise DataError(f'no shard matches "{name}"')
    return found


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
    suffix = Path(name).suffix.lower()
    names = [
        entry.name
        for entry in os.scandir(folder)
        if SHARD.search(entry.name) or Path(entry.name).suffix.lower() == suffix or entry.is_dir()
    ]
    tars = sorted(entry for entry in names if entry.endswith(".tar"))
    near = difflib.get_close_matches(Path(name).name, names, n=3, cutoff=0.5)
    if suffix[1:] in IMAGE_SUFFIXES and (glob.has_magic(name) or not near):
        return f"a folder of pictures is given as the folder: {folder}/"
    near = near or tars[:3]
    shown = ", ".join(near) if near else "no shards"
    return f"the folder {folder} holds {shown}"
