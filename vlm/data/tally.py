"""What could not be used: how often for each reason, and where the first few cases lie."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

MAX_EXAMPLES = 3

T = TypeVar("T")


class Place(NamedTuple):
    """Where a sample lies: its shard, its key, and where in the shard its picture begins."""

    shard: str
    key: str
    offset: int

    def __str__(self) -> str:
        return f"{self.shard}: {self.key!r} at byte {self.offset}"


@dataclass
class Tally(Generic[T]):
    """Cases by reason: how many, and up to MAX_EXAMPLES of them."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[T]] = field(default_factory=dict)

    def add(self, reason: str, example: T) -> None:
        """Counts one case."""
        self.add_all(reason, 1, [example])

    def add_all(self, reason: str, count: int, examples: list[T]) -> None:
        """Counts some cases, of which the first are told."""
        if count:
            self.merge(Tally({reason: count}, {reason: examples}))

    def merge(self, other: "Tally[T]") -> None:
        """Counts another's cases too."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            kept = self.examples.setdefault(reason, [])
            kept += [case for case in other.examples[reason] if case not in kept]
            del kept[MAX_EXAMPLES:]

    @property
    def total(self) -> int:
        """Of all reasons."""
        return sum(self.counts.values())

    def lines(self) -> Iterator[str]:
        """Yields one line a reason: `2 image.missing: a.jpg, b.jpg`."""
        for reason, count in self.counts.items():
            examples = self.examples[reason]
            more = ", ..." if count > len(examples) == MAX_EXAMPLES else ""
            yield f"{count} {reason}: {', '.join(map(str, examples))}{more}"

    def as_json(self) -> dict[str, Any]:
        """For `tally_of_places`."""
        return {"counts": self.counts, "examples": self.examples}


def tally_of_places(values: dict[str, Any]) -> Tally[Place]:
    """What `as_json` gave, read back."""
    examples = {reason: [Place(*place) for place in v] for reason, v in values["examples"].items()}
    return Tally(values["counts"], examples)
