"""Rebuild the emoji quickstart shards, byte for byte, from pinned npm packages.

    python datasets/emoji/build.py            # write all files beside this one
    python datasets/emoji/build.py --check    # rebuild in a temporary folder and compare

Object emoji (animals, food, travel, activities, objects) drawn by seven artists are rendered at
64x64 px over white. A sample is `KEY.webp` and `KEY.json`, with `KEY = ARTIST-CODEPOINTS`.
`locales.tsv` names each concept in 28 locales; SHA256SUMS lists it with the shards.

Splits hold out artists and concepts. A concept's side is a hash of its code points; concepts that
share a label take the side of the first of them, so a caption's concept is never on both sides.
A held-out picture whose pixels equal a training picture is dropped.

    train         training concepts, TRAIN_ARTISTS
    val_artist    training concepts, VAL_ARTISTS: unseen artists, for tuning
    test_artist   training concepts, TEST_ARTIST: an unseen artist, for reporting only
    val_concept   12% of concepts by every artist but TEST_ARTIST: unseen concepts, for tuning
    test_concept  12% of concepts by every artist: unseen concepts, for reporting only
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import itertools
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import resvg_py
from PIL import Image
from webdataset import TarWriter

Split = Literal["train", "val_artist", "val_concept", "test_artist", "test_concept"]
Json = dict[str, Any]

TRAIN_ARTISTS = ("noto", "twemoji", "fluent-emoji-flat", "noto-v1")
VAL_ARTISTS = ("fxemoji", "streamline-emojis")
TEST_ARTIST = "emojione"
ARTISTS = (*TRAIN_ARTISTS, *VAL_ARTISTS, TEST_ARTIST)
GROUPS = ("animals-nature", "food-drink", "travel-places", "activities", "objects")
SHORTCODES = ("cldr", "emojibase", "github", "iamcal", "joypixels")

HELD_OUT_SHARE = 0.12  # of concepts, once for test_concept and once for val_concept
NUM_TRAIN_SHARDS = 6
IMAGE_SIZE = 64
INK_BELOW = 224  # of 255: a pixel with a darker channel is ink
MIN_INK = 0.01  # a picture with a smaller share of ink is blank
WEBP_OPTIONS = {"quality": 90, "method": 6}
MAX_CAPTIONS = 5
# In Unicode's names black and white mean filled and outlined; `dog2` and `sagittarius` are codes.
UNTRUE_NAME = re.compile(
    r"[\d,]|\b(black|white|symbol|sign|lower left|volumne|city sunrise|blue car|flipper|android)\b"
    r"|^(art|feet|mag|mag right|flags|zap|mega|calling|date|moon|stars|bullettrain.*|womans .*)$"
)
LOCALES = "locales.tsv"
NPM_TIMEOUT_S = 300
BUILT_WITH = {"resvg-py": "0.5.0", "pillow": "13.0.0", "webdataset": "1.0.2"}

# npm's own `dist.integrity` of each tarball: the base64 sha512.
PACKAGES = {
    "emojibase-data@17.0.0": (
        "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA=="
    ),
    "@iconify-json/noto@1.2.9": (
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw=="
    ),
    "@iconify-json/twemoji@1.2.5": (
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw=="
    ),
    "@iconify-json/fluent-emoji-flat@1.2.6": (
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw=="
    ),
    "@iconify-json/noto-v1@1.2.5": (
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA=="
    ),
    "@iconify-json/fxemoji@1.2.2": (
        "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ=="
    ),
    "@iconify-json/streamline-emojis@1.2.4": (
        "iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A=="
    ),
    "@iconify-json/emojione@1.2.3": (
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg=="
    ),
}

# Seen by eye. `wrong`: icons whose name is a concept's but whose picture is not (streamline's
# `turkey` is a flag). `names`: icons that no rule finds (fxemoji's `dogside` is the whole dog).
REVIEWED_ICONS: Json = json.loads(Path(__file__).with_name("reviewed_icons.json").read_text())


@dataclass(frozen=True)
class Concept:
    """One emoji that every artist may draw: what the captions say, and other names for its icon."""

    hexcode: str
    label: str
    group: str
    tags: tuple[str, ...]
    names: tuple[str, ...]  # shortcodes as words, then the Unicode name


@dataclass(frozen=True)
class Sample:
    """One picture of one concept by one artist, encoded."""

    concept: Concept
    artist: str
    webp: bytes
    pixels_sha256: str

    @property
    def key(self) -> str:
        """`ARTIST-CODEPOINTS`, without dots: WebDataset splits names at the first one."""
        return f"{self.artist}-{code_points(self.concept.hexcode)}"


# --- packages


def fetch(package: str, cache: Path) -> Path:
    """The tarball of `NAME@VERSION`, downloaded once and checked against its pinned sha512."""
    path = cache / (package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz")
    if not path.exists():
        options = ["--ignore-scripts", "--loglevel=error", "--pack-destination", str(cache)]
        command = ["npm", "pack", package, *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=NPM_TIMEOUT_S)
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != PACKAGES[package]:
        raise ValueError(f"{path}: sha512 is {digest}, not the pinned one; delete it and try again")
    return path


def read_json(tarball: Path, member: str) -> Json:
    """One JSON file of a package, read in memory: nothing is unpacked, nothing is run."""
    with tarfile.open(tarball) as tar:
        file = tar.extractfile(f"package/{member}")
        assert file is not None
        content: Json = json.load(file)
        return content


# --- concepts and captions


def code_points(hexcode: str) -> str:
    """The lower-case code points without the variation selector, which sources disagree about."""
    return hexcode.lower().replace("-fe0f", "")


def slug(text: str) -> str:
    """Iconify's form of a name: `T-Rex` is `t-rex`, `piñata` is `pinata`."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain.replace("'", "")).strip("-")


