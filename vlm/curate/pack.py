"""Write pictures as WebDataset shards: original bytes, one JSON a sample, every time the same."""

import errno
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from vlm.curate.listing import Listing, Picture
from vlm.data.decode import open_image
from vlm.data.samples import BadSample, parse_texts
from vlm.data.shards import MAX_IMAGE_BYTES, MAX_TEXT_BYTES
from vlm.errors import ConfigError, DataError, DiskError
from vlm.runtime.files import progress, write_atomic

SHARD_SIZE_BYTES = 256 << 20
REPORT = "pack.json"
MAGIC = {
    "jpg": rb"\xff\xd8\xff",
    "png": rb"\x89PNG\r\n\x1a\n",
    "gif": rb"GIF8[79]a",
    "webp": rb"RIFF....WEBP",
}
Sample = dict[str, Any]  # WebDataset's: "__key__", and bytes by suffix


def pack(
    listing: Listing, out: Path, *, shard_size_bytes: int = SHARD_SIZE_BYTES
) -> dict[str, Any]:
    """Writes a listing's pictures into a new folder of shards, whole or not at all.

    A JPEG, PNG, WebP or GIF, by its first bytes, is stored as it is; a BMP or TIFF becomes a PNG.
    The key is the picture's number and what ASCII its name has; the name itself is in the meta as
    "path". The same listing gives the same bytes.

    Args:
        listing: What to pack; what cannot be is counted in its `skipped`.
        out: The folder, which must not exist.
        shard_size_bytes: No shard is larger, unless by its only sample.

    Returns:
        The report, which the folder holds as `pack.json`: source, num_samples, num_shards, skipped.

    Raises:
        ConfigError: The folder exists.
        DataError: Not a single picture can be packed.
        DiskError: The folder cannot be written.
    """
    if out.exists():
        raise ConfigError(f"{out}: exists, and packing never overwrites; name another folder")
    with _disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        temporary.chmod(0o755)
        num_samples, num_shards = _write_shards(listing, temporary, shard_size_bytes)
        if num_samples == 0:
            raise DataError(_nothing_packed(listing))
        report = {
            "source": listing.source,
            "num_samples": num_samples,
            "num_shards": num_shards,
            "skipped": {"counts": listing.skipped.counts, "examples": listing.skipped.examples},
        }
        with _disk_errors(out):
            write_atomic(temporary / REPORT, json.dumps(report, indent=1).encode())
            os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        problem = "the disk is full" if full else f"cannot be written: {error.strerror}"
        raise DiskError(f"{out}: {problem}; nothing was left there") from error


def _write_shards(listing: Listing, folder: Path, shard_size_bytes: int) -> tuple[int, int]:
    """Returns how many samples and shards were written."""
    num_samples = 0
    with _disk_errors(folder), _ShardWriter(folder, shard_size_bytes) as writer:
        for sample in _samples(listing):
            writer.write(sample)
            num_samples += 1
    return num_samples, writer.num_shards


class _ShardWriter:
    """WebDataset's tar writer over files of a limited size, each on the disk before it closes."""

    def __init__(self, folder: Path, shard_size_bytes: int) -> None:
        self._folder, self._limit = folder, shard_size_bytes - tarfile.RECORDSIZE
        self.num_shards, self._used = 0, 0
        self._shard = ExitStack()

    def __enter__(self) -> "_ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._shard.close()

    def write(self, sample: Sample) -> None:
        blocks = sum(
            1 + -(-len(sample[name]) // tarfile.BLOCKSIZE) for name in sample if name != "__key__"
        )
        size = tarfile.BLOCKSIZE * blocks
        if self.num_shards == 0 or self._used + size > self._limit:
            self._next_shard()
        self._writer.write(sample)
        self._used += size

    def _next_shard(self) -> None:
        from webdataset.writer import TarWriter  # imports torch: only where something is packed

        self._shard.close()
        file = self._shard.enter_context((self._folder / f"{self.num_shards:05d}.tar").open("wb"))
        self._shard.callback(os.fsync, file.fileno())
        self._shard.callback(file.flush)
        self._writer = self._shard.enter_context(
            TarWriter(file, encoder=False, compress=False, mtime=0)
        )
        self.num_shards, self._used = self.num_shards + 1, 0


def _samples(listing: Listing) -> Iterator[Sample]:
    total = len(listing.pictures)
    for number, picture in enumerate(
        progress(listing.pictures, description="packing", total=total)
    ):
        try:
            suffix, image = _image(picture.path)
            texts = _texts(picture)
        except _Unusable as problem:
            listing.skipped.add(problem.reason, f"{picture.name} ({problem})")
            continue
        slug = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(picture.name).stem)[:40].strip("_")
        key = f"{number:0{max(6, len(str(total)))}d}" + (f"-{slug}" if slug else "")
        yield {"__key__": key, suffix: image, **texts}


class _Unusable(Exception):
    """A picture that is left out, and why."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(detail)


def _image(path: Path) -> tuple[str, bytes]:
    """The suffix and the bytes to store."""
    try:
        if not path.is_file():
            raise _Unusable("image.missing", "is a folder" if path.is_dir() else "no such file")
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise _Unusable("image.size", f"more than {MAX_IMAGE_BYTES} bytes")
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _Unusable("image.unreadable", str(error)) from error
    for suffix, magic in MAGIC.items():
        if re.match(magic, data, re.DOTALL):
            try:
                open_image(data)
            except BadSample as bad:
                raise _Unusable(bad.reason, bad.detail) from bad
            return suffix, data
    return "png", _as_png(data)


def _as_png(data: bytes) -> bytes:
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=("BMP", "TIFF")) as image:
                upright = ImageOps.exif_transpose(image)
        if upright.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
            upright = upright.convert("RGB")
        upright.save(buffer, "PNG")
    except Exception as error:
        raise _Unusable("image.format", "not a picture of a known format") from error
    return buffer.getvalue()


def _texts(picture: Picture) -> dict[str, bytes]:
    """The text fields that read back as the picture's captions and meta."""
    meta = {**picture.meta, "path": picture.name}
    if picture.captions:
        meta["captions"] = list(picture.captions)
    texts = {}
    try:
        cls = str(meta.get("cls")).encode()
        if _reads_back(cls, meta.get("cls")):
            texts["cls"] = cls
            del meta["cls"]
        texts["json"] = json.dumps(meta, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise _Unusable("text.encoding", "half a character in its text") from None
    except RecursionError:
        raise _Unusable("text.json", "nested too deeply") from None
    if len(texts["json"]) > MAX_TEXT_BYTES:
        raise _Unusable("text.size", f"more than {MAX_TEXT_BYTES} bytes of text")
    return texts


def _reads_back(cls: bytes, value: Any) -> bool:
    """Whether a `.cls` of these bytes says the value, and nothing but a text or a number."""
    read = parse_texts(cls=cls)[1]["cls"]
    return type(read) is type(value) and bool(read == value)


def _nothing_packed(listing: Listing) -> str:
    missing = listing.skipped.counts.get("image.missing", 0)
    if missing and missing == len(listing.pictures):
        first = listing.skipped.examples["image.missing"][0]
        return (
            f"{listing.source}: none of its {missing} image files exists, such as {first}; "
            "paths are absolute or relative to the folder of the table"
        )
    reasons = "; ".join(listing.skipped.lines()) or "it has no rows"
    return f"{listing.source}: nothing could be packed: {reasons}"
