"""From names to things: the file of a config, and the values and lines in it."""

import difflib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vlm.errors import ConfigError

MAX_BYTES = 2**20
MAX_DEPTH = 20
MAX_VALUES = 1000  # the schema has about 60; more only cost time

Keys = tuple[str, ...]

# YAML 1.2's scalars, with Python's underscores: 1e-3 is a number, `off` and 12:30 are text
_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_SCALARS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "null": (r"~|null|Null|NULL|", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9](?:_?[0-9]){0,999}", int),  # Python refuses above 4300 digits
    "float": (rf"[-+]?(?:{_DIGITS}\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", float),
}
_TAG = "tag:yaml.org,2002:"
_RESOLVERS = [(_TAG + name, re.compile(rf"(?:{rule})\Z")) for name, (rule, _) in _SCALARS.items()]


class Document(NamedTuple):
    """What a YAML text holds.

    Attributes:
        values: Plain values: dicts, lists, text, numbers, True, False, None.
        lines: The line of every key of a mapping and of every item of a list (its number is its
            key), counted from 1; `()` is the start.
        repeated: Line and problem of every key that its mapping has already; the first one counts.
    """

    values: Any
    lines: dict[Keys, int]
    repeated: list[tuple[int, str]]


class YamlError(ValueError):
    """Text that is not YAML, or YAML that a settings file may not hold."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.line = line


def _shipped_folder() -> Path:
    """The wheel keeps them inside the package; a checkout keeps them beside it."""
    package = Path(__file__).parent.parent
    in_wheel = package / "shipped_configs"
    return in_wheel if in_wheel.is_dir() else package.parent / "configs"


def shipped_configs(folder: str = "") -> list[str]:
    """The sorted names of the configs that come with the package, or of those in a folder there."""
    return sorted(file.stem for file in (_shipped_folder() / folder).glob("*.yaml"))


def find_config(name: str | Path) -> Path:
    """The file that `name` stands for.

    Args:
        name: A path; or a bare NAME, which is `configs/NAME.yaml` in the working directory, else
            the shipped config of that name.

    Raises:
        ConfigError: There is none; the message names the nearest shipped one.
    """
    return _find(name, "config", "")


def find_suite(name: str | Path) -> Path:
    """The file of a suite: as `find_config`, with `configs/suites/NAME.yaml` for a bare NAME."""
    return _find(name, "suite", "suites")


def find_objects(name: str | Path) -> Path:
    """The file of a list of objects: as `find_config`, with `configs/scenes/NAME.yaml`."""
    return _find(name, "list of objects", "scenes")


def _find(name: str | Path, what: str, folder: str) -> Path:
    candidates = [Path(name)]
    if Path(name).name == str(name):
        file = Path(folder, f"{name}.yaml")
        candidates += ["configs" / file, _shipped_folder() / file]
    for candidate in candidates:
        if os.path.isfile(candidate):  # unlike Path.is_file, never raises
            return candidate
    shipped = shipped_configs(folder)
    near = difflib.get_close_matches(Path(name).stem, shipped, n=1)
    meant = f" did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f'no {what} "{printable(str(name))}": not a file, and no shipped {what} has that name;'
        f"{meant} shipped: {', '.join(shipped) or 'none'}"
    )


def read_text(file: Path) -> str:
    """The text of a settings file.

    Raises:
        ConfigError: It can't be read, is larger than 1 MiB, or is not UTF-8.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"{file}: larger than 1 MiB; this is no settings file")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{file}: can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{file}:{line}: not UTF-8 text; save the file as UTF-8") from error


