"""The doctor: reads all bytes of a data set again, and tells everything that is wrong with it.

Reasons beside those of indexing and decoding:

    shard.unreadable  there is no such tar, or it is none; a URL has other bytes than its index says
    shard.size        the tar is not as long as it was when it was indexed
    shard.crc         the bytes of a sample are not those that were indexed
    shard.sha256      the bytes between the samples are not those that were indexed
    index.damaged     the index file is not the one that was written
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from vlm.data.dataset import Dataset
from vlm.data.decode import decode_image
from vlm.data.index_file import ShardIndex
from vlm.data.joined import is_joined, read_joined
from vlm.data.opening import shard_cache
from vlm.data.patterns import expand
from vlm.data.remote import shard_name
from vlm.data.samples import BadSample
from vlm.data.shards import open_index, open_remote_index, recorded_index
from vlm.errors import DataError
from vlm.runtime.files import progress, sha256_file
from vlm.runtime.processes import spread

MAX_CASES = 100  # of one reason, that a report lists; all are counted


class Case(NamedTuple):
    """One thing that is wrong: with a sample, or, without a key, with its shard."""

    shard: str
    key: str
    detail: str

    def __str__(self) -> str:
        return ": ".join(part for part in self if part)


@dataclass
class Report:
    """What was found in some shards.

    Attributes:
        num_shards: Looked at.
        num_samples: In their indexes.
        size_bytes: Of the tars, as indexed.
        counts: How often each reason came.
        cases: The first `MAX_CASES` of each.
    """

    num_shards: int = 0
    num_samples: int = 0
    size_bytes: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    cases: dict[str, list[Case]] = field(default_factory=dict)

    def add(self, reason: str, cases: Sequence[Case], count: int) -> None:
        """Counts a reason `count` times, and lists cases of it."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        listed = self.cases.setdefault(reason, [])
        listed += cases[: MAX_CASES - len(listed)]

    def merge(self, other: "Report") -> None:
        """Adds what was found in other shards."""
        self.num_shards += other.num_shards
        self.num_samples += other.num_samples
        self.size_bytes += other.size_bytes
        for reason, count in other.counts.items():
            self.add(reason, other.cases[reason], count)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON."""
        reasons = {
            reason: {"count": count, "cases": [case._asdict() for case in self.cases[reason]]}
            for reason, count in self.counts.items()
        }
        totals = {name: getattr(self, name) for name in ("num_shards", "num_samples", "size_bytes")}
        return {**totals, "clean": not self.counts, "reasons": reasons}


def check(
    patterns: Sequence[str],
    *,
    decode: bool = False,
    num_workers: int = 1,
    cache_dir: Path | None = None,
) -> Report:
    """Compares all bytes of shards with what was indexed of them.

    A shard's index is believed even if the tar has another time or size now: a reader would index
    it again. A shard that was never indexed is indexed now.

    Args:
        patterns: Shard patterns and joined indexes.
        decode: Whether to decode every picture.
        num_workers: Processes.
        cache_dir: Where indexes are that do not lie beside their tar; None for the user's.
    """
    joined = [shard for one in patterns if is_joined(one) for shard in read_joined(one)]
    shards = [*joined, *expand([one for one in patterns if not is_joined(one)])]
    examine = partial(check_shard, decode=decode, cache_dir=cache_dir)
    report = Report()
    results = spread(examine, shards, num_workers=num_workers)
    for found in progress(results, description="checking", total=len(shards)):
        report.merge(found)
    return report


def check_shard(shard: ShardIndex | Path | str, *, decode: bool, cache_dir: Path | None) -> Report:
    """What is wrong with one shard."""
    report = Report(num_shards=1)
    if not isinstance(shard, ShardIndex):
        name = shard_name(shard) if isinstance(shard, str) else shard.name
        try:
            shard = _index(shard, cache_dir)
        except DataError as error:
            report.add("shard.unreadable", [Case(name, "", str(error))], 1)
            return report
    report.num_samples, report.size_bytes = shard.num_samples, shard.size_bytes
    try:
        _left_out(shard, report)
        shard.rows().records()
    except DataError as error:
        report.add("index.damaged", [Case(shard.name, "", str(error))], 1)
    else:
        _compare(shard, report, decode=decode)
    return report


def _index(shard: Path | str, cache_dir: Path | None) -> ShardIndex:
    if isinstance(shard, str):
        return open_remote_index(shard, shard_cache(cache_dir))
    return recorded_index(shard, cache_dir=cache_dir) or open_index(shard, cache_dir=cache_dir)


def _left_out(shard: ShardIndex, report: Report) -> None:
    cases: dict[str, list[Case]] = {}
    for found in shard.details().quarantine:
        where = f"at byte {found.offset}: {found.detail}"
        cases.setdefault(found.reason, []).append(Case(shard.name, found.key, where))
    for reason, count in shard.rejects.items():
        report.add(reason, cases[reason], count)


def _compare(shard: ShardIndex, report: Report, *, decode: bool) -> None:
    """The tar's bytes against its index; sample by sample where they differ, or to decode them."""
    try:
        size, sha256 = _size_and_sha256(shard)
    except (OSError, DataError) as error:
        detail = str(getattr(error, "strerror", error))
        report.add("shard.unreadable", [Case(shard.name, "", detail)], 1)
        return
    if size != shard.size_bytes:
        detail = f"has {size} bytes; indexed were {shard.size_bytes}"
        report.add("shard.size", [Case(shard.name, "", detail)], 1)
        return
    changed = sha256 != shard.sha256
    if not changed and not decode:
        return
    before = sum(report.counts.values())
    for reason, case in _bad_samples(shard, decode=decode):
        report.add(reason, [case], 1)
    if changed and sum(report.counts.values()) == before:
        report.add("shard.sha256", [Case(shard.name, "", "changed between its samples")], 1)


def _size_and_sha256(shard: ShardIndex) -> tuple[int, str]:
    if shard.remote is None:
        return shard.path.stat().st_size, sha256_file(shard.path)
    shard.remote.recheck()
    os.close(shard.remote.open())  # nothing else than what the index says can be opened
    return shard.size_bytes, shard.sha256


def _bad_samples(shard: ShardIndex, *, decode: bool) -> Iterator[tuple[str, Case]]:
    dataset = Dataset([shard])
    for sample_id in range(len(dataset)):
        try:
            sample = dataset.read(sample_id)
            if decode and sample.image:
                decode_image(sample.image)
        except BadSample as bad:
            key = dataset.key(sample_id)
            detail = bad.detail.removeprefix(f"{shard.where}: {key!r}: ")
            yield bad.reason, Case(shard.name, key, detail)
