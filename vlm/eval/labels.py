"""The true classes of pictures: what their metadata says, as places in a list of class names."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlm.errors import ConfigError, DataError
from vlm.retrieval.embed import Item

DEFAULT_FIELDS = ("label", "cls")  # cls: a shard's `.cls`, CLIP_benchmark's class number


@dataclass(frozen=True)
class Truth:
    """The true classes of those samples that have a label.

    Attributes:
        field: Where in the metadata they were found.
        class_names: All classes.
        rows: Which samples have a label, as places in the list of all.
        classes: The numbers of each one's classes; one for each unless `is_multi_label`.
        is_multi_label: Whether labels are lists.
    """

    field: str
    class_names: list[str]
    rows: list[int]
    classes: list[list[int]]
    is_multi_label: bool


def true_classes(
    items: Sequence[Item], label: str | None, class_names: Sequence[str] | None
) -> Truth:
    """Looks up each sample's label: a name, a class number from 0, or a list of these.

    A number is a place in `class_names` where these are given, also where a name looks like it; a
    text of digits is one where no name is that text.

    Args:
        items: The samples.
        label: The metadata field; by default the first of `DEFAULT_FIELDS` that any sample has.
        class_names: The classes; by default the sorted labels of the data. A name may repeat: such
            classes can only be given by number.

    Raises:
        ConfigError: A label is not among `class_names`, or is the name of several of them, or the
            data's folders, which number its classes, are not as many.
        DataError: No sample has the label.
    """
    field = _field(items, label)
    found = [(row, item.meta.get(field)) for row, item in enumerate(items)]
    labelled = [(row, value) for row, value in found if value is not None]
    is_multi_label = any(isinstance(value, list) for _, value in labelled)
    values = [value if isinstance(value, list) else [value] for _, value in labelled]
    if class_names is None:
        values = [[str(one) for one in several] for several in values]
        class_names = sorted({name for several in values for name in several})
        if not class_names:
            raise DataError(f"no sample's list {field!r} holds a label")
    elif field == "cls":
        _check_folders([items[row] for row, _ in labelled], len(class_names))
    classes = _numbers(values, class_names)
    return Truth(field, list(class_names), [row for row, _ in labelled], classes, is_multi_label)


def check_are_names(truth: Truth) -> None:
    """Refuse classes that are known by their numbers alone: they say nothing to a text encoder.

    Raises:
        ConfigError: All are numbers.
    """
    if all(re.fullmatch(r"-?[0-9]+", name) for name in truth.class_names):
        raise ConfigError(
            f"the labels in {truth.field!r} are numbers ({', '.join(truth.class_names[:3])}, ...); "
            "give labels: FILE with the class names, one a line, in the order of the numbers"
        )


def _check_folders(items: Sequence[Item], num_classes: int) -> None:
    """Refuse numbers that are ranks of the folders that are there, if a folder is missing."""
    labels = [str(item.meta.get("label")) for item in items]
    ranks = {label: rank for rank, label in enumerate(sorted(set(labels)))}
    are_folders = all(
        item.path.startswith(f"{label}/") and item.meta["cls"] == ranks[label]
        for item, label in zip(items, labels, strict=True)
    )
    if are_folders and len(ranks) != num_classes:
        raise ConfigError(
            f"'cls' numbers the {len(ranks)} folders that are there, but there are {num_classes} "
            "class names; use label: label, with names as the folders have them, or restore the "
            "missing folder"
        )


def _field(items: Sequence[Item], label: str | None) -> str:
    wanted = DEFAULT_FIELDS if label is None else (label,)
    there = {name for item in items for name, value in item.meta.items() if value is not None}
    found = next((name for name in wanted if name in there), None)
    if found is None:
        raise DataError(
            f"no sample has the field {' or '.join(map(repr, wanted))}; its fields are: "
            f"{', '.join(sorted(there)) or 'none'}; name the one with the class as label"
        )
    return found


def _numbers(values: Sequence[Sequence[Any]], class_names: Sequence[str]) -> list[list[int]]:
    """The class numbers of each sample's labels, each once."""
    places: dict[str, list[int]] = {}
    for number, name in enumerate(class_names):
        places.setdefault(name, []).append(number)
    numbers: dict[Any, list[int]] = {}  # by label, the places that it may mean
    for label in (label for several in values for label in several):
        if type(label) is int:
            numbers[label] = [label] if 0 <= label < len(class_names) else []
        else:
            numbers[str(label)] = places.get(str(label)) or _place(str(label), len(class_names))
    _refuse(numbers, len(class_names))
    keys = [[label if type(label) is int else str(label) for label in row] for row in values]
    return [sorted({numbers[key][0] for key in row}) for row in keys]


def _place(label: str, num_classes: int) -> list[int]:
    """The class that a text of digits numbers, as a CSV has it; none if it is another text."""
    is_number = re.fullmatch(r"[0-9]{1,18}", label) is not None
    return [int(label)] if is_number and int(label) < num_classes else []


def _refuse(numbers: dict[Any, list[int]], num_classes: int) -> None:
    unknown = sorted((repr(label) for label, found in numbers.items() if not found))
    if unknown:
        raise ConfigError(
            f"{len(unknown)} labels of the data are not among the {num_classes} class names: "
            f"{', '.join(unknown[:5])}; add them, or name another label field"
        )
    for label, found in numbers.items():
        if len(found) > 1:
            raise ConfigError(
                f"label {label!r} is the name of {len(found)} classes ({', '.join(map(str, found))}"
                "); such classes need numbers as labels"
            )
