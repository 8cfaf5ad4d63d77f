"""The contact sheet shows the pictures it says it shows."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageFont

from vlm.curate import show
from vlm.curate.listing import Listing, Picture
from vlm.curate.pack import pack
from vlm.curate.show import GAP, THUMBNAIL, contact_sheet, wrap, write_sheet
from vlm.data.dataset import Dataset, open_shards
from vlm.errors import ConfigError

COLOURS = ["red", "lime", "blue", "yellow", "magenta", "cyan"]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    pictures = []
    for number, colour in enumerate(COLOURS):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (32, 32), colour).save(path)
        pictures.append(Picture(path, path.name, (f"a {colour} square " * 9,)))
    pack(Listing("t", pictures), tmp_path / "out")
    return open_shards(str(tmp_path / "out/*.tar"), log=pytest.fail)


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def test_every_picture_is_in_its_cell(dataset: Dataset, tmp_path: Path) -> None:
    assert contact_sheet(dataset, tmp_path / "sheet.png", n=99) == 6
    sheet = opened(tmp_path / "sheet.png")
    middle = GAP + THUMBNAIL // 2
    row = [sheet.getpixel((middle + i * (THUMBNAIL + GAP), middle)) for i in range(3)]
    assert row == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    beneath = np.asarray(sheet)[GAP + THUMBNAIL + 2 :, GAP : GAP + THUMBNAIL]
    assert (beneath[:60] < 128).any()  # ink


def test_the_seed_chooses(dataset: Dataset, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        contact_sheet(dataset, tmp_path / name, n=2, seed=seed)
    content = [(tmp_path / name).read_bytes() for name in "abc"]
    assert content[0] == content[1] != content[2]


def test_a_bad_sample_shows_its_reason(dataset: Dataset, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "whole.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-30])
    pack(Listing("t", [Picture(tmp_path / "bad.png", "bad.png")]), tmp_path / "bad")
    bad = open_shards(str(tmp_path / "bad/*.tar"), log=pytest.fail)
    contact_sheet(bad, tmp_path / "sheet.png")
    pixels = np.asarray(opened(tmp_path / "sheet.png")).reshape(-1, 3)
    assert (pixels == (0xB0, 0x00, 0x20)).all(axis=1).any()


def test_no_line_is_wider_than_its_cell() -> None:
    path = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    font = ImageFont.truetype(path, 13)
    text = "some words \n and\tan" + "endless" * 30 + " word " + "長" * 50
    lines = wrap(text, font, 100)
    assert max(font.getlength(line) for line in lines) <= 100
    assert "".join(lines).replace(" ", "") == "".join(text.split())


def test_a_sheet_of_nothing_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"n \(0\) must be at least 1"):
        contact_sheet(dataset, tmp_path / "sheet.png", n=0)


def test_a_long_caption_ends_in_dots_on_its_last_line(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    said = "a very long caption " * 20
    pack(Listing("t", [Picture(tmp_path / "a.png", "a.png", (said,))]), tmp_path / "long")
    cell = show._cell(open_shards(str(tmp_path / "long/*.tar"), log=pytest.fail), 0)
    texts = [text for text, _ in cell.lines[1:]]
    assert len(texts) == 8
    assert texts[-1].startswith("   ")
    assert texts[-1].endswith("…")
    assert max(cell.font.getlength(text) for text in texts) <= THUMBNAIL


def test_letters_that_the_font_lacks_come_from_one_of_the_system(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fonts = Path(matplotlib.get_data_path()) / "fonts/ttf"
    found = [str(fonts / name) for name in ("none.ttf", "cmr10.ttf", "STIXGeneral.ttf")]
    monkeypatch.setattr(show.font_manager, "findSystemFonts", lambda: found)
    assert show._font("red の").getname()[0] == "STIXGeneral"
    assert show._font("a red кот").getname()[0] == "DejaVu Sans"
    assert show._font("長").getname()[0] == "DejaVu Sans"  # nobody has it


def test_a_title_stands_above_the_pictures(dataset: Dataset, tmp_path: Path) -> None:
    for name, title in (("a.png", ""), ("b.png", "Exact repeats")):
        write_sheet(dataset, tmp_path / name, [[0, 1]], title=title)
    plain, titled = (np.asarray(opened(tmp_path / name)) for name in ("a.png", "b.png"))
    height = len(titled) - len(plain)
    assert height > 0
    assert (titled[: GAP + height] < 128).any()  # ink
    assert (titled[GAP + height :] == plain[GAP:]).all()
