"""What is said about a scene: captions, a caption and its swap, and questions with answers."""

import random
import re
from collections.abc import Sequence
from typing import NamedTuple

from vlm.curate.scenes_objects import Vocabulary
from vlm.curate.scenes_plan import INVERSE, Scene, Thing

NUMBERS = ("zero", "one", "two", "three", "four")
ENDS = {
    "left of": ("on the left", "on the right"),
    "right of": ("on the right", "on the left"),
    "above": ("at the top", "at the bottom"),
    "below": ("at the bottom", "at the top"),
}
NUM_CAPTIONS = 5
TELLING = {"corner": 3}  # of its sentences, how many say where things are: the swap's are false


class Question(NamedTuple):
    """A question that the picture answers with certainty, and its type."""

    question: str
    answer: str
    type: str


def captions(
    scene: Scene, other: Scene | None, vocabulary: Vocabulary, rng: random.Random
) -> tuple[list[str], list[str | None]]:
    """Five true captions, the plainest first, and beside each the same words about the swap.

    Those are false of this scene; None where they are not, or where there is no swap.
    """
    true = sentences(scene, vocabulary)
    chosen = [0, *rng.sample(range(1, len(true)), NUM_CAPTIONS - 1)]
    false = sentences(other, vocabulary)[: TELLING.get(scene.kind)] if other else []
    beside = [false[n] if n < len(false) else None for n in chosen]
    return [true[n] for n in chosen], beside


def sentences(scene: Scene, vocabulary: Vocabulary) -> list[str]:
    """All the true captions there are; each names every object, and the first the swap's words."""
    if scene.kind in ("count", "counts"):
        return _of_counts(scene, vocabulary)
    return _of_corner(scene) if scene.kind == "corner" else _of_two(scene)


def _of_two(scene: Scene) -> list[str]:
    ((_, how, _),) = scene.relations
    one, other = (_described(thing) for thing in scene.things)
    (a, b), back = (_a(one), _a(other)), INVERSE[how]
    ground = f"on {_a(scene.background)} background"
    first, last = ENDS[how]
    related = [
        f"{a} {how} {b}",
        f"{b} {back} {a}",
        f"there is {a} {how} {b}",
        f"{a} {how} {b} {ground}",
        f"{a} {first} and {b} {last}",
    ]
    if scene.kind == "relation":
        return [*related, f"the {one} is {how} the {other}", f"the {other} is {back} the {one}"]
    colours = " and ".join(f"the {thing.name} is {thing.colour}" for thing in scene.things)
    return [f"{a} and {b}", f"{b} and {a}", f"there is {a} and {b}", colours, *related]


def _of_corner(scene: Scene) -> list[str]:
    beside, upright = (how for _, how, _ in scene.relations)
    one, middle, last = (thing.name for thing in scene.things)
    a, b, c = (_a(name) for name in (one, middle, last))
    return [
        f"{a} {beside} {b} and {c} {upright} the {middle}",
        f"{c} {upright} {b} and {a} {beside} the {middle}",
        f"the {one} is {beside} the {middle} and the {last} is {upright} the {middle}",
        f"{a}, {b} and {c}",
        f"there is {c}, {b} and {a}",
        f"{b}, {a} and {c} on {_a(scene.background)} background",
    ]


def _of_counts(scene: Scene, vocabulary: Vocabulary) -> list[str]:
    counted = [_counted(name, n, vocabulary) for name, n in scene.counts.items()]
    forth, back = " and ".join(counted), " and ".join(counted[::-1])
    ground = f"{_a(scene.background)} background"
    is_one = len(scene.things) == 1
    pictured = [f"a picture of {back}", f"{forth} on {ground}"]
    if scene.kind == "counts":
        return [forth, back, f"there are {forth}", f"{counted[0]} with {counted[1]}", *pictured]
    shown = _a(scene.things[0].name) if is_one else forth
    there = f"there {'is' if is_one else 'are'} {forth}"
    return [forth, there, *pictured, f"{ground} with {shown}", f"you can see {shown}"]


def swap(scene: Scene, other: Scene, vocabulary: Vocabulary) -> dict[str, str]:
    """A true caption of a scene, and the same of its swap: the same words about another picture."""
    return {
        "caption": sentences(scene, vocabulary)[0],
        "swapped": sentences(other, vocabulary)[0],
    }


def questions(scene: Scene, vocabulary: Vocabulary, rng: random.Random) -> list[Question]:
    """Questions of every type that fits the scene; as many "is there" with yes as with no."""
    names = sorted(scene.counts)
    present = rng.choice(names)
    # As likely in such a scene as the one that is there, so that the question does not tell.
    likely = vocabulary.pool(unseen=present in vocabulary.unseen, tint=scene.kind == "colour")
    others = [[name for name in pool if name not in names] for pool in (likely, vocabulary.names)]
    absent = rng.choice(others[0] or others[1])
    found = [
        Question(f"is there {_a(present)}?", "yes", "exists"),
        Question(f"is there {_a(absent)}?", "no", "exists"),
        Question("what objects are there?", _listed(names), "objects"),
        Question("what colour is the background?", scene.background, "background"),
    ]
    for one, how, other in scene.triples:
        found.append(Question(f"what is {how} the {other}?", one, "relation"))
        if scene.kind != "corner":  # there the third object is that way too, if not as straight
            found.append(Question(f"what is {INVERSE[how]} the {one}?", other, "relation"))
    found += [
        Question(f"what colour is the {thing.name}?", thing.colour, "colour")
        for thing in scene.things
        if thing.colour
    ]
    if scene.kind in ("count", "counts"):
        for name, n in scene.counts.items():
            question = f"how many {vocabulary.plural(name)} are there?"
            found.append(Question(question, NUMBERS[n], "count"))
    return found


def _counted(name: str, n: int, vocabulary: Vocabulary) -> str:
    return f"{NUMBERS[n]} {name if n == 1 else vocabulary.plural(name)}"


def _described(thing: Thing) -> str:
    return f"{thing.colour} {thing.name}" if thing.colour else thing.name


def _a(noun: str) -> str:
    return f"{'an' if re.match(r'[aeio]|u(?!ni)', noun) else 'a'} {noun}"


def _listed(names: Sequence[str]) -> str:
    """In the order of the alphabet, so that one answer alone is right."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
