"""The emoji quickstart shards: whole, readable, captioned, and with nothing held out in train."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

FOLDER = Path(__file__).parents[2] / "datasets" / "emoji"
LOCALES = FOLDER / "locales.tsv"
SPLITS = ("train", "val_artist", "val_concept", "test_artist", "test_concept")
HELD_OUT = SPLITS[1:]
TRAIN_ARTISTS = {"noto", "twemoji", "fluent-emoji-flat", "noto-v1"}
VAL_ARTISTS = {"fxemoji", "streamline-emojis"}
TEST_ARTISTS = {"emojione"}
MAX_TAR_BYTES = 14_000_000  # tar pads each of two members per sample to 512 bytes
MAX_WEBP_BYTES = 6_000_000
MAX_LOCALES_BYTES = 500_000


@dataclass(frozen=True)
class Sample:
    """One sample, decoded."""

    key: str
    meta: dict[str, Any]
    image: Image.Image
    webp_bytes: int


@cache
def samples(split: str) -> list[Sample]:
    """Every sample of a split, in the order of its shards."""
    found = []
    for path in sorted(FOLDER.glob(f"{split}-*.tar")):
        members: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                members.setdefault(key, {})[extension] = tar.extractfile(member).read()
        for key, parts in members.items():
            image = Image.open(io.BytesIO(parts["webp"]))
            image.load()
            found.append(Sample(key, json.loads(parts["json"]), image, len(parts["webp"])))
    return found


def values(split: str, field: str) -> set[str]:
    """The different values of a JSON field in a split."""
    return {sample.meta[field] for sample in samples(split)}


@cache
def pixels(split: str) -> set[bytes]:
    """The decoded pictures of a split."""
    return {sample.image.tobytes() for sample in samples(split)}


def test_files_match_sha256sums():
    lines = (FOLDER / "SHA256SUMS").read_text().splitlines()
    expected = {name: digest for digest, name in (line.split("  ") for line in lines)}
    files = {path.name: path.read_bytes() for path in [*FOLDER.glob("*.tar"), LOCALES]}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in files.items()} == expected


def test_every_concept_has_a_label_in_28_locales():
    with LOCALES.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    english = {row["concept"]: row["en"] for row in rows}
    concepts = {s.meta["concept"]: s.meta["label"] for split in SPLITS for s in samples(split)}
    assert english == concepts
    assert all(len(row) == 29 and all(row.values()) for row in rows)
    assert LOCALES.stat().st_size < MAX_LOCALES_BYTES


@pytest.mark.parametrize("split", SPLITS)
def test_every_image_is_64_px_rgb(split: str):
    assert {(sample.image.size, sample.image.mode) for sample in samples(split)} == {
        ((64, 64), "RGB")
    }


@pytest.mark.parametrize("split", SPLITS)
def test_every_sample_has_two_to_five_different_captions(split: str):
    for sample in samples(split):
        captions = sample.meta["captions"]
        assert captions[0] == sample.meta["label"]
        assert 2 <= len(set(captions)) == len(captions) <= 5
        assert all(caption.strip() for caption in captions)


def test_keys_are_unique_and_name_artist_and_concept():
    every = [sample for split in SPLITS for sample in samples(split)]
    assert len({sample.key for sample in every}) == len(every)
    for sample in every:
        code = sample.meta["concept"].lower().replace("-fe0f", "")
        assert sample.key == f"{sample.meta['artist']}-{code}"


def test_each_split_has_the_promised_artists():
    artists = {split: values(split, "artist") for split in SPLITS}
    assert artists == {
        "train": TRAIN_ARTISTS,
        "val_artist": VAL_ARTISTS,
        "test_artist": TEST_ARTISTS,
        "val_concept": TRAIN_ARTISTS | VAL_ARTISTS,
        "test_concept": TRAIN_ARTISTS | VAL_ARTISTS | TEST_ARTISTS,
    }


@pytest.mark.parametrize("field", ["concept", "label"])
def test_concept_splits_are_disjoint_and_artist_splits_are_of_training_concepts(field: str):
    train, val, test = (values(split, field) for split in ("train", "val_concept", "test_concept"))
    assert not train & val
    assert not train & test
    assert not val & test
    assert values("val_artist", field) <= train
    assert values("test_artist", field) <= train


@pytest.mark.parametrize("split", HELD_OUT)
def test_no_held_out_picture_is_in_train(split: str):
    assert not pixels("train") & pixels(split)


@pytest.mark.parametrize("split", ["val_artist", "val_concept"])
def test_no_tuning_picture_is_in_a_test_split(split: str):
    assert not pixels(split) & (pixels("test_artist") | pixels("test_concept"))


def test_size_stays_small_enough_for_the_repository():
    assert sum(path.stat().st_size for path in FOLDER.glob("*.tar")) < MAX_TAR_BYTES
    assert sum(sample.webp_bytes for split in SPLITS for sample in samples(split)) < MAX_WEBP_BYTES
