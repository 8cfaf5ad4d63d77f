"""The indexes of many shards, local and remote: each opened, all that is wrong told at once."""

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vlm.data.findings import useless
from vlm.data.index_file import ShardIndex
from vlm.data.remote import GIB, ShardCache
from vlm.data.shards import default_cache_dir, open_index, open_remote_index
from vlm.errors import DataError
from vlm.runtime.files import progress

NUM_CONNECTIONS = 16  # when indexes are fetched
SHARD_CACHE_BYTES = 100 * GIB


def open_indexes(
    names: Sequence[Path | str],
    *,
    cache_dir: Path | None = None,
    shard_cache_bytes: int = SHARD_CACHE_BYTES,
    fields: Collection[str] = (),
    needs_images: bool = True,
) -> list[ShardIndex]:
    """Returns the indexes of shards; those local ones that have none are indexed now.

    Args:
        names: Paths, and URLs as text.
        cache_dir: Where indexes go that cannot be written beside their tar, and what is remote;
            None for the user's.
        shard_cache_bytes: How much of remote shards is kept there.
        fields: Numbers of the samples' JSON that the indexes must hold.
        needs_images: Whether shards of texts alone are an error.

    Raises:
        ConfigError: A remote shard has no index, or one that lacks a field.
        DataError: A shard is missing, compressed or without images; all of them are told.
        DiskError: An index can be written nowhere.
    """
    cache = shard_cache(cache_dir, shard_cache_bytes)

    def opened(name: Path | str) -> ShardIndex | DataError:
        try:
            if isinstance(name, str):
                return open_remote_index(name, cache, fields=fields)
            return open_index(name, cache_dir=cache_dir, fields=fields)
        except DataError as error:
            return error

    shards: list[ShardIndex] = []
    problems: list[str] = []
    for found in progress(_mapped(opened, names), description="indexing", total=len(names)):
        if isinstance(found, DataError):
            problems += found.problems
        else:
            shards.append(found)
    problems += [
        problem for shard in shards if (problem := useless(shard, needs_images=needs_images))
    ]
    if problems:
        raise DataError(problems)
    return shards


def shard_cache(cache_dir: Path | None, max_bytes: int = SHARD_CACHE_BYTES) -> ShardCache:
    """The part of a cache that is of remote shards."""
    return ShardCache((cache_dir or default_cache_dir()) / "remote", max_bytes)


def _mapped(
    opened: Callable[[Path | str], ShardIndex | DataError], names: Sequence[Path | str]
) -> Iterator[ShardIndex | DataError]:
    """In turn where all is local: the disk and sha256 are the limit there, not the waiting."""
    if not any(isinstance(name, str) for name in names):
        yield from map(opened, names)
        return
    with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
        try:
            yield from pool.map(opened, names)
        finally:
            pool.shutdown(cancel_futures=True)
