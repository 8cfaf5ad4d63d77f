"""The catalogue of tasks: the settings each has in a suite, and the function that it runs."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from vlm.config.schema import STRICT
from vlm.errors import ConfigError
from vlm.eval import probes
from vlm.eval.caption_table import read_caption_table
from vlm.eval.captions import caption
from vlm.eval.classification import zero_shot
from vlm.eval.retrieval import EqualCaptions, retrieval
from vlm.eval.source import Outcome, Source
from vlm.inference import VisionLanguageModel

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$")]  # part of a file's name
Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, config=STRICT)
class Task(ABC):
    """What every task has: the data to measure on, and a name for it."""

    task: str
    split: Name
    data: Text | list[Text]  # DATA, relative to the working directory

    @property
    def name(self) -> str:
        """TASK-SPLIT, which no two tasks of a suite share."""
        return f"{self.task}-{self.split}"

    def fits(self, model: VisionLanguageModel) -> bool:
        """Whether the model can do it."""
        return True

    @abstractmethod
    def run(self, source: Source) -> Outcome:
        """Measure a model on its data."""


@dataclass(frozen=True, config=STRICT)
class ZeroShotTask(Task):
    """Name what pictures show."""

    task: Literal["zero_shot"]
    label: Text = "label"  # the metadata field with the class
    labels: Text | None = None  # a file with one class name a line; by default all labels seen
    templates: Text | list[Text] = "simple"  # none | simple | openai | openai_simple | FILE

    def run(self, source: Source) -> Outcome:
        """Measure it."""
        names = None if self.labels is None else read_labels(self.labels)
        return zero_shot(source, label=self.label, class_names=names, templates=self.templates)


@dataclass(frozen=True, config=STRICT)
class CaptionsFrom:
    """Captions that are not in the data, but in a table."""

    table: Text  # CSV, TSV, JSONL or Parquet
    key: Text  # the metadata field, and the table's column, by which they belong together
    column: Text  # with the captions


@dataclass(frozen=True, config=STRICT)
class RetrievalTask(Task):
    """Find pictures by their captions, and captions by their pictures."""

    task: Literal["retrieval"]
    equal_captions: EqualCaptions = "merge"  # merge: one query | keep: one each, as the field does
    captions: CaptionsFrom | None = None  # by default the data's own

    def run(self, source: Source) -> Outcome:
        """Measure it."""
        place, table = self.captions, None
        if place is not None:
            table = read_caption_table(place.table, key=place.key, column=place.column)
        return retrieval(source, equal_captions=self.equal_captions, table=table)


@dataclass(frozen=True, config=STRICT)
class CaptionTask(Task):
    """Describe pictures."""

    task: Literal["caption"]
    prompt: Text | None = None  # how each caption begins

    def fits(self, model: VisionLanguageModel) -> bool:
        """Whether the model has a captioner."""
        return model.model.captioner is not None

    def run(self, source: Source) -> Outcome:
        """Measure it."""
        return caption(source, prompt=self.prompt)


@dataclass(frozen=True, config=STRICT)
class ProbeTask(Task):
    """Name what pictures show, by a linear classifier of their features."""

    task: Literal["probe"]
    train_data: Text | list[Text]  # DATA: the classifier is fitted to it
    val_data: Text | list[Text] | None = (
        None  # DATA to choose lambda by; None: a fifth of the above
    )
    label: Text = "label"  # the metadata field with the class

    def run(self, source: Source) -> Outcome:
        """Measure it."""
        val = None if self.val_data is None else source.beside(self.val_data)
        return probes.probe(source, source.beside(self.train_data), val=val, label=self.label)


@dataclass(frozen=True, config=STRICT)
class KnnTask(Task):
    """Name what pictures show, by the pictures whose features are nearest."""

    task: Literal["knn"]
    train_data: Text | list[Text]  # DATA: the neighbours
    label: Text = "label"  # the metadata field with the class
    k: int = Field(default=20, ge=1)  # neighbours that vote
    temperature: float = Field(default=0.07, gt=0)  # a vote weighs exp(cosine / temperature)

    def run(self, source: Source) -> Outcome:
        """Measure it."""
        train = source.beside(self.train_data)
        return probes.knn(source, train, label=self.label, k=self.k, temperature=self.temperature)


TASKS: dict[str, type[Task]] = {
    "zero_shot": ZeroShotTask,
    "retrieval": RetrievalTask,
    "caption": CaptionTask,
    "probe": ProbeTask,
    "knn": KnnTask,
}


def read_labels(path: str | Path) -> list[str]:
    """The class names in a text file, one a line; blank lines are no names.

    Raises:
        ConfigError: The file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"labels file {path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"labels file {path}: not UTF-8 text; save it as UTF-8") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
