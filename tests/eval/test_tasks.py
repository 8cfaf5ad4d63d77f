import math

import pytest
import torch

from vlm.data.dataset import open_shards
from vlm.errors import ConfigError, DataError
from vlm.eval import classification, retrieval
from vlm.eval.captions import caption
from vlm.eval.source import Source
from vlm.heads.zero_shot import zero_shot_weights
from vlm.metrics import ranking
from vlm.metrics.words import token_f1
from vlm.retrieval.embed import Item


@pytest.fixture(scope="session")
def source(model, shards):
    return Source(model, open_shards(str(shards)), log=lambda _: None)


def test_zero_shot_equals_a_loop_over_the_protocol(model, source):
    outcome = classification.zero_shot(source, templates=["a {}", "{} square"])
    items = [source.dataset.read(i) for i in range(12)]
    names = sorted({item.meta["label"] for item in items})
    logits = (
        model.embed_images([i.image for i in items])
        @ zero_shot_weights(model, names, ["a {}", "{} square"]).T
    )
    labels = torch.tensor([names.index(item.meta["label"]) for item in items])
    rows = {row.metric: row for row in outcome.rows}
    assert rows["acc1"].value == pytest.approx(ranking.top_k_accuracy(logits, labels, 1))
    assert rows["acc5"].value == pytest.approx(ranking.top_k_accuracy(logits, labels, 5))
    assert rows["mean_per_class_recall"].value == pytest.approx(
        ranking.mean_per_class_recall(logits, labels)
    )
    assert outcome.rows[0].metric == "acc1"
    assert [row.chance for row in outcome.rows] == [1 / 6, 5 / 6, 1 / 6]
    assert {row.n for row in outcome.rows} == {12}
    assert all(0 <= row.ci95[0] <= row.value <= row.ci95[1] <= 1 for row in outcome.rows)


def test_zero_shot_details_show_every_sample(source):
    details = classification.zero_shot(source).details
    assert [s["key"] for s in details["samples"]][:2] == ["0-red", "0-green"]
    first = details["samples"][0]
    assert first["truth"] == "red"
    assert len(first["top"]) == 5
    assert sum(p for _, p in first["top"]) <= 1.001
    wrong = sum(s["top"][0][0] != s["truth"] for s in details["samples"])
    assert sum(c["count"] for c in details["confusions"]) == wrong
    assert list(details["skipped"].values()) == [1]


def test_class_names_may_be_more_than_the_data_has(source):
    names = ["red", "green", "blue", "yellow", "black", "white", "pink", "brown"]
    outcome = classification.zero_shot(source, class_names=names)
    assert outcome.rows[0].chance == 1 / 8
    assert outcome.details["class_names"] == names


def test_a_label_that_is_no_class_is_named(source):
    with pytest.raises(ConfigError, match=r"5 labels of the data .* 'black', 'blue'"):
        classification.zero_shot(source, class_names=["red", "rouge"])


def test_a_field_that_no_sample_has_is_named_with_those_there_are(source):
    with pytest.raises(DataError, match="'lable'; its fields are: artist, concept, label"):
        classification.zero_shot(source, label="lable")


def test_a_class_may_be_given_by_its_number():
    items = [Item("a", (), {"cls": 1}), Item("b", (), {"cls": "cat"}), Item("c", (), {})]
    assert classification.true_names(items, "cls", ["cat", "dog"]) == ["dog", "cat", None]


def test_class_ranks_do_not_depend_on_the_chunk(monkeypatch):
    features, weights, labels = torch.randn(7, 4), torch.randn(5, 4), torch.arange(7) % 5
    whole = classification.class_ranks(features, weights, labels)
    monkeypatch.setattr(classification, "_CHUNK", 3)
    assert torch.equal(classification.class_ranks(features, weights, labels), whole)


