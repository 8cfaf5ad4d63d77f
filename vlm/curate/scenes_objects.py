"""The objects that scenes show: a list of names, and cut-outs of the emoji that draw them."""

import json
import re
from collections import Counter, defaultdict
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from vlm.config.find import YamlError, find_objects, printable, read_text, read_yaml
from vlm.config.schema import STRICT
from vlm.data.dataset import Dataset
from vlm.data.decode import decode_image
from vlm.errors import ConfigError, DataError

PAPER_INK = 12  # of 255: less than this below white, as WebP's noise is, counts as paper
_SQUARE = np.ones((3, 3), np.uint8)
_NAME = re.compile(r"[a-z]{2,20}")


@dataclass(frozen=True, config=STRICT)
class Object:
    """One line of the list.

    Attributes:
        label: The "label" in the meta of its pictures; the name if None.
        plural: The name with an s if None.
        tint: Whether it may be shown in another colour: its shape alone tells what it is.
    """

    label: str | None = None
    plural: str | None = None
    tint: bool = False


@dataclass(frozen=True, config=STRICT)
class Vocabulary:
    """What scenes may show, by name.

    Attributes:
        objects: In all splits.
        unseen: Only in `test_object`.
    """

    objects: dict[str, Object]
    unseen: dict[str, Object]

    def __getitem__(self, name: str) -> Object:
        return self.objects[name] if name in self.objects else self.unseen[name]

    @property
    def names(self) -> list[str]:
        """Of all objects."""
        return [*self.objects, *self.unseen]

    def pool(self, *, unseen: bool, tint: bool) -> list[str]:
        """The names of one list; with `tint`, of those that may be shown in colours."""
        listed = self.unseen if unseen else self.objects
        return [name for name, thing in listed.items() if thing.tint or not tint]

    def plural(self, name: str) -> str:
        """As "foxes"."""
        return self[name].plural or f"{name}s"


class Drawing(NamedTuple):
    """An object cut out of its picture, with nothing around it."""

    artist: str
    rgba: Image.Image


def read_vocabulary(name: str) -> Vocabulary:
    """The list of objects in a YAML file, or the shipped one of that name.

    Raises:
        ConfigError: There is no such file, or it is not such a list; all problems are told.
    """
    path = find_objects(name)
    try:
        document = read_yaml(read_text(path))
    except YamlError as error:
        raise ConfigError(f"{path}:{error.line}: {error}") from error
    try:
        vocabulary = TypeAdapter(Vocabulary).validate_json(json.dumps(document.values))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors()]
        raise ConfigError([f"{path}: {printable(problem, 200)}" for problem in problems]) from None
    problems = [f"{line}: {problem}" for line, problem in document.repeated]
    problems += _problems(vocabulary)
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    return vocabulary


def _problems(vocabulary: Vocabulary) -> list[str]:
    counts = Counter(vocabulary.names)
    problems = [f"{name} is both in objects and in unseen" for name in counts if counts[name] > 1]
    problems += [
        f"{printable(name)}: a name is one word of 2 to 20 letters a to z"
        for name in counts
        if not _NAME.fullmatch(name)
    ]
    labels = Counter(vocabulary[name].label or name for name in counts)
    problems += [f"the label {label!r} has {n} names" for label, n in labels.items() if n > 1]
    for what, listed in (("objects", vocabulary.objects), ("unseen", vocabulary.unseen)):
        if len(listed) < 4:
            problems.append(f"{what} lists {len(listed)}; at least 4 are needed to compose")
    if sum(thing.tint for thing in vocabulary.objects.values()) < 2:
        problems.append("objects need at least 2 with tint: true, to show in colours")
    if not any(thing.tint for thing in vocabulary.unseen.values()):
        problems.append("unseen needs at least 1 with tint: true, to show in colours")
    return problems


def read_drawings(dataset: Dataset, vocabulary: Vocabulary) -> dict[str, list[Drawing]]:
    """Every drawing of each object, cut out, in the order of the artists' names.

    Raises:
        DataError: The data draws some object not once; all of them are told.
    """
    names = {vocabulary[name].label or name: name for name in vocabulary.names}
    found: dict[str, list[tuple[str, Drawing]]] = defaultdict(list)
    for sample_id, meta in enumerate(dataset.metas()):
        if name := names.get(str(meta.get("label"))):
            sample = dataset.read(sample_id)
            drawing = Drawing(str(meta.get("artist", "")), cut_out(decode_image(sample.image)))
            found[name].append((sample.key, drawing))
    if missing := [label for label, name in names.items() if name not in found]:
        raise DataError(
            f"no picture has the label {', '.join(map(repr, missing[:5]))}"
            f"{f' and {len(missing) - 5} others' if len(missing) > 5 else ''}; "
            "name data that draws all objects (--data), or list what it draws (--objects)"
        )
    return {
        name: [drawing for _, drawing in sorted(found[name], key=_artist_then_key)]
        for name in vocabulary.names
    }


def _artist_then_key(keyed: tuple[str, Drawing]) -> tuple[str, str]:
    return keyed[1].artist, keyed[0]


def cut_out(picture: Image.Image) -> Image.Image:
    """A drawing over white paper as RGBA without the paper, cropped to what is drawn.

    Paper is what is white up to the border; white inside of an outline (an eye) stays. An edge
    pixel is a blend of paper and drawing: its alpha is its ink over the most ink beside it, and its
    colour is what gives the blend back.
    """
    rgb = np.asarray(picture.convert("RGB"))
    ink: UInt8[np.ndarray, "H W"] = 255 - rgb.min(axis=2)
    paper = _paper(ink)
    edge = cv2.dilate(paper, _SQUARE).astype(bool) & ~paper.astype(bool)
    strongest = cv2.dilate(np.where(paper, 0, ink).astype(np.uint8), _SQUARE)
    alpha = np.where(paper, 0, 255)
    alpha = np.where(edge, ink.astype(int) * 255 // np.maximum(strongest, 1), alpha)
    colour = 255 - (255 - rgb.astype(int)) * 255 // np.maximum(alpha, 1)[..., None]
    rgba = np.dstack([colour.clip(0, 255), alpha]).astype(np.uint8)
    image = Image.fromarray(rgba)
    return image.crop(image.getchannel("A").getbbox())


def _paper(ink: Any) -> UInt8[np.ndarray, "H W"]:
    """1 where white goes on to the border, without passing between diagonal neighbours."""
    white = np.pad((ink <= PAPER_INK).astype(np.uint8), 1, constant_values=1)
    _, labels = cv2.connectedComponents(white, connectivity=4)
    outside: UInt8[np.ndarray, "H W"] = (labels == labels[0, 0])[1:-1, 1:-1].astype(np.uint8)
    return outside


def tinted(drawing: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """A drawing in shades of one colour: its median lightness is the colour itself."""
    grey = np.asarray(drawing.convert("RGB").convert("L")).astype(int)
    median = int(np.median(grey[np.asarray(drawing.getchannel("A")) > 127]))
    levels = np.arange(256)[:, None] - median  # [256, 1]
    pure = np.array(colour)
    darker = pure + levels * pure * 6 // (10 * max(median, 96))
    lighter = pure + levels * (255 - pure) * 5 // (10 * max(255 - median, 96))
    table = np.where(levels < 0, darker, lighter).clip(0, 255).astype(np.uint8)
    return Image.fromarray(np.dstack([table[grey], np.asarray(drawing.getchannel("A"))]))
