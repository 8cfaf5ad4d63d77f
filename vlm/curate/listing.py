"""What is to be packed: pictures with their captions, listed from a folder."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm.data.grouping import IMAGE_SUFFIXES, TEXT_SUFFIXES
from vlm.data.samples import BadSample, parse_texts
from vlm.data.tally import Tally
from vlm.errors import DataError

REENCODED_SUFFIXES = ("bmp", "tif", "tiff")  # packed as PNG


@dataclass(frozen=True)
class Picture:
    """An image file and what is said about it; `name` is its path as its source spells it."""

    path: Path
    name: str
    captions: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass
class Listing:
    """A source's pictures, and what of it could not be listed."""

    source: str
    pictures: list[Picture]
    skipped: Tally[str] = field(default_factory=Tally)


def folder_files(folder: Path) -> list[Path]:
    """Returns the pictures and sidecars under a folder, sorted; none hidden, a link taken once."""
    wanted = {*IMAGE_SUFFIXES, *REENCODED_SUFFIXES, *TEXT_SUFFIXES}
    files, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        stat = os.stat(root)
        if (stat.st_dev, stat.st_ino) in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        files += [
            Path(root, name)
            for name in names
            if not name.startswith(".") and _suffix(name) in wanted
        ]
    return sorted(files)


def list_folder(folder: Path, files: list[Path] | None = None) -> Listing:
    """Lists the pictures of a folder.

    What lies beside a picture under its name speaks for it: `x.txt`, `x.json`, `x.cls` for `x.jpg`,
    with the meaning they have in a shard. In a folder without any of these, the first subfolder's
    name is the picture's label, and its rank among the labels its class.

    Args:
        folder: The folder.
        files: Its `folder_files`, where they are known already.

    Raises:
        DataError: There is no picture in it.
    """
    files = folder_files(folder) if files is None else files
    images = [path for path in files if _suffix(path.name) not in TEXT_SUFFIXES]
    if not images:
        suffixes = ", ".join(IMAGE_SUFFIXES + REENCODED_SUFFIXES)
        raise DataError(f"{folder}: no picture in this folder ({suffixes})")
    stems = {path.with_suffix("") for path in images}
    texts = {
        (path.with_suffix(""), _suffix(path.name)): path
        for path in files
        if _suffix(path.name) in TEXT_SUFFIXES and path.with_suffix("") in stems
    }
    if not texts:
        return _labelled(folder, images)
    listing = Listing(str(folder), [])
    for path in images:
        beside = {suffix: texts.get((path.with_suffix(""), suffix)) for suffix in TEXT_SUFFIXES}
        name = _name(path, folder)
        try:
            said = {suffix: text.read_bytes() for suffix, text in beside.items() if text}
            captions, meta = parse_texts(
                json_text=said.get("json"), txt=said.get("txt"), cls=said.get("cls")
            )
        except BadSample as bad:
            listing.skipped.add(bad.reason, f"{name}: {bad.detail}")
        except OSError as error:
            listing.skipped.add("text.unreadable", f"{name}: {error.strerror}")
        else:
            listing.pictures.append(Picture(path, name, captions, meta))
    return listing


def _labelled(folder: Path, images: list[Path]) -> Listing:
    labels = {path: _name(path, folder).split("/")[0] for path in images if path.parent != folder}
    classes = {label: number for number, label in enumerate(sorted(set(labels.values())))}
    metas = [
        {"label": labels[path], "cls": classes[labels[path]]} if path in labels else {}
        for path in images
    ]
    pictures = [
        Picture(path, _name(path, folder), (), meta)
        for path, meta in zip(images, metas, strict=True)
    ]
    return Listing(str(folder), pictures)


def _suffix(name: str) -> str:
    return Path(name).suffix[1:].lower()


def _name(path: Path, folder: Path) -> str:
    """The path within its folder, in characters that any text can hold."""
    return os.fsencode(path.relative_to(folder).as_posix()).decode("utf-8", "replace")
