"""Class names: of a public set, of a file, or given; facts from openai/CLIP's data/prompts.md."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm.errors import ConfigError
from vlm.runtime import torchvision_guard

_CIFAR10 = "airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck"
_CIFAR100 = (
    "apple, aquarium fish, baby, bear, beaver, bed, bee, beetle, bicycle, bottle, bowl, boy, "
    "bridge, bus, butterfly, camel, can, castle, caterpillar, cattle, chair, chimpanzee, clock, "
    "cloud, cockroach, couch, crab, crocodile, cup, dinosaur, dolphin, elephant, flatfish, forest, "
    "fox, girl, hamster, house, kangaroo, keyboard, lamp, lawn mower, leopard, lion, lizard, "
    "lobster, man, maple tree, motorcycle, mountain, mouse, mushroom, oak tree, orange, orchid, "
    "otter, palm tree, pear, pickup truck, pine tree, plain, plate, poppy, porcupine, possum, "
    "rabbit, raccoon, ray, road, rocket, rose, sea, seal, shark, shrew, skunk, skyscraper, snail, "
    "snake, spider, squirrel, streetcar, sunflower, sweet pepper, table, tank, telephone, "
    "television, tiger, tractor, train, trout, tulip, turtle, wardrobe, whale, willow tree, wolf, "
    "woman, worm"
)


@dataclass(frozen=True)
class NamedSet:
    """A public data set's classes.

    Attributes:
        names: In the order of its class numbers, with commas between; None for open_clip's 1,000.
        templates: The list of templates that its accuracy is quoted with.
    """

    names: str | None
    templates: str


NAMED_SETS = {
    "imagenet": NamedSet(None, "openai"),
    "cifar10": NamedSet(_CIFAR10, "cifar"),
    "cifar100": NamedSet(_CIFAR100, "cifar"),
}


def named_class_names(name: str) -> list[str]:
    """The class names of a set in `NAMED_SETS`, in the order of its class numbers.

    ImageNet's are open_clip's, in which "missile" and "sunglasses" each name two classes.
    """
    names = NAMED_SETS[name].names
    if names is not None:
        return names.split(", ")
    torchvision_guard.install()
    import open_clip

    return list(open_clip.IMAGENET_CLASSNAMES)


def read_labels(labels: str | Path) -> list[str]:
    """The class names of a set in `NAMED_SETS`, or of a text file with one a line.

    A blank line between names stays, to be refused: without it the numbers of all that follow would
    shift.

    Raises:
        ConfigError: It is neither a set nor a file that can be read.
    """
    if str(labels) in NAMED_SETS:
        return named_class_names(str(labels))
    try:
        text = Path(labels).read_text(encoding="utf-8-sig")
    except OSError as error:
        sets = ", ".join(NAMED_SETS)
        raise ConfigError(
            f"labels file {labels}: can't be read: {error.strerror}; give a file or one of {sets}"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"labels file {labels}: not UTF-8 text; save it as UTF-8") from None
    return [line.strip() for line in text.rstrip().splitlines()]


def resolve_class_names(labels: str | Path | Sequence[str]) -> list[str]:
    """Class names as a user gives them: a list, the name of a set, or a file.

    Raises:
        ConfigError: There is no such file, or a list or a file has blank or repeated names. Those
            of a public set may repeat: its classes are told apart by number.
    """
    names = read_labels(labels) if isinstance(labels, str | Path) else list(labels)
    check_class_names(names, may_repeat=isinstance(labels, str) and labels in NAMED_SETS)
    return names


def check_class_names(class_names: Sequence[str], *, may_repeat: bool = False) -> None:
    """Refuse a list of labels that cannot be told apart.

    Args:
        class_names: The list.
        may_repeat: Whether a name may stand for several classes, which then differ by number.

    Raises:
        ConfigError: It is empty, or has blank or repeated names; one line for each problem.
    """
    if not class_names:
        raise ConfigError("the list of labels is empty; give at least one")
    problems = [
        f"label {i} of {len(class_names)} is blank; remove it or name it"
        for i, name in enumerate(class_names, start=1)
        if not name.strip()
    ]
    counts = Counter(class_names)
    repeated = [name for name, n in counts.items() if n > 1 and name.strip() and not may_repeat]
    problems += [f"label {name!r} is given more than once; keep one" for name in repeated]
    if problems:
        raise ConfigError(problems)


def distinct(class_names: Sequence[str]) -> list[str]:
    """The names as they are shown: a repeated one with its class number, as "missile (657)"."""
    counts = Counter(class_names)
    return [
        name if counts[name] == 1 else f"{name} ({number})"
        for number, name in enumerate(class_names)
    ]
