"""Writes what an index is made of: segments of an embedded data set, with thumbnails."""

import io
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from vlm.data.dataset import Dataset
from vlm.data.decode import decode_image
from vlm.data.samples import BadSample
from vlm.errors import DataError, DiskError
from vlm.inference import VisionLanguageModel
from vlm.retrieval.embed import Log, describe_skipped, embed_batches
from vlm.retrieval.segment import SegmentWriter
from vlm.runtime.files import sync_folder

SEGMENT_ROWS = 1_000_000  # 1 GB of fp16 vectors at 512 dimensions, in memory while it is written
THUMBNAIL_SIZE = 128  # pixels of the longer side
BATCH_SIZE = 128  # pictures a row group of the Parquet file


def segment_name(number: int) -> str:
    """The folder of a segment."""
    return f"segment-{number:06d}"


def write_segments(
    model: VisionLanguageModel, dataset: Dataset, folder: Path, *, first: int, log: Log
) -> list[dict[str, Any]]:
    """Embed a data set into segments `first`, `first + 1`, ... of a folder; returns their entries.

    Raises:
        DataError: Not one picture can be read.
    """
    entries: list[dict[str, Any]] = []
    writer: SegmentWriter | None = None
    skipped: Counter[str] = Counter()
    with ThreadPoolExecutor() as threads:
        for batch in embed_batches(model, dataset, batch_size=BATCH_SIZE, log=log):
            skipped.update(batch.skipped)
            if not batch.items:
                continue
            if writer is None:
                number = first + len(entries)
                writer = SegmentWriter(folder / segment_name(number), model.embed_dim)
            ids = batch.sample_ids.tolist()
            writer.write(batch, list(threads.map(partial(thumbnail, dataset), ids)))
            if writer.num_rows >= SEGMENT_ROWS:
                entries.append(writer.close())
                writer = None
    if writer is not None:
        entries.append(writer.close())
    if not entries:
        raise DataError(f"no picture can be read: {describe_skipped(skipped) or 'there is none'}")
    return [{**entry, "data": dataset.fingerprint} for entry in entries]


def thumbnail(dataset: Dataset, sample_id: int) -> bytes:
    """A small WebP of a whole picture (the model may see only its middle); empty if unreadable."""
    try:
        image = decode_image(dataset.read(sample_id).image, min_size=THUMBNAIL_SIZE)
    except BadSample:
        return b""
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


@contextmanager
def temporary_folder(final: Path) -> Iterator[Path]:
    """A hidden folder beside `final`, gone at the end unless `publish` has moved it.

    Raises:
        DiskError: Writing fails.
    """
    temporary = final.with_name(f".{final.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
    except OSError as error:
        raise DiskError(f"{error.filename or final}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, final: Path) -> None:
    """Move a folder, whose files are synced, to where readers see it whole."""
    for path in [*temporary.rglob("*"), temporary]:
        if path.is_dir():
            sync_folder(path)
    temporary.rename(final)
    sync_folder(final.parent)
