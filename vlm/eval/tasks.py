"""The catalogue of tasks: the settings each has in a suite, and the function that it runs."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from vlm.config.schema import STRICT
from vlm.curate.source import open_data
from vlm.errors import ConfigError
from vlm.eval.captions import caption, describe
from vlm.eval.classification import zero_shot
from vlm.eval.questions import answer, questions
from vlm.eval.retrieval import retrieval
from vlm.eval.source import Outcome, Source
from vlm.eval.swaps import swap
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

    def look(self, source: Source) -> object:
        """What all ranks do together before rank 0 measures alone: see the pictures."""
        return source.embedded

    @abstractmethod
    def run(self, source: Source) -> Outcome:
        """Measure a model on its data, on rank 0; the pictures have been seen."""


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

    def look(self, source: Source) -> object:
        """All ranks describe."""
        return describe(source, self.prompt)

    def run(self, source: Source) -> Outcome:
        """Measure it."""
        return caption(source, prompt=self.prompt)


@dataclass(frozen=True, config=STRICT)
class SwapTask(Task):
    """Tell a caption from the same words about another picture."""

    task: Literal["swap"]

    def run(self, source: Source) -> Outcome:
        """Measure it."""
        return swap(source)


@dataclass(frozen=True, config=STRICT)
class QuestionsTask(Task):
    """Answer questions about pictures."""

    task: Literal["questions"]
    train_data: Text | list[Text] | None = None  # DATA that question-only answers are learnt from

    def fits(self, model: VisionLanguageModel) -> bool:
        """Whether the model has a captioner."""
        return model.model.captioner is not None

    def look(self, source: Source) -> object:
        """Answer what is asked about each picture."""
        return answer(source)

    def run(self, source: Source) -> Outcome:
        """Measure it."""
        known = None if self.train_data is None else open_data(self.train_data, log=source.log)
        return questions(source, train_data=known)


TASKS: dict[str, type[Task]] = {
    "zero_shot": ZeroShotTask,
    "retrieval": RetrievalTask,
    "caption": CaptionTask,
    "swap": SwapTask,
    "questions": QuestionsTask,
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
