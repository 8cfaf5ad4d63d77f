"""What a data set consists of: pictures, formats, captions, scripts and exact duplicates."""

import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b

import numpy as np
from jaxtyping import Int32

from vlm.config.find import counted
from vlm.data.dataset import Dataset
from vlm.data.decode import FORMATS
from vlm.runtime.files import progress

NO_LETTERS = "no letters"
_WIDTHS = ("FULLWIDTH", "HALFWIDTH")  # forms of a script, no scripts


@dataclass(frozen=True)
class Stats:
    """What was counted; pictures and lengths by sample, scripts by caption.

    Attributes:
        num_shards: In the data set.
        size_bytes: Of the tars.
        rejects: What was left out, by reason.
        image_sizes: Width and height of each picture.
        formats: Pictures of each format.
        caption_lengths: Characters of each sample's longest caption; 0 where it has none.
        num_captions: Of all samples.
        scripts: Captions with letters of each script, by its Unicode name; some count twice.
        num_repeated_images: Samples whose picture's bytes came before.
        num_repeated_captions: Captions whose text came before.
    """

    num_shards: int
    size_bytes: int
    rejects: dict[str, int]
    image_sizes: Int32[np.ndarray, "N 2"]
    formats: dict[str, int]
    caption_lengths: Int32[np.ndarray, " N"]
    num_captions: int
    scripts: dict[str, int]
    num_repeated_images: int
    num_repeated_captions: int


def measure(dataset: Dataset) -> Stats:
    """Counts what a data set consists of: pictures from the index, captions from the shards."""
    found: Counter[str] = Counter()
    hashes = []
    captions = progress(dataset.captions(), description="reading captions", total=len(dataset))
    for caption in captions:
        found.update(sorted(scripts(caption)))  # of equal counts, the same one first
        hashes.append(int.from_bytes(blake2b(caption.encode(), digest_size=8).digest(), "little"))
    images = dataset.image_hashes()
    formats = np.bincount(dataset.image_formats(), minlength=len(FORMATS))
    return Stats(
        num_shards=len(dataset.shards),
        size_bytes=sum(shard.size_bytes for shard in dataset.shards),
        rejects=dataset.rejects,
        image_sizes=dataset.image_sizes(),
        formats=_ranked({name: int(n) for name, n in zip(FORMATS, formats, strict=True) if n}),
        caption_lengths=dataset.caption_lengths(),
        num_captions=len(hashes),
        scripts=_ranked(found),
        num_repeated_images=len(images) - len(np.unique(images)),
        num_repeated_captions=len(hashes) - len(np.unique(np.array(hashes, np.uint64))),
    )


def scripts(text: str) -> set[str]:
    """The scripts of a text's letters: `LATIN`, `CJK`, `HIRAGANA`."""
    return {name for letter in text if (name := _script(letter))} or {NO_LETTERS}


@cache
def _script(letter: str) -> str | None:
    """The first word of a letter's Unicode name; None for what is no letter."""
    if not unicodedata.category(letter).startswith("L"):
        return None
    words = unicodedata.name(letter, "").split()
    return next((word for word in words if word not in _WIDTHS), None)


def _ranked(counts: dict[str, int]) -> dict[str, int]:
    return dict(Counter(counts).most_common())


def lines(stats: Stats) -> list[tuple[str, str]]:
    """What to print: a name and what is said of it."""
    size_mb = stats.size_bytes / 1e6
    samples = len(stats.caption_lengths)
    found = [
        ("samples", f"{samples:,} in {counted(stats.num_shards, 'shard')}, {size_mb:,.1f} MB"),
        ("left out", _listed(stats.rejects) or "nothing"),
        ("formats", _listed(stats.formats)),
    ]
    for side, values in zip(("width", "height"), stats.image_sizes.T, strict=True):
        found.append((side, f"{_spread(values)} pixels"))
    captionless = int((stats.caption_lengths == 0).sum())
    found.append(
        ("captions", f"{stats.num_captions:,}; {counted(captionless, 'sample')} without any")
    )
    if stats.num_captions:
        lengths = stats.caption_lengths[stats.caption_lengths > 0]
        found += [
            ("length", f"{_spread(lengths)} characters; each sample's longest"),
            ("scripts", f"captions with letters of: {_listed(stats.scripts)}"),
        ]
    return [*found, ("repeated", repeated(stats))]


def repeated(stats: Stats) -> str:
    """How many pictures and captions came before."""
    pictures = counted(stats.num_repeated_images, "picture")
    return f"{pictures} and {counted(stats.num_repeated_captions, 'caption')} equal to one before"


def _spread(values: np.ndarray) -> str:
    low, median, high = np.quantile(values, (0, 0.5, 1))
    return f"{low:,.0f} to {high:,.0f}, median {median:,.0f}" if low < high else f"{low:,.0f}"


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())
