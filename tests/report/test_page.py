import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from vlm.cli import report as cli
from vlm.errors import ConfigError, DiskError
from vlm.metrics.units import unit_of
from vlm.report.inputs import (
    Captioned,
    Captions,
    Classified,
    Confusion,
    Hit,
    Query,
    Retrieval,
    ZeroShot,
    read_run,
)
from vlm.report.page import render, write_report
from vlm.report.sections import verdict

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&\u202eevil\u2066\x00\x1b"
LINK = "javascript:alert(1)"


@pytest.fixture(scope="session")
def html(run):
    return str(render(read_run(run)))


@pytest.fixture(scope="session")
def page(html, parse):
    return parse(html)


def test_a_full_run_has_every_section(page):
    assert page.headings == [
        "results", "curves", "zero-shot", "retrieval", "captions", "confusions", "bad-samples",
        "configuration",
    ]  # fmt: skip
    assert [a["href"] for a in page.all("a")] == [f"#{name}" for name in page.headings]
    assert page.of_class("absent") == []


def test_nothing_comes_from_outside_and_nothing_runs(html, page):
    assert not re.search(r"https?:", html)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "form", "base"}
    assert all(a["src"].startswith("data:image/webp;base64,") for a in page.all("img"))
    policy = next(a for a in page.all("meta") if "http-equiv" in a)
    assert policy["content"].startswith("default-src 'none'")
    assert "url(" not in html
    assert len(html) < 3_000_000


def test_the_verdict_names_primary_metrics_and_chance(run, page):
    rows = json.loads((run / "results.json").read_text())
    acc1 = rows[0]
    says = f"It names {100 * acc1['value']:.1f}% of the pictures of val right at the first try "
    assert says + "(chance 16.7%" in page.text
    assert "finds a right picture among the first ten for" in page.text
    assert "with a token F1 of" in page.text


def test_a_score_that_chance_explains_is_called_so(run):
    inputs = read_run(run)
    row = replace(inputs.results[0], value=0.2, ci95=(0.1, 0.3), chance=0.15)
    better = replace(row, ci95=(0.16, 0.3))
    rank = replace(row, metric="median_rank", value=5.0, ci95=(4.0, 6.0), chance=9.0)
    assert "(chance 15.0%: no better than that)" in verdict(replace(inputs, results=[row]))
    assert "(chance 15.0%)." in verdict(replace(inputs, results=[better]))
    assert "5.0 median rank on val (chance 9.0)." in verdict(replace(inputs, results=[rank]))


def test_the_facts(page):
    assert "vlm train 'a b.yaml'" in page.text
    assert "Steps3 (1 skipped)" in page.text
    assert "Samples seen24 (1 bad)" in page.text
    assert "image.truncated1squares-0000.tar: 0-<red> at byte 1,536" in page.text
    assert "vlm 0.1.0, torch 2.x" in page.text
    assert "global_batch_size: 8" in page.text


def test_every_result_is_a_row_and_the_primary_one_stands_out(run, page):
    rows = json.loads((run / "results.json").read_text())
    assert (
        len([a for a in page.all("th") if a.get("scope") == "row"]) == len(rows) + 1
    )  # a bad sample
    assert len(page.of_class("primary")) == 6
    shares = sum(unit_of(row["metric"]) == "share" for row in rows)
    assert len(page.of_class("bar")) == shares


def test_caption_metrics_stand_under_their_names_beside_what_people_reach(page):
    for name in ("BLEU-4", "ROUGE-L", "CIDEr-D", "CLIPScore", "distinct-1", "length in words"):
        assert name in page.text
    share = r"[\d.]+%"
    people = rf"own captions: distinct-1 {share}, distinct-2 {share} and length in words 3\.0"
    assert re.search(people, page.text)
    assert re.search(r"token F1 [\d.]+%, CIDEr-D \d\.\d{3}", page.text)


def test_every_picture_and_drawing_is_described(page):
    assert page.all("img")
    assert all(a["alt"] for a in page.all("img"))
    assert all(a["aria-label"] for a in page.all("svg"))
    assert all(a.get("scope") for a in page.all("th"))


def test_the_galleries_mark_what_is_right(run, page):
    details = json.loads((run / "eval" / "retrieval-val.json").read_text())
    assert any(hit["right"] for query in details["text_to_image"] for hit in query["hits"])
    assert page.of_class("positive")
    assert page.of_class("pair")
    assert len(page.of_class("matrix")) == 2
    assert page.of_class("generated")


def test_a_curve_for_every_quantity(page):
    labels = " ".join(a["aria-label"] for a in page.of_class("chart"))
    for title in (
        "Loss in", "Loss: contrastive", "Loss: caption", "Learning rate", "Temperature",
        "Gradient norm", "Throughput", "Waiting for data", "Padding",
    ):  # fmt: skip
        assert title in labels
    assert "ln 8: guessing" in page.text


def test_a_run_without_results_says_how_to_get_them(run, tmp_path, parse):
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(run / name, tmp_path)
    page = parse(render(read_run(tmp_path)))
    assert page.headings == ["curves", "configuration"]
    assert f"vlm eval {tmp_path} SUITE --out {tmp_path / 'results.json'}" in page.text
    assert len(page.of_class("absent")) == 6
    assert "Trained to a loss of 2.000 at step 3; not measured." in page.text


