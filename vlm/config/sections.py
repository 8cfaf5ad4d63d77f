"""What each section of the settings holds, and the key that a typo meant."""

import dataclasses
import difflib
import functools
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from vlm.config.find import Keys, dotted
from vlm.config.schema import Config


@functools.cache
def fields_of(section: type) -> dict[str, Any]:
    """What each key of a section holds.

    A section (its dataclass), a list of them (`tuple[dataclass, ...]`), `dict`, or None: one value.
    """
    return {field.name: _holds(field.type) for field in dataclasses.fields(section)}


def _holds(annotation: Any) -> Any:
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return annotation
    if get_origin(annotation) is dict:
        return dict
    options = get_args(annotation)
    if get_origin(annotation) is tuple and dataclasses.is_dataclass(options[0]):
        return annotation
    return next(filter(None, map(_holds, options)), None)


def _leaves(section: type, prefix: str = "") -> Iterator[str]:
    for name, inner in fields_of(section).items():
        if isinstance(inner, type) and inner is not dict:
            yield from _leaves(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def flatten(
    values: Mapping[str, Any], *, separator: str = ".", prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yields the values that are no mappings, with all keys that lead to them joined."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flatten(value, separator=separator, prefix=f"{name}{separator}")
        else:
            yield name, value


def suggest(keys: Keys, section: type) -> tuple[str, list[str]]:
    """How to go on after an unknown key, and the dotted keys it may have meant."""
    name, names = keys[-1][:80], list(fields_of(section))
    leaves = list(_leaves(Config))
    if name in leaves:
        outer, _, last = name.rpartition(".")
        return f"write {last} under {outer.replace('.', ': ')}:", [name]
    if near := difflib.get_close_matches(name, names, n=1):
        meant = (*keys[:-1], near[0])
        return f"did you mean {dotted(meant)}?", [".".join(meant)]
    last_names = {leaf.rpartition(".")[2] for leaf in leaves}
    ending = [leaf for leaf in leaves if leaf.endswith(f"_{name}")][:4]
    if ending and name not in last_names:
        return f"did you mean {' or '.join(ending)}?", ending
    if near := difflib.get_close_matches(name, sorted(last_names), n=1):
        places = [leaf for leaf in leaves if leaf.rpartition(".")[2] == near[0]]
        return f"did you mean {' or '.join(places)}?", places
    where = dotted(keys[:-1]) if keys[1:] else "a config"
    return f"{where} has {', '.join(names)}", []
