import math

import numpy as np
import pytest
import torch

from vlm.data.dataset import open_shards
from vlm.errors import ConfigError, DataError
from vlm.eval import classification, retrieval
from vlm.eval.captions import caption
from vlm.eval.source import Source
from vlm.heads.zero_shot import zero_shot_weights
from vlm.metrics import ranking
from vlm.metrics.bleu import bleu, bleu_counts
from vlm.metrics.cider import CiderD
from vlm.metrics.rouge import rouge_l
from vlm.metrics.words import token_f1


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
    assert [row.chance for row in outcome.rows[:3]] == [1 / 6, 5 / 6, 1 / 6]
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


CAPTION_METRICS = [
    *("token_f1", "exact_match", "cider_d", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"),
    *("clip_score", "distinct_1", "distinct_2", "length"),
]


@pytest.fixture
def describing(model, shards, monkeypatch):
    """Captions a source as told, a caption for each of its 12 pictures, whatever they show."""

    def describing(texts):
        texts = iter(texts)
        monkeypatch.setattr(
            model, "caption_pixels", lambda images, **_: [next(texts) for _ in range(len(images))]
        )
        return caption(Source(model, open_shards(str(shards)), log=lambda _: None))

    return describing


COLOURS = ["red", "green", "blue", "yellow", "black", "white"] * 2


def test_caption_metrics_equal_those_of_the_words_themselves(model, source, describing):
    said = [f"a {colour} square" if n % 3 else "a red dog" for n, colour in enumerate(COLOURS)]
    outcome = describing(said)
    rows = {row.metric: row for row in outcome.rows}
    assert list(rows) == CAPTION_METRICS
    assert {row.n for row in outcome.rows} == {12}
    references = [[c.split() for c in source.dataset.read(i).captions] for i in range(12)]
    tokens = [text.split() for text in said]
    pairs = list(zip(tokens, references, strict=True))
    cider = CiderD(references).scores(tokens)
    assert rows["cider_d"].value == pytest.approx(cider.mean())
    assert [sample["cider_d"] for sample in outcome.details["samples"]] == pytest.approx(cider)
    expected = bleu(np.sum([bleu_counts(*pair) for pair in pairs], 0))
    assert [rows[f"bleu_{n}"].value for n in (1, 2, 3, 4)] == pytest.approx(expected)
    assert rows["rouge_l"].value == pytest.approx(np.mean([rouge_l(*pair) for pair in pairs]))
    # a, square, dog, and six colours but for the red square's: red is there all the same
    num_words = len({word for words in tokens for word in words})
    assert rows["distinct_1"].value == pytest.approx(num_words / 36)
    assert rows["length"].value == 3
    for row in outcome.rows:
        low, high = row.ci95
        assert low <= row.value <= high, row.metric


def test_clip_score_compares_each_caption_with_its_own_picture(
    model, source, describing, monkeypatch
):
    images = model.embed_images([source.dataset.read(i).image for i in range(12)])

    def embed_texts(texts):  # a colour's words are where its picture is
        words = [text.split()[1] for text in texts]
        return torch.stack([images[COLOURS.index(w) if w in COLOURS else 0] for w in words])

    monkeypatch.setattr(model, "embed_texts", embed_texts)
    said = [f"a {colour} square" for colour in [*COLOURS[:6], *["black"] * 6]]
    outcome = describing(said)
    expected = [2.5] * 6 + (2.5 * images[6:] @ images[4]).tolist()
    assert min(expected) < 2.49
    found = [sample["clip_score"] for sample in outcome.details["samples"]]
    assert found == pytest.approx(expected, abs=1e-5)


def test_chance_is_what_a_constant_caption_reaches(describing):
    outcome = describing(["a red square"] * 12)
    rows = {row.metric: row for row in outcome.rows}
    for name in ("token_f1", "cider_d", "bleu_1", "bleu_2", "bleu_3", "rouge_l", "clip_score"):
        assert rows[name].value <= rows[name].chance + 1e-6, name
    assert outcome.details["best_constant"].endswith(" square")
    for name in ("token_f1", "distinct_1", "distinct_2", "length"):
        assert rows[name].value == pytest.approx(rows[name].chance), name
    assert outcome.details["constants"]["bleu_1"].startswith("a ")
    # People's first captions: six colours, "a" and "square" in 36 words.
    assert outcome.details["people"]["distinct_1"] == pytest.approx(8 / 36)
    assert outcome.details["people"]["length"] == 3


def test_right_captions_reach_the_highest_scores(describing):
    rows = {row.metric: row for row in describing([f"a {c} square" for c in COLOURS]).rows}
    for name in ("token_f1", "exact_match", "bleu_1", "bleu_3", "rouge_l"):
        assert rows[name].value == pytest.approx(1.0), name
    assert rows["cider_d"].value > 2 * rows["cider_d"].chance
    assert rows["cider_d"].ci95[0] > rows["cider_d"].chance


def test_captions_without_a_word_score_0(describing):
    rows = {row.metric: row for row in describing([""] * 12).rows}
    for name in ("token_f1", "cider_d", "bleu_1", "bleu_4", "rouge_l", "distinct_1", "length"):
        assert rows[name].value == pytest.approx(0.0, abs=1e-9), name
        assert rows[name].ci95 == pytest.approx((0.0, 0.0), abs=1e-9), name


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
