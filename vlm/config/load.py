"""Settings from a file and overrides, with every mistake reported at once; and back to YAML."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from vlm.config import find
from vlm.config.find import Keys, dotted, printable, shown
from vlm.config.rules import check
from vlm.config.schema import Config
from vlm.config.sections import fields_of, suggest
from vlm.errors import ConfigError


class _Place(NamedTuple):
    order: int
    text: str


def load_config(path: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Config:
    """The settings in a YAML file, changed by overrides.

    Args:
        path: A file, or a name that `find_config` knows.
        overrides: `section.key=value` texts whose values are YAML, or dotted keys with Python
            values. A section merges into what is there; any other value replaces it.

    Raises:
        ConfigError: Has one line for each thing wrong with the file and the overrides, in order.
    """
    file = find.find_config(path)
    settings = _Settings(str(file))
    settings.read(find.read_text(file))
    given = [overrides] if isinstance(overrides, str) else overrides
    items: Any = given.items() if isinstance(given, Mapping) else given
    for order, item in enumerate(items):
        settings.override(item, find.MAX_BYTES + 1 + order)
    return settings.validate()


def dump_config(config: Config) -> str:
    """YAML with every setting, defaults included, that `load_config` reads as an equal Config."""
    return find.write_yaml(dataclasses.asdict(config))


class _Settings:
    """The settings given so far, where each came from, and what is wrong with them."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.values: dict[str, Any] = {}
        self.places: dict[Keys, _Place] = {(): _Place(0, source)}
        self.problems: list[tuple[_Place, str]] = []
        self.mistaken: set[str] = set()  # keys with a known mistake: no rule needs to mention them

    def read(self, text: str) -> None:
        """Takes the settings of a YAML text."""
        try:
            document = find.read_yaml(text)
        except find.YamlError as error:
            raise ConfigError(f"{self.source}:{error.line}: {error}") from error
        self.problems += [(self._line(line), problem) for line, problem in document.repeated]
        if isinstance(document.values, dict):
            self._merge(document.values, lambda keys: self._line(document.lines[keys]))
        elif document.values is not None:
            text = (
                f"must hold sections: {', '.join(fields_of(Config))}; is {shown(document.values)}"
            )
            self.problems.append((self._line(document.lines[()]), text))

    def _line(self, line: int) -> _Place:
        return _Place(line, f"{self.source}:{line}")

    def override(self, item: str | tuple[str, Any], order: int) -> None:
        """Takes one `section.key=value`, or one (dotted key, Python value)."""
        text = item if isinstance(item, str) else f"{item[0]}={shown(item[1])}"
        place = _Place(order, f"override {printable(text)}")
        try:
            name, value = _split(item) if isinstance(item, str) else (item[0], _jsonable(item[1]))
        except ValueError as error:
            self.problems.append((place, str(error)))
            return
        target = tuple(name.split("."))
        for key in reversed(target):
            value = {key: value}
        self._merge(value, lambda keys: place, target=target)

    def _merge(
        self,
        given: dict[str, Any],
        place: Callable[[Keys], _Place],
        *,
        target: Keys = (),
        prefix: Keys = (),
        kind: Any = Config,
    ) -> None:
        """Puts `given` into the section at `prefix`, of the dataclass `kind` or an open dict."""
        into = self._reach(prefix)[1]
        for name, value in given.items():
            keys = (*prefix, name)
            if kind is not dict and name not in fields_of(kind):
                self._report_unknown(keys, kind, place(keys))
                continue
            self.places[keys] = place(keys)
            inner = None if kind is dict else fields_of(kind)[name]
            if isinstance(value, list) and get_origin(inner) is tuple:
                into[name] = [{} if isinstance(item, dict) else item for item in value]
                self._merge_list(value, place, prefix=keys, kind=get_args(inner)[0])
                continue
            if not isinstance(value, dict) or not isinstance(inner, type):
                into[name] = value
                continue
            if not isinstance(into.get(name), dict) or (inner is dict and keys == target):
                into[name] = {}
            self._merge(value, place, target=target, prefix=keys, kind=inner)

    def _merge_list(
        self, given: list[Any], place: Callable[[Keys], _Place], *, prefix: Keys, kind: type
    ) -> None:
        """Puts the sections in `given` into the empty ones of the list at `prefix`."""
        for number, item in enumerate(given):
            keys = (*prefix, str(number))
            self.places[keys] = place(keys)
            if isinstance(item, dict):
                self._merge(item, place, prefix=keys, kind=kind)

    def _report_unknown(self, keys: Keys, kind: type, place: _Place) -> None:
        hint, meant = suggest(keys, kind)
        self.problems.append((place, f"unknown key {dotted(keys)}; {hint}"))
        self.mistaken.update(meant)

    def validate(self) -> Config:
        """The Config, or every problem so far as one ConfigError."""
        adapter = TypeAdapter(Config)
        try:  # as JSON, strict pydantic takes a list for a tuple and a mapping for a section
            config = adapter.validate_json(json.dumps(self.values))
        except ValidationError as error:
            self._report_invalid(error)
            config = adapter.validate_json(json.dumps(self.values))
        for problem in check(config):
            if any(key.startswith(tuple(self.mistaken)) for key in problem.keys):
                continue
            places = [self.places.get(tuple(key.split("."))) for key in problem.keys]
            place = next(filter(None, places), self.places[()])
            self.problems.append((place, problem.text))
        if self.problems:
            self.problems.sort(key=lambda problem: problem[0].order)
            raise ConfigError([f"{place.text}: {text}" for place, text in self.problems])
        return config

    def _report_invalid(self, error: ValidationError) -> None:
        """Notes one problem a value, and takes the values out, so that the rest can be checked."""
        errors_of: dict[Keys, list[Any]] = {}
        for item in error.errors(include_url=False, include_input=False):
            errors_of.setdefault(self._reach(item["loc"])[0], []).append(item)
        wrong = [(keys, _explain(self._reach(keys)[1], errors_of[keys])) for keys in errors_of]
        for keys, text in wrong:
            setting = next(keys[:n] for n in range(len(keys), 0, -1) if keys[:n] in self.places)
            self.problems.append((self.places[setting], f"{dotted(keys)} {text}"))
            self.mistaken.add(".".join(setting))
            while isinstance(self._reach(setting[:-1])[1], list):  # out with the whole list
                setting = setting[:-1]
            reached, section = self._reach(setting[:-1])
            if reached == setting[:-1]:
                section.pop(setting[-1], None)

    def _reach(self, location: Sequence[str | int]) -> tuple[Keys, Any]:
        """The keys and the value as far along `location` as there is one."""
        keys: Keys = ()
        value: Any = self.values
        for part in location:
            if part == "list" and isinstance(value, list):  # the tag of a form in the schema
                continue
            try:
                value = value[int(part) if isinstance(value, list) else part]
            except (LookupError, TypeError, ValueError):
                break
            keys = (*keys, str(part))
        return keys, value


