"""Winoground's scores: equal to its own definition, at chance by chance, per pair."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset import TarWriter

from vlm.data.dataset import open_shards
from vlm.errors import DataError
from vlm.eval.source import Source, cluster_of
from vlm.eval.statistics import mean_interval
from vlm.eval.suite import evaluate, load_suite
from vlm.eval.swaps import Pairs, Swap, pairs_of, swap, swap_of, winoground
from vlm.report.inputs import read_run
from vlm.retrieval.embed import Item

COLOURS = ["red", "green", "blue", "yellow", "black", "white"]


@pytest.fixture(scope="module")
def pairs_tar(tmp_path_factory):
    """Six pairs of two-coloured pictures, one without partner, one without swap."""
    path = tmp_path_factory.mktemp("pairs") / "pairs-0000.tar"
    with TarWriter(str(path)) as writer:
        for number in range(6):
            for turn in (0, 1):
                two = [COLOURS[number], COLOURS[(number + 1) % 6]][:: -1 if turn else 1]
                texts = [f"a {a} square left of a {b} square" for a, b in (two, two[::-1])]
                meta = {
                    "captions": texts[:1],
                    "kind": "relation" if number < 4 else "colour",
                    "pair": f"p{number}",
                    "swap": {"caption": texts[0], "swapped": texts[1]},
                }
                if number == 5 and turn:
                    del meta["swap"]
                writer.write(
                    {"__key__": f"{number}-{turn}", "png": _png(*two), "json": _json(meta)}
                )
    return path


def _png(left, right):
    picture = Image.new("RGB", (40, 40), left)
    picture.paste(right, (20, 0, 40, 40))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _json(meta):
    return json.dumps(meta).encode()


@pytest.fixture(scope="module")
def source(model, pairs_tar):
    return Source(model, open_shards(str(pairs_tar)), log=lambda _: None)


def test_scores_equal_winogrounds_own_definition(model, source):
    """As in its paper: s(C0, I0) > s(C1, I0) and so on, over the matrix of each pair."""
    samples = [source.dataset.read(i) for i in range(10)]
    texts = model.embed_texts([s.meta["swap"]["caption"] for s in samples])
    images = model.embed_images([s.image for s in samples])
    text, image = [], []
    for a in range(0, 10, 2):
        s = images[a : a + 2] @ texts[a : a + 2].T  # [picture, caption]
        text.append(bool(s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0]))
        image.append(bool(s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1]))
    outcome = swap(source)
    rows = {row.metric: row for row in outcome.rows}
    both = [t and i for t, i in zip(text, image, strict=True)]
    assert rows["text_score"].value == pytest.approx(np.mean(text))
    assert rows["image_score"].value == pytest.approx(np.mean(image))
    assert rows["group_score"].value == pytest.approx(np.mean(both))
    assert rows["text_score/relation"].value == pytest.approx(np.mean(text[:4]))
    assert [rows[f"text_score{kind}"].n for kind in ("", "/relation", "/colour")] == [5, 4, 1]
    assert rows["accuracy"].n == 11  # the one without a partner too
    assert [row.metric for row in outcome.rows][:4] == [
        "text_score", "image_score", "group_score", "accuracy",
    ]  # fmt: skip
    assert [row.chance for row in outcome.rows][:4] == [1 / 4, 1 / 4, 1 / 6, 1 / 2]
    assert outcome.details["num_pairs"] == 5
    assert outcome.details["num_without_swap"] == 1


def test_random_similarities_score_chance():
    generator = torch.Generator().manual_seed(0)
    own, other = (torch.randn(40_000, generator=generator) for _ in range(2))
    pairs = Pairs(list(range(0, 40_000, 2)), list(range(1, 40_000, 2)))
    scores = {name: right.mean() for name, right in winoground(own, other, pairs).items()}
    error = 4 * (0.25 * 0.75 / 20_000) ** 0.5
    assert scores["text_score"] == pytest.approx(1 / 4, abs=error)
    assert scores["image_score"] == pytest.approx(1 / 4, abs=error)
    assert scores["group_score"] == pytest.approx(1 / 6, abs=error)


def test_scores_tell_which_comparison_failed():
    # s(I0,C0), s(I1,C1) and s(I0,C1), s(I1,C0)
    def of(own, other):
        found = winoground(torch.tensor(own), torch.tensor(other), Pairs([0], [1]))
        return [bool(right[0]) for right in found.values()]

    assert of([2.0, 2.0], [1.0, 1.0]) == [True, True, True]
    # I0 is like everything: each picture finds its caption, captions do not find pictures
    assert of([5.0, 2.0], [4.0, 1.0]) == [True, False, False]
    assert of([5.0, 2.0], [1.0, 4.0]) == [False, True, False]
    assert of([1.0, 1.0], [1.0, 1.0]) == [False, False, False]  # a tie is wrong


def test_a_pair_is_one_cluster(source):
    rows = {row.metric: row for row in swap(source).rows}
    samples = swap(source).details["samples"]
    right = [s["similarity"] > s["swapped_similarity"] for s in samples]
    names = [s["pair"] for s in samples]
    assert rows["accuracy"].ci95 == mean_interval(right, names)
    assert cluster_of(Item("a", (), {"pair": "p"}), 0) == cluster_of(
        Item("b", (), {"pair": "p"}), 1
    )


def test_a_swap_that_is_none_and_a_pair_that_is_none_are_told():
    assert swap_of(Item("a", (), {})) is None
    for bad in ("text", {"caption": "x"}, {"caption": "x", "swapped": 3}):
        with pytest.raises(DataError, match='a: "swap" must be'):
            swap_of(Item("a", (), {"swap": bad}))
    items = [Item(key, (), {"pair": 1}) for key in "abc"]
    one = Swap("x", "y")
    assert pairs_of(items[:1], [one]) == Pairs([], [])
    assert pairs_of(items[:2], [one, Swap("y", "x")]) == Pairs([0], [1])
    for swaps in ([one, one], [one, Swap("y", "x"), one]):
        with pytest.raises(DataError, match=r"pair 1 \(a, b.*must be two pictures"):
            pairs_of(items[: len(swaps)], swaps)


def test_the_suite_for_tuning_never_looks_at_a_test_split():
    for name, is_test in (("scenes", False), ("scenes_test", True)):
        tasks = load_suite(name)
        assert {task.task for task in tasks} == {"caption", "questions", "swap", "retrieval"}
        assert all(("/test_" in str(task.data)) == is_test for task in tasks)


def test_data_without_swaps_is_an_error(model, shards):
    with pytest.raises(DataError, match='no readable picture has a "swap"'):
        swap(Source(model, open_shards(str(shards)), log=lambda _: None))


def test_a_suite_runs_it_and_a_report_is_not_stopped_by_it(model, pairs_tar, tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text(f"tasks: [{{task: swap, split: val, data: {pairs_tar}}}]")
    out = tmp_path / "run" / "results.json"
    results = evaluate(model, path, out=out, log=lambda _: None)
    assert len(read_run(out.parent).results) == len(results)
    assert results[0]["metric"] == "text_score"
    assert results[0]["n"] == 5
