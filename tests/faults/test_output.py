"""Hostile captions, keys and names in what is printed, logged and written: shown, never obeyed."""

import csv
import io
import json
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser

import pytest
from PIL import Image
from webdataset import TarWriter

from vlm.cli.main import main
from vlm.report.html import element
from vlm.retrieval.index import Hit
from vlm.retrieval.page import search_page
from vlm.retrieval.tables import new_csv

HOSTILE = [
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "</title></ol><iframe src=//evil>",
    "javascript:alert(1)",
    '=HYPERLINK("http://evil","x")',
    "+1+cmd|' /C calc'!A0",
    "-2+3+cmd|' /C calc'!A0",
    "@SUM(1+1)*cmd|' /C calc'!A0",
    "\t=1+1",
    "\x1b]0;owned\x07\x1b[2J\x1b[31mred",
    "\x9b2J\x9b31mred",
    "\u202egnp.txt\u2066 [bold]rich[/bold] \r\nerror: forged line",
]
each = pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))


class Page(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, markup):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data):
        self.text += data


def controls(text):
    """Characters that a terminal obeys, or that turn a line around; line feeds apart."""
    return [c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf")]


@each
def test_a_page_of_hits_shows_it_as_text(text):
    hit = Hit(key=text, score=0.5, caption=text, meta={text: text}, thumbnail=b"x")
    page, plain = (
        Page(search_page(query, [one], where=query))
        for query, one in (
            (text, hit),
            ("x", Hit(key="x", score=0.5, caption="x", meta={}, thumbnail=b"x")),
        )
    )
    assert page.tags == plain.tags
    assert page.attributes == plain.attributes
    assert page.text.count(text.replace("\r\n", "\n")) >= 2 or page.text.count(text) >= 2


@each
def test_the_report_shows_it_as_text(text):
    page = Page(element("p", text, title=text, href=None))
    assert (page.tags, page.attributes) == (["p"], ["title"])
    assert controls(page.text) == [c for c in controls(page.text) if c in "\t"]


@each
def test_a_csv_has_no_formula_and_reads_back(text, tmp_path):
    with new_csv(tmp_path / "x.csv", ["key", "caption"]) as write:
        write([text, text])
    with (tmp_path / "x.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 2
    for cell in rows[1]:
        assert cell[0] not in "=+-@\t\r\n"
        assert cell.removeprefix("'") == text


@each
def test_an_error_is_one_line_without_controls(text, capsys):
    assert main(["data", "index", f"nowhere/{text}.tar"]) in (2, 3)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert controls(err) == []


def picture():
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def hostile_shard(tmp_path_factory):
    """Every hostile text as a caption, a key and a meta; and twice, so that it is rejected."""
    path = tmp_path_factory.mktemp("hostile") / "train-0000.tar"
    with TarWriter(str(path)) as tar:
        for text in HOSTILE:
            key = text.replace("/", "_").replace(".", "_")
            meta = {"caption": text, text: text}
            tar.write({"__key__": key, "png": picture(), "json": json.dumps(meta).encode()})
        for text in HOSTILE:
            key = text.replace("/", "_").replace(".", "_")
            tar.write({"__key__": key, "txt": b"again"})
        tar.write({"__key__": "good", "png": picture(), "json": b'{"caption": "good"}'})
    return path


@pytest.mark.parametrize("verb", ["index", "show"])
def test_what_a_verb_prints_of_hostile_shards_has_no_controls(hostile_shard, tmp_path, verb):
    words = ["data", verb, str(hostile_shard)]
    words += ["--out", str(tmp_path / "sheet.png")] if verb == "show" else []
    done = subprocess.run(
        [sys.executable, "-m", "vlm", *words], capture_output=True, timeout=120, check=True
    )
    assert controls((done.stdout + done.stderr).decode()) == []
    assert b"member.name" in done.stdout  # told, and counted


def test_a_shard_whose_own_name_is_hostile_is_printed_escaped(tmp_path, capsys):
    path = tmp_path / "\x1b[2J\u202e.tar"
    with TarWriter(str(path)) as tar:
        tar.write({"__key__": "a", "png": picture(), "txt": b"a"})
        tar.write({"__key__": "b", "txt": b"without a picture"})
    assert main(["data", "index", str(path)]) == 0
    out = capsys.readouterr().out
    assert "1 sample.no_image" in out
    assert controls(out) == []
