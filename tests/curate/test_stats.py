"""What a data set consists of, counted by hand."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm.cli.main import main
from vlm.curate.source import open_data
from vlm.curate.stats import NO_LETTERS, Stats, lines, measure, scripts
from vlm.curate.stats_plot import _counted, plot


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures, two of them equal; four captions, two of them equal."""
    said = {"a": ["a cat", "кот"], "b": ["a cat"], "c": ["猫 on a mat"], "d": []}
    (tmp_path / "in").mkdir()
    for name, captions in said.items():
        width = 30 if name == "a" else 20
        suffix = "jpg" if name == "d" else "png"
        Image.new("RGB", (width, 10), "red").save(tmp_path / f"in/{name}.{suffix}")
        (tmp_path / f"in/{name}.json").write_text(json.dumps({"captions": captions}))
    return tmp_path / "in"


def test_pictures_captions_scripts_and_duplicates_are_counted(folder: Path) -> None:
    stats = measure(open_data(str(folder), log=lambda line: None))
    assert sorted(stats.image_sizes.tolist()) == [[20, 10], [20, 10], [20, 10], [30, 10]]
    assert stats.formats == {"PNG": 3, "JPEG": 1}
    assert sorted(stats.caption_lengths.tolist()) == [0, 5, 5, 10]
    assert stats.num_captions == 4
    assert stats.scripts == {"LATIN": 3, "CYRILLIC": 1, "CJK": 1}
    assert (stats.num_repeated_images, stats.num_repeated_captions) == (1, 1)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a red bird", {"LATIN"}),
        ("красная птица!", {"CYRILLIC"}),
        ("طائر أحمر", {"ARABIC"}),
        ("红色的鸟 red птица", {"CJK", "LATIN", "CYRILLIC"}),
        ("とり", {"HIRAGANA"}),
        ("\uff46\uff55\uff4c\uff4c", {"LATIN"}),
        ("빨간 새", {"HANGUL"}),
        ("😀 123 !", {NO_LETTERS}),
        ("", {NO_LETTERS}),
    ],
)
def test_each_script_of_a_caption_is_found(text: str, names: set[str]) -> None:
    assert scripts(text) == names


def some_stats(sizes: list[list[int]], lengths: list[int], scripts: dict[str, int]) -> Stats:
    return Stats(
        num_shards=1,
        size_bytes=5,
        rejects={},
        image_sizes=np.array(sizes, np.int32).reshape(-1, 2),
        formats={"PNG": len(sizes)} if sizes else {},
        caption_lengths=np.array(lengths, np.int32),
        num_captions=sum(scripts.values()),
        scripts=scripts,
        num_repeated_images=0,
        num_repeated_captions=0,
    )


@pytest.mark.parametrize(
    "stats",
    [
        some_stats([[8, 8]], [0], {}),
        some_stats([[8, 8]], [1], {"LATIN": 1}),
        some_stats(
            [[i + 1, 2 * i + 3] for i in range(50)],
            [*range(49), 100_000],
            {f"S{i}": 2 for i in range(20)},
        ),
    ],
)
def test_any_set_is_told_and_drawn(stats: Stats, tmp_path: Path) -> None:
    plot(stats, tmp_path / "stats.png", title="$a_{$")
    with Image.open(tmp_path / "stats.png") as image:
        assert image.size == (1500, 990)
    assert dict(lines(stats))["samples"].startswith(f"{len(stats.caption_lengths)} in 1 shard")


def test_the_verb_prints_and_draws(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "stats", str(folder), "--out", str(tmp_path / "stats.png")]) == 0
    said = capsys.readouterr().out
    assert "width     20 to 30, median 20 pixels\n" in said
    assert "captions  4; 1 sample without any\n" in said
    assert "scripts   captions with letters of: 3 LATIN, 1 CYRILLIC, 1 CJK\n" in said
    assert "repeated  1 picture and 1 caption equal to one before\n" in said
    assert (tmp_path / "stats.png").read_bytes().startswith(b"\x89PNG")


def test_bars_are_of_formats_and_scripts_alone() -> None:
    stats = some_stats([[8, 8]], [1], {f"S{i}": 20 - i for i in range(10)})
    _, formats, captions = _counted(stats, Counter({(8, 8): 1}))
    assert (formats.title, formats.counts) == ("Formats of pictures", {"PNG": 1})
    assert captions.title == "Captions with letters of"
    assert list(captions.counts.items())[-2:] == [("S6", 14), ("others", 13 + 12 + 11)]
