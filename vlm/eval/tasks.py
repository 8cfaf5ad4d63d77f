"""The catalogue of tasks: the settings each has in a suite, and the function that it runs."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from vlm.config.schema import STRICT, Count
from vlm.errors import ConfigError
from vlm.eval.captions import caption
from vlm.eval.classification import zero_shot
from vlm.eval.grounding import grounding
from vlm.eval.retrieval import retrieval
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
class RetrievalTask(Task):
    """Find pictures by their captions, and captions by their pictures."""

    task: Literal["retrieval"]

    def run(self, source: Source) -> Outcome:
        """Measure it."""
        return retrieval(source)


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
class ExplainTask(Task):
    """Show where a picture has what a text names, and prove it."""

    task: Literal["explain"]
    template: Annotated[str, Field(pattern=r"\{\}")] = "{}"  # makes the text from an object's name
    num_pictures: Count = 100  # evenly spaced over the data

    def run(self, source: Source) -> Outcome:
        """Measure it."""
        return grounding(source, template=self.template, num_pictures=self.num_pictures)


TASKS: dict[str, type[Task]] = {
    "zero_shot": ZeroShotTask,
    "retrieval": RetrievalTask,
    "caption": CaptionTask,
    "explain": ExplainTask,
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
