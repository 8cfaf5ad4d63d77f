"""The probe and knn tasks on a tiny model's features."""

import io
import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from webdataset import TarWriter

from vlm.data.dataset import open_shards
from vlm.errors import DataError
from vlm.eval.probes import Named, knn, probe, split
from vlm.eval.source import Source
from vlm.eval.suite import evaluate, load_suite
from vlm.heads import linear_probe

COLOURS = ["red", "green", "blue", "yellow", "black", "white"]


def write(path, num_each, *, seed, labels=None):
    """Squares of six colours in noise."""
    generator = torch.Generator().manual_seed(seed)
    with TarWriter(str(path)) as writer:
        for number in range(num_each):
            for colour in COLOURS:
                square = torch.tensor(Image.new("RGB", (1, 1), colour).getpixel((0, 0)))
                noise = torch.randn(16, 16, 3, generator=generator) * 90
                pixels = (square + noise).clamp(0, 255).byte().numpy()
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                meta = {"label": (labels or {}).get(colour, colour)}
                fields = {"png": buffer.getvalue(), "json": json.dumps(meta).encode()}
                writer.write({"__key__": f"{number}-{colour}-{seed}", **fields})
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probes")
    sizes = {"train": 20, "val": 8, "test": 25}
    return {
        name: write(folder / f"{name}.tar", size, seed=seed)
        for seed, (name, size) in enumerate(sizes.items())
    }


@pytest.fixture(scope="module")
def sources(model, data):
    opened = {}
    first = Source(model, open_shards(data["test"]), log=lambda _: None, opened=opened)
    return {"test": first, **{name: first.beside(data[name]) for name in ("train", "val")}}


def test_a_probe_of_emoji_is_scikit_learns_at_a_lambda_as_good_as_its_best(sources, monkeypatch):
    """Five groups of emoji; a random model's features tell them apart a little."""
    names = {"train": "train-0000", "val": "train-0001", "test": "val_artist-0000"}
    emoji = {k: sources["test"].beside(f"datasets/emoji/{v}.tar") for k, v in names.items()}
    monkeypatch.setattr(linear_probe, "_FIRST", range(32, 65, 16))  # 0.01, 1, 100: the quick ones
    outcome = probe(emoji["test"], emoji["train"], val=emoji["val"], label="group")
    embedded = [emoji[name].embedded for name in names]
    x_train, x_val, x_test = (part.features.double().numpy() for part in embedded)
    y_train, y_val, y_test = ([item.meta["group"] for item in part.items] for part in embedded)
    l2 = outcome.details["l2"]
    with threadpool_limits(1):
        grid = [LogisticRegression(C=10.0**e, max_iter=1000) for e in range(-2, 3)]
        best_val = max(model.fit(x_train, y_train).score(x_val, y_val) for model in grid)
        same = LogisticRegression(C=1 / l2, max_iter=5000, tol=1e-6)
        same.fit(np.concatenate([x_train, x_val]), y_train + y_val)
    tried = {fit["l2"]: fit["val_acc1"] for fit in outcome.details["tried"]}
    assert tried[l2] >= best_val - 0.005
    acc1 = outcome.rows[0]
    assert acc1.value == pytest.approx(same.score(x_test, y_test), abs=0.005)
    assert [row.metric for row in outcome.rows] == ["acc1", "mean_per_class_recall"]
    assert acc1.n == 560
    assert acc1.ci95[0] <= acc1.value <= acc1.ci95[1]
    most = Counter(y_train + y_val).most_common(1)[0][0]
    assert acc1.chance == pytest.approx(y_test.count(most) / 560)
    assert acc1.value > acc1.chance + 0.02
    assert outcome.rows[1].chance == pytest.approx(1 / 5)


def test_validation_pictures_are_a_fifth_of_the_training_ones_or_given(sources):
    by_hash = probe(sources["test"], sources["train"]).details
    given = probe(sources["test"], sources["train"], val=sources["val"]).details
    assert (by_hash["num_train"], by_hash["num_val"]) == (96, 24)
    assert (given["num_train"], given["num_val"]) == (120, 48)
    assert given["samples"][0]["key"] == "0-red-2"
    hits = [sample["truth"] == sample["predicted"] for sample in given["samples"]]
    assert sum(hits) / 150 == pytest.approx(
        probe(sources["test"], sources["train"], val=sources["val"]).rows[0].value
    )


