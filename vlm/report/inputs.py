"""What a run folder holds for its report, checked where it enters; whatever is absent is empty."""

import math
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from vlm.config.find import YamlError, read_text, read_yaml
from vlm.errors import ConfigError, DataError
from vlm.runtime.files import read_json_lines

_READ = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, config=_READ)
class Result:
    """A row of results.json."""

    task: str
    split: str
    metric: str
    value: float
    ci95: tuple[float, float]
    n: int
    chance: float
    protocol: str


@dataclass(frozen=True, config=_READ)
class Classified:
    """A picture with its true class and its likeliest ones, best first."""

    key: str
    truth: str
    top: Annotated[list[tuple[str, float]], Field(min_length=1)]

    @property
    def predicted(self) -> str:
        """The likeliest class."""
        return self.top[0][0]


@dataclass(frozen=True, config=_READ)
class Confusion:
    """How often pictures of one class were taken for another's."""

    truth: str
    predicted: str
    count: int


@dataclass(frozen=True, config=_READ)
class Hit:
    """A found picture (its key) or caption."""

    target: str
    score: float
    right: bool


@dataclass(frozen=True, config=_READ)
class Query:
    """What was asked, the place from 1 of the best right answer, and what was found."""

    query: str
    rank: int
    right: list[str]
    hits: list[Hit]


@dataclass(frozen=True, config=_READ)
class Captioned:
    """A picture's generated caption beside what people wrote."""

    key: str
    generated: str
    references: list[str]
    token_f1: float


@dataclass(frozen=True, config=_READ)
class Details:
    """What every task's details begin with."""

    split: str
    protocol: str
    data: str | list[str]
    fingerprint: str


@dataclass(frozen=True, config=_READ)
class ZeroShot(Details):
    """Details of a zero_shot task."""

    task: Literal["zero_shot"]
    samples: list[Classified]
    confusions: list[Confusion]


@dataclass(frozen=True, config=_READ)
class Retrieval(Details):
    """Details of a retrieval task."""

    task: Literal["retrieval"]
    text_to_image: list[Query]
    image_to_text: list[Query]


@dataclass(frozen=True, config=_READ)
class Captions(Details):
    """Details of a caption task."""

    task: Literal["caption"]
    samples: list[Captioned]
    best_constant: str


AnyDetails = Annotated[ZeroShot | Retrieval | Captions, Field(discriminator="task")]


@dataclass(frozen=True, config=_READ)
class BadSample:
    """Where a sample lies that could not be used."""

    shard: str
    key: str
    offset: int


@dataclass(frozen=True, config=_READ)
class BadSamples:
    """A line of bad_samples.jsonl: all bad samples of a reason, and the first few."""

    reason: str
    count: int
    examples: list[BadSample]


@dataclass(frozen=True)
class Inputs:
    """A run folder, read.

    Attributes:
        folder: As it was given.
        command: What command.json says.
        config: The text of config.yaml.
        settings: The values in it; none is checked, so that the config of another version is read.
        metrics: The lines of metrics.jsonl.
        bad_samples: The lines of bad_samples.jsonl.
        results: The rows of results.json; the first of a task and split is its primary one.
        details: Of each task and split that has both results and details of the same protocol, in
            the order of the results.
    """

    folder: Path
    command: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    bad_samples: list[BadSamples] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    details: list[AnyDetails] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def primary(self) -> list[Result]:
        """The first result of each task and split."""
        firsts: dict[tuple[str, str], Result] = {}
        for result in self.results:
            firsts.setdefault((result.task, result.split), result)
        return list(firsts.values())

    def setting(self, name: str) -> Any:
        """A setting by its dotted name; None where the config has none."""
        value: Any = self.settings
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value


def read_run(folder: Path) -> Inputs:
    """Everything in a run folder that a report shows.

    Raises:
        ConfigError: There is no such folder, or it is not a run's.
        DataError: A file in it is damaged.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such run folder; vlm train makes one (its run.dir)")
    names = ("config.yaml", "metrics.jsonl", "results.json")
    if not any((folder / name).is_file() for name in names):
        raise ConfigError(f"{folder}: not a run folder: it has none of {', '.join(names)}")
    results = _read(folder / "results.json", list[Result]) or []
    config = folder / "config.yaml"
    text = read_text(config) if config.is_file() else ""
    lines = [line for line in read_json_lines(folder / "metrics.jsonl") if isinstance(line, dict)]
    return Inputs(
        folder=folder,
        command=_read(folder / "command.json", dict[str, Any]) or {},
        config=text,
        settings=_settings(text),
        metrics=lines,
        bad_samples=_read_lines(folder / "bad_samples.jsonl", BadSamples),
        results=results,
        details=_details(folder / "eval", results),
    )


def number(line: dict[str, Any], name: str) -> float | None:
    """A finite number in a line of metrics; None where there is none."""
    value = line.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _details(folder: Path, results: list[Result]) -> list[AnyDetails]:
    shown = [result for result in results if result.task in ("zero_shot", "retrieval", "caption")]
    measured = dict.fromkeys((result.task, result.split, result.protocol) for result in shown)
    found: list[AnyDetails] = []
    for task, split, protocol in measured:
        path = folder / f"{task}-{split}.json"
        inside = path.parent == folder  # a name with a slash is no name of ours
        details = _read(path, AnyDetails) if inside else None
        if details is not None and details.protocol == protocol:
            found.append(details)
    return found


def _settings(text: str) -> dict[str, Any]:
    try:
        values = read_yaml(text).values
    except YamlError:
        return {}  # the page shows the text as it is
    return values if isinstance(values, dict) else {}


def _read_lines(path: Path, kind: Any) -> list[Any]:
    """A JSON value a line, each as `kind`; none where there is no such file."""
    return [_checked(path, line, kind) for line in _content(path).splitlines()]


def _read(path: Path, kind: Any) -> Any:
    """A JSON file as `kind`; None where there is no such file."""
    return _checked(path, _content(path), kind) if path.is_file() else None


def _checked(path: Path, text: bytes, kind: Any) -> Any:
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        raise DataError(f"{path}: damaged: {_first(error)}; write it again or remove it") from None


def _content(path: Path) -> bytes:
    """A file's bytes; none where there is no such file."""
    try:
        return path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}") from error


def _first(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    where = ".".join(map(str, problem["loc"]))
    return f"{where}: {problem['msg']}" if where else problem["msg"]
