"""What every task works with: a data set seen by a model, rows of results, a protocol's hash."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm.curate.source import open_data
from vlm.data.dataset import Dataset
from vlm.errors import DataError
from vlm.eval.results import Samples
from vlm.eval.statistics import Interval, Scores, cluster_codes, mean_interval
from vlm.heads.zero_shot import ZeroShotClassifier, zero_shot_classifier
from vlm.inference import VisionLanguageModel
from vlm.retrieval.embed import (
    Embedded,
    Item,
    Log,
    Pictures,
    describe_skipped,
    embed_dataset,
    read_pictures,
    skipped_line,
)
from vlm.runtime import distributed

VERSION = 2  # of the tasks: part of every protocol, raised when a metric changes its meaning

Classifiers = dict[tuple[tuple[str, ...], tuple[str, ...]], ZeroShotClassifier]  # by their texts


@dataclass(frozen=True)
class Row:
    """One measured number.

    Attributes:
        metric: Its name.
        value: In 0..1, or as `vlm.metrics.units` says.
        ci95: Its 95% interval, from resampled concepts where pictures share one, else pictures.
        n: How many samples or queries were scored.
        chance: What a model reaches that does not look.
        samples: What it is the mean of; None where it is none. `vlm compare` pairs them.
    """

    metric: str
    value: float
    ci95: Interval
    n: int
    chance: float
    samples: Samples | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Outcome:
    """What a task measured (the primary metric first), the hash of how, and what a report shows."""

    rows: list[Row]
    protocol: str
    details: dict[str, Any]


@dataclass(frozen=True)
class Described:
    """What `Source.describe` returns; the rest is as in `Pictures`.

    Attributes:
        values: One a picture, in the order of the data.
    """

    values: list[Any]
    sample_ids: list[int]
    items: list[Item]
    skipped: dict[str, int]


class Source:
    """A data set seen by a model; tasks share its embedded pictures.

    All ranks must ask together for what they see (`embedded`, `describe`), each in its slice; rank
    0 then has all of it, and the others, which measure nothing, have their own part.

    Args:
        model: The model.
        dataset: The data.
        batch_size: Pictures at a time.
        log: Gets lines of progress, and what was skipped.
        classifiers: Those that were made of this model already; sources may share them.
        opened: The sources of all tasks by their data, as JSON: `beside` looks there first.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        dataset: Dataset,
        *,
        batch_size: int = 64,
        log: Log = print,
        classifiers: Classifiers | None = None,
        opened: "dict[str, Source] | None" = None,
    ) -> None:
        self.model = model
        self.dataset = dataset
        self.batch_size = batch_size
        self.log = log
        self.alone = False  # whether rank 0 measures, and others wait
        self.protocols: dict[str, dict[str, Any]] = {}  # what each hash is of
        self._described: dict[str, Described] = {}
        self.classifiers: Classifiers = {} if classifiers is None else classifiers
        self.opened = {} if opened is None else opened

    def beside(self, data: str | list[str]) -> "Source":
        """Other DATA, as training data is: opened, and embedded, once for all tasks, by all ranks.

        Raises:
            DataError: It is missing or damaged.
        """
        key = json.dumps(data)
        for turn in (True, False) if key not in self.opened else ():
            with distributed.agreed():
                if turn is (distributed.rank() == 0):  # first the one that may pack it
                    self.opened[key] = Source(
                        self.model,
                        open_data(data, log=self.log),
                        batch_size=self.batch_size,
                        log=self.log,
                        classifiers=self.classifiers,
                        opened=self.opened,
                    )
        return self.opened[key]

    @cached_property
    def embedded(self) -> Embedded:
        """All readable pictures, embedded when first asked for.

        Raises:
            DataError: Not one picture can be read.
        """
        with distributed.agreed():
            mine = embed_dataset(self.model, self.dataset, **self._slice())
        features = distributed.gather_rows(mine.features)
        sample_ids = distributed.gather_rows(mine.sample_ids)
        items, skipped = self._gather(mine.items, mine.skipped)
        with distributed.agreed():
            if not items and distributed.rank() == 0:
                reasons = describe_skipped(skipped) or "there is none"
                raise DataError(f"no picture can be read: {reasons}")
        return Embedded(features, sample_ids, items, skipped)

    def describe(
        self, name: str, look: Callable[[Pictures], Sequence[Any]], *, description: str
    ) -> Described:
        """What `look` says of each readable picture, as JSON; pictures are read once a `name`.

        Args:
            name: Of what is said. Where it was asked for before, `look` is not called.
            look: A value for each picture of a batch, which is not empty.
            description: Of the progress bar, as "captioning".
        """
        if name not in self._described:
            with distributed.agreed():
                mine = self._describe(look, description)
            values = distributed.gather_values(mine.values)
            ids = distributed.gather_values(mine.sample_ids)
            items, skipped = self._gather(mine.items, mine.skipped)
            self._described[name] = Described(values, ids, items, skipped)
        return self._described[name]

    def _describe(self, look: Callable[[Pictures], Sequence[Any]], description: str) -> Described:
        mine = Described([], [], [], {})
        skipped: Counter[str] = Counter()
        slice_ = self._slice()
        for batch in read_pictures(self.model, self.dataset, description=description, **slice_):
            skipped.update(batch.skipped)
            mine.values.extend(look(batch) if batch.items else ())
            mine.sample_ids.extend(batch.sample_ids.tolist())
            mine.items.extend(batch.items)
        mine.skipped.update(skipped)
        return mine

    def _slice(self) -> dict[str, Any]:
        """How this rank reads its part of the data."""
        assert not self.alone, "all ranks see the pictures, in Task.look"
        return {
            "batch_size": self.batch_size,
            "rank": distributed.rank(),
            "world_size": distributed.world_size(),
            "log": self.log,
        }

    def _gather(
        self, items: list[Item], skipped: dict[str, int]
    ) -> tuple[list[Item], dict[str, int]]:
        """All ranks' items on rank 0, and on all what all skipped, which is told."""
        if distributed.world_size() == 1:
            return items, skipped
        found = [
            Item(key, tuple(captions), meta)
            for key, captions, meta in distributed.gather_values(items)
        ]
        total: Counter[str] = Counter()
        for part in distributed.gather_json(skipped):
            total.update(part)
        if total:
            self.log(skipped_line(total, len(self.dataset)))
        return found, dict(total)

    def classifier(
        self, class_names: Sequence[str], templates: Sequence[str]
    ) -> ZeroShotClassifier:
        """The zero-shot classifier of these classes and templates; its texts are encoded once."""
        key = tuple(class_names), tuple(templates)
        if key not in self.classifiers:
            self.classifiers[key] = zero_shot_classifier(self.model, class_names, templates)
        return self.classifiers[key]

    def protocol(self, task: str, **settings: Any) -> str:
        """16 hex digits, equal where two results may be compared."""
        parts = {
            "task": task,
            "version": VERSION,
            "preprocess": asdict(self.model.preprocess),
            "data": self.dataset.fingerprint,
            **settings,
        }
        text = json.dumps(parts, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.protocols[digest] = json.loads(text)
        return digest


def mean_row(
    metric: str,
    scores: Scores,
    clusters: Sequence[Hashable],
    *,
    chance: float,
    weights: npt.NDArray[np.float64] | None = None,
) -> Row:
    """A (weighted) mean of scores, one a sample, with its interval."""
    value = float(np.average(np.asarray(scores, np.float64), weights=weights))
    interval = mean_interval(scores, clusters, weights=weights)
    samples = Samples(np.asarray(scores, np.float64), cluster_codes(clusters)[0], weights)
    return Row(metric, value, interval, len(scores), chance, samples)


def cluster_of(item: Item, sample_id: int) -> Hashable:
    """What a picture shares its fate with: those of its "concept", or of its "pair", else none."""
    for name in ("concept", "pair"):
        if (shared := item.meta.get(name)) is not None:
            return name, str(shared)
    return "picture", sample_id
