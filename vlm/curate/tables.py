"""Tables of image paths and captions: CSV, TSV, JSONL and Parquet to a list of pictures."""

import csv
import difflib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.curate.listing import Listing, Picture
from vlm.data.tally import Tally
from vlm.errors import ConfigError, DataError

JSON_SUFFIXES = (".jsonl", ".ndjson")
TABLE_SUFFIXES = (".csv", ".tsv", *JSON_SUFFIXES, ".parquet")
# compared without case, blanks and underscores; the first that the table has is taken
IMAGE_COLUMNS = ("image", "path", "filepath", "file", "filename", "imagepath", "img")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "description", "sentence")
LABEL_COLUMNS = ("label", "class")
OWN_FIELDS = ("captions", "caption", "path")  # what a pack says in its own words
MAX_NAMED_COLUMNS = 20


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are read; labels and others go to the picture's meta."""

    image: str
    captions: tuple[str, ...]
    labels: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f'image column "{self.image}"']
        for what, names in (("caption", self.captions), ("label", self.labels)):
            if names:
                quoted = ", ".join(f'"{name}"' for name in names)
                parts.append(f"{what} column{'s' if len(names) > 1 else ''} {quoted}")
        return ", ".join(parts if self.captions else [*parts, "no captions"])


def list_table(
    path: Path,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    log: Callable[[str], object] = print,
) -> Listing:
    """Lists the pictures of a table; rows that name the same image are captions of one picture.

    Labels go to the picture's meta, of JSONL all other fields too, as those of a shard's `.json`;
    the first row of an image says them. A number of JSON that is none (NaN) is null.

    Args:
        path: The table. Image paths in it are absolute, or relative to its folder.
        image_column: Guessed from its name if None.
        caption_column: One column, or several with commas between; guessed if None.
        log: Gets the line that says which columns were taken.

    Raises:
        ConfigError: A column that was named does not exist.
        DataError: The table cannot be read, or its columns cannot be guessed.
    """
    names = _column_names(path)
    columns = choose_columns(
        names,
        image_column=image_column,
        caption_column=caption_column,
        table=path.name,
        takes_all=path.suffix.lower() in JSON_SUFFIXES,
    )
    log(f"{path.name}: {columns}")
    listing = Listing(path.name, [])
    pictures: dict[str, Picture] = {}
    for where, row in _rows(path, columns, listing.skipped):
        image = _image(row.get(columns.image), columns.image, path.name)
        if not image:
            listing.skipped.add("row.no_image", where)
            continue
        captions = [text for column in columns.captions for text in _captions(row.get(column))]
        labels = {column: _label(row.get(column)) for column in columns.labels}
        meta = labels | {name: row[name] for name in columns.others if name in row}
        before = pictures.get(image)
        if before is not None:
            captions = [*before.captions, *captions]
            if any(before.meta[column] != label for column, label in labels.items()):
                listing.skipped.add("row.other_label", f"{where} of {image}")
            meta = before.meta
        pictures[image] = Picture(path.parent / image, image, tuple(dict.fromkeys(captions)), meta)
    listing.pictures = list(pictures.values())
    return listing


def read_captions(path: Path, *, key: str, column: str) -> Iterator[tuple[str, list[str]]]:
    """Yields the key of each row, as text, and its captions.

    Raises:
        ConfigError: There is no such file or column.
        DataError: The table cannot be read, or a row of it.
    """
    if path.suffix.lower() not in TABLE_SUFFIXES or not path.is_file():
        what = "no such file" if path.suffix.lower() in TABLE_SUFFIXES else "not a table"
        raise ConfigError(f"{path}: {what}; give one of {', '.join(TABLE_SUFFIXES)}")
    names = _column_names(path)
    columns = Columns(_existing(key, names, path.name), (_existing(column, names, path.name),))
    skipped: Tally[str] = Tally()
    for _, row in _rows(path, columns, skipped):
        if row.get(key) is not None:
            yield str(row[key]), _captions(row.get(column))
    if skipped.total:
        raise DataError([f"{path.name}: {line}; mend the table" for line in skipped.lines()])


