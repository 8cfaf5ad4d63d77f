"""Retrieval: which captions are queries, what answers them, and the field's own figures."""

import pytest
import torch
from clip_benchmark.metrics import zeroshot_retrieval
from torch.nn.functional import normalize

from vlm.data.dataset import open_shards
from vlm.errors import ConfigError, DataError
from vlm.eval.caption_table import read_caption_table
from vlm.eval.retrieval import number_captions, ranks_of, retrieval, retrieval_rows
from vlm.eval.source import Source
from vlm.eval.suite import evaluate, load_suite

CAPTIONS = [("A  Dog", "pet"), ("a dog", "a dog", "brown"), (), ("pet",)]


@pytest.fixture
def source(model, shards):
    return Source(model, open_shards(str(shards)), log=lambda _: None)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "names.tsv"
    path.write_text("concept\tde\tfr\nred\trot\trouge\ngreen\tgrün\tvert\nblue\tblau\t\n")
    return path


def test_equal_captions_are_one_query_that_all_their_pictures_answer(model):
    captions = number_captions(CAPTIONS, model.tokenizer)
    assert captions.texts == ["a dog", "pet", "brown"]
    assert captions.pairs.T.tolist() == [[0, 0], [1, 0], [0, 1], [2, 1], [1, 3]]


def test_kept_captions_are_a_query_each_that_their_own_picture_answers(model):
    captions = number_captions(CAPTIONS, model.tokenizer, "keep")
    assert captions.texts == ["A  Dog", "pet", "a dog", "a dog", "brown", "pet"]
    assert captions.pairs.T.tolist() == [[0, 0], [1, 0], [2, 1], [3, 1], [4, 1], [5, 3]]


@pytest.mark.parametrize("equal", ["merge", "keep"])
def test_no_captions_at_all_is_an_error(model, equal):
    with pytest.raises(DataError, match="no picture has a caption"):
        number_captions([(), ()], model.tokenizer, equal)


class Saved:
    """A model whose features are there already."""

    def encode_image(self, features):
        return features

    encode_text = encode_image


@pytest.mark.parametrize("num_texts", [600, 500])
def test_figures_are_those_of_clip_benchmark(model, num_texts):
    """Its own function, on the same features; three to five captions a picture, 600 in all."""
    images = torch.randn(150, 16)
    numbers = iter(range(600))
    of_pictures = [
        tuple(f"caption {next(numbers) * 7 % num_texts}" for _ in range(3 + i % 3))
        for i in range(150)
    ]
    features = {text: torch.randn(16) for texts in of_pictures for text in texts}
    for picture, texts in zip(images, of_pictures, strict=True):
        for text in texts:
            features[text] = features[text] + picture / 2  # so that there is something to find
    theirs = zeroshot_retrieval.evaluate(
        Saved(),
        [(images[i : i + 32], of_pictures[i : i + 32]) for i in range(0, 150, 32)],
        lambda texts: torch.stack([features[text] for text in texts]),
        "cpu",
        amp=False,
        recall_k_list=[1, 5, 10],
    )
    captions = number_captions(of_pictures, model.tokenizer, "keep")
    texts = normalize(torch.stack([features[text] for text in captions.texts]), dim=1)
    ranks = ranks_of(texts, normalize(images, dim=1), captions.pairs, device=torch.device("cpu"))
    rows = {r.metric: r for r in retrieval_rows(*ranks, captions.pairs, range(150))}
    assert rows["text_to_image_recall@1"].n == 600
    for k in (1, 5, 10):
        forth, back = (
            rows[f"{way}_recall@{k}"].value for way in ("text_to_image", "image_to_text")
        )
        assert forth == pytest.approx(theirs[f"image_retrieval_recall@{k}"], abs=1e-6)
        # Equal captions of two pictures tie: that counts against the model; there, topk decides.
        above = theirs[f"text_retrieval_recall@{k}"] - back
        assert abs(above) < 1e-6 if num_texts == 600 else -1e-6 < above < 0.2
        assert 0.02 < min(forth, back) < max(forth, back) < 0.98


