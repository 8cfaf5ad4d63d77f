"""Files for people, written where there was none; CSV has nothing that a spreadsheet runs."""

import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from vlm.errors import ConfigError, DiskError

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # noqa: RUF001


def safe_cell(value: object) -> object:
    """A text that a spreadsheet would take for a formula, with a quote before it."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def refuse_existing(path: Path | None) -> None:
    """Ask for another output before the work is done.

    Raises:
        ConfigError: There is something at `path`.
    """
    if path is not None and path.exists():
        raise ConfigError(f"{path} exists; name another file, or remove it first")


@contextmanager
def new_csv(
    path: Path | None, header: Sequence[str]
) -> Iterator[Callable[[Sequence[object]], object]]:
    """A function that writes one row to a new file, or to standard output for None.

    The header comes with the first row: what fails before it prints nothing. A file that was not
    written to its end is removed.

    Raises:
        ConfigError: There is something at `path`.
        DiskError: The file cannot be written.
    """
    if path is None:
        yield _row_writer(sys.stdout, header)
        return
    with _create(path) as file:
        try:
            yield _row_writer(file, header)
            file.flush()
        except BaseException as error:
            path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                reason = error.strerror or error
                raise DiskError(f"{path}: cannot be written: {reason}") from error
            raise


def write_new(path: Path, text: str) -> None:
    """Write a text file that was not there.

    Raises:
        ConfigError: There is something at `path`.
        DiskError: The file cannot be written.
    """
    try:
        with _create(path) as file:
            file.write(text)
    except OSError as error:
        raise DiskError(f"{path}: cannot be written: {error.strerror or error}") from error


def _create(path: Path) -> TextIO:
    try:
        return path.open("x", encoding="utf-8", newline="")
    except FileExistsError:
        raise ConfigError(f"{path} exists; name another file, or remove it first") from None
    except OSError as error:
        raise DiskError(f"{path}: cannot be written: {error.strerror}") from error


def _row_writer(file: Any, header: Sequence[str]) -> Callable[[Sequence[object]], object]:
    table = csv.writer(file, lineterminator="\n")
    waiting: list[Sequence[object]] = [header]

    def write(row: Sequence[object]) -> None:
        rows = [*waiting, row]
        waiting.clear()
        table.writerows([safe_cell(value) for value in each] for each in rows)

    return write
