"""Indexes many shards: in several processes, by several ranks, and on from where it was stopped."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from vlm.curate.store import Store
from vlm.data.index_file import SUFFIX, ShardIndex, decode_index
from vlm.data.joined import NAME, decode_joined, encode_joined
from vlm.data.shards import build_index, open_index, recorded_index, stat_tar
from vlm.errors import ConfigError, DataError
from vlm.runtime.files import progress
from vlm.runtime.processes import spread


@dataclass(frozen=True)
class Wanted:
    """What each shard's index must hold, and where it goes.

    Attributes:
        fields: Numbers of the samples' JSON.
        out: A folder for all indexes and for the file that joins them; None keeps each index
            beside its tar, or in the cache.
        cache_dir: The cache; None for the user's.
    """

    fields: frozenset[str] = frozenset()
    out: Store | None = None
    cache_dir: Path | None = None


def index_shards(
    paths: Sequence[Path],
    wanted: Wanted,
    *,
    num_workers: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> list[ShardIndex] | None:
    """Indexes the shards that have no true index yet; rank r of W takes every W-th.

    No rank waits for another: the one that finishes last finds all indexes, and joins them.

    Args:
        paths: The tars.
        wanted: What of them.
        num_workers: Processes of this rank.
        rank: r, of this process.
        world_size: W, those that share the work.

    Returns:
        All indexes, in the order of the paths; None where other ranks are still at work.

    Raises:
        ConfigError: Two shards of one name for one folder, or a folder that cannot be.
        DataError: Shards that cannot be indexed; all of this rank's are told.
        DiskError: An index cannot be written.
    """
    joined = _joined(wanted.out)
    if wanted.out is not None:
        _refuse_equal_names(joined, paths)
        columns = [index.columns for index in joined.values()]
        wanted = replace(wanted, fields=wanted.fields.union(*columns))
    known = {path: index for path in paths if (index := _true(joined.get(path.name), path, wanted))}
    mine = [path for path in paths[rank::world_size] if path not in known]
    known |= _index_all(mine, wanted, num_workers)
    for path in paths:
        if path not in known and (index := _find(path, wanted)):
            known[path] = index
    if len(known) < len(paths):
        return None
    if wanted.out is not None:
        _join(joined | {path.name: index for path, index in known.items()}, wanted.out)
    return [known[path] for path in paths]


def _index_all(paths: Sequence[Path], wanted: Wanted, num_workers: int) -> dict[Path, ShardIndex]:
    found: dict[Path, ShardIndex] = {}
    problems: list[str] = []
    results = spread(partial(_index, wanted=wanted), paths, num_workers=num_workers)
    for path, result in zip(
        paths, progress(results, description="indexing", total=len(paths)), strict=True
    ):
        if isinstance(result, ShardIndex):
            found[path] = result
        else:
            problems += result
    if problems:
        raise DataError(problems)
    return found


def _index(path: Path, wanted: Wanted) -> ShardIndex | list[str]:
    """The index of a shard, built now if there is none; or what is wrong with the shard."""
    try:
        if wanted.out is None:
            return open_index(path, cache_dir=wanted.cache_dir, fields=wanted.fields)
        return _find(path, wanted) or _build_into(wanted.out, path, wanted.fields)
    except DataError as error:
        return error.problems


def _build_into(out: Store, path: Path, fields: frozenset[str]) -> ShardIndex:
    content, name = build_index(path, sorted(fields)), path.name + SUFFIX
    out.write(name, content)
    return decode_index(content, path=path, index_path=out.file(name))


def _find(path: Path, wanted: Wanted) -> ShardIndex | None:
    """The true index of a shard, if it is where it should be."""
    if wanted.out is None:
        return _true(recorded_index(path, cache_dir=wanted.cache_dir), path, wanted)
    name = path.name + SUFFIX
    content = wanted.out.read(name)
    try:
        index = decode_index(content or b"", path=path, index_path=wanted.out.file(name))
    except (ValueError, KeyError, TypeError):
        return None
    return _true(index, path, wanted)


def _true(index: ShardIndex | None, path: Path, wanted: Wanted) -> ShardIndex | None:
    """The index, if it is of the tar as it is and holds what is wanted."""
    if index and index.is_of(stat_tar(path)) and wanted.fields <= set(index.columns):
        return replace(index, path=path)
    return None


def _joined(out: Store | None) -> dict[str, ShardIndex]:
    """What a folder joins already, by name."""
    content = None if out is None else out.read(NAME)
    if out is None or content is None:
        return {}
    shards = decode_joined(content, out.folder or Path(out.place), str(out.file(NAME)))
    return {shard.name: shard for shard in shards}


def _join(shards: dict[str, ShardIndex], out: Store) -> None:
    columns = Counter(shard.columns for shard in shards.values())
    if len(columns) > 1:
        largest = max(columns, key=len)
        fewer = [shard.name for shard in shards.values() if shard.columns != largest]
        raise ConfigError(
            f"{out.file(NAME)}: {len(fewer)} of its shards lack a field of the others "
            f"({', '.join(largest)}); name these shards too: {', '.join(fewer[:3])}"
        )
    ordered = sorted(shards.values(), key=lambda shard: (shard.name, str(shard.path)))
    out.write(NAME, encode_joined(ordered, out.folder))


def _refuse_equal_names(joined: dict[str, ShardIndex], paths: Sequence[Path]) -> None:
    by_name = {name: shard.path for name, shard in joined.items() if shard.path.exists()}
    for path in paths:
        other = by_name.setdefault(path.name, path)
        if other.absolute() != path.absolute():
            raise ConfigError(
                f"{other} and {path} have one name, and so would their indexes; "
                "give each of their folders an --out of its own"
            )