def test_retrieval_equals_a_loop_over_all_pairs(model, source):
    """Written from the protocol: any right answer counts, and ties go against the model."""
    samples = [source.dataset.read(i) for i in range(12)]
    texts = sorted({text for sample in samples for text in sample.captions})
    similarity = model.embed_images([s.image for s in samples]) @ model.embed_texts(texts).T

    def rank(scores, right):
        best = max(scores[i] for i in right)
        return sum(s >= best for i, s in enumerate(scores) if i not in right)

    text_ranks = [
        rank(similarity[:, j].tolist(), {i for i, s in enumerate(samples) if text in s.captions})
        for j, text in enumerate(texts)
    ]
    image_ranks = [
        rank(similarity[i].tolist(), {j for j, text in enumerate(texts) if text in s.captions})
        for i, s in enumerate(samples)
    ]
    outcome = retrieval.retrieval(source)
    rows = {row.metric: row for row in outcome.rows}
    assert outcome.rows[0].metric == "text_to_image_recall@10"
    # Pictures of one colour are equal: a rounding error apart, their ranks may swap by one place.
    for k in (1, 5, 10):
        for name, ranks in (("text_to_image", text_ranks), ("image_to_text", image_ranks)):
            expected = sum(r < k for r in ranks) / len(ranks)
            assert rows[f"{name}_recall@{k}"].value == pytest.approx(expected, abs=2.1 / len(ranks))
    assert rows["text_to_image_recall@1"].n == 18  # 6 shared by both artists, 12 of one
    assert rows["image_to_text_recall@1"].n == 12
    hits = [1 - math.comb(12 - p, 5) / math.comb(12, 5) for p in [2] * 6 + [1] * 12]
    assert rows["text_to_image_recall@5"].chance == pytest.approx(sum(hits) / 18)


def test_retrieval_details_show_queries_and_hits(source):
    details = retrieval.retrieval(source).details
    assert len(details["text_to_image"]) == 18
    query = details["text_to_image"][0]
    assert query["query"] == "a red square"
    assert query["right"] == ["0-red", "1-red"]
    assert len(query["hits"]) == 10
    right = {hit["target"] for hit in query["hits"] if hit["right"]}
    assert right == {"0-red", "1-red"} & {hit["target"] for hit in query["hits"]}
    assert query["rank"] >= 1
    assert details["image_to_text"][0]["query"] == "0-red"


def test_caption_scores_what_the_model_says(model, source):
    outcome = caption(source)
    samples = outcome.details["samples"]
    pictures = [source.dataset.read(i).image for i in range(12)]
    assert [s["generated"] for s in samples] == model.caption(pictures)
    f1 = [token_f1(s["generated"], s["references"]) for s in samples]
    assert outcome.rows[0].metric == "token_f1"
    assert outcome.rows[0].value == pytest.approx(sum(f1) / 12)
    # "a red square" for every picture: 1 for the two red ones, 2/3 for the ten others.
    assert outcome.rows[0].chance == pytest.approx((2 + 10 * 2 / 3) / 12)
    assert outcome.rows[1].chance == pytest.approx(2 / 12)


def test_the_protocol_changes_with_what_was_measured_and_with_nothing_else(model, source, shards):
    again = Source(model, open_shards(str(shards)), log=lambda _: None)
    simple = classification.zero_shot(source).protocol
    assert len(simple) == 16
    assert classification.zero_shot(again).protocol == simple
    others = {
        classification.zero_shot(source, templates="none").protocol,
        classification.zero_shot(source, label="concept").protocol,
        retrieval.retrieval(source).protocol,
        caption(source).protocol,
        caption(source, prompt="a").protocol,
    }
    assert len({simple, *others}) == 6


def test_pictures_of_one_concept_are_one_cluster(source):
    # With six concepts of two equal pictures each, the interval is that of six independent samples.
    from vlm.eval.statistics import mean_interval

    outcome = classification.zero_shot(source)
    hits = [s["top"][0][0] == s["truth"] for s in outcome.details["samples"]]
    assert outcome.rows[0].ci95 == mean_interval(hits, [*range(6)] * 2)


def test_pictures_are_embedded_once_for_all_tasks(model, shards, monkeypatch):
    source = Source(model, open_shards(str(shards)), log=lambda _: None)
    calls = []
    encode = model.encode_pixels
    monkeypatch.setattr(model, "encode_pixels", lambda images: calls.append(1) or encode(images))
    classification.zero_shot(source)
    retrieval.retrieval(source)
    assert calls == [1]
