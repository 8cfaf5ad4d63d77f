"""One immutable part of an index: a Parquet file of rows and, beside it, a faiss file of vectors.

`rows.parquet` alone holds everything (key, fp16 vector, captions, metadata as JSON, thumbnail);
`vectors.faiss` is an exact fp16 scan over the same vectors, read through a memory map.
"""

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Float

from vlm.errors import DataError
from vlm.retrieval.embed import Embedded
from vlm.retrieval.filter import Kind, column_of
from vlm.runtime.files import sha256_file

ROWS, VECTORS = "rows.parquet", "vectors.faiss"
_SHOWN = ["key", "captions", "meta", "thumbnail"]


def schema(embed_dim: int) -> pa.Schema:
    """The columns of `rows.parquet`."""
    return pa.schema(
        {
            "key": pa.string(),
            "vector": pa.list_(pa.float16(), embed_dim),
            "captions": pa.list_(pa.string()),
            "meta": pa.string(),
            "thumbnail": pa.binary(),
        }
    )


class SegmentWriter:
    """Writes one segment into a folder of its own, batch by batch.

    Args:
        folder: Made here.
        embed_dim: D.
    """

    def __init__(self, folder: Path, embed_dim: int) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.num_rows = 0
        self._fields: set[str] = set()
        self._schema = schema(embed_dim)
        self._rows = pq.ParquetWriter(
            folder / ROWS,
            self._schema,
            compression="zstd",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )
        self._vectors = faiss.IndexScalarQuantizer(
            embed_dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )

    def write(self, batch: Embedded, thumbnails: Sequence[bytes]) -> None:
        """Append a batch, as one row group: a search then reads little more than its hits."""
        features = np.ascontiguousarray(batch.features.numpy(), dtype=np.float32)
        metas = [item.meta for item in batch.items]
        columns = [
            [item.key for item in batch.items],
            pa.FixedSizeListArray.from_arrays(
                pa.array(features.astype(np.float16).ravel()), features.shape[1]
            ),
            [list(item.captions) for item in batch.items],
            [json.dumps(meta, ensure_ascii=False, sort_keys=True) for meta in metas],
            list(thumbnails),
        ]
        arrays = [pa.array(c, field.type) for c, field in zip(columns, self._schema, strict=True)]
        self._rows.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._vectors.add(features)
        self._fields.update(*metas)
        self.num_rows += len(batch)

    def close(self) -> dict[str, Any]:
        """Finish both files on disk; returns the segment's entry in the manifest."""
        self._rows.close()
        faiss.write_index(self._vectors, str(self.folder / VECTORS))
        return {
            "name": self.folder.name,
            "num_rows": self.num_rows,
            "fields": sorted(self._fields),
            "files": describe_files(self.folder),
        }


class Segment:
    """Reads one segment.

    Args:
        folder: Where it is.
        entry: Of the manifest.
        embed_dim: D.

    Raises:
        DataError: A file is missing, damaged, or not what the manifest says.
    """

    def __init__(self, folder: Path, entry: Mapping[str, Any], embed_dim: int) -> None:
        self.folder = folder
        self.num_rows: int = entry["num_rows"]
        self.fields = frozenset[str](entry["fields"])
        check_files(folder, entry["files"])
        self._vectors = _open_vectors(folder / VECTORS)
        shape = (self._vectors.ntotal, self._vectors.d)
        if shape != (self.num_rows, embed_dim):
            raise DataError(
                f"{folder / VECTORS}: damaged: {shape[0]} vectors of {shape[1]} dimensions, not "
                f"{self.num_rows} of {embed_dim}"
            )
        try:
            self._rows = pq.ParquetFile(
                folder / ROWS, memory_map=True, page_checksum_verification=True
            )
        except (pa.ArrowException, OSError) as error:
            raise _damaged(folder / ROWS, error) from error
        groups = self._rows.metadata
        sizes = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])
        self._columns: dict[tuple[str, Kind], Any] = {}

    def search(
        self, query: Float[np.ndarray, " D"], k: int, live: Bool[np.ndarray, " N"] | None
    ) -> list[tuple[float, int]]:
        """The k best (score, row), best first; fewer where fewer are live.

        Args:
            query: Of length 1.
            k: At least 1.
            live: Which rows may be found; None for all.
        """
        parameters = None
        if live is not None:
            bits = np.packbits(live, bitorder="little")
            # ignored: faiss's stubs lack the forms that its own documentation shows
            selector = faiss.IDSelectorBitmap(bits)  # type: ignore[call-arg, arg-type]
            parameters = faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
        rows = np.ascontiguousarray(query, dtype=np.float32)[None]
        scores, found = self._vectors.search(rows, min(k, self.num_rows), params=parameters)
        pairs = zip(scores[0].tolist(), found[0].tolist(), strict=True)
        return [(score, row) for score, row in pairs if row >= 0]

    def read(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """What is shown of rows: key, captions, meta (as JSON), thumbnail."""
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        tables = {group: self._read([int(group)], _SHOWN) for group in set(groups.tolist())}
        return [
            tables[group].slice(row - int(self._starts[group]), 1).to_pylist()[0]
            for row, group in zip(rows, groups.tolist(), strict=True)
        ]

    @cached_property
    def keys(self) -> Any:
        """The keys of all rows, an Arrow array."""
        return self._read(None, ["key"])["key"].combine_chunks()

    def rows_of(self, keys: Sequence[str]) -> Bool[np.ndarray, " N"]:
        """Which rows have one of the keys."""
        found = pc.is_in(self.keys, pa.array(keys, pa.string()))
        return np.asarray(found.to_numpy(zero_copy_only=False), dtype=np.bool_)

    def column(self, field: str, kind: Kind) -> Any:
        """A metadata field of all rows; parsed once, and kept."""
        if (field, kind) not in self._columns:
            texts = self._read(None, ["meta"])["meta"].to_pylist()
            values = [json.loads(text).get(field) for text in texts]
            self._columns[field, kind] = column_of(values, kind)
        return self._columns[field, kind]

    def _read(self, groups: list[int] | None, columns: list[str]) -> Any:
        try:
            if groups is None:
                return self._rows.read(columns)
            return self._rows.read_row_groups(groups, columns)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(self.folder / ROWS, error) from error


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of each file in a folder, after waiting until it is on disk."""
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.name] = {"size_bytes": path.stat().st_size, "sha256": sha256_file(path)}
    return files


def check_files(
    folder: Path, files: Mapping[str, Mapping[str, Any]], *, whole: bool = False
) -> None:
    """Compare a folder's files with what the manifest says: sizes, and the bytes if `whole`.

    Raises:
        DataError: With a line for each file that is missing or differs.
    """
    problems = []
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path}: missing; copy the index again, or build it anew")
        elif path.stat().st_size != expected["size_bytes"]:
            problems.append(
                f"{path}: damaged: {path.stat().st_size} bytes, not {expected['size_bytes']}"
            )
        elif whole and sha256_file(path) != expected["sha256"]:
            problems.append(f"{path}: damaged: its sha256 is not the one in the manifest")
    if problems:
        raise DataError(problems)


def _open_vectors(path: Path) -> Any:
    try:
        # IO_FLAG_MMAP reads a scalar-quantised index whole; this one maps it.
        vectors = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise _damaged(path, error) from error
    if not isinstance(vectors, faiss.IndexScalarQuantizer):
        raise DataError(f"{path}: damaged: a {type(vectors).__name__}, not an fp16 scan")
    return vectors


def _damaged(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:200]
    return DataError(f"{path}: damaged: {reason}; copy the index again, or build it anew")
