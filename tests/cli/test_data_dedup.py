"""`vlm data dedup`: what it prints and draws."""

import pytest
from PIL import Image

from vlm.cli.main import main
from vlm.curate import show


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Five pictures: one twice in the same bytes, one once more as a JPEG."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name, colour in (("a.png", "red"), ("b.png", "blue"), ("c.png", "red")):
        picture = Image.new("RGB", (64, 48), "white")
        picture.paste(colour, (8, 8, 40, 30))
        picture.save(tmp_path / "photos" / name)
    picture.save(tmp_path / "photos/d.jpg", quality=90)
    return "photos"


def test_it_counts_repeats_and_draws_them_side_by_side(folder, capsys, monkeypatch):
    titles = []
    draw = show._draw
    monkeypatch.setattr(
        show, "_draw", lambda cells, title: titles.append(title) or draw(cells, title)
    )
    assert main(["data", "dedup", folder, "--out", "sheet.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [
        "the same bytes: 1 of 4 samples repeat one of 1",
        "  00000.tar/000000-a = 00000.tar/000002-c",
        "sheet.png: 1 of 1 group",
    ]
    assert main(["data", "dedup", folder, "--perceptual", "--out", "sheet.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [
        "alike, at most 4 of 64 bits differ: 2 of 4 samples repeat one of 1",
        "  00000.tar/000000-a = 00000.tar/000002-c = 00000.tar/000003-d",
        "sheet.png: 1 of 1 group",
    ]
    assert titles == [
        "Exact repeats: the same bytes",
        "Perceptual repeats: alike, at most 4 of 64 bits differ",
    ]
    with Image.open("sheet.png") as sheet:
        assert sheet.width == 16 + 3 * (192 + 16)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--threshold", "3"], "--threshold does nothing without --perceptual"),
        (["--perceptual", "--threshold", "40"], "--threshold (40) must be from 0 to 10"),
    ],
)
def test_a_wrong_threshold_is_refused(folder, capsys, words, problem):
    assert main(["data", "dedup", folder, *words]) == 2
    assert capsys.readouterr().err == f"error: {problem}\n"
