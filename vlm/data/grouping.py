"""The samples that a tar's members form, and those that are left out with their reason."""

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from vlm.data.tar import Member, Problem

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif")  # the first that a sample has is its image
TEXT_SUFFIXES = ("txt", "json", "cls")


@dataclass
class TarSample:
    """Adjacent members that share a key: the fields of one sample, by suffix."""

    key: str
    offset: int
    fields: dict[str, Member] = field(default_factory=dict)
    twice: str | None = None  # a suffix that came twice
    touches_damage: bool = False  # a field may have been lost beside it

    def kinds(self) -> set[str]:
        """The fields it has, with every image format counted as one."""
        return {"image" if suffix in IMAGE_SUFFIXES else suffix for suffix in self.fields}

    def image(self) -> tuple[str, Member] | None:
        """Its image's suffix and member: the first of `IMAGE_SUFFIXES` that it has."""
        return next(((s, self.fields[s]) for s in IMAGE_SUFFIXES if s in self.fields), None)


def split_key(name: str) -> tuple[str, str] | None:
    """WebDataset's `base_plus_ext`: the key ends at the first dot of the last path component."""
    match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", name)
    return (match.group(1), match.group(2).lower()) if match else None


def samples(
    items: Iterable[Member | Problem],
) -> tuple[list[TarSample], list[Problem], Counter[str]]:
    """Returns a scanned shard's samples, all that was left out, and how often each suffix came.

    Samples need an image, but in a shard of texts alone (`holds_texts_alone`). Only
    `IMAGE_SUFFIXES` and `TEXT_SUFFIXES` become fields. A problem always ends a sample, so that a
    field from beyond a damage is never paired with one from before it. Rejected whole: a key that
    comes back later in the shard, a field that comes twice, no image, and a sample beside a damage
    that lacks a field which every sample away from damage has.
    """
    groups, problems, suffixes = _group(items)
    keys = Counter(group.key for group in groups)
    texts_alone = holds_texts_alone(suffixes)
    usable = [group for group in groups if group.image() or texts_alone]
    whole = [group.kinds() for group in usable if not group.touches_damage]
    usual = set.intersection(*whole) if whole else set[str]()
    kept = []
    for group in groups:
        rejected = _rejection(
            group, repeats=keys[group.key], usual=usual, needs_image=not texts_alone
        )
        if rejected is None:
            kept.append(group)
        else:
            problems.append(Problem(rejected[0], group.offset, rejected[1], group.key))
    return kept, problems, suffixes


def holds_texts_alone(suffixes: Collection[str]) -> bool:
    """Whether a shard's members are texts, without a file of another kind."""
    return bool(suffixes) and set(suffixes) <= set(TEXT_SUFFIXES)


def _group(
    items: Iterable[Member | Problem],
) -> tuple[list[TarSample], list[Problem], Counter[str]]:
    groups: list[TarSample] = []
    problems: list[Problem] = []
    suffixes: Counter[str] = Counter()
    current, after_damage = None, False
    for item in items:
        if isinstance(item, Problem):
            problems.append(item)
            if current is not None:
                current.touches_damage = True
            current, after_damage = None, True
            continue
        split = split_key(item.name)
        if split is None or re.match(r"__[^/]*__($|/)", item.name):  # WebDataset skips these too
            continue
        key, suffix = split
        suffixes[suffix] += 1
        if current is None or key != current.key:
            current = TarSample(key, item.offset, touches_damage=after_damage)
            groups.append(current)
            after_damage = False
        if suffix in current.fields:
            current.twice = suffix
        elif suffix in IMAGE_SUFFIXES + TEXT_SUFFIXES:
            current.fields[suffix] = item
    return groups, problems, suffixes


def _rejection(
    group: TarSample, *, repeats: int, usual: set[str], needs_image: bool
) -> tuple[str, str] | None:
    if repeats > 1 and group.touches_damage:
        return "sample.damaged", "its fields lie on both sides of a damage"
    if repeats > 1:
        return "sample.repeated_key", f"the key comes {repeats} times, not side by side"
    if group.twice is not None:
        return "sample.repeated_field", f"{group.twice} comes twice"
    if needs_image and group.image() is None:
        return "sample.no_image", f"its fields are: {', '.join(group.fields) or 'none'}"
    lost = sorted(usual - group.kinds()) if group.touches_damage else []
    return ("sample.damaged", f"lost {', '.join(lost)} beside a damage") if lost else None