def test_a_run_without_a_log_has_results(run, tmp_path, parse):
    shutil.copy(run / "results.json", tmp_path)
    page = parse(render(read_run(tmp_path)))
    assert page.headings == ["results"]
    assert "Curves: nothing logged yet" in page.text
    assert "Zero-shot: not measured" in page.text


def test_data_that_is_gone_leaves_the_words(run, tmp_path, parse):
    folder = shutil.copytree(run, tmp_path / "run")
    for path in (folder / "eval").glob("*.json"):
        path.write_text(path.read_text().replace("squares-0000.tar", "gone-0000.tar"))
    page = parse(render(read_run(folder)))
    assert {image["class"] for image in page.all("img")} == {"matrix"}
    assert "Without pictures: " in page.text
    assert len(page.headings) == 8


def hostile(inputs):
    """The inputs of a run of which every text is an attack."""
    query = Query(HOSTILE, 3, [HOSTILE], [Hit(HOSTILE, 0.5, False), Hit(LINK, 0.4, True)])
    common = {"split": HOSTILE, "protocol": HOSTILE, "data": HOSTILE, "fingerprint": HOSTILE}
    top = [(HOSTILE, 0.6), (LINK, 0.4)]
    confusion = Confusion(LINK, HOSTILE, 2)
    picture = Classified(HOSTILE, LINK, top)
    captioned = Captioned(HOSTILE, HOSTILE, [HOSTILE, LINK], 0.5)
    details = [
        ZeroShot(**common, task="zero_shot", samples=[picture], confusions=[confusion]),
        Retrieval(**common, task="retrieval", text_to_image=[query], image_to_text=[query]),
        Captions(**common, task="caption", samples=[captioned], best_constant=HOSTILE),
    ]
    result = replace(
        inputs.results[0], task=HOSTILE, split=HOSTILE, metric=HOSTILE, protocol=HOSTILE
    )
    return replace(
        inputs,
        command={"command": [HOSTILE], "vlm": HOSTILE, HOSTILE: HOSTILE, "machine": LINK},
        config=HOSTILE,
        metrics=[{"step": 1, f"loss/{HOSTILE}": 1.0, "loss": 2.0, "loss/b": 1.0}],
        results=[result],
        details=details,
    )


def test_no_text_of_the_data_becomes_markup(run, parse):
    html = str(render(hostile(read_run(run))))
    page = parse(html)
    assert "alert(1)" in page.text
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "img", "iframe"})
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert "javascript:" not in attributes.get("href", "")
        assert "alert" not in attributes.get("style", "")
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00\x1b]", html)


def test_hostile_captions_from_the_shards_are_alt_texts(tmp_path, run, parse, squares):
    from vlm.report.pictures import Pictures

    shards = squares(tmp_path / "bad.tar", lambda colour: [HOSTILE + colour])
    (img,) = parse(str(Pictures().album(str(shards)).show("0-red"))).all("img")
    assert set(img) == {"class", "title", "src", "alt", "width", "height"}
    assert img["alt"].startswith("<script>alert(1)</script>\"'>")
    assert "\u202e" not in img["alt"]


def test_the_report_is_written_into_the_run_and_may_be_written_again(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    path = write_report(folder)
    assert path == folder / "report.html"
    first = path.read_bytes()
    assert write_report(folder).read_bytes() == first
    assert [p.name for p in folder.iterdir() if ".tmp-" in p.name] == []


def test_a_file_that_is_no_report_is_not_overwritten(run, tmp_path):
    out = tmp_path / "mine.html"
    out.write_text("<p>mine")
    with pytest.raises(ConfigError, match=r"mine\.html: exists and is no report"):
        write_report(run, out)
    assert out.read_text() == "<p>mine"
    with pytest.raises(DiskError, match="cannot write"):
        write_report(run, tmp_path)
    with pytest.raises(DiskError, match="cannot write"):
        write_report(run, out / "below-a-file.html")


def test_the_command_line(run, tmp_path, capsys):
    import argparse

    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    out = tmp_path / "out.html"
    assert cli.run(parser.parse_args([str(run), "--out", str(out)])) == 0
    assert capsys.readouterr().out == f"{out}: 0.1 MB\n"
    with pytest.raises(ConfigError, match="no such run folder"):
        cli.run(parser.parse_args([str(tmp_path / "nowhere")]))


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1])
@pytest.mark.parametrize(
    ("ink", "paper", "least"),
    [
        *[(ink, "paper", 4.5) for ink in ("ink", "faint", "accent", "right", "wrong")],
        *[(ink, "panel", 4.5) for ink in ("ink", "faint")],
        *[(ink, "range", 4.5) for ink in ("ink", "right")],
        *[("chance", paper, 3.0) for paper in ("paper", "panel", "rule")],  # WCAG 1.4.11
    ],
)
def test_contrast_is_aa_in_light_and_dark(html, scheme, ink, paper, least):
    colours = dict(re.findall(r"--(\w+): (#\w{6});", html.split(":root {")[1 + scheme]))
    light, dark = sorted((luminance(colours[ink]), luminance(colours[paper])), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= least


@pytest.mark.system("chromium")
def test_a_browser_shows_it_without_complaint(run, tmp_path):
    path = write_report(run, tmp_path / "report.html")
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
        "--disable-background-networking --disable-component-update --enable-logging=stderr "
        f"--user-data-dir={tmp_path}/profile --window-size=390,800 --dump-dom"
    )
    command = ["chromium", *options.split(), path.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert 'id="confusions"' in shown.stdout
    assert "CONSOLE" not in shown.stderr
