"""Scenes of several objects as shards: pictures, captions, questions, and swaps that come in pairs.

Which combinations of objects, relations, colours and numbers each split shows is in `scenes_plan`;
what is said, in `scenes_words`; where the objects come from, in `scenes_objects`. All of a scene
follows from the seed, its split and its number, so any number of processes writes the same bytes.
"""

import io
import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vlm.curate.scenes_objects import Drawing, Vocabulary, read_drawings, read_vocabulary, tinted
from vlm.curate.scenes_plan import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SPLITS,
    UNITS,
    Combination,
    Director,
    Scene,
    Slot,
    Split,
    Thing,
    kept_for,
    swapped,
)
from vlm.curate.scenes_words import captions, questions, swap
from vlm.curate.source import open_data
from vlm.errors import ConfigError
from vlm.runtime.files import disk_error, progress, write_synced, written_whole
from vlm.runtime.processes import spread

SHARD_SIZE = 1000  # scenes
REPORT = "scenes.json"
SHADE = 28  # of 255: the most that a shaded background is darkened
WEBP = {"quality": 92, "method": 3}
Sample = dict[str, Any]  # WebDataset's: "__key__", and bytes by suffix


@dataclass(frozen=True)
class Recipe:
    """What scenes are made of; all of it is part of the bytes.

    Attributes:
        data: DATA with the drawings of objects, each with its "label".
        objects: The list of objects: a file, or a shipped one's name.
        image_size: Of a picture's side, in pixels.
        seed: Of all draws.
    """

    data: str = "datasets/emoji/train-*.tar"
    objects: str = "objects"
    image_size: int = 64
    seed: int = 0


class Shard(NamedTuple):
    """A part of a split, and the file for it."""

    recipe: Recipe
    split: Split
    numbers: range
    path: Path


def make_scenes(
    out: Path,
    recipe: Recipe,
    *,
    num_train: int = 20_000,
    num_heldout: int = 1000,
    num_workers: int = 1,
) -> dict[str, Any]:
    """Writes a new folder of shards, `SPLIT-NUMBER.tar`, whole or not at all.

    Args:
        out: The folder, which must not exist.
        recipe: What of.
        num_train: Scenes of the training split.
        num_heldout: Scenes of each other split; even, as they come in pairs.
        num_workers: Processes; the bytes are the same for any number.

    Returns:
        The report, which the folder holds as `scenes.json`: the recipe, the number of scenes of
        each split, the objects, and the combinations that are held out.

    Raises:
        ConfigError: The folder exists, a number makes no sense, or the list of objects is wrong.
        DataError: The data lacks an object's drawing.
        DiskError: The folder cannot be written.
    """
    _check(out, recipe, num_train, num_heldout)
    studio = _studio(recipe)
    sizes = {split: num_train if split == "train" else num_heldout for split in SPLITS}
    report = {
        "recipe": asdict(recipe),
        "num_scenes": sizes,
        "objects": list(studio.vocabulary.objects),
        "unseen": list(studio.vocabulary.unseen),
        "artists": studio.artists,
        "held_out": held_out_combinations(studio.vocabulary),
    }
    try:
        with written_whole(out) as folder:
            shards = list(_shards(recipe, sizes, folder))
            composed = progress(
                spread(_samples, shards, num_workers=num_workers),
                description="composing",
                total=len(shards),
            )
            for shard, samples in zip(shards, composed, strict=True):
                _write(shard.path, samples)
            write_synced(folder / REPORT, json.dumps(report, indent=1).encode())
    except OSError as error:
        raise disk_error(out, error, sum(sizes.values()) * 6000) from error
    return report


def held_out_combinations(vocabulary: Vocabulary) -> dict[str, list[Combination]]:
    """The combinations of a list's objects that training never shows, by the split that does."""
    names, tint = sorted(vocabulary.objects), vocabulary.pool(unseen=False, tint=True)
    all_of_them: list[Combination] = [("objects", *pair) for pair in combinations(names, 2)]
    all_of_them += [("relation", name, how) for name in names for how in RELATIONS]
    all_of_them += [("colour", name, colour) for name in sorted(tint) for colour in COLOURS]
    all_of_them += [("count", name, str(n)) for name in names for n in (2, 3, 4)]
    return {
        split: [found for found in all_of_them if kept_for(found) == split]
        for split in ("val", "test_combination")
    }


def _check(out: Path, recipe: Recipe, num_train: int, num_heldout: int) -> None:
    problems = []
    if out.exists():
        problems.append(f"{out}: exists, and scenes never overwrite; name another folder")
    if num_train < 1 or num_heldout < 2 or num_heldout % 2:
        problems.append(
            f"{num_train} scenes to train on and {num_heldout} held out: at least 1, and an even "
            "number, as these come in pairs"
        )
    if not 32 <= recipe.image_size <= 512:
        problems.append(f"image size ({recipe.image_size}) must be from 32 to 512 pixels")
    if recipe.seed < 0:
        problems.append(f"seed ({recipe.seed}) must be at least 0")
    if problems:
        raise ConfigError(problems)


def _shards(recipe: Recipe, sizes: dict[Split, int], folder: Path) -> Iterator[Shard]:
    for split, size in sizes.items():
        for shard, start in enumerate(range(0, size, SHARD_SIZE)):
            numbers = range(start, min(start + SHARD_SIZE, size))
            yield Shard(recipe, split, numbers, folder / f"{split}-{shard:04d}.tar")


