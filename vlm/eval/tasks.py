"""The catalogue of tasks: the settings each has in a suite, and the function that it runs."""

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from vlm.config.schema import STRICT, Count
from vlm.curate.benchmark_folder import CLASS_NAMES, TEMPLATES, benchmark_text
from vlm.eval import probes
from vlm.eval.caption_table import CaptionTable, read_caption_table
from vlm.eval.captions import caption, describe
from vlm.eval.classification import zero_shot
from vlm.eval.grounding import grounding
from vlm.eval.perplexity import perplexity, surprise
from vlm.eval.questions import answer, questions
from vlm.eval.retrieval import EqualCaptions, retrieval
from vlm.eval.source import Outcome, Source
from vlm.eval.swaps import swap
from vlm.heads.class_names import NAMED_SETS, check_class_names, read_labels
from vlm.heads.zero_shot import resolve_templates
from vlm.inference import VisionLanguageModel

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$")]  # part of a file's name
Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, config=STRICT)
class Task(ABC):
    """What every task has: the data to measure on, and a name for it."""

    task: str
    split: Name
    data: Text | list[Text]  # DATA, relative to the working directory
    lacking: ClassVar[str] = "no captioner; model.captioner.width=... in its config trains one"

    @property
    def name(self) -> str:
        """TASK-SPLIT, which no two tasks of a suite share."""
        return f"{self.task}-{self.split}"

    def fits(self, model: VisionLanguageModel) -> bool:
        """Whether the model can do it."""
        return True

    def other_data(self) -> list[str | list[str]]:
        """DATA that it reads beside its own, as training data."""
        return []

    def check(self) -> object:
        """Read the text files that its settings name.

        Raises:
            ConfigError: One is not there, or wrong.
            DataError: One is damaged.
        """
        return None

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
    label: Text | None = None  # the metadata field with the class; by default label, else cls
    # imagenet | cifar10 | cifar100 | a file with one class name a line; by default the
    # classnames.txt of a folder in CLIP_benchmark's layout, else all labels seen
    labels: Text | None = None
    # none | simple | cifar | openai | openai_simple | FILE | a list; by default those of a folder
    # in CLIP_benchmark's layout, else those that a named set is quoted with, else simple
    templates: Text | list[Text] | None = None

    def run(self, source: Source) -> Outcome:
        """Measure it."""
        return zero_shot(
            source,
            label=self.label,
            class_names=self._class_names(),
            templates=self._templates(),
        )

    def check(self) -> object:
        """Class names and templates."""
        names = self._class_names()
        if names is not None:
            check_class_names(names, may_repeat=True)
        return names, resolve_templates(self._templates())

    def _class_names(self) -> list[str] | None:
        if self.labels is not None:
            return read_labels(self.labels)
        path = benchmark_text(self.data, CLASS_NAMES)
        return None if path is None else read_labels(path)

    def _templates(self) -> str | list[str]:
        if self.templates is not None:
            return self.templates
        path = benchmark_text(self.data, TEMPLATES)
        if path is not None:
            return str(path)
        return NAMED_SETS[self.labels].templates if self.labels in NAMED_SETS else "simple"


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

    def check(self) -> object:
        """The table of captions."""
        return self._table()

    def run(self, source: Source) -> Outcome:
        """Measure it."""
        return retrieval(source, equal_captions=self.equal_captions, table=self._table())

    def _table(self) -> CaptionTable | None:
        place = self.captions
        if place is None:
            return None
        return read_caption_table(place.table, key=place.key, column=place.column)


@dataclass(frozen=True, config=STRICT)
class CaptionTask(Task):
    """Describe pictures."""

    task: Literal["caption"]
    prompt: Text | None = None  # how each caption begins

    def fits(self, model: VisionLanguageModel) -> bool:
        """Whether the model has a captioner."""
        return model.model.captioner is not None

    def look(self, source: Source) -> object:
        """All ranks describe, and embed for CLIPScore."""
        return describe(source, self.prompt), source.embedded

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

    def other_data(self) -> list[str | list[str]]:
        """What answers from the question alone are learnt from."""
        return [] if self.train_data is None else [self.train_data]

    def look(self, source: Source) -> object:
        """Answer what is asked about each picture."""
        return answer(source)

    def run(self, source: Source) -> Outcome:
        """Measure it."""
        known = None if self.train_data is None else source.beside(self.train_data).dataset
        return questions(source, train_data=known)


@dataclass(frozen=True, config=STRICT)
class ExplainTask(Task):
    """Show where a picture has what a text names, and prove it."""

    task: Literal["explain"]
    template: Annotated[str, Field(pattern=r"\{\}")] = "{}"  # makes the text from an object's name
    num_pictures: Count = 100  # evenly spaced over the data

    def look(self, source: Source) -> object:
        """Nothing: rank 0 explains a few pictures alone."""
        return None

    def run(self, source: Source) -> Outcome:
        """Measure it."""
        return grounding(source, template=self.template, num_pictures=self.num_pictures)


@dataclass(frozen=True, config=STRICT)
class ProbeTask(Task):
    """Name what pictures show, by a linear classifier of their features."""

    task: Literal["probe"]
    train_data: Text | list[Text]  # DATA: the classifier is fitted to it
    val_data: Text | list[Text] | None = (
        None  # DATA to choose lambda by; None: a fifth of the above
    )
    label: Text = "label"  # the metadata field with the class

    def other_data(self) -> list[str | list[str]]:
        """What is fitted to, and what lambda is chosen by."""
        return [data for data in (self.train_data, self.val_data) if data is not None]

    def look(self, source: Source) -> object:
        """All data."""
        return source.embedded, [source.beside(data).embedded for data in self.other_data()]

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

    def other_data(self) -> list[str | list[str]]:
        """Where the neighbours are."""
        return [self.train_data]

    def look(self, source: Source) -> object:
        """Both."""
        return source.embedded, source.beside(self.train_data).embedded

    def run(self, source: Source) -> Outcome:
        """Measure it."""
        train = source.beside(self.train_data)
        return probes.knn(source, train, label=self.label, k=self.k, temperature=self.temperature)


@dataclass(frozen=True, config=STRICT)
class PerplexityTask(Task):
    """Foresee the words of captions."""

    task: Literal["perplexity"]
    lacking: ClassVar[str] = (
        "neither a captioner nor a language head; model.captioner.width=... or "
        "model.text.language_head=true in its config trains one"
    )

    def fits(self, model: VisionLanguageModel) -> bool:
        """Whether anything in it predicts words."""
        return not (model.model.captioner is None and model.model.language_head is None)

    def look(self, source: Source) -> object:
        """Read the captions."""
        return surprise(source)

    def run(self, source: Source) -> Outcome:
        """Measure it."""
        return perplexity(source)


TASKS: dict[str, type[Task]] = {
    "zero_shot": ZeroShotTask,
    "retrieval": RetrievalTask,
    "caption": CaptionTask,
    "swap": SwapTask,
    "questions": QuestionsTask,
    "explain": ExplainTask,
    "probe": ProbeTask,
    "knn": KnnTask,
    "perplexity": PerplexityTask,
}
