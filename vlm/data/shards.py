"""The index that each local tar gets once: found where it is still true, else built and kept.

The index of `NAME.tar` is `NAME.tar.idx` beside it, or, where that cannot be written, a file in the
cache folder named by the sha256 of the tar's path, size and time. An index whose size_bytes or
mtime_ns is not the tar's is built again; nothing else is compared.
"""

import hashlib
import os
import zlib
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from vlm.data import tar
from vlm.data.decode import FORMATS, header_size, open_image
from vlm.data.grouping import (
    IMAGE_SUFFIXES,
    TEXT_SUFFIXES,
    TarSample,
    holds_texts_alone,
    samples,
)
from vlm.data.index_file import (
    FORMAT,
    SUFFIX,
    Field,
    Record,
    ShardIndex,
    count_rejects,
    decode_index,
    encode_index,
)
from vlm.data.remote import RemoteShard, ShardCache
from vlm.data.samples import BadSample, parse_texts
from vlm.errors import ConfigError, DataError, DiskError
from vlm.runtime.files import write_atomic

MAX_IMAGE_BYTES = 1 << 28
MAX_TEXT_BYTES = 1 << 20


def open_index(
    path: Path, *, cache_dir: Path | None = None, fields: Collection[str] = ()
) -> ShardIndex:
    """Returns the index of a tar, built now if there is none of the tar as it is.

    Args:
        path: The tar.
        cache_dir: Where indexes go that cannot be written beside their tar.
        fields: Numbers of the samples' JSON that the index must hold.

    Raises:
        DataError: The tar is compressed, cannot be read, or changed meanwhile.
        DiskError: The index can be written nowhere.
    """
    stat = stat_tar(path)
    places = index_places(path, stat, cache_dir)
    known = [index for place in places if (index := load_index(path, place)) and index.is_of(stat)]
    columns = set(fields).union(*(index.columns for index in known))
    for index in known:
        if columns == set(index.columns):
            return index
    return _write(path, places, build_index(path, sorted(columns)))


def recorded_index(path: Path, *, cache_dir: Path | None = None) -> ShardIndex | None:
    """What was indexed of a tar: as it is now, else as it was before it changed.

    Raises:
        DataError: There is no such tar.
    """
    stat = stat_tar(path)
    places = index_places(path, stat, cache_dir)
    found = [index for place in places if (index := load_index(path, place))]
    return max(found, key=lambda index: index.is_of(stat), default=None)


def stat_tar(path: Path) -> os.stat_result:
    """Size and time of a tar.

    Raises:
        DataError: There is none.
    """
    try:
        return path.stat()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def index_places(path: Path, stat: os.stat_result, cache_dir: Path | None) -> list[Path]:
    """Where the index of a tar may be: beside it, or in the cache."""
    identity = f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    cached = hashlib.sha256(identity.encode()).hexdigest() + SUFFIX
    cache = (cache_dir or default_cache_dir()) / "index"
    return [path.with_name(path.name + SUFFIX), cache / cached]