def load_concepts(tarball: Path) -> list[Concept]:
    """The object emoji of emojibase; skin tones and genders are no entries of their own there."""
    groups = read_json(tarball, "meta/groups.json")["groups"]
    unicode_names = read_json(tarball, "meta/unicode-names.json")
    shortcodes = [read_json(tarball, f"en/shortcodes/{name}.json") for name in SHORTCODES]
    concepts = []
    entries: Any = read_json(tarball, "en/data.json")
    for entry in entries:
        group = groups.get(str(entry.get("group")))
        if group not in GROUPS:
            continue
        hexcode = entry["hexcode"]
        names = dict.fromkeys([*words_of(hexcode, shortcodes), unicode_names[hexcode].lower()])
        concepts.append(Concept(hexcode, entry["label"], group, tuple(entry["tags"]), tuple(names)))
    return sorted(concepts, key=lambda concept: concept.hexcode)


def words_of(hexcode: str, shortcodes: list[Json]) -> Iterator[str]:
    """Every shortcode of an emoji as words: `red_car` is `red car`."""
    for table in shortcodes:
        codes = table.get(hexcode, [])
        for code in [codes] if isinstance(codes, str) else codes:
            yield code.replace("_", " ")


def captions(concept: Concept) -> list[str]:
    """Two to five different captions: label, tags, both together, other truthful names."""
    tags = ", ".join(concept.tags)
    names = [name for name in concept.names if not UNTRUE_NAME.search(name)]
    news = any(slug(tag) not in slug(concept.label) for tag in concept.tags)
    both = [f"{concept.label}: {tags}"] if news else []
    texts = [concept.label, tags, *both, *names, f"{concept.label} emoji"]
    unique: dict[str, str] = {}
    for text in texts:
        unique.setdefault(slug(text).replace("-", ""), text)  # `email` says no more than `e-mail`
    num_captions = min(max(len(unique) - 1, 2), MAX_CAPTIONS)  # "stadium emoji": if nothing else
    return list(unique.values())[:num_captions]


def labels_by_locale(tarball: Path) -> dict[str, dict[str, str]]:
    """Each locale's label of every emoji, by hexcode; English first, the others by their codes."""
    with tarfile.open(tarball) as tar:
        found = re.findall(r"^package/([a-z-]+)/data\.json$", "\n".join(tar.getnames()), re.M)
    labels = {}
    for locale in sorted(found, key=lambda code: (code != "en", code)):
        entries: Any = read_json(tarball, f"{locale}/data.json")
        labels[locale] = {entry["hexcode"]: entry["label"] for entry in entries}
    return labels


def write_locales(path: Path, concepts: list[Concept], tarball: Path) -> None:
    """A row a concept, a column a locale; the same bytes every time."""
    labels = labels_by_locale(tarball)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["concept", *labels])
        for concept in concepts:
            names = (of_locale[concept.hexcode] for of_locale in labels.values())
            writer.writerow([concept.hexcode, *names])
    print(f"{path.name}: {len(concepts)} concepts in {len(labels)} locales")


# --- splits


