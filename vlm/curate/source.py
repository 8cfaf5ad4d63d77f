"""DATA as one data set: shards are opened; folders and tables are packed once into a cache."""

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm.config.find import counted
from vlm.curate.benchmark_folder import benchmark_shards
from vlm.curate.listing import Listing, folder_files, list_folder
from vlm.curate.pack import REPORT, pack
from vlm.curate.tables import TABLE_SUFFIXES, list_table
from vlm.data.dataset import Dataset, open_shards
from vlm.data.opening import SHARD_CACHE_BYTES
from vlm.data.patterns import neighbours
from vlm.data.shards import default_cache_dir
from vlm.data.tally import Tally
from vlm.errors import ConfigError, DataError
from vlm.runtime.files import locked

PACK_VERSION = 2  # part of what a cached pack is known by

Log = Callable[[str], object]


def open_data(
    data: str | Sequence[str],
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    cache_dir: Path | None = None,
    shard_cache_bytes: int = SHARD_CACHE_BYTES,
    fields: Collection[str] = (),
    require_captions: bool = False,
    needs_images: bool = True,
    log: Log = print,
) -> Dataset:
    """Opens DATA: a shard pattern or several, a folder of shards or of images, or a table.

    A folder or table is packed once. The pack is known by the names, sizes and times of the table
    and the images and by the columns, so a change to any of them packs anew. Processes that open
    the same DATA at once wait for the first of them.

    Args:
        data: What to open.
        image_column: Of a table; guessed if None.
        caption_column: Of a table, one or several with commas between; guessed if None.
        cache_dir: Where packs are kept, indexes that cannot lie beside their tar, and copies of
            remote shards; None for `$XDG_CACHE_HOME/vlm`.
        shard_cache_bytes: Of all copies of remote shards.
        fields: Numbers of the samples' meta that `Dataset.field` must give.
        require_captions: Whether data without a single caption is an error.
        needs_images: Whether shards of texts alone are an error.
        log: Gets the columns taken, where a pack was made, and what was left out.

    Raises:
        ConfigError: A column of what is no table, a column that does not exist, a command.
        DataError: DATA is missing, damaged beyond use, or without what is needed.
        DiskError: The cache cannot be written.
    """
    cache_dir = cache_dir or default_cache_dir()
    patterns = packed_patterns(data, Columns(image_column, caption_column), cache_dir, log=log)
    return open_shards(
        patterns,
        cache_dir,
        shard_cache_bytes=shard_cache_bytes,
        fields=fields,
        require_captions=require_captions,
        needs_images=needs_images,
        log=log,
    )


def packed_patterns(
    data: str | Sequence[str], columns: "Columns", cache_dir: Path, *, log: Log = print
) -> list[str]:
    """The shard patterns that DATA stands for; a folder of images or a table is packed for it.

    Raises:
        ConfigError: A column of what is no table, or that does not exist.
        DataError: A table or a folder that cannot be packed.
        DiskError: The cache cannot be written.
    """
    patterns = shard_patterns(data)
    if patterns is not None:
        columns.refuse(f"{data} is shards")
        return patterns
    source = find_source(data if isinstance(data, str) else data[0], columns, log=log)
    folder = _packed(source, cache_dir / "packed", log)
    report = json.loads((folder / REPORT).read_bytes())
    for line in Tally(**report["skipped"]).lines():
        log(f"{source.name}: left out {line}")
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    if len(tars) != report["num_shards"]:
        raise DataError(f"{folder}: a part of this pack is gone; delete the folder to pack again")
    return tars


@dataclass(frozen=True)
class Columns:
    """The columns that a user named; None for one to be guessed."""

    image: str | None = None
    caption: str | None = None

    def refuse(self, reason: str) -> None:
        """Raises a ConfigError if a column was named: it would be ignored."""
        for what, name in (("image", self.image), ("caption", self.caption)):
            if name is not None:
                raise ConfigError(f'--{what}-column "{name}" is for tables, but {reason}')


@dataclass(frozen=True)
class Source:
    """A folder of images or a table: what it is called, what it is known by, and how to list it."""

    name: str
    digest: str
    listing: Callable[[], Listing]


def shard_patterns(data: str | Sequence[str]) -> list[str] | None:
    """The shard patterns that DATA stands for, or None for a folder of images or a table.

    Raises:
        ConfigError: Several DATA, of which one is not shards.
        DataError: A table that is not there.
    """
    several = [data] if isinstance(data, str) else list(data)
    patterns: list[str] = []
    for one in several:
        found = _patterns(one)
        if found is None and len(several) > 1:
            raise ConfigError(f"{one}: only shards can be joined; pack it first: vlm data pack")
        if found is None:
            return None
        patterns += found
    return patterns


def _patterns(data: str) -> list[str] | None:
    path = Path(data).expanduser()
    if path.is_dir():
        return benchmark_shards(path) or sorted(str(tar) for tar in path.glob("*.tar")) or None
    if data.endswith("/"):
        raise DataError(f"{data}: no such folder; {neighbours(data)}")
    if path.suffix.lower() not in TABLE_SUFFIXES:
        return [data]
    if not path.is_file():
        raise DataError(f"{data}: no such file; {neighbours(data)}")
    return None


def find_source(data: str, columns: Columns, *, log: Log = print) -> Source:
    """Returns a folder of images or a table as a source; of a table the rows are read now.

    Raises:
        ConfigError: A column of what is no table, or one that does not exist.
        DataError: A table that cannot be read.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        columns.refuse(f"{data} is a folder")
        files = folder_files(path)
        digest = _digest({str(file.relative_to(path)): file for file in files}, columns)
        return Source(data, digest, lambda: list_folder(path, files))
    listing = list_table(path, image_column=columns.image, caption_column=columns.caption, log=log)
    named = {picture.name: picture.path for picture in listing.pictures}
    return Source(path.name, _digest({"": path} | named, columns), lambda: listing)


def _digest(files: dict[str, Path], columns: Columns) -> str:
    digest = hashlib.sha256(json.dumps([PACK_VERSION, columns.image, columns.caption]).encode())
    for name, path in files.items():
        try:
            stat = path.stat()
            known = [name, stat.st_size, stat.st_mtime_ns]
        except (OSError, ValueError):
            known = [name]  # missing: packed anew once it is there
        digest.update(json.dumps(known).encode())
    return digest.hexdigest()


def _packed(source: Source, cache: Path, log: Log) -> Path:
    """The folder that holds the source's pack, made now if there is none."""
    folder = cache / source.digest[:32]
    if folder.exists():
        return folder
    with locked(cache / f"{folder.name}.lock"):
        if not folder.exists():
            for left in cache.glob(f".{folder.name}.*"):  # by a process that was killed
                shutil.rmtree(left)
            report = pack(source.listing(), folder)
            log(f"{source.name}: packed {counted(report['num_samples'], 'picture')} into {folder}")
    return folder
