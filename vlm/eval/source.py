"""What every task works with: a data set seen by a model, rows of results, a protocol's hash."""

import hashlib
import json
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm.curate.source import open_data
from vlm.data.dataset import Dataset
from vlm.eval.statistics import Interval, Scores, mean_interval
from vlm.inference import VisionLanguageModel
from vlm.retrieval.embed import Embedded, Item, Log, embed_dataset

VERSION = 1  # of the tasks: part of every protocol, raised when a metric changes its meaning


@dataclass(frozen=True)
class Row:
    """One measured number.

    Attributes:
        metric: Its name.
        value: In 0..1, or a rank from 1.
        ci95: Its 95% interval, from resampled concepts where pictures share one, else pictures.
        n: How many samples or queries were scored.
        chance: What a model reaches that does not look.
    """

    metric: str
    value: float
    ci95: Interval
    n: int
    chance: float


@dataclass(frozen=True)
class Outcome:
    """What a task measured (the primary metric first), the hash of how, and what a report shows."""

    rows: list[Row]
    protocol: str
    details: dict[str, Any]


class Source:
    """A data set seen by a model; tasks share its embedded pictures.

    Args:
        model: The model.
        dataset: The data.
        batch_size: Pictures at a time.
        log: Gets lines of progress, and what was skipped.
        opened: The sources of all tasks by their data, as JSON: `beside` looks there first.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        dataset: Dataset,
        *,
        batch_size: int = 64,
        log: Log = print,
        opened: "dict[str, Source] | None" = None,
    ) -> None:
        self.model = model
        self.dataset = dataset
        self.batch_size = batch_size
        self.log = log
        self.opened = {} if opened is None else opened

    def beside(self, data: str | list[str]) -> "Source":
        """Other DATA, as training data is: opened, and embedded, once for all tasks.

        Raises:
            DataError: It is missing or damaged.
        """
        key = json.dumps(data)
        if key not in self.opened:
            dataset = open_data(data, log=self.log)
            self.opened[key] = Source(
                self.model,
                dataset,
                batch_size=self.batch_size,
                log=self.log,
                opened=self.opened,
            )
        return self.opened[key]

    @cached_property
    def embedded(self) -> Embedded:
        """All readable pictures, embedded when first asked for.

        Raises:
            DataError: Not one picture can be read.
        """
        return embed_dataset(self.model, self.dataset, batch_size=self.batch_size, log=self.log)

    def protocol(self, task: str, **settings: Any) -> str:
        """16 hex digits, equal where two results may be compared."""
        parts = {
            "task": task,
            "version": VERSION,
            "preprocess": asdict(self.model.preprocess),
            "data": self.dataset.fingerprint,
            **settings,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


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
    return Row(metric, value, interval, len(scores), chance)


def cluster_of(item: Item, sample_id: int) -> Hashable:
    """What a picture shares its fate with: those of its "concept", else none."""
    concept = item.meta.get("concept")
    return ("picture", sample_id) if concept is None else ("concept", str(concept))