def choose_columns(
    names: list[str],
    *,
    image_column: str | None,
    caption_column: str | None,
    table: str,
    takes_all: bool = False,
) -> Columns:
    """Returns the columns to read: those named, else the first that the names in this file fit.

    Args:
        names: Of all columns.
        image_column: Guessed if None.
        caption_column: One, or several with commas between; guessed if None.
        table: Its name.
        takes_all: Whether columns of no meaning here are read too.

    Raises:
        ConfigError: A named column does not exist.
        DataError: No column fits, or two have one name.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f'{table}: has several columns "{twice[0]}"; give each its own name')
    labels = tuple(name for name in names if _plain(name) in LABEL_COLUMNS)
    captions: tuple[str, ...] = ()
    if caption_column is not None:
        listed = [caption_column] if caption_column in names else caption_column.split(",")
        captions = tuple(_existing(name.strip(), names, table) for name in listed)
    elif guess := _guess(names, CAPTION_COLUMNS):
        captions = (guess,)
    image = (
        _guess(names, IMAGE_COLUMNS)
        if image_column is None
        else _existing(image_column, names, table)
    )
    taken = {image, *captions, *labels, *OWN_FIELDS}
    others = tuple(name for name in names if name not in taken) if takes_all else ()
    if image is None or not (captions or labels or others):
        wanted = [*(["image"] if image is None else []), *([] if captions else ["caption"])]
        shown = ", ".join(names[:MAX_NAMED_COLUMNS])
        options = " and ".join(f"--{what}-column NAME" for what in wanted)
        settings = " ".join(f"data.{what}_column=NAME" for what in wanted)
        raise DataError(
            f"{table}: cannot tell which column holds the {' and the '.join(wanted)}; "
            f"name it with {options} (in a config: {settings}; for an evaluation, vlm data pack "
            f"takes the option{'s' if len(wanted) > 1 else ''}); its columns are: {shown}"
        )
    labels = tuple(name for name in labels if name not in captions)
    return Columns(image, captions, labels, others)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower())


def _guess(names: list[str], known: tuple[str, ...]) -> str | None:
    plain = {_plain(name): name for name in reversed(names)}
    return next((plain[name] for name in known if name in plain), None)


def _existing(name: str, names: list[str], table: str) -> str:
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}? Its" if near else "its"
    shown = ", ".join(names[:MAX_NAMED_COLUMNS])
    raise ConfigError(f'{table}: has no column "{name}"; {hint} columns are: {shown}')


def _image(cell: Any, column: str, table: str) -> str:
    if isinstance(cell, (bytes, dict)):
        raise DataError(f'{table}: column "{column}" holds images, not paths; write them to files')
    return cell if isinstance(cell, str) else ""


def _captions(cell: Any) -> list[str]:
    texts = cell if isinstance(cell, list) else [cell]
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]


def _label(cell: Any) -> Any:
    return [_scalar(one) for one in cell] if isinstance(cell, list) else _scalar(cell)


def _scalar(cell: Any) -> Any:
    if cell is None or isinstance(cell, (str, int)):
        return cell
    return cell if isinstance(cell, float) and math.isfinite(cell) else str(cell)


def _column_names(path: Path) -> list[str]:
    if path.suffix.lower() == ".parquet":
        return list(_parquet(path).schema_arrow.names)
    if path.suffix.lower() in (".csv", ".tsv"):
        return next(_cells(path))[1]
    names: dict[str, None] = {}
    for _, row in _json_rows(path, Tally()):
        names |= dict.fromkeys(row)
    return list(names)


def _rows(
    path: Path, columns: Columns, skipped: Tally[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix.lower() == ".parquet":
        wanted = [columns.image, *columns.captions, *columns.labels]
        number = 0
        for batch in _parquet(path).iter_batches(columns=wanted):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    elif path.suffix.lower() in (".csv", ".tsv"):
        rows = _cells(path)
        _, header = next(rows)
        for line, cells in rows:
            if len(cells) == len(header):
                yield f"line {line}", dict(zip(header, cells, strict=True))
            else:
                text = f"line {line} has {len(cells)} cells for {len(header)} columns"
                skipped.add("row.cells", text)
    else:
        for line, row in _json_rows(path, skipped):
            yield f"line {line}", row


def _parquet(path: Path) -> Any:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path)
    except (ArrowInvalid, OSError) as error:
        raise DataError(f"{path.name}: cannot be read as Parquet: {error}") from error


def _cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The lines of a CSV with their numbers, the header first; blank lines are passed over."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            head = file.readline()
            file.seek(0)
            delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",\t;", key=head.count)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            empty = True
            for cells in reader:
                if cells:
                    empty = False
                    yield reader.line_num, cells
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path.name}: cannot be read as CSV in UTF-8: {error}") from error
    if empty:
        raise DataError(f"{path.name}: is empty")


def _json_rows(path: Path, skipped: Tally[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, parse_float=_finite, parse_constant=_finite)
            except (ValueError, RecursionError) as error:
                skipped.add("row.json", f"line {number}: {error}")
                continue
            if isinstance(row, dict):
                yield number, row
            else:
                skipped.add("row.json", f"line {number} is a {type(row).__name__}, not an object")


def _finite(number: str) -> float | None:
    value = float(number)
    return value if math.isfinite(value) else None