def open_remote_index(url: str, cache: ShardCache, *, fields: Collection[str] = ()) -> ShardIndex:
    """Returns the index that lies beside a remote tar, fetched once.

    Args:
        url: Of the tar.
        cache: Where copies of the index and the tar are kept.
        fields: Numbers of the samples' JSON that the index must hold.

    Raises:
        ConfigError: There is none, or it lacks a field.
        DataError: There is no such tar, or the index is damaged.
    """
    path, kept = cache.file(url, ".tar"), cache.file(url, SUFFIX)
    index = cache.index(url, lambda file: load_index(path, file))
    remote = RemoteShard(url, index.size_bytes, index.sha256, cache)
    if missing := sorted(set(fields) - set(index.columns)):
        options = " ".join(f"--field {name}" for name in missing)
        raise ConfigError(
            f"{remote}: its index lacks {', '.join(missing)}; run vlm data index {options} where "
            f"the tars are, upload the .tar.idx files, and delete {kept.parent}"
        )
    return replace(index, index_path=kept, remote=remote)


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/vlm`, or `~/.cache/vlm`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlm"


def load_index(path: Path, index_path: Path) -> ShardIndex | None:
    """The index in a file, or None if it is missing, of another version, or damaged."""
    try:
        content = index_path.read_bytes()
        return decode_index(content, path=path, index_path=index_path)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, places: Sequence[Path], content: bytes) -> ShardIndex:
    problems = [f"{path}: no place for its index"]
    for place in places:
        if _is_ours(place):
            try:
                write_atomic(place, content)
            except DiskError as error:
                problems = error.problems
            else:
                return decode_index(content, path=path, index_path=place)
    raise DiskError(problems)


def _is_ours(place: Path) -> bool:
    """False for another program's file of this name, which is left alone."""
    try:
        with place.open("rb") as file:
            start = file.read(64)
    except OSError:  # missing, most often
        return True
    return start == b"" or FORMAT.encode() in start


def build_index(path: Path, columns: Sequence[str] = ()) -> bytes:
    """Reads a whole tar, and returns the bytes of its index.

    A sample is left out, with its reason, if its picture's header or its texts cannot be read.

    Raises:
        DataError: The tar is compressed, holds no samples, cannot be read, or changed meanwhile.
    """
    try:
        with path.open("rb") as file:
            before = os.fstat(file.fileno())
            found, problems, suffixes = samples(tar.scan(file.fileno(), name=path.name))
            described, unusable = _describe_all(file.fileno(), found, columns)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            after = os.fstat(file.fileno())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    if not suffixes:  # perhaps no tar at all: leave no index beside it
        problem = problems[0] if problems else tar.Problem("shard.empty", 0, "it has no members")
        raise DataError(f"{path.name}: holds no samples: {problem.reason} {problem}")
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError(f"{path}: changed while it was indexed; index it when it is finished")
    rejects, quarantine = count_rejects([*problems, *unusable])
    header = {
        "size_bytes": after.st_size,
        "mtime_ns": after.st_mtime_ns,
        "sha256": digest,
        "num_samples": len(described),
        "columns": columns,
        "texts_alone": holds_texts_alone(suffixes),
        "fields": dict(suffixes.most_common(100)),
        "rejects": rejects,
        "quarantine": quarantine,
    }
    return encode_index(
        header,
        keys=[sample.key for sample in described],
        records=[sample.record for sample in described],
        numbers=[sample.numbers for sample in described],
    )


class _Described(NamedTuple):
    """A sample whose picture's header and texts could be read."""

    key: str
    record: Record
    numbers: tuple[float, ...]


def _describe_all(
    descriptor: int, found: Sequence[TarSample], columns: Sequence[str]
) -> tuple[list[_Described], list[tar.Problem]]:
    """The samples that can be used, and each other one as a problem."""
    described, problems = [], []
    for sample in found:
        try:
            described.append(_describe(descriptor, sample, columns))
        except BadSample as bad:
            problems.append(tar.Problem(bad.reason, sample.offset, bad.detail, sample.key))
    return described, problems


def _describe(descriptor: int, sample: TarSample, columns: Sequence[str]) -> _Described:
    texts, fields = dict[str, bytes](), dict.fromkeys(TEXT_SUFFIXES, Field(-1, 0, 0))
    for kind in [kind for kind in TEXT_SUFFIXES if kind in sample.fields]:
        reason = "text.json" if kind == "json" else "text.size"
        texts[kind], fields[kind] = _read(descriptor, sample.fields[kind], reason, MAX_TEXT_BYTES)
    captions, meta = parse_texts(
        json_text=texts.get("json"), txt=texts.get("txt"), cls=texts.get("cls")
    )
    record = Record(
        key_end=0,  # `encode_index` knows
        **_describe_image(descriptor, sample.image(), repr(texts).encode()),
        caption_length=max(map(len, captions), default=0),
        txt=fields["txt"],
        json=fields["json"],
        cls=fields["cls"],
    )
    return _Described(sample.key, record, tuple(_number(meta.get(name)) for name in columns))


def _describe_image(
    descriptor: int, found: tuple[str, tar.Member] | None, texts: bytes
) -> dict[str, Any]:
    """What a record says of the picture; where there is none, the hash is that of the texts."""
    if found is None:
        nothing = dict.fromkeys(("suffix", "format", "width", "height"), 0)
        return {**nothing, "image_hash": _hash(texts), "image": Field(-1, 0, 0)}
    suffix, member = found
    data, image = _read(descriptor, member, "image.size", MAX_IMAGE_BYTES)
    opened = open_image(data)
    width, height = header_size(opened)
    return {
        "image_hash": _hash(data),
        "suffix": IMAGE_SUFFIXES.index(suffix),
        "format": FORMATS.index(_format(opened)),
        "width": width,
        "height": height,
        "image": image,
    }


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _read(descriptor: int, member: tar.Member, reason: str, limit: int) -> tuple[bytes, Field]:
    if member.size > limit:
        raise BadSample(reason, f"{member.size} bytes; at most {limit} are read")
    data = os.pread(descriptor, member.size, member.offset)
    return data, Field(member.offset, member.size, zlib.crc32(data))


def _format(opened: Image.Image) -> str:
    """A JPEG that holds several pictures, as telephones write, opens as MPO."""
    return "JPEG" if opened.format == "MPO" else opened.format or ""


def _number(value: object) -> float:
    """What a JSON value counts as in a column: NaN if it is no number."""
    try:
        return float(value) if isinstance(value, int | float) else float("nan")
    except OverflowError:  # an integer beyond float64
        return float("nan")
