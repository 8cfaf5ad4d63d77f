"""Contact sheets: samples side by side, each picture with its key and captions beneath."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from vlm.data.dataset import Dataset
from vlm.data.decode import decode_image
from vlm.data.samples import BadSample
from vlm.errors import ConfigError
from vlm.runtime.files import write_atomic

THUMBNAIL = 192  # pixels a side
GAP = 16
FONT_SIZE, LINE_HEIGHT = 13, 17
MAX_LINES = 8  # of text beneath a picture
MAX_COLUMNS = 8
_DEJAVU = str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"))
PAPER, FRAME, INK, FAINT, ALARM = "#ffffff", "#f1f1f1", "#1b1b1b", "#6b6b6b", "#b00020"


@dataclass(frozen=True)
class _Cell:
    picture: Image.Image | None
    lines: list[tuple[str, str]]  # text and colour
    font: ImageFont.FreeTypeFont


def contact_sheet(dataset: Dataset, path: Path, *, n: int = 32, seed: int = 0) -> int:
    """Draws `n` samples, chosen by the seed, in the data set's order, as a PNG; returns how many.

    A sample that is bad shows its reason in red where its picture would be. Pictures smaller than a
    cell are enlarged by whole factors, so that their pixels stay square.

    Raises:
        ConfigError: `n` is below 1.
        DiskError: The PNG cannot be written.
    """
    if n < 1:
        raise ConfigError(f"n ({n}) must be at least 1")
    n = min(n, len(dataset))
    chosen = np.random.default_rng(seed).choice(len(dataset), n, replace=False)
    columns = min(MAX_COLUMNS, math.ceil(math.sqrt(n * 1.5)))
    ids = sorted(chosen.tolist())
    write_sheet(dataset, path, [ids[at : at + columns] for at in range(0, n, columns)])
    return n


def write_sheet(
    dataset: Dataset, path: Path, rows: Sequence[Sequence[int]], *, title: str = ""
) -> None:
    """Draws rows of samples as a PNG, of each row the first `MAX_COLUMNS`.

    Raises:
        DiskError: The PNG cannot be written.
    """
    cells = [[_cell(dataset, sample_id) for sample_id in row[:MAX_COLUMNS]] for row in rows]
    buffer = BytesIO()
    _draw(cells, title).save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


def _font(text: str) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, or the system's font that has more of the text's letters."""
    letters, default = {ord(letter) for letter in text if letter.isprintable()}, _DEJAVU
    if not letters - _letters(default):
        return ImageFont.truetype(default, FONT_SIZE)
    paths = [path for path in font_manager.findSystemFonts() if "LastResort" not in path]
    found = sorted(paths, key=lambda path: ("Regular" not in path, path))
    best = max([default, *found], key=lambda path: len(letters & _letters(path)))
    return ImageFont.truetype(best, FONT_SIZE)


@cache
def _letters(path: str) -> frozenset[int]:
    """What a font has; nothing where it cannot be read."""
    try:
        ImageFont.truetype(path, FONT_SIZE)  # some have pictures of one size
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


def _cell(dataset: Dataset, sample_id: int) -> _Cell:
    name = dataset.key(sample_id)
    font = _font(name)
    key = [(_elided(name, font), FAINT)]
    try:
        sample = dataset.read(sample_id)
        picture = _fitted(decode_image(sample.image, min_size=THUMBNAIL))
    except BadSample as bad:
        return _Cell(None, key + [(s, ALARM) for s in wrap(str(bad), font, THUMBNAIL)], font)
    marked = [f"• {text}" for text in sample.captions]
    if not marked:
        labels = [field for field in ("label", "cls") if field in sample.meta]
        marked = [f"{field}: {sample.meta[field]}" for field in labels] or ["no caption"]
    font = _font(f"{name}{''.join(marked)}")
    lines = []
    for text in marked:
        first, *rest = wrap(text, font, THUMBNAIL - FONT_SIZE)
        lines += [first, *(f"   {line}" for line in rest)]
    if len(lines) > MAX_LINES:
        last = lines[MAX_LINES - 1]
        last = last[: _fitting(last, font, THUMBNAIL - FONT_SIZE)]
        lines = [*lines[: MAX_LINES - 1], f"{last}…"]
    return _Cell(picture, key + [(line, INK) for line in lines], font)


def _fitted(picture: Image.Image) -> Image.Image:
    if max(picture.size) * 2 <= THUMBNAIL:
        factor = THUMBNAIL // max(picture.size)
        size = (picture.width * factor, picture.height * factor)
        return picture.resize(size, Image.Resampling.NEAREST)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return picture


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Returns the text in lines of at most `width` pixels, broken at blanks, else anywhere."""
    lines, line = [], ""
    for word in "".join(letter if letter.isprintable() else " " for letter in text).split():
        if line and font.getlength(f"{line} {word}") <= width:
            line = f"{line} {word}"
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width and len(word) > 1:
            fits = max(1, _fitting(word, font, width))
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    return [*lines, line] if line else lines


def _fitting(word: str, font: ImageFont.FreeTypeFont, width: int) -> int:
    """How many of the word's letters fit."""
    word = word[:width]  # no letter that shows is narrower than a pixel
    return next(n for n in range(len(word), -1, -1) if font.getlength(word[:n]) <= width)


def _elided(text: str, font: ImageFont.FreeTypeFont) -> str:
    lines = wrap(text, font, THUMBNAIL - FONT_SIZE)
    return lines[0] + ("…" if len(lines) > 1 else "") if lines else ""


def _draw(rows: list[list[_Cell]], title: str) -> Image.Image:
    columns = max(map(len, rows))
    heights = [THUMBNAIL + LINE_HEIGHT * max(len(cell.lines) for cell in row) + GAP for row in rows]
    head = GAP + (LINE_HEIGHT + GAP // 2 if title else 0)
    sheet = Image.new("RGB", (GAP + columns * (THUMBNAIL + GAP), head + sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP // 2), title, font=_font(title), fill=INK)
    for number, row in enumerate(rows):
        top = head + sum(heights[:number])
        for column, cell in enumerate(row):
            left = GAP + column * (THUMBNAIL + GAP)
            draw.rectangle((left, top, left + THUMBNAIL - 1, top + THUMBNAIL - 1), fill=FRAME)
            if cell.picture is not None:
                inset = [(THUMBNAIL - side) // 2 for side in cell.picture.size]
                sheet.paste(cell.picture, (left + inset[0], top + inset[1]))
            for line, (text, colour) in enumerate(cell.lines):
                y = top + THUMBNAIL + 4 + line * LINE_HEIGHT
                draw.text((left, y), text, font=cell.font, fill=colour)
    return sheet
