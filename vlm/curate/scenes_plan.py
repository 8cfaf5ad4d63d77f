"""What a scene shows and where, drawn at random; and which split may show it.

A combination is what could be new in a scene although each part of it is known: two objects
together, an object in a relation's role ("dog", "left of"), in a colour, or in a number. A hash of
the combination itself says which split it is kept for, whatever the seed: 12% for
`test_combination`, 12% for `val`, the rest for training. A scene belongs to a split if it shows at
least one combination kept for that split (`train`: none is needed) and none kept for another.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from typing import Literal, NamedTuple

from vlm.curate.scenes_objects import Vocabulary
from vlm.errors import ConfigError

Split = Literal["train", "val", "test_combination", "test_object"]
Kind = Literal["count", "counts", "relation", "corner", "colour"]
Combination = tuple[str, ...]  # its type, then what is combined

SPLITS: tuple[Split, ...] = ("train", "val", "test_combination", "test_object")
SHARES: dict[Kind, int] = {"count": 20, "counts": 15, "relation": 35, "corner": 10, "colour": 20}
HELD_OUT_SHARE = 0.12  # of the combinations, once for test_combination and once for val
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = tuple(INVERSE)
COLOURS = {
    "red": (220, 40, 40),
    "yellow": (245, 200, 20),
    "green": (40, 160, 60),
    "blue": (40, 90, 220),
    "purple": (140, 60, 180),
}
BACKGROUNDS = {
    "white": (248, 248, 248),
    "grey": (180, 180, 180),
    "yellow": (255, 236, 140),
    "green": (175, 225, 165),
    "blue": (165, 205, 250),
    "pink": (250, 185, 210),
}
UNITS = 64  # a side of the picture, whatever its size in pixels
MAX_DRAWS = 2000  # of a scene; of those of the shipped list, at least one in thirty fits


class Thing(NamedTuple):
    """One object in a scene: its name, which drawing of it (modulo how many), and its colour."""

    name: str
    drawing: int
    colour: str | None = None


class Slot(NamedTuple):
    """The square that a thing fills, in units; things stand in the middle of their slots."""

    x: int
    y: int
    side: int


@dataclass(frozen=True)
class Scene:
    """What is to be seen.

    Attributes:
        kind: How it was composed: `count` (1 to 4 of one object), `counts` (two objects, one of
            them more often), `relation` (two objects), `corner` (three: one beside and one above or
            below the middle one, which is `things[1]`), `colour` (two tinted objects).
        things: What is shown.
        slots: Where; one a thing.
        relations: (i, relation, j): thing i is so placed to thing j.
        background: Its colour.
        shade: Where it grows darker, in steps right and down; (0, 0) is plain.
    """

    kind: Kind
    things: tuple[Thing, ...]
    slots: tuple[Slot, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    background: str = "white"
    shade: tuple[int, int] = (0, 0)

    @property
    def counts(self) -> Counter[str]:
        """How many of each object, in the order of the things."""
        return Counter(thing.name for thing in self.things)

    @property
    def triples(self) -> list[tuple[str, str, str]]:
        """The relations with names for numbers."""
        return [(self.things[i].name, how, self.things[j].name) for i, how, j in self.relations]


def swapped(scene: Scene) -> Scene | None:
    """The scene with two things exchanged, or their colours or numbers; None for one kind alone."""
    things = scene.things
    if scene.kind == "count":
        return None
    if scene.kind == "colour":
        (a, b) = things
        exchanged = (a._replace(colour=b.colour), b._replace(colour=a.colour))
        return replace(scene, things=exchanged)
    if scene.kind == "counts":
        one, other = {thing.name: thing for thing in things}.values()
        return replace(scene, things=tuple(other if t == one else one for t in things))
    return replace(scene, things=things[::-1])  # of a corner, the middle one stays


def combinations_of(scene: Scene) -> set[Combination]:
    """All combinations that a scene shows; an object by itself is one too."""
    names = sorted(scene.counts)
    found: set[Combination] = {("object", name) for name in names}
    found |= {("objects", *pair) for pair in combinations(names, 2)}
    for one, how, other in scene.triples:
        found |= {("relation", one, how), ("relation", other, INVERSE[how])}
    found |= {("colour", thing.name, thing.colour) for thing in scene.things if thing.colour}
    found |= {("count", name, str(n)) for name, n in scene.counts.items() if n > 1}
    return found


@lru_cache(100_000)
def kept_for(combination: Combination) -> Split:
    """The split that a combination of objects is kept for; `train` is what all may show."""
    if combination[0] == "object":
        return "train"
    digest = hashlib.sha256("/".join(combination).encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < HELD_OUT_SHARE:
        return "test_combination"
    return "val" if position < 2 * HELD_OUT_SHARE else "train"


class Director:
    """Draws scenes that a split may show.

    Args:
        vocabulary: What may be shown.
        seed: Of all draws; which combinations are held out does not depend on it.
    """

    def __init__(self, vocabulary: Vocabulary, seed: int) -> None:
        self._seed = seed
        self._vocabulary = vocabulary

    def scene(self, split: Split, number: int) -> tuple[Scene, random.Random, bool]:
        """Returns a scene, the generator to go on with, and whether it is half of a pair.

        In the held-out splits scenes 2n and 2n + 1 are a pair: the second is the first, swapped. In
        training, and where there is nothing to swap, each scene is by itself.

        Raises:
            ConfigError: No scene was found that the split may show.
        """
        paired = split != "train"
        rng = random.Random(f"{self._seed}/{split}/{number // 2 if paired else number}")
        kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
        paired = paired and kind != "count"
        if not paired:
            rng = random.Random(f"{self._seed}/{split}/{number}/alone")
        scene = self._draw(split, kind, rng, paired)
        other = swapped(scene) if paired and number % 2 else None
        return other or scene, random.Random(f"{rng.random()}/{number}"), paired

    def held_out(self, scene: Scene) -> list[Combination]:
        """Those of a scene's combinations that training never shows."""
        return sorted(c for c in combinations_of(scene) if self._split_of(c) != "train")

    def _draw(self, split: Split, kind: Kind, rng: random.Random, paired: bool) -> Scene:
        for _ in range(MAX_DRAWS):
            scene = _DRAW[kind](rng, self._names(split, kind, rng))
            other = swapped(scene) if paired else None
            if self._fits(scene, split) and (other is None or self._fits(other, split)):
                return _with_background(scene, rng)
        raise ConfigError(
            f"no {kind} scene for {split} in {MAX_DRAWS:,} draws: the list of objects is too short "
            "to hold combinations out; list 20 or more, 8 of them with tint: true"
        )

    def _names(self, split: Split, kind: Kind, rng: random.Random) -> list[str]:
        """Three different names, one of them unseen where the split is about these."""
        tint = kind == "colour"
        known = self._vocabulary.pool(unseen=False, tint=tint)
        if split != "test_object":
            return rng.sample(known, min(3, len(known)))
        unseen = self._vocabulary.pool(unseen=True, tint=tint)
        first = rng.choice(unseen)
        rest = [name for name in rng.sample([*known, *unseen], 3) if name != first]
        names = [first, *rest[: 1 if tint else 2]]
        rng.shuffle(names)
        return names

    def _fits(self, scene: Scene, split: Split) -> bool:
        shown = {self._split_of(combination) for combination in combinations_of(scene)}
        return shown <= {"train", split} and (split in shown or split == "train")

    def _split_of(self, combination: Combination) -> Split:
        if not self._vocabulary.unseen.keys().isdisjoint(combination[1:]):
            return "test_object"
        return kept_for(combination)


