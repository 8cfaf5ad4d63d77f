"""The sources of a run: opened, chosen from, joined, and put in order."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from vlm.config.schema import Config, DataConfig, SourceConfig
from vlm.curate.select import Ledger, choose
from vlm.curate.source import open_data
from vlm.data.dataset import Dataset
from vlm.data.mixture import MixedOrder, cycle_counts, join
from vlm.data.order import Order, SampleOrder
from vlm.data.remote import GIB
from vlm.data.samples import value_at
from vlm.data.tally import Tally
from vlm.errors import BadSampleQuotaError, ConfigError

IMAGE = "encoders.image"  # as optim.trainable_groups names it
LOOKED_AT = 10_000  # samples of each source, for a field of their json
Log = Callable[[str], object]


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on.

    Attributes:
        dataset: The chosen samples of all sources, one source after the other.
        order: Which of them comes when.
        counts: Of each source, how many of a cycle's positions are its.
        ledgers: Of each source, what became of its samples.
    """

    dataset: Dataset
    order: Order
    counts: tuple[int, ...]
    ledgers: tuple[Ledger, ...]

    @property
    def state(self) -> dict[str, Any]:
        """What a resumed run must find again: the samples, and how the sources are woven."""
        sizes = [ledger.kept for ledger in self.ledgers]
        return {
            "fingerprint": self.dataset.fingerprint,
            "mixture": [list(pair) for pair in zip(sizes, self.counts, strict=True)],
        }

    def passes(self, num_positions: int) -> dict[str, float]:
        """How often each source has been passed over, by name."""
        names = (ledger.name for ledger in self.ledgers)
        return dict(zip(names, self.order.passes(num_positions), strict=True))

    def counters(self, num_positions: int) -> dict[str, float]:
        """For the metrics: the passes over each source, where there are several."""
        if len(self.ledgers) == 1:
            return {}
        passes = self.passes(num_positions)
        return {f"passes/{name}": round(count, 4) for name, count in passes.items()}

    def ledger(self) -> bytes:
        """The content of ledger.json."""
        total = sum(self.counts)
        sources = [
            {**ledger.as_json(), "share": round(count / total, 6)}
            for ledger, count in zip(self.ledgers, self.counts, strict=True)
        ]
        return json.dumps({"version": 1, "sources": sources}, indent=1).encode()


def open_training_data(config: Config, *, log: Log = print) -> TrainingData:
    """The training samples of data.train, in their order.

    Raises:
        ConfigError: data.train is not set, a list of ids cannot be read, or a weight is too small.
        DataError: A source cannot be read, or a filter leaves none of its samples.
        BadSampleQuotaError: The indexes left out more than data.max_bad_fraction of all samples.
    """
    sources = _sources(config.data)
    chosen, ledgers = [], []
    for source in sources:
        dataset, ledger = _open(source, config, log)
        chosen.append(dataset)
        ledgers.append(ledger)
        if len(sources) > 1 or ledger.dropped.counts:
            for line in ledger.lines():
                log(line)
    _refuse_no_pictures(chosen, config)
    _refuse_absent_fields(chosen, config.data, log)
    _check_rejected(ledgers, config.data.max_bad_fraction)
    counts = _counts(sources, chosen)
    dataset = join(chosen)
    order = _order([one.shard_sizes for one in chosen], counts, config)
    return TrainingData(dataset, order, tuple(counts), tuple(ledgers))


def _sources(data: DataConfig) -> tuple[SourceConfig, ...]:
    if data.train is None:
        raise ConfigError(
            "data.train is not set; add data.train=DATA (shards, a folder or a table)"
        )
    if isinstance(data.train, tuple):
        return data.train
    return (
        SourceConfig(
            data.train, image_column=data.image_column, caption_column=data.caption_column
        ),
    )


def _open(source: SourceConfig, config: Config, log: Log) -> tuple[Dataset, Ledger]:
    data = config.data
    dataset = open_data(
        source.data,
        image_column=source.image_column,
        caption_column=source.caption_column,
        cache_dir=Path(data.cache_dir) if data.cache_dir else None,
        shard_cache_bytes=int(data.shard_cache_gib * GIB),
        fields=tuple(source.filter.fields),
        require_captions=True,
        needs_images=not (config.model.text.language_head or config.model.captioner),
        log=log,
    )
    name = source.name or source.data
    if dataset.has_texts_alone:
        num_texts = sum(shard.num_samples for shard in dataset.shards if shard.texts_alone)
        log(f"{name}: {num_texts:,} samples are texts without a picture: no pairs to tell apart")
    return choose(dataset, source.filter, name=name, val_fraction=data.val_fraction, log=log)


def _refuse_no_pictures(chosen: list[Dataset], config: Config) -> None:
    """Pictures may be absent on purpose: then the image encoder doesn't learn."""
    shards = [shard for dataset in chosen for shard in dataset.shards]
    if all(s.texts_alone for s in shards) and config.optim.trainable_groups.get(IMAGE) != 0:
        raise ConfigError(
            "data.train has texts without a single picture; to train on words alone, add "
            f"optim.trainable_groups={{{IMAGE}: 0}}"
        )


def _refuse_absent_fields(chosen: list[Dataset], data: DataConfig, log: Log) -> None:
    """Of large sources it looks at the beginning alone: remote shards come whole."""
    for key in ("questions", "hard_negatives"):
        name = getattr(data, key)
        if name is None or any(_has_field(dataset, name) for dataset in chosen):
            continue
        if all(len(dataset) <= LOOKED_AT for dataset in chosen):
            raise ConfigError(f'data.{key}: no sample\'s json has a field "{name}"')
        log(f'warning: data.{key}: no source has "{name}" among its first {LOOKED_AT:,} samples')


def _has_field(dataset: Dataset, name: str) -> bool:
    return any(value_at(meta, name) is not None for meta in islice(dataset.metas(), LOOKED_AT))


def _check_rejected(ledgers: list[Ledger], max_fraction: float) -> None:
    """Hold what cannot be read by its index to the same share as what fails when it is read."""
    tally = Tally[str]()
    for ledger in ledgers:
        tally.merge(ledger.rejected)
    num_all = sum(ledger.num_all for ledger in ledgers)
    if tally.total > max_fraction * num_all:
        raise BadSampleQuotaError(
            [
                f"{tally.total} of {num_all} samples were left out, more than "
                f"data.max_bad_fraction={max_fraction:g} allows; mend or remove them:",
                *tally.lines(),
            ]
        )


def _counts(sources: tuple[SourceConfig, ...], chosen: list[Dataset]) -> list[int]:
    """Of each source, its positions in a cycle: by weight, else by number of samples."""
    weights = [source.weight or float(len(d)) for source, d in zip(sources, chosen, strict=True)]
    return cycle_counts([source.name or source.data for source in sources], weights)


def _order(shard_sizes: list[list[int]], counts: list[int], config: Config) -> Order:
    settings: dict[str, Any] = {
        "seed": config.train.seed,
        "streams": config.data.streams,
        "global_batch_size": config.train.global_batch_size,
    }
    if len(shard_sizes) == 1:
        return SampleOrder(shard_sizes[0], **settings)
    return MixedOrder(shard_sizes, counts, **settings)