def _samples(shard: Shard) -> list[Sample]:
    studio = _studio(shard.recipe)
    return [studio.sample(shard.split, number) for number in shard.numbers]


def _write(path: Path, samples: list[Sample]) -> None:
    from webdataset.writer import TarWriter  # imports torch: only in the process that writes

    with path.open("wb") as file:
        with TarWriter(file, encoder=False, compress=False, mtime=0) as writer:
            for sample in samples:
                writer.write(sample)
        file.flush()
        os.fsync(file.fileno())


@cache
def _studio(recipe: Recipe) -> "Studio":
    vocabulary = read_vocabulary(recipe.objects)
    dataset = open_data(recipe.data, log=lambda _: None)
    return Studio(recipe, vocabulary, read_drawings(dataset, vocabulary))


class Studio:
    """Makes samples: composes what the director drew, and says what there is to say.

    Args:
        recipe: As above.
        vocabulary: Of the recipe's list.
        drawings: Of each object, at least one.
    """

    def __init__(
        self, recipe: Recipe, vocabulary: Vocabulary, drawings: dict[str, list[Drawing]]
    ) -> None:
        self.vocabulary = vocabulary
        self._recipe, self._drawings = recipe, drawings
        self._director = Director(vocabulary, recipe.seed)
        self._scaled = lru_cache(20_000)(self._scale)

    @property
    def artists(self) -> list[str]:
        """Who drew the objects."""
        return sorted({one.artist for several in self._drawings.values() for one in several})

    def sample(self, split: Split, number: int) -> Sample:
        """A scene, its picture as "webp" and all that is said about it as "json"."""
        scene, rng, paired = self._director.scene(split, number)
        picture, boxes = self.compose(scene)
        meta = self._meta(scene, boxes, rng)
        if paired:
            meta["pair"] = f"{split}-{number // 2}"
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP", **WEBP)
        text = json.dumps(meta, separators=(",", ":"), ensure_ascii=False)
        return {
            "__key__": f"{split}-{number:06d}",
            "webp": buffer.getvalue(),
            "json": text.encode(),
        }

    def compose(self, scene: Scene) -> tuple[Image.Image, list[list[int]]]:
        """The picture, and the box [x0, y0, x1, y1] of each thing in pixels, x1 and y1 outside."""
        picture = background(scene.background, scene.shade, self._recipe.image_size).copy()
        boxes = []
        for thing, slot in zip(scene.things, scene.slots, strict=True):
            cut, (x, y) = self._placed(thing, slot)
            picture.paste(cut, (x, y), cut)
            boxes.append([x, y, x + cut.width, y + cut.height])
        return picture, boxes

    def _placed(self, thing: Thing, slot: Slot) -> tuple[Image.Image, tuple[int, int]]:
        """The cut-out at its size, and where its upper left corner comes."""
        size = self._recipe.image_size
        chosen = thing.drawing % len(self._drawings[thing.name])
        cut = self._scaled(thing.name, chosen, thing.colour, slot.side * size // UNITS)
        x = (2 * slot.x + slot.side) * size // (2 * UNITS) - cut.width // 2
        y = (2 * slot.y + slot.side) * size // (2 * UNITS) - cut.height // 2
        return cut, (x, y)

    def _scale(self, name: str, number: int, colour: str | None, side: int) -> Image.Image:
        drawing = self._drawings[name][number].rgba
        if colour:
            drawing = tinted(drawing, COLOURS[colour])
        longer = max(drawing.size)
        width, height = (max(1, (length * side + longer // 2) // longer) for length in drawing.size)
        return drawing.resize((width, height), Image.Resampling.BICUBIC)

    def _meta(self, scene: Scene, boxes: Sequence[list[int]], rng: random.Random) -> dict[str, Any]:
        shown = zip(scene.things, boxes, strict=True)
        unseen, other = self._director.held_out(scene), swapped(scene)
        if other and not unseen and self._director.held_out(other):
            other = None  # of what training never shows, it doesn't hear that it is false either
        true, false = captions(scene, other, self.vocabulary, rng)
        meta: dict[str, Any] = {
            "captions": true,
            "kind": scene.kind,
            "background": scene.background,
            "objects": [self._described(thing, box) for thing, box in shown],
            "relation": scene.triples,
            "qa": [question._asdict() for question in questions(scene, self.vocabulary, rng)],
        }
        if other:
            meta["swap"] = swap(scene, other, self.vocabulary)
            meta["negatives"] = false
        if unseen:
            meta["held_out"] = unseen
        return meta

    def _described(self, thing: Thing, box: list[int]) -> dict[str, Any]:
        drawings = self._drawings[thing.name]
        described = {
            "name": thing.name,
            "box": box,
            "artist": drawings[thing.drawing % len(drawings)].artist,
        }
        return described | ({"colour": thing.colour} if thing.colour else {})


@lru_cache(1000)
def background(colour_name: str, shade: tuple[int, int], size: int) -> Image.Image:
    """A plain ground, or one that grows a little darker to one side or corner."""
    right, down = shade
    ramp = np.arange(size)
    across = (right * (2 * ramp - size + 1))[None, :] + (down * (2 * ramp - size + 1))[:, None]
    reach = max(1, int(across.max() - across.min()))
    dark = (across - across.min()) * SHADE // reach  # [size, size]
    colour = np.array(BACKGROUNDS[colour_name])
    return Image.fromarray((colour - dark[..., None] * colour // 255).astype(np.uint8))