def read_yaml(text: str) -> Document:
    """The values in one YAML document; nothing in it is run, imported or shared.

    Raises:
        YamlError: It isn't YAML; has tags, anchors or aliases; is too large or too deep.
    """
    try:
        node = _Loader(text).get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(line, f"not YAML: the character U+{error.character:04X}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise YamlError(mark.line + 1 if mark else 1, _explain(error)) from error
    document = Document(None, {(): node.start_mark.line + 1 if node else 1}, [])
    return document._replace(values=_plain(node, (), document) if node else None)


def write_yaml(values: dict[str, Any]) -> str:
    """YAML that `read_yaml` reads back to the same values, tuples as lists."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**20)


_NO_ALIASES = "anchors (&) and aliases (*) are not allowed; write the value out, or quote it"


class _Refusal(yaml.MarkedYAMLError):
    """YAML that a settings file may not hold."""


class _Loader(yaml.SafeLoader):
    """Composes nodes and constructs nothing: no tags, anchors or aliases, and bounded in size."""

    yaml_implicit_resolvers = {None: _RESOLVERS}  # noqa: RUF012  # PyYAML's own protocol

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.num_values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]  # PyYAML's stubs
        self.depth += 1
        self.num_values += 1
        if problem := self._refusal(event):
            raise _Refusal(problem=problem, problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def _refusal(self, event: Any) -> str | None:
        if event.anchor is not None:
            return _NO_ALIASES
        if event.tag is not None:
            tag = printable(event.tag.replace(_TAG, "!!"))
            return f"the tag {tag} is not allowed; give plain text, numbers, lists and sections"
        if self.depth > MAX_DEPTH:
            return f"nested deeper than {MAX_DEPTH} levels"
        if self.num_values > MAX_VALUES:
            return f"more than {MAX_VALUES} values; this is no settings file"
        if isinstance(event, yaml.ScalarEvent) and re.search("[\ud800-\udfff]", event.value):
            return "half of a surrogate pair is not text"
        return None


class _Dumper(yaml.SafeDumper):
    """Quotes whatever this reader or a YAML 1.1 reader would take for something else than text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        **yaml.SafeDumper.yaml_implicit_resolvers,
        None: _RESOLVERS,
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_tuple(self, data: tuple[Any, ...]) -> yaml.Node:
        return self.represent_sequence(_TAG + "seq", data, flow_style=True)

    def represent_text(self, data: str) -> yaml.Node:
        # PyYAML writes U+0085 as it is between single quotes, where it reads as a line break
        style = None if data.isprintable() else '"'
        return self.represent_scalar(_TAG + "str", data, style=style)


_Dumper.add_representer(tuple, _Dumper.represent_tuple)
_Dumper.add_representer(str, _Dumper.represent_text)


def _explain(error: yaml.MarkedYAMLError) -> str:
    if isinstance(error, _Refusal):
        return str(error.problem)
    if error.context in (
        "while scanning an anchor",
        "while scanning an alias",
    ):  # data.train: *.tar
        return _NO_ALIASES
    parts = [part for part in (error.context, error.problem) if part]
    return f"not YAML: {', '.join(parts)}; text with special characters needs quotes"


def _plain(node: yaml.Node, keys: Keys, document: Document) -> Any:
    """The node's value; notes the lines of keys and of items of lists."""
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            document.lines[(*keys, str(number))] = item.start_mark.line + 1
        return [_plain(item, (*keys, str(n)), document) for n, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        return _plain_mapping(node, keys, document)
    _, convert = _SCALARS.get(node.tag.removeprefix(_TAG), ("", str))
    return convert(node.value)


def _plain_mapping(node: yaml.MappingNode, keys: Keys, document: Document) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise YamlError(line, "a key must be text, not a list or a section")
        name = key_node.value
        if name in values:
            first = document.lines[(*keys, name)]
            key = printable(".".join((*keys, name)))
            document.repeated.append((line, f"duplicate key {key}; it is on line {first} already"))
            continue
        document.lines[(*keys, name)] = line
        values[name] = _plain(value_node, (*keys, name), document)
    return values


def printable(text: str, max_length: int = 80) -> str:
    """`text` on one line: control codes escaped, cut to `max_length` characters."""
    escaped = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in text[: max_length + 1]
    )
    return escaped if len(escaped) <= max_length else f"{escaped[: max_length - 3]}..."


def counted(count: int, what: str) -> str:
    """A number of things, as "1 shard" or "2,000 shards"."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def dotted(keys: Keys) -> str:
    """`keys` as they are written, on one line."""
    return printable(".".join(keys)) or '""'


def shown(value: Any) -> str:
    """A setting's value as JSON, on one line."""
    return printable(json.dumps(value, ensure_ascii=False, default=repr, skipkeys=True))