def held_out(hexcode: str) -> Literal["train", "val_concept", "test_concept"]:
    """The side of a concept: a uniform hash of its code points, cut at 12% and 24%."""
    digest = hashlib.sha256(code_points(hexcode).encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < HELD_OUT_SHARE:
        return "test_concept"
    return "val_concept" if position < 2 * HELD_OUT_SHARE else "train"


def split_of(side: str, artist: str) -> Split | None:
    """The split of a picture, `None` if it is in none."""
    if side == "test_concept":
        return "test_concept"
    if side == "val_concept":
        return None if artist == TEST_ARTIST else "val_concept"
    if artist == TEST_ARTIST:
        return "test_artist"
    return "val_artist" if artist in VAL_ARTISTS else "train"


def assign(samples: list[Sample]) -> dict[Split, list[Sample]]:
    """The splits, each in an order that mixes artists and concepts: by the hash of the key."""
    first: dict[str, str] = {}
    for sample in sorted(samples, key=lambda sample: sample.concept.hexcode):
        first.setdefault(slug(sample.concept.label), sample.concept.hexcode)
    splits: dict[Split, list[Sample]] = {
        name: [] for name in ("train", "val_artist", "val_concept", "test_artist", "test_concept")
    }
    for sample in sorted(samples, key=lambda sample: hashlib.sha256(sample.key.encode()).digest()):
        side = held_out(first[slug(sample.concept.label)])
        if split := split_of(side, sample.artist):
            splits[split].append(sample)
    return drop_leaks(splits)


def drop_leaks(splits: dict[Split, list[Sample]]) -> dict[Split, list[Sample]]:
    """Without the held-out pictures whose pixels are also in train; printed, not silent."""
    seen = {sample.pixels_sha256 for sample in splits["train"]}
    kept: dict[Split, list[Sample]] = {"train": splits["train"]}
    for name, samples in splits.items():
        if name != "train":
            kept[name] = [sample for sample in samples if sample.pixels_sha256 not in seen]
            dropped = sorted({sample.key for sample in samples} - {s.key for s in kept[name]})
            print(f"{name}: {len(dropped)} pictures also in train dropped {dropped}")
    return kept


# --- icons


def match_icons(artist: str, concepts: list[Concept], icons: Json, chars: Json) -> dict[str, str]:
    """The icon name of each concept that a set draws, by hexcode.

    By code point where the set lists them, then as reviewed, then by label, then by shortcode or
    Unicode name, then (streamline) by a numbered variant of the label. A better kind of match comes
    first, and a picture belongs to one concept only, aliases included.
    """
    shorten: Callable[[str], str] = (
        (lambda text: slug(text).replace("-", "")) if artist == "fxemoji" else slug
    )
    by_code = {code_points(code): name for code, name in chars.items()}
    own = {name: name for name in icons["icons"]}
    aliases = {name: alias["parent"] for name, alias in icons.get("aliases", {}).items()}
    free = own.keys() - set(REVIEWED_ICONS["wrong"].get(artist, []))
    reviewed = REVIEWED_ICONS["names"].get(artist, {})
    found: dict[str, str] = {}
    kinds: list[Callable[[Concept], list[str]]] = [
        lambda c: [by_code.get(code_points(c.hexcode), "")],
        lambda c: [reviewed.get(c.label, "")],
        lambda c: [shorten(c.label)],
        lambda c: [shorten(name) for name in c.names],
        lambda c: [f"{slug(c.label)}-1"] if artist == "streamline-emojis" else [],
    ]
    for candidates, table in itertools.product(kinds, (own, aliases)):
        for concept in concepts:
            names = [table[name] for name in candidates(concept) if table.get(name) in free]
            if names and concept.hexcode not in found:
                found[concept.hexcode] = names[0]
                free.discard(names[0])
    return found


def svg_of(name: str, icons: Json) -> str:
    """A stand-alone SVG of an icon, centred in a square."""
    icon = {"left": 0, "top": 0, "width": 16, "height": 16, **icons, **icons["icons"][name]}
    side = max(icon["width"], icon["height"])
    left = icon["left"] - (side - icon["width"]) / 2
    top = icon["top"] - (side - icon["height"]) / 2
    head = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    box = f'width="{side}" height="{side}" viewBox="{left:g} {top:g} {side} {side}"'
    return f"<svg {head} {box}>{icon['body']}</svg>"


def render(svg: str) -> Image.Image:
    """The picture over white. No system fonts: they differ between machines."""
    png = resvg_py.svg_to_bytes(
        svg_string=svg,
        width=IMAGE_SIZE,
        height=IMAGE_SIZE,
        background="white",
        skip_system_fonts=True,
    )
    return Image.open(io.BytesIO(png)).convert("RGB")


def draw(concept: Concept, artist: str, svg: str) -> Sample | None:
    """The sample, or `None` where nothing visible is drawn or the icon lost its style sheet."""
    if 'class="st' in svg and "<style" not in svg:  # fxemoji's tram car: all black
        return None
    image = render(svg)
    if np.mean(np.asarray(image).min(axis=2) < INK_BELOW) < MIN_INK:
        return None
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", **WEBP_OPTIONS)
    decoded = Image.open(buffer).convert("RGB").tobytes()
    return Sample(concept, artist, buffer.getvalue(), hashlib.sha256(decoded).hexdigest())


def draw_set(artist: str, tarball: Path, concepts: list[Concept]) -> list[Sample]:
    """Every visible picture of an artist, with a line that says what was found and skipped."""
    icons, chars = read_json(tarball, "icons.json"), read_json(tarball, "chars.json")
    names = match_icons(artist, concepts, icons, chars)
    drawn = [
        draw(concept, artist, svg_of(names[concept.hexcode], icons))
        for concept in concepts
        if concept.hexcode in names
    ]
    samples = [sample for sample in drawn if sample]
    num_skipped = len(drawn) - len(samples)
    print(f"{artist}: {len(samples)} pictures, {num_skipped} blank or broken ones skipped")
    return samples


# --- shards


def meta_json(sample: Sample) -> bytes:
    """The sample's JSON, in one spelling."""
    concept = sample.concept
    meta = {
        "artist": sample.artist,
        "captions": captions(concept),
        "concept": concept.hexcode,
        "group": concept.group,
        "label": concept.label,
        "tags": concept.tags,
    }
    return json.dumps(meta, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def write_shard(path: Path, samples: list[Sample]) -> None:
    """One tar, the same bytes every time."""
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0, mode=0o644) as writer:
        for sample in samples:
            writer.write(
                {"__key__": sample.key, "webp": sample.webp, "json": meta_json(sample)},
            )


def write_splits(splits: dict[Split, list[Sample]], out: Path) -> None:
    """The shards of every split, a table of them, and their SHA256SUMS."""
    for stale in out.glob("*.tar"):
        stale.unlink()
    for name, samples in splits.items():
        num_shards = NUM_TRAIN_SHARDS if name == "train" else 1
        for shard in range(num_shards):
            write_shard(out / f"{name}-{shard:04d}.tar", samples[shard::num_shards])
        artists = Counter(sample.artist for sample in samples)
        concepts = {sample.concept.hexcode for sample in samples}
        size_bytes = sum(path.stat().st_size for path in out.glob(f"{name}-*.tar"))
        webp = sum(len(sample.webp) for sample in samples)
        print(
            f"{name}: {len(samples)} images, {len(concepts)} concepts, {size_bytes} bytes "
            f"({webp} WebP), {dict(sorted(artists.items()))}"
        )
    lines = [f"{digest}  {name}\n" for name, digest in sha256sums(out).items()]
    (out / "SHA256SUMS").write_text("".join(lines))


def sha256sums(folder: Path) -> dict[str, str]:
    """The digest of every shard and of the table of locales, by name."""
    files = [*folder.glob("*.tar"), folder / LOCALES]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def build(out: Path, cache: Path) -> None:
    """Fetch, match, render, split and write."""
    out.mkdir(parents=True, exist_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    tarballs = {name.rsplit("@", 1)[0]: fetch(name, cache) for name in PACKAGES}
    concepts = load_concepts(tarballs["emojibase-data"])
    write_locales(out / LOCALES, concepts, tarballs["emojibase-data"])
    samples = [
        sample
        for artist in ARTISTS
        for sample in draw_set(artist, tarballs[f"@iconify-json/{artist}"], concepts)
    ]
    write_splits(assign(samples), out)


def differing(out: Path, cache: Path) -> list[str]:
    """The names of files in `out` that a fresh build does not give, or that SHA256SUMS denies."""
    with tempfile.TemporaryDirectory() as scratch:
        build(Path(scratch), cache)
        fresh, sums = sha256sums(Path(scratch)), (Path(scratch) / "SHA256SUMS").read_text()
    ours = sha256sums(out)
    names = {name for name in fresh.keys() | ours.keys() if fresh.get(name) != ours.get(name)}
    if sums != (out / "SHA256SUMS").read_text():
        names.add("SHA256SUMS")
    return sorted(names)


def main() -> int:
    """Build, or check; 1 if the check finds a difference."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=here, help="folder of the files")
    parser.add_argument("--cache", type=Path, help="folder that keeps the npm tarballs")
    parser.add_argument("--check", action="store_true", help="compare --out with a fresh build")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = partial(differing if args.check else build, args.out, args.cache or Path(scratch))
        names = run() or []
    for name in names:
        print(f"{name} differs from a fresh build", file=sys.stderr)
    for library, built in BUILT_WITH.items():
        if (here_version := version(library)) != built:
            print(f"{library} is {here_version}, not {built}: bytes may differ", file=sys.stderr)
    return 1 if names else 0


if __name__ == "__main__":
    sys.exit(main())