def test_knn_votes_as_the_head_does(sources):
    outcome = knn(sources["test"], sources["train"], k=5)
    train, test = sources["train"].embedded, sources["test"].embedded
    scores, nearest = (test.features @ train.features.T).topk(5)
    hits = 0
    for item, row, numbers in zip(test.items, scores, nearest, strict=True):
        votes = dict.fromkeys(COLOURS, 0.0)
        for score, number in zip(row.tolist(), numbers.tolist(), strict=True):
            votes[train.items[number].meta["label"]] += 2.718281828459045 ** ((score - 1) / 0.07)
        hits += max(votes, key=votes.get) == item.meta["label"]
    assert outcome.rows[0].value == pytest.approx(hits / 150)
    assert outcome.rows[0].value > 0.4
    assert outcome.details["num_train"] == 120


@pytest.mark.parametrize("task", [probe, knn])
def test_a_class_that_was_not_trained_is_a_miss(model, sources, tmp_path, task):
    path = write(tmp_path / "odd.tar", 4, seed=7, labels={"red": "crimson"})
    odd = sources["test"].beside(path)
    outcome = task(odd, sources["train"])
    assert outcome.details["unseen_classes"] == ["crimson"]
    assert outcome.rows[0].n == 24
    samples = outcome.details["samples"]
    right = [sample["truth"] for sample in samples if sample["truth"] == sample["predicted"]]
    assert outcome.rows[0].value == pytest.approx(len(right) / 24)
    assert "crimson" not in right


@pytest.mark.parametrize("task", [probe, knn])
def test_classes_may_be_numbers(model, tmp_path, task):
    numbers = {colour: number for number, colour in enumerate(COLOURS)}
    paths = [write(tmp_path / f"{seed}.tar", 5, seed=seed, labels=numbers) for seed in range(2)]
    test, train = (Source(model, open_shards(path), log=lambda _: None) for path in paths)
    assert {sample["truth"] for sample in task(test, train).details["samples"]} == set("012345")


def test_validation_pictures_are_drawn_from_each_class_by_a_hash():
    truth = ["a"] * 10 + ["b"] * 4 + ["c"]
    keys = [f"{name}{number}" for number, name in enumerate(truth)]
    whole = Named(keys, truth, torch.arange(15.0)[:, None], list(range(15)))
    fitted, chosen = split(whole)
    assert Counter(fitted.truth) == {"a": 8, "b": 3, "c": 1}
    assert Counter(chosen.truth) == {"a": 2, "b": 1}
    assert sorted(fitted.keys + chosen.keys) == sorted(keys)
    assert [keys[int(x)] for x in chosen.features.flatten()] == chosen.keys
    turned = Named(keys[::-1], truth[::-1], whole.features.flip(0), whole.clusters[::-1])
    assert set(split(turned)[1].keys) == set(chosen.keys)


def test_too_few_pictures_to_choose_lambda_by_is_an_error(sources, encoded, tmp_path):
    with TarWriter(str(tmp_path / "one.tar")) as writer:
        writer.write({"__key__": "a", "png": encoded("red"), "json": b'{"label": "red"}'})
    with pytest.raises(DataError, match="no class has two of the 1 labelled training"):
        probe(sources["test"], sources["test"].beside(str(tmp_path / "one.tar")))


def test_what_was_fitted_to_and_how_is_part_of_the_protocol(sources):
    test, train, val = (sources[name] for name in ("test", "train", "val"))
    protocols = [
        probe(test, train).protocol,
        probe(test, train, val=val).protocol,
        probe(test, val).protocol,
        knn(test, train).protocol,
        knn(test, val).protocol,
        knn(test, train, k=3).protocol,
        knn(test, train, temperature=0.1).protocol,
    ]
    assert len(set(protocols)) == 7
    assert knn(test, train).protocol == protocols[3]


def test_a_suite_embeds_training_data_once_for_all_tasks(model, data, tmp_path, monkeypatch):
    path = tmp_path / "suite.yaml"
    lines = [
        f"- {{task: {task}, split: test, data: {data['test']}, train_data: {data['train']}}}"
        for task in ("probe", "knn")
    ]
    path.write_text("\n".join(["tasks:", *lines]))
    pictures = []
    encode = model.encode_pixels
    monkeypatch.setattr(model, "encode_pixels", lambda x: pictures.append(len(x)) or encode(x))
    results = evaluate(model, path, out=tmp_path / "results.json", log=lambda _: None)
    assert [(r["task"], r["metric"]) for r in results] == [
        ("probe", "acc1"),
        ("probe", "mean_per_class_recall"),
        ("knn", "acc1"),
        ("knn", "mean_per_class_recall"),
    ]
    assert sum(pictures) == 150 + 120
    assert json.loads((tmp_path / "eval/probe-test.json").read_text())["l2"] > 0


def test_the_shipped_suite_trains_on_the_training_split():
    tasks = load_suite("configs/suites/emoji_probes.yaml")
    assert [task.task for task in tasks] == ["probe", "knn"]
    assert {task.train_data for task in tasks} == {"datasets/emoji/train-*.tar"}