def _count(rng: random.Random, names: Sequence[str]) -> Scene:
    num = rng.randint(1, 4)
    thing = Thing(names[0], rng.randrange(2**16))
    slots = [_anywhere(rng)] if num == 1 else _quarters(rng, num)
    return Scene("count", (thing,) * num, tuple(slots))


def _counts(rng: random.Random, names: Sequence[str]) -> Scene:
    one, other = _things(rng, names[:2])
    more = rng.randint(2, 3)
    things = (*(one,) * more, other)
    return Scene("counts", things, tuple(_quarters(rng, len(things))))


def _relation(rng: random.Random, names: Sequence[str]) -> Scene:
    how = rng.choice(RELATIONS)
    return Scene("relation", tuple(_things(rng, names[:2])), _two(rng, how), ((0, how, 1),))


def _colour(rng: random.Random, names: Sequence[str]) -> Scene:
    colours = rng.sample(list(COLOURS), 2)
    pairs = zip(_things(rng, names[:2]), colours, strict=True)
    things = tuple(thing._replace(colour=colour) for thing, colour in pairs)
    how = rng.choice(RELATIONS)
    return Scene("colour", things, _two(rng, how), ((0, how, 1),))


def _corner(rng: random.Random, names: Sequence[str]) -> Scene:
    beside, upright = rng.choice(RELATIONS[:2]), rng.choice(RELATIONS[2:])
    column, row = int(beside == "left of"), int(upright == "above")  # of the middle one
    cells = [(1 - column, row), (column, row), (column, 1 - row)]
    slots = tuple(_in_quarter(rng, *cell) for cell in cells)
    return Scene("corner", tuple(_things(rng, names)), slots, ((0, beside, 1), (2, upright, 1)))


_DRAW: dict[Kind, Callable[[random.Random, Sequence[str]], Scene]] = {
    "count": _count,
    "counts": _counts,
    "relation": _relation,
    "corner": _corner,
    "colour": _colour,
}


def _things(rng: random.Random, names: Sequence[str]) -> Iterator[Thing]:
    for name in names:
        yield Thing(name, rng.randrange(2**16))


def _two(rng: random.Random, how: str) -> tuple[Slot, ...]:
    """Slots of two things, the first in the relation to the second.

    Their distance along the relation is at least twice that across it: nothing is diagonal.
    """
    slots = []
    for half in (0, 1):
        side = rng.randint(22, 30)
        along = rng.randint(1, max(1, 32 - side)) if half == 0 else rng.randint(32, 63 - side)
        across = rng.randint(27, 37) - side // 2
        x, y = (along, across) if how in RELATIONS[:2] else (across, along)
        slots.append(Slot(x, y, side))
    return tuple(slots if how in ("left of", "above") else slots[::-1])


def _quarters(rng: random.Random, num: int) -> list[Slot]:
    cells = rng.sample([(0, 0), (1, 0), (0, 1), (1, 1)], num)
    return [_in_quarter(rng, *cell) for cell in cells]


def _in_quarter(rng: random.Random, column: int, row: int) -> Slot:
    side = rng.randint(20, 28)
    x, y = (rng.randint(32 * cell + 1, 32 * cell + 31 - side) for cell in (column, row))
    return Slot(x, y, side)


def _anywhere(rng: random.Random) -> Slot:
    side = rng.randint(24, 40)
    return Slot(rng.randint(1, 63 - side), rng.randint(1, 63 - side), side)


def _with_background(scene: Scene, rng: random.Random) -> Scene:
    """A background that no thing has the colour of, half of them plain."""
    taken = {thing.colour for thing in scene.things}
    colour = rng.choice([name for name in BACKGROUNDS if name not in taken])
    steps = [(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1) if x or y]
    shade = rng.choice(steps) if rng.random() < 0.5 else (0, 0)
    return replace(scene, background=colour, shade=shade)
