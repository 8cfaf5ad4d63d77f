"""Which samples of a source are trained on, and why each of the others is not."""

import json
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64

from vlm.config.schema import FilterConfig
from vlm.curate.dedup import exact_firsts, perceptual_firsts, perceptual_hashes
from vlm.curate.listing import MAX_EXAMPLES, Tally
from vlm.curate.pack import REPORT
from vlm.data.dataset import Dataset
from vlm.errors import ConfigError, DataError

Log = Callable[[str], object]
Fails = Bool[np.ndarray, " N"]

_OPERATORS: dict[str, Callable[[Any, float], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass
class Ledger:
    """What became of every sample of a source: kept + dropped + rejected = all.

    Attributes:
        name: Of the source.
        kept: Samples to train on.
        dropped: Samples that a rule left out, by the first rule that did.
        rejected: What was left out when the shards were packed or indexed: damages, and samples
            that cannot be read.
    """

    name: str
    kept: int = 0
    dropped: Tally = field(default_factory=Tally)
    rejected: Tally = field(default_factory=Tally)

    @property
    def num_all(self) -> int:
        """All there was."""
        return self.kept + sum(self.dropped.counts.values()) + sum(self.rejected.counts.values())

    def lines(self) -> Iterator[str]:
        """Yields what to tell: how many are kept, and a line a reason."""
        yield f"{self.name}: {self.kept:,} of {self.num_all:,} samples kept"
        for what in ("dropped", "rejected"):
            for line in getattr(self, what).lines():
                yield f"{self.name}: {what} {line}"

    def as_json(self) -> dict[str, Any]:
        """For ledger.json."""

        def told(tally: Tally) -> dict[str, Any]:
            return {
                reason: {"count": count, "examples": tally.examples[reason]}
                for reason, count in tally.counts.items()
            }

        return {
            "name": self.name,
            "all": self.num_all,
            "kept": self.kept,
            "dropped": told(self.dropped),
            "rejected": told(self.rejected),
        }


def choose(
    dataset: Dataset,
    rules: FilterConfig,
    *,
    name: str,
    val_fraction: float = 0.0,
    log: Log = print,
) -> tuple[Dataset, Ledger]:
    """Returns the samples of a whole data set that pass all rules, and the ledger of the others.

    Rules apply in this order: lists of ids, picture, caption, fields, repeats, and last what is
    held out. So of a group of repeats, the first one that passes all else is kept.

    Raises:
        ConfigError: A list of ids cannot be read.
        DataError: A field was not indexed; or no sample is left.
    """
    ledger = Ledger(name, rejected=_rejected(dataset))
    ids = np.arange(len(dataset))
    for reason, fails_in in _rules(rules, log):
        fails = fails_in(dataset)[ids]
        told = [dataset.name(i) for i in ids[fails][:MAX_EXAMPLES]]
        ledger.dropped.add_all(reason, int(fails.sum()), told)
        ids = ids[~fails]
    if rules.dedup != "none":
        firsts = _firsts(dataset, ids, rules)
        fails = firsts != ids
        pairs = list(zip(ids[fails], firsts[fails], strict=True))[:MAX_EXAMPLES]
        told = [f"{dataset.name(i)} (repeats {dataset.name(first)})" for i, first in pairs]
        ledger.dropped.add_all(f"dedup.{rules.dedup}", int(fails.sum()), told)
        ids = ids[~fails]
    mask = np.zeros(len(dataset), bool)
    mask[ids] = True
    kept = dataset.select(mask)
    if val_fraction:
        kept, held_out = kept.split(val_fraction)
        told = [held_out.name(i) for i in range(len(held_out))[:MAX_EXAMPLES]]
        ledger.dropped.add_all("val_fraction", len(held_out), told)
    ledger.kept = len(kept)
    if not len(kept):
        raise DataError([f"{name}: no sample is left", *list(ledger.lines())[1:]])
    return kept, ledger


def _rules(rules: FilterConfig, log: Log) -> Iterator[tuple[str, Callable[[Dataset], Fails]]]:
    """Reasons, each with what finds the samples of a whole data set that it is true of."""
    if rules.deny_ids is not None:
        yield "filter.deny_ids", partial(_listed, file=rules.deny_ids, log=log)
    if rules.allow_ids is not None:
        file = rules.allow_ids
        yield "filter.allow_ids", lambda dataset: ~_listed(dataset, file=file, log=log)
    if rules.min_image_side:
        smallest = rules.min_image_side
        yield "filter.image_side", lambda dataset: dataset.image_sizes().min(axis=1) < smallest
    if rules.max_aspect is not None:
        yield "filter.aspect", partial(_too_long, max_aspect=rules.max_aspect)
    if rules.min_caption_chars or rules.max_caption_chars is not None:
        yield "filter.caption_chars", partial(_caption_outside, rules=rules)
    for name, comparison in rules.fields.items():
        yield f"filter.{name}.missing", partial(_missing, name=name)
        yield f"filter.{name}", partial(_fails_comparison, name=name, comparison=comparison)


def _listed(dataset: Dataset, *, file: str, log: Log) -> Fails:
    """Whether each sample is in a list of ids: KEY, or SHARD.tar/KEY."""
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: a list of ids that cannot be read: {error}") from error
    ids = {line.strip() for line in lines} - {""}
    if not ids:
        raise ConfigError(f"{file}: holds no ids; write one a line: KEY or SHARD.tar/KEY")
    names = [dataset.name(i) for i in range(len(dataset))]
    matched = [{name, name.partition("/")[2]} & ids for name in names]
    if unknown := ids.difference(*matched):
        shown = ", ".join(sorted(unknown)[:MAX_EXAMPLES]) + ", ..." * (len(unknown) > MAX_EXAMPLES)
        log(f"{file}: {len(unknown):,} of {len(ids):,} ids name no sample: {shown}")
    return np.array([bool(found) for found in matched])


def _too_long(dataset: Dataset, *, max_aspect: float) -> Fails:
    sizes = dataset.image_sizes()
    fails: Fails = sizes.max(axis=1) > max_aspect * sizes.min(axis=1)
    return fails


def _caption_outside(dataset: Dataset, *, rules: FilterConfig) -> Fails:
    lengths = dataset.caption_lengths()
    longest = np.iinfo(np.int32).max if rules.max_caption_chars is None else rules.max_caption_chars
    return (lengths < rules.min_caption_chars) | (lengths > longest)


def _missing(dataset: Dataset, *, name: str) -> Fails:
    fails: Fails = np.isnan(dataset.field(name))
    return fails


def _fails_comparison(dataset: Dataset, *, name: str, comparison: str) -> Fails:
    values = dataset.field(name)
    fails: Fails = np.zeros(len(values), bool)
    for one in comparison.split(" and "):
        fails |= ~_holds(values, one)
    return fails


def _holds(values: Float64[np.ndarray, " N"], comparison: str) -> Bool[np.ndarray, " N"]:
    sign, number = re.fullmatch(r" *([<>=!]+) *(\S+) *", comparison).groups()  # type: ignore[union-attr]  # the schema's pattern
    holds: Bool[np.ndarray, " N"] = _OPERATORS[sign](values, float(number))
    return holds


def _firsts(
    dataset: Dataset, ids: Int64[np.ndarray, " K"], rules: FilterConfig
) -> Int64[np.ndarray, " K"]:
    """Of some samples, the first of them that each repeats; itself where it repeats none."""
    if rules.dedup == "exact":
        firsts = exact_firsts(dataset.image_hashes()[ids])
    else:
        firsts = perceptual_firsts(perceptual_hashes(dataset)[ids], max_bits=rules.dedup_bits)
    chosen: Int64[np.ndarray, " K"] = ids[firsts]
    return chosen


def _rejected(dataset: Dataset) -> Tally:
    """What the index left out, and what had been left out when the shards were packed."""
    tally = Tally()
    for folder, count in Counter(shard.path.parent for shard in dataset.shards).items():
        if (folder / REPORT).is_file():
            report = json.loads((folder / REPORT).read_bytes())
            if report["num_shards"] == count:  # of a part, it is not known what was left out
                skipped = Tally(**report["skipped"])
                for reason, number in skipped.counts.items():
                    tally.add_all(reason, number, skipped.examples[reason])
    for shard in dataset.shards:
        if shard.rejects:
            quarantine = shard.details().quarantine
            for reason, count in shard.rejects.items():
                cases = [problem for problem in quarantine if problem.reason == reason]
                told = [f"{shard.name} at byte {case.offset}: {case.detail}" for case in cases]
                tally.add_all(reason, count, told)
    return tally