def test_captions_from_a_table_are_found_by_a_field(source, table):
    outcome = retrieval(source, table=read_caption_table(table, key="concept", column="de"))
    rows = {row.metric: row for row in outcome.rows}
    assert [q["query"] for q in outcome.details["text_to_image"]] == ["rot", "grün", "blau"]
    assert outcome.details["text_to_image"][0]["right"] == ["0-red", "1-red"]
    assert rows["text_to_image_recall@1"].n == 3
    assert rows["image_to_text_recall@1"].n == 6  # black, white and yellow have no name
    assert rows["text_to_image_recall@1"].chance == pytest.approx(2 / 12)
    french = retrieval(source, table=read_caption_table(table, key="concept", column="fr"))
    assert french.rows[0].n == 2  # an empty cell is no caption


def test_each_choice_of_captions_is_a_protocol_of_its_own(source, table):
    choices = [
        {},
        {"equal_captions": "keep"},
        {"table": read_caption_table(table, key="concept", column="de")},
        {"table": read_caption_table(table, key="concept", column="fr")},
    ]
    protocols = [retrieval(source, **choice).protocol for choice in choices]
    assert len(set(protocols)) == 4
    table.write_text(table.read_text().replace("rot", "Rot"))
    again = read_caption_table(table, key="concept", column="de")
    assert retrieval(source, table=again).protocol not in protocols


def test_rows_of_one_key_are_captions_of_the_same_pictures(tmp_path):
    path = tmp_path / "names.jsonl"
    path.write_text('{"id": 7, "text": ["a", "b"]}\n{"id": 7, "text": "c"}\n{"text": "d"}\n')
    assert read_caption_table(path, key="id", column="text").captions == {"7": ("a", "b", "c")}


@pytest.mark.parametrize(
    ("name", "column", "kind", "problem"),
    [
        ("no.tsv", "de", ConfigError, r"no\.tsv: no such file"),
        ("names.txt", "de", ConfigError, r"names\.txt: not a table; give one of \.csv"),
        ("names.tsv", "d", ConfigError, r'has no column "d"; did you mean de\?'),
        ("bad.tsv", "de", DataError, r"bad\.tsv: 1 row\.cells: line 2 has 1 cells"),
    ],
)
def test_a_wrong_table_is_named(table, name, column, kind, problem):
    (table.parent / "names.txt").touch()
    (table.parent / "bad.tsv").write_text("concept\tde\nred\n")
    with pytest.raises(kind, match=problem):
        read_caption_table(table.parent / name, key="concept", column=column)


def test_a_suite_names_the_table_and_the_protocol(model, shards, table, tmp_path):
    path = tmp_path / "suite.yaml"
    where = f"captions: {{table: {table}, key: concept, column: de}}"
    path.write_text(
        f"tasks:\n- {{task: retrieval, split: de, data: {shards}, {where}}}\n"
        f"- {{task: retrieval, split: kept, data: {shards}, equal_captions: keep}}\n"
    )
    results = evaluate(model, path, log=lambda _: None)
    n = {(row["split"], row["metric"]): row["n"] for row in results}
    assert n["de", "text_to_image_recall@10"] == 3
    assert n["kept", "text_to_image_recall@10"] == 24


@pytest.mark.parametrize(
    ("captions", "problem"),
    [
        ("{table: a.tsv, key: b}", "needs `captions.column:`"),
        ("{table: a.tsv, key: b, column: c, colum: d}", "captions has no key 'colum'"),
        ("a.tsv", r"captions \('a.tsv'\)"),
    ],
)
def test_a_wrong_table_setting_is_named(tmp_path, captions, problem):
    path = tmp_path / "suite.yaml"
    path.write_text(f"tasks: [{{task: retrieval, split: a, data: d, captions: {captions}}}]")
    with pytest.raises(ConfigError, match=problem):
        load_suite(path)


def test_the_suite_of_locales_has_every_column_of_its_table(monkeypatch):
    tasks = load_suite("configs/suites/emoji_locales.yaml")
    assert len(tasks) == 28
    for task in tasks:
        place = task.captions
        assert task.split == f"val_artist-{place.column}"
        assert (
            len(read_caption_table(place.table, key=place.key, column=place.column).captions) == 861
        )
