"""Scenes say what they show, hold out what they promise, and are the same bytes every time."""

import colorsys
import io
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image, ImageDraw

from vlm.cli.main import main
from vlm.curate import scenes_plan as plan
from vlm.curate.scenes import Recipe
from vlm.curate.scenes_objects import Object, Vocabulary, cut_out, read_vocabulary, tinted
from vlm.curate.scenes_plan import BACKGROUNDS, COLOURS, INVERSE, Director, kept_for
from vlm.data.dataset import open_shards
from vlm.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]
RECIPE = Recipe(data=f"{REPOSITORY}/datasets/emoji/train-*.tar")
SPLITS = ("train", "val", "test_combination", "test_object")
NUM_HELDOUT = 120
NUMBERS = ["zero", "one", "two", "three", "four"]
Scene = dict[str, Any]


# A process of its own is faster: here the types of every call are checked.
COMMAND = """
import socket, sys
class Refused(socket.socket):
    def __init__(self, *_, **__):
        raise AssertionError("scenes need no network")
if "--workers" not in sys.argv:
    socket.socket = Refused
from vlm.cli.main import main
if __name__ == "__main__":
    sys.exit(main(["data", "scenes", *sys.argv[1:]]))
"""


def compose(out: Path, *options: object) -> None:
    words = ["--data", RECIPE.data, "--num-train", 300, "--num-heldout", NUM_HELDOUT, *options]
    subprocess.run([sys.executable, "-c", COMMAND, out, *map(str, words)], check=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "out"
    compose(out)
    return out


@cache
def scenes(folder: Path, split: str) -> list[Scene]:
    """The metas of a split with their captions and pictures, by vlm's own reader."""
    dataset = open_shards(f"{folder}/{split}-*.tar", log=pytest.fail)
    samples = [dataset.read(number) for number in range(len(dataset))]
    pictures = [Image.open(io.BytesIO(sample.image)).convert("RGB") for sample in samples]
    return [
        {**s.meta, "key": s.key, "captions": s.captions, "picture": np.asarray(picture, np.int64)}
        for s, picture in zip(samples, pictures, strict=True)
    ]


def every(folder: Path) -> list[Scene]:
    return [scene for split in SPLITS for scene in scenes(folder, split)]


def counts(scene: Scene) -> Counter[str]:
    return Counter(shown["name"] for shown in scene["objects"])


def centre(scene: Scene, name: str) -> tuple[float, float]:
    (box,) = (shown["box"] for shown in scene["objects"] if shown["name"] == name)
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def holds(scene: Scene, one: str, how: str, other: str) -> bool:
    """Whether boxes are so, the distance along the relation the longer one."""
    (x0, y0), (x1, y1) = centre(scene, one), centre(scene, other)
    dx, dy = x1 - x0, y1 - y0
    along, across = (dx, dy) if how in ("left of", "right of") else (dy, dx)
    return (along if how in ("left of", "above") else -along) > 1.5 * abs(across)


def combinations_of(scene: Scene) -> set[tuple[str, ...]]:
    """What test_combination holds out, from boxes and names alone."""
    found = {("objects", *pair) for pair in combinations(sorted(counts(scene)), 2)}
    found |= {("count", name, str(n)) for name, n in counts(scene).items() if n > 1}
    found |= {("colour", o["name"], o["colour"]) for o in scene["objects"] if "colour" in o}
    for one, how, other in scene["relation"]:
        found |= {("relation", one, how), ("relation", other, INVERSE[how])}
    return found


def held_out(folder: Path) -> dict[str, set[tuple[str, ...]]]:
    """What the report lists."""
    listed = json.loads((folder / "scenes.json").read_text())["held_out"]
    return {split: {tuple(one) for one in found} for split, found in listed.items()}


def test_any_number_of_processes_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    compose(tmp_path / "again", "--workers", 2)
    names = sorted(path.name for path in (tmp_path / "again").iterdir())
    assert len(names) == 5
    assert [(tmp_path / "again" / name).read_bytes() for name in names] == [
        (folder / name).read_bytes() for name in names
    ]


def test_another_seed_gives_other_scenes_of_the_same_splits() -> None:
    vocabulary = read_vocabulary("objects")
    one, other = (
        [Director(vocabulary, seed).scene("val", number)[0] for number in range(8)]
        for seed in (0, 1)
    )
    assert not set(one) & set(other)
    for scene in other:
        assert {kept_for(shown) for shown in plan.combinations_of(scene)} <= {"train", "val"}


def test_relations_are_true_of_the_boxes(folder: Path) -> None:
    related = [scene for scene in every(folder) if scene["relation"]]
    assert len(related) > 250
    for scene in related:
        assert all(holds(scene, *triple) for triple in scene["relation"])


def test_boxes_hold_the_objects_apart_from_each_other_and_inside(folder: Path) -> None:
    for scene in every(folder):
        for box in (shown["box"] for shown in scene["objects"]):
            assert 0 <= box[0] < box[2] <= 64
            assert 0 <= box[1] < box[3] <= 64
            assert 14 <= max(box[2] - box[0], box[3] - box[1]) <= 40
        for a, b in combinations([shown["box"] for shown in scene["objects"]], 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_every_caption_is_true(folder: Path) -> None:
    """Read back with patterns of its own: relations, numbers, colours, places, backgrounds."""
    plurals = _plurals()
    for scene in every(folder):
        assert len(set(scene["captions"])) == 5
        for caption in scene["captions"]:
            _check_caption(scene, caption, plurals)


def _plurals() -> dict[str, str]:
    vocabulary = read_vocabulary("objects")
    return {vocabulary.plural(name): name for name in vocabulary.names}


def _check_caption(scene: Scene, caption: str, plurals: dict[str, str]) -> None:
    text, names = caption, counts(scene)
    if ground := re.search(r"an? (\w+) background", text):
        assert ground.group(1) == scene["background"]
        text = text.replace(ground.group(), "")
    colours = {o["name"]: o["colour"] for o in scene["objects"] if "colour" in o}
    for name, colour in re.findall(r"the (\w+) is (red|yellow|green|blue|purple)", text):
        assert colours[name] == colour
    for colour, name in re.findall(r"\b(red|yellow|green|blue|purple) (\w+)", text):
        if name != "and":
            assert colours[name] == colour
    text = re.sub(r"\b(red|yellow|green|blue|purple) (?!and)", "", text)
    related = r"(?:an?|the) (\w+) (?:is )?(left of|right of|above|below) (?:an?|the) (\w+)"
    for triple in re.findall(related, text):
        assert holds(scene, *triple)
    for name, place in re.findall(r"an? (\w+) (on the left|on the right|at the \w+)", text):
        x, y = centre(scene, name)
        assert {"on the left": x < 32, "on the right": x > 32, "at the top": y < 32}.get(
            place, y > 32
        )
    for number, noun in re.findall(r"\b(one|two|three|four) (\w+)", text):
        assert names[plurals[noun] if number != "one" else noun] == NUMBERS.index(number)
    told = {plurals.get(word, word) for word in re.findall(r"\w+", text)}
    assert names.keys() <= told  # every object is named
    assert not (set(plurals.values()) - names.keys()) & told  # and no other


def test_every_answer_is_true_and_is_there_is_balanced(folder: Path) -> None:
    plurals = _plurals()
    for split in SPLITS:
        found: dict[str, Counter[str]] = defaultdict(Counter)
        for scene in scenes(folder, split):
            for entry in scene["qa"]:
                assert entry["answer"] == _answer(scene, entry["question"], plurals)
                found[entry["type"]][entry["answer"]] += 1
        assert found["exists"]["yes"] == found["exists"]["no"] == len(scenes(folder, split))
        assert set(found) == {
            "exists", "objects", "background", "relation", "colour", "count",
        }  # fmt: skip


def _answer(scene: Scene, question: str, plurals: dict[str, str]) -> str | None:
    names = counts(scene)
    if match := re.fullmatch(r"is there an? (\w+)\?", question):
        return "yes" if match.group(1) in names else "no"
    if match := re.fullmatch(r"how many (\w+) are there\?", question):
        return NUMBERS[names[plurals[match.group(1)]]]
    if match := re.fullmatch(r"what is (left of|right of|above|below) the (\w+)\?", question):
        how, other = match.groups()
        (right,) = [name for name in names if name != other and holds(scene, name, how, other)]
        return right
    if question == "what colour is the background?":
        return str(scene["background"])
    if match := re.fullmatch(r"what colour is the (\w+)\?", question):
        return {o["name"]: o["colour"] for o in scene["objects"]}[match.group(1)]
    assert question == "what objects are there?"
    *first, last = sorted(names)
    return f"{', '.join(first)} and {last}" if first else last


def hues(pixels: Any) -> Any:
    """Of RGB pixels [N, 3], in degrees."""
    return [360 * colorsys.rgb_to_hsv(*pixel)[0] for pixel in (pixels / 255).tolist()]


def test_colours_are_to_be_seen(folder: Path) -> None:
    for scene in every(folder):
        outside = np.ones((64, 64), bool)
        for x0, y0, x1, y1 in (shown["box"] for shown in scene["objects"]):
            outside[y0:y1, x0:x1] = False
        ground = np.median(scene["picture"][outside], axis=0)
        distances = {name: np.abs(ground - rgb).sum() for name, rgb in BACKGROUNDS.items()}
        assert min(distances, key=distances.__getitem__) == scene["background"]
        for shown in scene["objects"]:
            if "colour" in shown:
                x0, y0, x1, y1 = shown["box"]
                inside = scene["picture"][y0:y1, x0:x1].reshape(-1, 3)
                assert _seen(inside, ground) == shown["colour"], scene["key"]


def _seen(inside: Any, ground: Any) -> str:
    """The colour of most of the pixels that are not the ground's, by hue."""
    distance = np.abs(inside - ground).sum(axis=1)
    wanted = dict(zip(COLOURS, hues(np.array(list(COLOURS.values()))), strict=True))
    found = Counter(
        min(wanted, key=lambda name: abs((hue - wanted[name] + 180) % 360 - 180))
        for hue in hues(inside[distance > np.median(distance)])
    )
    return found.most_common(1)[0][0]


def test_what_is_held_out_is_never_trained_on(folder: Path) -> None:
    listed = held_out(folder)
    shown = {split: [combinations_of(scene) for scene in scenes(folder, split)] for split in SPLITS}
    for split, other in (("val", "test_combination"), ("test_combination", "val")):
        assert all(found & listed[split] for found in shown[split]), "each shows one at least"
        assert not listed[split] & set().union(*shown["train"])
        assert not listed[split] & set().union(*shown[other])
        assert not listed[split] & set().union(*shown["test_object"])


def test_each_type_of_combination_is_held_out(folder: Path) -> None:
    for listed in held_out(folder).values():
        assert {one[0] for one in listed} == {"objects", "relation", "colour", "count"}


def test_unseen_objects_are_in_every_scene_of_their_split_and_in_no_other(folder: Path) -> None:
    unseen = set(read_vocabulary("objects").unseen)
    assert all(unseen & counts(scene).keys() for scene in scenes(folder, "test_object"))
    for split in ("train", "val", "test_combination"):
        assert not any(unseen & counts(scene).keys() for scene in scenes(folder, split))


def test_every_object_and_every_artist_is_trained_on(folder: Path) -> None:
    shown = [shown for scene in scenes(folder, "train") for shown in scene["objects"]]
    assert {one["name"] for one in shown} == set(read_vocabulary("objects").objects)
    artists = {"noto", "twemoji", "fluent-emoji-flat", "noto-v1"}
    assert {one["artist"] for one in shown} == artists
    tests = [shown for scene in scenes(folder, "test_object") for shown in scene["objects"]]
    assert {one["artist"] for one in tests} == artists


def test_pairs_are_two_pictures_of_the_same_words(folder: Path) -> None:
    plurals = _plurals()
    for split in SPLITS[1:]:
        pairs = defaultdict(list)
        for scene in scenes(folder, split):
            assert ("pair" in scene) == ("swap" in scene) == (scene["kind"] != "count")
            if "pair" in scene:
                pairs[scene["pair"]].append(scene)
        assert len(pairs) > 30
        for one, other in pairs.values():
            caption, swapped = one["swap"]["caption"], one["swap"]["swapped"]
            assert other["swap"] == {"caption": swapped, "swapped": caption}
            assert caption != swapped
            words = [
                sorted(plurals.get(word, word) for word in text.split())
                for text in (caption, swapped)
            ]
            assert words[0] == words[1]
            assert caption in one["captions"]
            assert (one["background"], one["kind"]) == (other["background"], other["kind"])
            assert np.abs(one["picture"] - other["picture"]).max() > 60
    assert not any("pair" in scene for scene in scenes(folder, "train"))


def test_what_is_false_has_the_captions_words_in_another_order(folder: Path) -> None:
    plurals, told = _plurals(), Counter[bool]()

    def words(text: str) -> list[str]:
        return sorted(plurals.get(word, word) for word in text.split() if word not in ("a", "an"))

    relations = {"left", "right", "above", "below"}
    for scene in [s for s in scenes(folder, "train") if "negatives" in s]:
        assert scene["kind"] != "count"
        assert scene["negatives"][0] == scene["swap"]["swapped"]
        for caption, false in zip(scene["captions"], scene["negatives"], strict=True):
            told[false is not None] += 1
            if false is None:  # a list of what is there is true of the swap, too
                assert scene["kind"] == "corner"
                assert not relations & set(caption.split())
            else:
                assert false not in scene["captions"]
                assert words(false) == words(caption)
    assert told[True] > 5 * told[False] > 0


def test_training_is_told_nothing_of_what_is_held_out_in_captions_or_false_ones(
    folder: Path,
) -> None:
    """A relation, a colour or a number that training never shows is in none of its texts."""
    plurals = _plurals()
    held_out = {
        c for split in SPLITS[1:3] for s in scenes(folder, split) for c in map(tuple, s["held_out"])
    }
    numbers = ("zero", "one", "two", "three", "four")
    phrases = {f"{c[2]} {c[1]}" for c in held_out if c[0] == "colour"}
    phrases |= {f"{numbers[int(c[2])]} {c[1]}" for c in held_out if c[0] == "count"}
    phrases |= {f"the {c[1]} is {c[2]} the " for c in held_out if c[0] == "relation"}
    assert {c[0] for c in held_out} >= {"colour", "count", "relation"}
    train = scenes(folder, "train")
    texts = [
        t
        for s in train
        for t in [*s["captions"], *s.get("negatives", []), *s.get("swap", {}).values()]
        if t
    ]
    assert sum("negatives" in scene for scene in train) > len(train) / 5
    for text in texts:
        spelled = " ".join(plurals.get(word, word) for word in text.split()) + " "
        assert not [phrase for phrase in phrases if phrase in spelled], text


@pytest.mark.filterwarnings(  # WebDataset leaves its file to the collector
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_the_webdataset_package_reads_the_same(folder: Path) -> None:
    found = webdataset.WebDataset(str(folder / "val-0000.tar"), shardshuffle=False).decode("rgb8")
    read = {sample["__key__"]: sample for sample in found}
    assert len(read) == NUM_HELDOUT
    for scene in scenes(folder, "val"):
        sample = read[scene["key"]]
        assert tuple(sample["json"]["captions"]) == scene["captions"]
        assert (sample["webp"] == scene["picture"]).all()


def test_a_cut_out_on_another_ground_is_the_drawing_on_that_ground() -> None:
    def drawn(ground: str) -> Image.Image:
        large = Image.new("RGB", (512, 512), ground)
        draw = ImageDraw.Draw(large)
        draw.ellipse((100, 60, 420, 470), fill="crimson")
        draw.ellipse((200, 200, 300, 300), fill="white")  # stays: it is inside
        return large.resize((64, 64), Image.Resampling.BOX)

    cut = cut_out(drawn("white"))
    assert cut.size == pytest.approx((40, 52), abs=1)
    on_blue = Image.new("RGB", cut.size, "navy")
    on_blue.paste(cut, mask=cut)
    expected = drawn("navy").crop((12, 7, 12 + cut.width, 7 + cut.height))
    difference = np.abs(np.asarray(on_blue, int) - np.asarray(expected, int)).max(axis=2)
    assert difference.max() < 30


def test_a_tint_keeps_the_shading_and_its_median_is_the_colour() -> None:
    ramp = np.tile(np.linspace(60, 200, 33).astype(np.uint8), (33, 1))
    grey = Image.fromarray(np.dstack([ramp] * 3 + [np.full_like(ramp, 255)]))
    pixels = np.asarray(tinted(grey, COLOURS["blue"]), int)
    assert pixels[0, 16, :3].tolist() == list(COLOURS["blue"])
    lightness = pixels[0, :, :3].sum(axis=1)
    assert (np.diff(lightness) >= 0).all()
    assert lightness[-1] - lightness[0] > 100


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--num-heldout", "3"], "an even number, as these come in pairs"),
        (["--num-train", "0"], "0 scenes to train on"),
        (["--image-size", "8"], r"image size \(8\) must be from 32 to 512 pixels"),
        (["--seed", "-1"], r"seed \(-1\) must be at least 0"),
        (["--workers", "0"], r"--workers \(0\) must be at least 1"),
        (["--objects", "object"], 'no list of objects "object": .* did you mean objects'),
        (["--data", "nowhere/*.tar"], "nowhere"),
        (["--data", "NOISE"], "no picture has the label 'dog face', .* and 43 others"),
    ],
)
def test_a_bad_argument_is_one_line(
    options: list[str],
    problem: str,
    make_tar: Callable[..., Path],
    encoded: Callable[..., bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    noise = make_tar([("a.png", encoded()), ("a.json", b'{"label": "noise"}')])
    options = [str(noise) if word == "NOISE" else word for word in options]
    words = ["data", "scenes", str(tmp_path / "out"), "--data", RECIPE.data, *options]
    assert main(words) in (2, 3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.search(problem, lines[0])
    assert not list(tmp_path.glob("out*"))


def test_what_exists_is_not_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "scenes", str(folder), "--data", RECIPE.data]) == 2
    assert "never overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("objects: {dog: {}}", "unseen: field required"),
        ("objects: {dog: {lable: x}}\nunseen: {}", r"objects\.dog\.lable"),
        ("objects: {Big Dog: {}}\nunseen: {}", "Big Dog: a name is one word"),
        ("objects: {dog: {}}\nunseen: {dog: {}}", "dog is both in objects and in unseen"),
        ("objects: {dog: {}, hound: {label: dog}}\nunseen: {}", "the label 'dog' has 2 names"),
        ("objects: {dog: {}}\nunseen: {}", "objects lists 1; at least 4"),
        ("objects: [dog", ":1: "),
    ],
)
def test_a_bad_list_of_objects_is_told(
    text: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    words = ["data", "scenes", str(tmp_path / "out"), "--objects", str(tmp_path / "mine.yaml")]
    assert main(words) == 2
    assert re.search(problem, capsys.readouterr().err)


def test_a_list_too_short_to_hold_combinations_out_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "MAX_DRAWS", 1)
    few = {name: Object(tint=True) for name in ("dog", "lion", "bus", "star")}
    unseen = {name: Object(tint=True) for name in ("owl", "snail", "bell", "ship")}
    director = Director(Vocabulary(objects=few, unseen=unseen), 0)
    with pytest.raises(ConfigError, match="the list of objects is too short") as raised:
        [director.scene("test_combination", number) for number in range(40)]
    assert len(raised.value.problems) == 1