def _split(item: str) -> tuple[str, Any]:
    name, equals, text = item.partition("=")
    if not (name.strip() and equals):
        raise ValueError("write it as section.key=value, such as optim.lr=1e-3")
    document = find.read_yaml(text)
    if document.repeated:
        raise ValueError(document.repeated[0][1])
    return name.strip(), document.values


def _jsonable(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value, default=_plain, ensure_ascii=False).encode())
    except (TypeError, ValueError) as error:
        raise ValueError(f"a setting can't hold {shown(value)}") from error


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError


_EXPECTED = {
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "one of {expected}",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "string_pattern_mismatch": 'a comparison, such as ">= 0.28" or "> 0.2 and < 0.9"',
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a section",
    "dataclass_type": "a section",
    "too_long": "a list of {max_length}",
}


def _explain(value: Any, errors: Sequence[Any]) -> str:
    """What one value must be, what it is, and the way out."""
    kind, context = errors[0]["type"], dict(errors[0].get("ctx", {}))
    if "expected" in context:  # 'a', 'b' or 'c'
        context["expected"] = context["expected"].replace(" or ", ", ").replace("'", "")
    if kind == "missing" and isinstance(value, dict):
        return f"lacks {errors[0]['loc'][-1]}"
    if kind == "missing":  # one error for each missing item
        kind, context = "too_long", {"max_length": len(value) + len(errors)}
    expected = _EXPECTED[kind].format(**context)
    if len({error["type"] for error in errors}) > 1:
        expected = "text, a number, true or false"
    separator = ";" if "," in expected else ","
    return f"must be {expected}{separator} is {shown(value)}{_way_out(value, kind)}"


def _way_out(value: Any, kind: str) -> str:
    if value == "None":
        return "; write null"
    if kind == "int_type" and isinstance(value, float) and value.is_integer() and value < 1e15:
        return f"; write {int(value)}"
    if kind == "string_type" and isinstance(value, int | float):
        return f'; as text it is written "{shown(value)}"'
    if kind == "dataclass_type" and value is None:
        return "; write {} for its defaults"
    return ""
