import json
from pathlib import Path

import pytest

from vlm.report.galleries import mix, spread
from vlm.report.inputs import Captioned
from vlm.report.pictures import SIDE, Pictures


def pick(items, num):
    return mix(items, str, lambda item: item > 0, num)


def test_a_mix_has_as_many_right_as_wrong():
    chosen = pick([*range(1, 50), *range(-5, 0)], 8)
    assert len(chosen) == 8
    assert sum(item > 0 for item in chosen) == 4


@pytest.mark.parametrize(("right", "wrong", "expected"), [(20, 1, 7), (1, 20, 1), (20, 0, 8)])
def test_the_other_kind_fills_up(right, wrong, expected):
    chosen = pick([*range(1, right + 1), *range(-wrong, 0)], 8)
    assert len(set(chosen)) == 8
    assert sum(item > 0 for item in chosen) == expected


def test_a_mix_does_not_depend_on_the_order():
    items = [*range(1, 50), *range(-50, 0)]
    assert pick(items, 8) == pick(items[::-1], 8)
    assert len(pick([1, -1], 8)) == 2
    assert pick([], 8) == []


def test_captions_are_spread_from_best_to_worst():
    samples = [Captioned(str(n), "", [], n / 99) for n in range(100)]
    scores = [sample.token_f1 for sample in spread(samples, 12)]
    assert scores == sorted(scores, reverse=True)
    assert (scores[0], scores[-1], len(scores)) == (1, 0, 12)
    assert len(spread(samples[:3], 12)) == 3


def data(run):
    return json.loads((run / "eval" / "zero_shot-val.json").read_text())["data"]


def test_a_picture_is_small_and_described(run):
    html = Pictures().album(data(run)).show("0-red")
    assert f'alt="a red square" width="{SIDE}" height="17"' in html
    assert 'src="data:image/webp;base64,UklGR' in html


def test_data_that_is_gone_gives_frames_and_a_reason(tmp_path):
    album = Pictures().album(str(tmp_path / "gone-*.tar"))
    assert "gone-*.tar" in album.problem
    assert "not available" in album.show("0-red")


def test_a_key_that_is_not_there_is_a_frame(run):
    assert "not in the data" in Pictures().album(data(run)).show("9-red")


def test_a_key_of_two_shards_names_no_picture(run, tmp_path):
    shard = tmp_path / "more.tar"
    shard.write_bytes(Path(data(run)).read_bytes())
    html = Pictures().album([data(run), str(shard)]).show("0-red")
    assert "several have this key" in html


def test_the_budget_ends(run):
    pictures = Pictures(budget_bytes=400)
    album = pictures.album(data(run))
    shown = [album.show(f"0-{colour}") for colour in ("red", "green", "blue", "black", "white")]
    assert "the page is full" in shown[-1]
    assert pictures.left_bytes >= 0
    assert (
        sum(len(html.split("base64,")[1].split('"')[0]) for html in shown if "base64" in html)
        <= 400
    )
