"""Captions from a table: what a picture is called elsewhere, found by a field of its metadata."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.curate.tables import read_captions
from vlm.retrieval.embed import Item


@dataclass(frozen=True)
class CaptionTable:
    """A column of captions, by the key that pictures share with it; see `read_caption_table`.

    Attributes:
        key: The metadata field, and the column, that says what a row is about.
        captions: The captions of each key, as text.
        protocol: What results depend on, as JSON.
    """

    key: str
    captions: dict[str, tuple[str, ...]]
    protocol: dict[str, Any]

    def of(self, item: Item) -> tuple[str, ...]:
        """The captions of a picture; none where its key, or the table's row, is missing."""
        value = item.meta.get(self.key)
        return () if value is None else self.captions.get(str(value), ())


def read_caption_table(path: str | Path, *, key: str, column: str) -> CaptionTable:
    """Read a CSV, TSV, JSONL or Parquet file.

    Args:
        path: The table.
        key: The column, and the metadata field, by which rows and pictures belong together. Rows of
            one key are captions of the same pictures.
        column: With the captions: a text, or (JSONL, Parquet) a list of them. Empty cells are none.

    Raises:
        ConfigError: There is no such file or column.
        DataError: The table is damaged.
    """
    path = Path(path)
    captions: dict[str, tuple[str, ...]] = {}
    for name, texts in read_captions(path, key=key, column=column):
        captions[name] = (*captions.get(name, ()), *texts)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return CaptionTable(key, captions, {"sha256": digest, "key": key, "column": column})
