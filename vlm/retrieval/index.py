"""A searchable folder of embedded pictures, with the model that answers queries.

    INDEX/index.json              the manifest, the one file that is ever replaced
    INDEX/model/                  a model folder, so that a copied index serves elsewhere
    INDEX/segment-000000/         rows.parquet and vectors.faiss
    INDEX/deleted-000000.json     keys that are gone from the segments before it

More data adds a segment, a deletion adds a list of keys, and nothing else is ever changed: a reader
or a killed writer sees the old index or the new one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vlm.curate.source import open_data
from vlm.data.dataset import Dataset
from vlm.errors import ConfigError, DataError
from vlm.hub.load import load
from vlm.inference import VisionLanguageModel
from vlm.retrieval.build import publish, temporary_folder, write_segments
from vlm.retrieval.deletions import Live, bury, deleted_keys, live_keys, live_rows, next_number
from vlm.retrieval.embed import Log
from vlm.retrieval.filter import Filter, parse_known
from vlm.retrieval.manifest import Manifest, exclusive, read_manifest
from vlm.retrieval.segment import Segment, check_files, describe_files

Data = str | Sequence[str] | Dataset
Query = str | Path | Image.Image


@dataclass(frozen=True)
class Hit:
    """A picture that was found.

    Attributes:
        key: Its name in the data.
        score: Cosine of query and picture, in -1..1.
        caption: The first one; empty if it has none.
        meta: Its metadata.
        thumbnail: A small WebP, as encoded bytes.
    """

    key: str
    score: float
    caption: str
    meta: dict[str, Any]
    thumbnail: bytes

    @property
    def path(self) -> str:
        """Where its folder or table had it; empty for what was packed by others."""
        return str(self.meta.get("path", ""))


def check_new(folder: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        ConfigError: It does, or it is no folder.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder} exists; give a new folder, or remove it first")


class Index:
    """An index, open for search; `Index.build` makes one and `Index.open` opens one.

    Args:
        folder: Where it is.
        device: Where its model computes: auto | cpu | cuda | mps.
    """

    def __init__(self, folder: str | Path, *, device: str = "auto") -> None:
        self.folder = Path(folder)
        self.device = device
        self._read()

    @classmethod
    def open(cls, folder: str | Path, *, device: str = "auto") -> "Index":
        """The index in a folder; nothing large is read before the first search.

        Raises:
            ConfigError: There is no such folder.
            DataError: A file in it is missing or damaged.
        """
        return cls(folder, device=device)

    @classmethod
    def build(
        cls,
        model: VisionLanguageModel | str | Path,
        data: Data,
        folder: str | Path,
        *,
        device: str = "auto",
        log: Log = print,
    ) -> "Index":
        """Embed a data set into a new folder, which appears when it is complete.

        Args:
            model: A model, or the SPEC of one; it is saved inside the index.
            data: DATA, or an open data set.
            folder: New or empty.
            device: Where a model from a SPEC computes.
            log: Gets lines of progress, and what was skipped.

        Raises:
            ConfigError: The folder holds something.
            DataError: Not one picture can be read.
            DiskError: The folder cannot be written.
        """
        folder = Path(folder)
        check_new(folder)
        model = model if isinstance(model, VisionLanguageModel) else load(model, device=device)
        dataset = data if isinstance(data, Dataset) else open_data(data, log=log)
        folder = folder.resolve()
        with temporary_folder(folder) as temporary:
            model.save(temporary / "model")
            segments = write_segments(model, dataset, temporary, first=0, log=log)
            manifest = Manifest(model.embed_dim, describe_files(temporary / "model"), segments, [])
            manifest.write(temporary)
            publish(temporary, folder)
        index = cls(folder, device=str(model.device))
        index.__dict__["model"] = model
        return index

    @cached_property
    def model(self) -> VisionLanguageModel:
        """The model in the folder, loaded when first needed.

        Raises:
            DataError: A file of it is not the one that made the index.
        """
        check_files(self.folder / "model", self._manifest.model, whole=True)
        return load(self.folder / "model", device=self.device)

    def __len__(self) -> int:
        """Pictures that can be found."""
        return sum(
            segment.num_rows if live is None else int(live.sum())
            for segment, live in zip(self._segments, self._live, strict=True)
        )

    @property
    def fields(self) -> list[str]:
        """The metadata fields that `where` knows."""
        return sorted(frozenset[str]().union(*(segment.fields for segment in self._segments)))

    def search(self, query: Query, k: int = 10, where: str | None = None) -> list[Hit]:
        """The k nearest pictures, best first; fewer where fewer match.

        Args:
            query: A text, or a picture: a PIL image or the Path of an image file.
            k: At least 1.
            where: Which pictures may be found, in the language of `vlm.retrieval.filter`.

        Raises:
            ConfigError: An empty text, a wrong k, or a `where` that is wrong or names no field.
            DataError: The query's picture cannot be read, or a file of the index is damaged.
        """
        rule = None if where is None else parse_known(where, self.fields)
        return self._search(self.embed(query), k, rule)

    def search_vector(
        self, vector: Float[Tensor, " D"], k: int = 10, where: str | None = None
    ) -> list[Hit]:
        """As `search`, for a query that is embedded already: a row of length 1."""
        return self._search(vector, k, None if where is None else parse_known(where, self.fields))

    def embed(self, query: Query) -> Float[Tensor, " D"]:
        """A query as a row of length 1."""
        if isinstance(query, str):
            if not query.strip():
                raise ConfigError("the query is empty; say what to look for")
            return self.model.embed_texts(query)[0]
        return self.model.embed_images(query)[0]

    def add(self, data: Data, *, log: Log = print) -> int:
        """Add a data set as new segments; returns the number of pictures added.

        Of data that is there already, only the pictures whose keys were deleted are added again. A
        key of other data is then there twice: keys are unique within a data set alone.

        Raises:
            ConfigError: The same data is in the index and none of its pictures was deleted, or
                another process writes to it.
            DataError: Not one picture can be read.
        """
        dataset = data if isinstance(data, Dataset) else open_data(data, log=log)
        with exclusive(self.folder):
            self._read()
            missing = self._missing(dataset)
            first = next_number(self.folder, "segment-*")
            with temporary_folder(self.folder / "adding") as temporary:
                entries = write_segments(self.model, missing, temporary, first=first, log=log)
                for entry in entries:
                    publish(temporary / entry["name"], self.folder / entry["name"])
            entries = [{**entry, "data": dataset.fingerprint} for entry in entries]
            self._commit(replace(self._manifest, segments=[*self._manifest.segments, *entries]))
        return sum(entry["num_rows"] for entry in entries)

    def delete(self, keys: Sequence[str]) -> int:
        """Make pictures impossible to find; returns how many.

        Raises:
            ConfigError: A key is not in the index, or another process writes to it.
        """
        with exclusive(self.folder):
            self._read()
            before = len(self)
            if unknown := sorted(set(keys) - live_keys(self._segments, self._live)):
                raise ConfigError([f"{self.folder}: no picture has the key {k!r}" for k in unknown])
            entry = bury(self.folder, keys, num_segments=len(self._segments))
            self._commit(replace(self._manifest, deleted=[*self._manifest.deleted, entry]))
        return before - len(self)

    def verify(self) -> None:
        """Compare every file's sha256 with the manifest's.

        Raises:
            DataError: With a line for each file that is missing or damaged.
        """
        problems: list[str] = []
        folders = {"model": self._manifest.model}
        folders |= {entry["name"]: entry["files"] for entry in self._manifest.segments}
        for name, files in folders.items():
            try:
                check_files(self.folder / name, files, whole=True)
            except DataError as error:
                problems += error.problems
        if problems:
            raise DataError(problems)

    def _missing(self, dataset: Dataset) -> Dataset:
        """What of a data set is to be added: all, or what was deleted if it is there already."""
        entries = enumerate(self._manifest.segments)
        same = [number for number, entry in entries if entry["data"] == dataset.fingerprint]
        if not same:
            return dataset
        segments = [self._segments[number] for number in same]
        deleted = deleted_keys(segments, [self._live[number] for number in same])
        if not deleted:
            raise ConfigError(f"{self.folder}: this data is in the index already")
        return dataset.select(np.array([dataset.key(n) in deleted for n in range(len(dataset))]))

    def _read(self) -> None:
        """Open what the manifest lists now; the masks of deleted rows are made when needed."""
        self._manifest = read_manifest(self.folder)
        check_files(self.folder / "model", self._manifest.model)
        self._segments = [
            Segment(self.folder / entry["name"], entry, self._manifest.embed_dim)
            for entry in self._manifest.segments
        ]
        self.__dict__.pop("_live", None)

    def _commit(self, manifest: Manifest) -> None:
        manifest.write(self.folder)
        self._read()

    @cached_property
    def _live(self) -> list[Live]:
        return live_rows(self.folder, self._manifest.deleted, self._segments)

    def _search(self, vector: Tensor, k: int, rule: Filter | None) -> list[Hit]:
        if k < 1:
            raise ConfigError(f"k ({k}) must be at least 1")
        query = vector.float().cpu().numpy()
        found: list[tuple[float, int, int]] = []
        for number, (segment, live) in enumerate(zip(self._segments, self._live, strict=True)):
            mask = live
            if rule is not None:
                matches = rule.mask(segment.column)
                mask = matches if live is None else matches & live
            found += [(-score, number, row) for score, row in segment.search(query, k, mask)]
        return self._hits(sorted(found)[:k])

    def _hits(self, found: list[tuple[float, int, int]]) -> list[Hit]:
        rows: dict[tuple[int, int], dict[str, Any]] = {}
        for number in {number for _, number, _ in found}:
            wanted = [row for _, n, row in found if n == number]
            read = self._segments[number].read(wanted)
            rows |= {(number, row): shown for row, shown in zip(wanted, read, strict=True)}
        return [_hit(-negative, rows[number, row]) for negative, number, row in found]


def _hit(score: float, row: dict[str, Any]) -> Hit:
    caption = row["captions"][0] if row["captions"] else ""
    return Hit(row["key"], score, caption, json.loads(row["meta"]), row["thumbnail"])
